"""Stage merge: the shards of all parts of the inputs, in their order, to the one dataset that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openpangu_sft.artifacts.artifact import Manifest, read_manifest, require_settings, staged_directory, sum_counts
from openpangu_sft.artifacts.checks import require_apart
from openpangu_sft.dataset.index_file import PREFIX, VALIDATION
from openpangu_sft.dataset.join import join_shards
from openpangu_sft.dataset.preprocess import data_settings, sample_files, shard_directories
from openpangu_sft.dataset.roles import AGAIN, roles_path
from openpangu_sft.dataset.spans import Part, parts_of, sha256_of_span
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import console
from openpangu_sft.util.errors import UserError


def run_merge(recipe: Recipe) -> Manifest:
    """Stage merge: `paths.shards` to `paths.dataset`, in the order of the samples files.

    Raises `UserError` where a shard is missing, belongs to no samples, is outdated or was made with other settings; or
    where all samples fall into the validation split, or none where some were to.
    """
    source, target = recipe.path("shards"), recipe.path("dataset")
    require_apart("paths.shards", source, "paths.dataset", target)
    settings = data_settings(recipe)
    files = sample_files(recipe.path("samples"))
    present = shard_directories(source)
    parts = parts_of(files, _divided_into(present, source))
    if left_over := {path.name for path in present} - {part.name for part in parts}:
        remedy = "remove it, or run make preprocess again"
        raise UserError("belongs to no samples file as they are now", where=source / min(left_over), remedy=remedy)
    shards = {source / part.name: _shard_of(part, source / part.name, settings) for part in parts}
    manifest = Manifest("dataset", settings, {directory.name: shard.digest for directory, shard in shards.items()})
    manifest.counts = sum_counts([shard.counts for shard in shards.values()])
    splits = {PREFIX: manifest.counts}
    if recipe.data.validation_share:
        splits[VALIDATION] = manifest.counts["validation"]
    for prefix, counts in splits.items():
        if not counts["packs"]:  # a hash decides, so few samples may give an empty side
            what, change = ("all", "lower") if prefix == PREFIX else ("none", "raise")
            what += (
                f" of the {sum(each['packed'] for each in splits.values()):,} samples falls into the validation split"
            )
            remedy = f"{change} data.validation_share, or set another data.seed, and run make preprocess again"
            raise UserError(what, where=source, remedy=remedy)
    without = [path.name for path, shard in shards.items() if roles_path(path, PREFIX).name not in shard.files]
    if without:
        what = f"shard {without[0]} was made by an earlier version and holds no roles, so the dataset gets none"
        console.print(f"{what}: {AGAIN} to see roles", markup=False, soft_wrap=True)
    with staged_directory(target, manifest) as staging:
        for prefix, counts in splits.items():
            counts.update(join_shards(list(shards), staging, prefix, counts["packs"], recipe.data))
            if without:
                roles_path(staging, prefix).unlink()
    return manifest


def _divided_into(shards: dict[Path, Manifest], source: Path) -> int:
    """How many parts the inputs were divided into, according to the shards; raises `UserError` if they disagree."""
    found: dict[int, Path] = {}
    for path, shard in shards.items():
        found.setdefault(int(str(shard.settings.get("shard", "")).partition("/")[2] or 1), path)
    if len(found) > 1:
        (one, path), (other, other_path) = sorted(found.items())[:2]
        what = f"shards of different divisions: {path.name} is of {one}, {other_path.name} is of {other}"
        raise UserError(what, where=source, remedy=f"remove those of one division, or {source}, and preprocess again")
    return next(iter(found), 1)


def _shard_of(part: Part, directory: Path, settings: dict[str, Any]) -> Manifest:
    """The manifest of the shard of one part of the inputs."""
    again = f"run make preprocess SHARD={part.part}" if part.part else "run make preprocess"
    if part.part and not directory.exists():
        raise UserError(f"part {part.part} is missing: no such shard", where=directory, remedy=again)
    shard = read_manifest(directory, "shard", again)
    require_settings(directory, shard.settings, {**settings, "shard": part.part}, f"{again} again")
    if shard.inputs != {part.source: sha256_of_span(part.span)}:
        raise UserError(f"made from another content of {part.span.file.name}", where=directory, remedy=again)
    return shard
