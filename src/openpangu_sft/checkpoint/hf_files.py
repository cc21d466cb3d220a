"""The weight files of a Hugging Face checkpoint: single, sharded with an index, or sharded without one."""

from __future__ import annotations

import re
from pathlib import Path

from openpangu_sft.recipe.model_config import AGAIN, not_hf, read_object
from openpangu_sft.util.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; `UserError` for none, a missing shard, or only `.bin` files."""
    index, single = directory / INDEX, directory / WEIGHTS
    if index.is_file() and single.is_file():
        raise UserError(f"there are two sets of weights, {WEIGHTS} and {INDEX}", where=directory, remedy="remove one")
    if index.is_file():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(_is_file_name(name) for name in shards.values()):
            raise UserError("weight_map names no files", where=index, remedy=AGAIN)
        return [_present(directory / name) for name in sorted(set(shards.values()))]
    if single.is_file():
        return [_present(single)]
    if shards := sorted(path.name for path in directory.glob("*.safetensors") if _SHARD.fullmatch(path.name)):
        return [_present(directory / name) for name in _without_index(directory, shards)]
    if list(directory.glob("pytorch_model*.bin")):
        what = "only .bin weights, which transformers 4.53.2 refuses to load with torch 2.1"
        raise UserError(what, where=directory, remedy="take the safetensors files")
    raise not_hf(directory, UserError(f"no weights here ({WEIGHTS})", where=directory, remedy="check paths.hf"))


def _without_index(directory: Path, shards: list[str]) -> list[str]:
    """Shards without an index: their names give their number; opening them checks the tensors."""
    counts = sorted({shard.split("-")[-1][:5] for shard in shards})
    if len(counts) > 1:
        what = f"has shards of {' and of '.join(map(str, map(int, counts)))}, and no {INDEX} that says which to take"
        raise UserError(what, where=directory, remedy="remove those of one set")
    for number in range(1, int(counts[0]) + 1):
        name = f"model-{number:05d}-of-{counts[0]}.safetensors"
        if name not in shards:
            raise UserError(f"shard is missing, and so is {INDEX}", where=directory / name, remedy="download both")
    return shards


def _present(path: Path) -> Path:
    if not path.is_file():
        raise UserError("shard is missing", where=path, remedy="download the checkpoint again")
    with path.open("rb") as stream:
        if stream.read(24) == b"version https://git-lfs.":
            raise UserError("is only a Git LFS pointer", where=path, remedy="get the file itself (git lfs pull)")
    return path


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
