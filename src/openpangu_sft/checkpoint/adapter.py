"""LoRA adapters as peft saves them: adapter_config.json and adapter_model.safetensors, without their base.

Each adapted projection has an A of its own there. Where those of q, k, v (or gate, up) are equal they are one A, found
under the first name, as Megatron has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpangu_sft.checkpoint.files.arrays import Array, Shape, Stored, same_bits
from openpangu_sft.checkpoint.files.safetensors import map_safetensors
from openpangu_sft.checkpoint.lora import first_name
from openpangu_sft.checkpoint.sharding import hf_shapes, part_name, whole
from openpangu_sft.checkpoint.weights import Part, Weights, require_tensors
from openpangu_sft.recipe.model_config import ADAPTER_CONFIG, AGAIN, read_object, write_object
from openpangu_sft.recipe.sections import LINEARS, Adapter, Model
from openpangu_sft.util.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KNOWN = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "megatron_config"}
_KNOWN |= {"megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision"}
_KNOWN |= {"target_modules", "task_type"}
"""Keys that do not change what A and B mean; any other one must be unset, those of later versions of peft too."""
_UNSET: tuple[Any, ...] = (None, False, "none", [], {})
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is; with others it is changed before training."""


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (directory / ADAPTER_CONFIG).is_file() and not any(directory.glob("model*.safetensors"))


def adapter_files(directory: Path) -> list[Path]:
    """The files of an adapter; `UserError` without safetensors."""
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        what = "only adapter_model.bin, a pickle, which can run code" if pickled else f"there is no {ADAPTER_WEIGHTS}"
        remedy = "save it again with PEFT's save_pretrained(…, safe_serialization=True)" if pickled else AGAIN
        raise UserError(what, where=directory, remedy=remedy)
    return [directory / ADAPTER_CONFIG, path]


def open_adapter(directory: Path, model: Model) -> Weights:
    """Opens A and B, by the names of `sharding.part_name`; values are read on use.

    Raises `UserError` where a file is missing or damaged, peft's configuration asks for more than A and B, or a tensor
    is missing, unexpected or of another shape.
    """
    config, path = adapter_files(directory)
    rank, alpha = _scale(read_object(config), config)
    found = {name.removeprefix(_PREFIX): array for name, array in map_safetensors(path, AGAIN).items()}
    targets = {name.split(".")[-3] for name in found if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    require_tensors(found, _shapes(model, rank, targets), path, "is it an adapter of the model in paths.hf?")
    wanted = tuple(name for names in LINEARS.values() for name in names if name in targets)
    if not wanted:
        raise UserError("holds no LoRA adapters", where=path, remedy="check the path")
    own = {name: array for name, array in found.items() if not _shared(name, array, found)}
    return Weights((Part(whole(name, array.shape), array, path) for name, array in own.items()),
                   adapter=Adapter(rank, alpha, wanted))  # fmt: skip


def _shared(name: str, array: Array, found: Mapping[str, Array]) -> bool:
    """Whether it is an A that is found under another name."""
    first = first_name(name)
    return ".lora_A." in name and first != name and first in found and same_bits(array, found[first])


def _scale(config: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """Rank and alpha."""
    if config.get("peft_type") != "LORA":
        what = f"peft_type is {config.get('peft_type')!r}"
        raise UserError(what, where=path, remedy="only LORA can be used")
    for key, value in config.items():
        if key not in _KNOWN and value not in (_INITIAL if key == "init_lora_weights" else _UNSET):
            remedy = "merge it into its base with PEFT (merge_and_unload(), then save_pretrained), and give the result"
            raise UserError(f"{key} is {value!r}, which is not supported", where=path, remedy=remedy)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, int) and isinstance(alpha, (int, float)) and rank > 0 and 0 < alpha < float("inf"):
        return rank, float(alpha)
    raise UserError(f"r is {rank!r}, lora_alpha {alpha!r}: not positive numbers", where=path, remedy=AGAIN)


def _shapes(model: Model, rank: int, targets: set[str]) -> dict[str, Shape]:
    """Names and shapes of A and B of every adapted projection."""
    shapes: dict[str, Shape] = {}
    for name, shape in hf_shapes(model).items():
        if name.endswith("_proj.weight") and name.split(".")[-2] in targets:
            shapes[part_name(name, "A")], shapes[part_name(name, "B")] = (rank, shape[1]), (shape[0], rank)
    return shapes


def require_shared(weights: Weights, model: Model, where: Path) -> None:
    """`UserError` unless q, k, v share one A, and gate, up do, as in Megatron; so do all that it has trained."""
    found = {name for name in weights.names() if ".lora_" in name}
    if found != {name for name in hf_shapes(model, weights.adapter) if ".lora_" in name}:
        what = "q, k, v, or gate, up, are not adapted together with one A, which Megatron shares"
        raise UserError(what, where=where, remedy="merge it first (make export FROM=…), and give the result")


def peft_tensors(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of the file, of all that a checkpoint holds (`Resharder.hf`)."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            a = name.replace(".lora_B.", ".lora_A.")
            found[_PREFIX + a], found[_PREFIX + name] = tensors[first_name(a)], tensor
    return found


def write_adapter_config(directory: Path, adapter: Adapter, base: Path) -> None:
    """Writes adapter_config.json with keys that peft 0.7.1 and later versions read."""
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.rank,
        "lora_alpha": alpha,
        "target_modules": adapter.targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_object(directory / ADAPTER_CONFIG, content)
