"""Stage merge: the shards of all input files, in the order of their names, to the one dataset that training reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.markup import escape

from openpangu_sft.artefact import Manifest, read_manifest, require_apart, require_settings, sha256_of, staged_directory
from openpangu_sft.dataset.indexed import FIELDS, field_path, write_index
from openpangu_sft.dataset.preprocess import (
    PREFIX,
    data_settings,
    require_tokenizer,
    sample_files,
    shard_directories,
)
from openpangu_sft.errors import UserError
from openpangu_sft.progress import progress
from openpangu_sft.recipe import Recipe

SUMMED = ("read", "packed", "rejected", "packs", "tokens", "trained_tokens")


def run_merge(recipe: Recipe) -> Manifest:
    """Stage merge: `paths.shards` to `paths.dataset`.

    The inputs are the shards of the recipe's samples files and nothing else, so the result can never become an input.

    Raises:
        UserError: a shard is missing, is left over, is older than its samples or was made with other settings.
    """
    source, target, seq_length = recipe.path("shards"), recipe.path("dataset"), recipe.data.seq_length
    require_apart("paths.shards", source, "paths.dataset", target)
    require_tokenizer(recipe)
    settings = data_settings(recipe)
    files = sample_files(recipe)
    left_over = {path.name for path in shard_directories(source)} - {file.stem for file in files}
    if left_over:
        raise UserError("its samples file is gone", where=source / min(left_over), remedy="run make preprocess again")
    shards: list[tuple[Path, Manifest]] = []
    for file in files:
        directory = source / file.stem
        shard = read_manifest(directory, "shard", "run make preprocess")
        require_settings(directory, shard.settings, settings, "run make preprocess again")
        if shard.inputs != {file.name: sha256_of(file)}:
            raise UserError("made from another content of " + file.name, where=directory, remedy="run make preprocess")
        shards.append((directory, shard))

    manifest = Manifest("dataset", settings, {directory.name: shard.digest for directory, shard in shards})
    manifest.counts = {name: sum(shard.counts[name] for _, shard in shards) for name in SUMMED}
    steps = progress("merge", len(FIELDS) * len(shards))
    with staged_directory(target, manifest) as staging, steps as advance:
        for field in FIELDS:
            with field_path(staging, PREFIX, field, "bin").open("wb") as merged:
                for directory, _ in shards:
                    with field_path(directory, PREFIX, field, "bin").open("rb") as stream:
                        shutil.copyfileobj(stream, merged, 1 << 20)
                    advance(1, escape(directory.name))
            write_index(field_path(staging, PREFIX, field, "idx"), manifest.counts["packs"], seq_length)
    return manifest
