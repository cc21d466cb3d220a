"""The files of a Hugging Face checkpoint, and what a directory holds that is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from openpangu_sft.checkpoint.mcore import TRACKER
from openpangu_sft.util.errors import UserError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Of PEFT; the first one names the base."""
AGAIN = "download it again"

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def not_hf(directory: Path, otherwise: UserError) -> UserError:
    """Why a directory is not a Hugging Face checkpoint, if its files tell; else `otherwise`."""
    if any((directory / name).is_file() for name in ADAPTERS):
        return _adapter(directory)
    if (directory / TRACKER).is_file():
        what = "is a Megatron-core checkpoint; a Hugging Face one is needed"
        return UserError(what, where=directory, remedy=f"check the path, or convert it: make export FROM={directory}")
    if any(directory.glob("mp_rank_*")):
        what = "is one iteration of a Megatron-core checkpoint"
        return UserError(what, where=directory, remedy=f"give the directory that contains it: {directory.parent}")
    return otherwise


def _adapter(directory: Path) -> UserError:
    path = directory / ADAPTERS[0]
    base = read_object(path).get("base_model_name_or_path") if path.is_file() else None
    return UserError(
        f"is a LoRA adapter, not a model (its base: {base or 'not named'})",
        where=directory,
        remedy="merge it into its base (PEFT: merge_and_unload(), then save_pretrained) and give the result",
    )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all present.

    Raises:
        UserError: none, or a shard is missing, or only `.bin` files.
    """
    index, single = directory / INDEX, directory / WEIGHTS
    if index.is_file() and single.is_file():
        raise UserError(f"there are two sets of weights, {WEIGHTS} and {INDEX}", where=directory, remedy="remove one")
    if index.is_file():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(_is_file_name(name) for name in shards.values()):
            raise UserError("weight_map names no files", where=index, remedy=AGAIN)
        names = sorted(set(shards.values()))
        for name in names:
            if not (directory / name).is_file():
                raise UserError("shard is missing", where=directory / name, remedy="download the checkpoint again")
        return [_not_a_pointer(directory / name) for name in names]
    if single.is_file():
        return [_not_a_pointer(single)]
    if shards := sorted(path.name for path in directory.glob("*.safetensors") if _SHARD.fullmatch(path.name)):
        return [_not_a_pointer(directory / name) for name in _without_index(directory, shards)]
    if list(directory.glob("pytorch_model*.bin")):
        raise UserError(
            "only .bin weights, which transformers 4.53.2 refuses to load with torch 2.1",
            where=directory,
            remedy="take the safetensors files",
        )
    raise not_hf(directory, UserError(f"no weights here ({WEIGHTS})", where=directory, remedy="check paths.hf"))


def _without_index(directory: Path, shards: list[str]) -> list[str]:
    """The shards where there is no index: their names say how many there are, and opening checks their tensors."""
    counts = sorted({shard.split("-")[-1][:5] for shard in shards})
    if len(counts) > 1:
        what = f"has shards of {' and of '.join(map(str, map(int, counts)))}, and no {INDEX} that says which to take"
        raise UserError(what, where=directory, remedy="remove those of one set")
    for number in range(1, int(counts[0]) + 1):
        name = f"model-{number:05d}-of-{counts[0]}.safetensors"
        if name not in shards:
            raise UserError(f"shard is missing, and so is {INDEX}", where=directory / name, remedy="download both")
    return shards


def _not_a_pointer(path: Path) -> Path:
    with path.open("rb") as stream:
        if stream.read(24) == b"version https://git-lfs.":
            raise UserError("is only a Git LFS pointer", where=path, remedy="get the file itself (git lfs pull)")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: it is not one.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=path, remedy=AGAIN) from None
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=path, remedy=AGAIN)
    return content


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
