"""Stage preprocess: samples files to packed shards, one per file.

A shard is a directory with the six files of Megatron's indexed format, roles, its manifest and, where samples were left
out, `rejects.jsonl`. With `--shard 3/16` the inputs are divided into 16 equal parts, and only the third is made.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, read_manifest, require_settings, staged_directory
from openpangu_sft.artifacts.checks import stamps_of, unchanged
from openpangu_sft.conversations.conversation import Rules, parse_sample
from openpangu_sft.conversations.files import RawFile, require_usable, suffix_of
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.conversations.opening import UTF8, open_raw
from openpangu_sft.dataset.index_file import PREFIX, roles_path
from openpangu_sft.dataset.shard import write_shard
from openpangu_sft.dataset.spans import Part, Span, parts_of, read_span, sha256_of_span, spans_of
from openpangu_sft.recipe.data import Data
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.remote_code import Trust
from openpangu_sft.tokenizer.template import TEMPLATE_DIGEST, TextSpan, sample_spans
from openpangu_sft.tokenizer.tokenizer import Tokenizer, tokenizer_digest
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError

SUFFIX = ".jsonl"  # of samples files

PLACES, SAMPLES = 8, 128
"""Where and how many samples are compared with the tokenizer's class before SentencePiece is used alone: at most."""

COMPARED = 20_000  # characters of a text that are compared at most: the class takes 12 s for one of 4 MB


class Shard(NamedTuple):
    """A finished shard, and whether this run made it; if not, an earlier one did, from the same inputs and settings."""

    part: Part
    manifest: Manifest
    made: bool


def run_preprocess(recipe: Recipe, number: int = 1, parts: int = 1) -> list[Shard]:
    """Stage preprocess: `paths.samples` to `paths.shards`, those of one part; the first also removes shards of no part.

    Raises `UserError` where there is nothing to read, for a bad sample (unless data.on_bad_sample is skip), or if no
    sample is left.
    """
    files = sample_files(recipe.path("samples"))
    settings = data_settings(recipe)
    all_parts = parts_of(files, parts)
    mine = [part for part in all_parts if parts == 1 or part.part == f"{number}/{parts}"]
    tokenizer: Optional[Tokenizer] = None
    shards = []
    for part in mine:
        before = stamps_of([part.span.file])  # before its sum is taken
        manifest = Manifest("shard", {**settings, "shard": part.part}, {part.source: sha256_of_span(part.span)})
        if found := _unchanged(recipe.path("shards") / part.name, manifest):
            shards.append(Shard(part, found, made=False))
            continue
        if not tokenizer:
            trusted, spans = recipe.tokenizer.trust_remote_code, [part.span for part in mine]
            tokenizer = open_tokenizer(recipe.path("hf"), trusted, spans, recipe.data)
            if len(tokenizer) > recipe.model.vocab_size:
                what = f"the tokenizer has {len(tokenizer)} tokens, model.vocab_size is {recipe.model.vocab_size}"
                raise UserError(what, where=recipe.path("hf"), remedy="check model.vocab_size")
        with staged_directory(recipe.path("shards") / part.name, manifest) as staging, unchanged(before):
            manifest.counts = write_shard(recipe.data, tokenizer, [part.span], staging)
        shards.append(Shard(part, manifest, made=True))
    if number == 1:
        for path, shard in shard_directories(recipe.path("shards")).items():
            if path.name not in {part.name for part in all_parts}:
                _remove_shard(path, shard)
    return shards


def _unchanged(directory: Path, wanted: Manifest) -> Optional[Manifest]:
    """The manifest of an existing shard that would be made the same again; those of 0.5.0 have no roles."""
    try:
        found = read_manifest(directory, "shard", "")
    except UserError:
        return None
    same = (found.settings, found.inputs, found.version) == (wanted.settings, wanted.inputs, wanted.version)
    return found if same and roles_path(Path(), PREFIX).name in found.files else None


def open_tokenizer(directory: Path, trust_remote_code: Trust, spans: Sequence[Span], data: Data) -> Tokenizer:
    """Loads a tokenizer, which uses SentencePiece directly where some of the samples get the same ids."""
    tokenizer = Tokenizer(directory, trust_remote_code)
    if reason := tokenizer.go_direct(list(_spans_to_compare(spans, Rules(data)))):
        say(f"tokenizer: its class is used, which is slower: {reason}")
    return tokenizer


def _spans_to_compare(spans: Sequence[Span], rules: Rules) -> Iterator[TextSpan]:
    """Text spans of samples from all over the inputs."""
    pieces = [piece for span in spans for piece in spans_of(span, 1)]
    places = pieces[:: len(pieces) // PLACES + 1]
    for place in places:
        for raw in islice(filter(None, read_span(place)), SAMPLES // len(places)):
            with contextlib.suppress(BadSample):  # reported when it is encoded
                texts = sample_spans(parse_sample(raw.content, rules))
                yield from (text._replace(text=text.text[:COMPARED]) for text in texts)


def sample_files(path: Path) -> list[Path]:
    """The samples files in a directory, or one by itself, sorted by name.

    Raises `UserError` for none, one that cannot be used, or one that has changed in size since `make format`.
    """
    if not path.exists():
        raise UserError("no such directory", where=path, remedy="run make format, or put samples (jsonl) there")
    if (path / MANIFEST).is_file():
        read_manifest(path, "samples", "run make format again")
    inside = [entry for entry in path.iterdir() if entry.name != MANIFEST] if path.is_dir() else [path]
    known = [entry for entry in inside if suffix_of(entry) and not entry.name.startswith(".")]
    for entry in known:
        if entry.suffix != SUFFIX:
            raise UserError(f"is not a {SUFFIX} file", where=entry, remedy="run make format on it, or move it away")
        require_usable(RawFile(entry, entry.name))
        with open_raw(entry, UTF8):  # refuses what looks like another encoding
            pass
    if not known:
        raise UserError(f"no {SUFFIX} files here", where=path, remedy="run make format, or put samples there")
    return sorted(known)


def shard_directories(directory: Path) -> dict[Path, Manifest]:
    """The shards in a directory, sorted by name; nothing else is listed."""
    found: dict[Path, Manifest] = {}
    for path in sorted(manifest.parent for manifest in directory.glob(f"[!.]*/{MANIFEST}")):
        with contextlib.suppress(UserError):
            found[path] = read_manifest(path, "shard", "")
    return found


def shard_of(part: Part, directory: Path, settings: dict[str, Any]) -> Manifest:
    """The manifest of a part's shard; `UserError` where it is missing, outdated, or made with other settings."""
    again = f"run make preprocess SHARD={part.part}" if part.part else "run make preprocess"
    if part.part and not directory.exists():
        raise UserError(f"part {part.part} is missing: no such shard", where=directory, remedy=again)
    shard = read_manifest(directory, "shard", again)
    require_settings(directory, shard.settings, {**settings, "shard": part.part}, f"{again} again")
    if roles_path(directory, PREFIX).name not in shard.files:
        raise UserError("was made by an earlier version and holds no roles", where=directory, remedy=again)
    if shard.inputs != {part.source: sha256_of_span(part.span)}:
        raise UserError(f"made from another content of {part.span.file.name}", where=directory, remedy=again)
    return shard


def data_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that shape tokens and packs: recorded by preprocess, required by merge and sft."""
    keys = ("seq_length", "seed", "on_bad_sample", "control_tokens", "too_long", "validation_share", "turns")
    shaping = (*keys, "thinking", "train_on", "tool_prompt", "ignore_keys")
    data = {f"data.{key}": getattr(recipe.data, key) for key in shaping}
    return {**data, "template": TEMPLATE_DIGEST, "tokenizer": tokenizer_digest(recipe.path("hf"))}


def _remove_shard(path: Path, shard: Manifest) -> None:
    for entry in sorted(path.iterdir()):
        if entry.name not in (MANIFEST, *shard.files):
            what = "lies in the shard of a samples file that is gone, and would be removed with it"
            raise UserError(what, where=entry, remedy="move it away")
    leaving = path.with_name(f".{path.name}.staging")  # under this name nothing takes it for a shard
    shutil.rmtree(leaving, ignore_errors=True)
    shutil.rmtree(path.rename(leaving))
