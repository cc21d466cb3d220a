"""Stage preprocess: each samples file to one packed shard.

A shard is a directory with the six files of Megatron's indexed format, its manifest and, where samples were rejected,
`rejects.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from rich.markup import escape

from openpangu_sft.artefact import MANIFEST, Manifest, read_manifest, sha256_of, staged_directory
from openpangu_sft.chat_format import TEMPLATE_DIGEST
from openpangu_sft.dataset.encode import Rejected, encode_all
from openpangu_sft.dataset.indexed import PackedWriter
from openpangu_sft.dataset.packing import plan_packs
from openpangu_sft.dataset.spool import Spool
from openpangu_sft.errors import UserError
from openpangu_sft.progress import progress
from openpangu_sft.recipe import Recipe
from openpangu_sft.sources.reader import READERS, read_records
from openpangu_sft.tokenizer import IGNORED, Tokenizer, tokenizer_digest

PREFIX = "data"
"""Of the files in a shard and in a dataset: Megatron's --data-path is directory/data."""

REJECTS = "rejects.jsonl"
SUFFIX = ".jsonl"
"""Of samples files."""


def run_preprocess(recipe: Recipe) -> list[Manifest]:
    """Stage preprocess: `paths.samples` to `paths.shards`, one shard per file; shards of files that are gone go too.

    Raises:
        UserError: nothing to read, a bad sample (unless data.on_bad_sample is skip), or no sample is left.
    """
    files = sample_files(recipe)
    require_tokenizer(recipe)
    tokenizer = Tokenizer(recipe.path("hf"), recipe.tokenizer.trust_remote_code)
    if len(tokenizer) > recipe.model.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, model.vocab_size is {recipe.model.vocab_size}",
            where=recipe.path("hf"),
            remedy="check model.vocab_size",
        )
    manifests = [_make_shard(recipe, tokenizer, file) for file in files]
    for path in shard_directories(recipe.path("shards")):
        if path.name not in {file.stem for file in files}:
            _remove_shard(path)
    return manifests


def sample_files(recipe: Recipe) -> list[Path]:
    """The samples files of a recipe, sorted by name.

    Raises:
        UserError: there is none, one cannot be used, or `make format` left them and one has changed in size since.
    """
    path = recipe.path("samples")
    if not path.exists():
        raise UserError("no such directory", where=path, remedy="run make format, or put samples (jsonl) there")
    if (path / MANIFEST).is_file():
        read_manifest(path, "samples", "run make format again")
    inside = [entry for entry in path.iterdir() if entry.name != MANIFEST] if path.is_dir() else [path]
    known = [entry for entry in inside if entry.suffix.lower() in READERS and not entry.name.startswith(".")]
    for entry in known:
        if entry.suffix != SUFFIX:
            raise UserError(f"is not a {SUFFIX} file", where=entry, remedy="run make format on it, or move it away")
        if not entry.is_file():
            raise UserError("is no regular file, or a link to nowhere", where=entry, remedy="move it away")
        try:
            entry.name.encode("utf-8")
        except UnicodeEncodeError:  # no manifest can hold it
            raise UserError(f"the name {entry.name!a} is not UTF-8", where=path, remedy="rename it") from None
    if not known:
        raise UserError(f"no {SUFFIX} files here", where=path, remedy="run make format, or put samples there")
    return sorted(known)


def shard_directories(directory: Path) -> list[Path]:
    """The shards that preprocess has left in a directory, sorted by name. Whatever else lies there is not listed."""
    found: list[Path] = []
    for path in sorted(manifest.parent for manifest in directory.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(UserError):
            read_manifest(path, "shard", "")
            found.append(path)
    return [path for path in found if not path.name.startswith(".")]


def data_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that shape tokens and packs: recorded by preprocess, required by merge and sft."""
    return {
        "data.seq_length": recipe.data.seq_length,
        "data.seed": recipe.data.seed,
        "data.on_bad_sample": recipe.data.on_bad_sample,
        "template": TEMPLATE_DIGEST,
        "tokenizer": tokenizer_digest(recipe.path("hf")),
    }


def require_tokenizer(recipe: Recipe) -> None:
    """Raises `UserError` unless the directory of the Hugging Face checkpoint is there."""
    if not recipe.path("hf").is_dir():
        raise UserError("no such directory", where=recipe.path("hf"), remedy="put the Hugging Face checkpoint there")


def _remove_shard(path: Path) -> None:
    own = {MANIFEST, *read_manifest(path, "shard", "").files}
    for entry in sorted(path.iterdir()):
        if entry.name not in own:
            what = "lies in the shard of a samples file that is gone, and would be removed with it"
            raise UserError(what, where=entry, remedy="move it away")
    leaving = path.with_name(f".{path.name}.staging")  # under this name nobody takes what is left for a shard
    shutil.rmtree(leaving, ignore_errors=True)
    shutil.rmtree(path.rename(leaving))


def _make_shard(recipe: Recipe, tokenizer: Tokenizer, file: Path) -> Manifest:
    seq_length = recipe.data.seq_length
    manifest = Manifest("shard", settings=data_settings(recipe), inputs={file.name: sha256_of(file)})
    with staged_directory(recipe.path("shards") / file.stem, manifest) as staging:
        spool = Spool(staging / "spool")
        trained, rejected = _encode_file(recipe, tokenizer, file, spool, staging / REJECTS)
        lengths = spool.finish()
        if not lengths.size:
            raise UserError("no sample is left to train on", where=file, remedy="look at the data")
        packs = plan_packs(lengths.tolist(), seq_length, recipe.data.seed)
        writer = PackedWriter(staging, PREFIX, seq_length, tokenizer.pad_id)
        with progress(f"writing {escape(file.name)}", len(packs)) as advance:
            for pack in packs:
                writer.write((spool[number] for number in pack), IGNORED)
                advance(1, "")
        writer.close()
        spool.remove()
        manifest.counts = {
            "read": lengths.size + rejected,
            "packed": int(lengths.size),
            "rejected": rejected,
            "packs": writer.rows,
            "tokens": int(lengths.sum()),
            "trained_tokens": trained,
        }
    return manifest


def _encode_file(recipe: Recipe, tokenizer: Tokenizer, file: Path, spool: Spool, rejects: Path) -> tuple[int, int]:
    """Encodes a file into the spool; returns the number of trained tokens and of rejected samples."""
    trained = rejected = position = 0
    outcomes = encode_all(read_records(file), tokenizer, recipe.data.seq_length, recipe.data.workers)
    with progress(f"encoding {escape(file.name)}", file.stat().st_size) as advance, contextlib.closing(outcomes):
        for end, outcome in outcomes:
            if isinstance(outcome, Rejected):
                if recipe.data.on_bad_sample == "refuse":
                    where = f"{file}{outcome.place}"
                    raise UserError(outcome.reason, where=where, remedy="mend it, or set data.on_bad_sample=skip")
                rejected += 1
                entry = {"file": file.name, **outcome._asdict(), "place": outcome.place.lstrip(":")}
                with rejects.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
            else:
                trained += int((outcome.labels != IGNORED).sum())
                spool.append(outcome)
            advance(end - position, "")
            position = end
    return trained, rejected
