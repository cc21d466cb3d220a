"""LoRA adapters: how they begin, how they are merged, and as peft saves them, without their base.

There each adapted projection has an A of its own. Where those of q, k, v (or gate, up) are equal they are one A, found
under the first name, as Megatron has it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from openpangu_sft.checkpoint.files.arrays import DTYPES, Array, DType, Shape, Stored, same_bits
from openpangu_sft.checkpoint.files.safetensors import map_safetensors
from openpangu_sft.checkpoint.sharding import Block, hf_shapes, part_name, whole
from openpangu_sft.checkpoint.weights import Part, Weights, require_tensors, weights_of_arrays
from openpangu_sft.recipe.lora import LINEARS, Adapter
from openpangu_sft.recipe.model_config import ADAPTER_CONFIG, AGAIN, read_object, write_object
from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
FIRST_OF = {name: names[0] for names in LINEARS.values() for name in names}
"""The projection under whose name A is found where several share it."""
_PREFIX = "base_model.model."
_KNOWN = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "megatron_config"}
_KNOWN |= {"megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision"}
_KNOWN |= {"target_modules", "task_type"}
"""Keys that do not change what A and B mean; any other one must be unset, those of later versions of peft too."""
_UNSET: tuple[Any, ...] = (None, False, "none", [], {})
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it is; with others it is changed before training."""


def first_name(name: str) -> str:
    """The name under which a shared A is found."""
    projection = name.split(".")[-3]
    return name.replace(f".{projection}.", f".{FIRST_OF.get(projection, projection)}.")


class Merged(Weights):
    """A model with its adapters merged: W + alpha / rank * B A, in fp32, rounded once to W's dtype."""

    def __init__(self, stored: Weights, rounded: bool = True) -> None:
        assert stored.adapter
        self._stored, self._scale, self._rounded = stored, stored.adapter.alpha / stored.adapter.rank, rounded
        self._parts = {name: parts for name, parts in stored._parts.items() if ".lora_" not in name}
        self._merged, self._lock = lru_cache(4)(self._merge), Lock()  # q, k and v are read by turns

    @property
    def stored(self) -> Weights:
        return self._stored

    def in_fp32(self) -> Merged:
        return Merged(self._stored, rounded=False)

    def dtype(self, name: str) -> DType:
        return super().dtype(name) if self._rounded or not self._adapts(name) else DTYPES["fp32"]

    def read(self, block: Block) -> Array:
        if not self._adapts(block.name):
            return super().read(block)
        with self._lock:  # two threads compare what was written
            merged = self._merged(block.name)
        return merged[block.within(whole(block.name, merged.shape))]

    def _adapts(self, name: str) -> bool:
        return part_name(name, "B") in self._stored._parts

    def _merge(self, name: str) -> Array:
        """The whole tensor: the same bits, whatever part of it is read."""
        own = part_name(name, "A")
        names = own if own in self._stored._parts else first_name(own), part_name(name, "B")
        a, b = (self._whole(part).astype(np.float64) for part in names)
        product: Array = b @ a
        product *= self._scale
        product += self._whole(name).astype(np.float32)
        return product.astype(np.float32).astype(self.dtype(name))

    def _whole(self, name: str) -> Array:
        blocks = self._stored._parts[name]
        rows = max(block.row + block.rows for block in blocks)
        columns = max(block.column + (block.columns or 0) for block in blocks)
        return self._stored.read(Block(name, 0, rows, 0, columns))


def base_of(weights: Weights) -> Weights:
    """The weights that adapters are beside, without them."""
    return Weights(part for part in weights.stored.parts() if ".lora_" not in part.block.name)


def with_adapters(weights: Weights, model: Model, adapter: Adapter, seed: int) -> Weights:
    """Weights with new adapters, which change nothing yet: B is 0, A is uniform within 1 / sqrt(in features).

    That is peft's own beginning (kaiming_uniform_ with a = sqrt(5)). A depends on the seed and its name, not on the
    layout. In the dtype of the weights.
    """
    parts = list(weights.parts())
    for name, shape in hf_shapes(model, adapter).items():
        if ".lora_" in name:
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            drawn = random.uniform(-1, 1, shape) / np.sqrt(shape[1]) if ".lora_A." in name else np.zeros(shape)
            dtype = weights.dtype(name.replace(".lora_A", "").replace(".lora_B", ""))
            parts.append(Part(whole(name, shape), drawn.astype(np.float32).astype(dtype), "a new adapter"))
    return Weights(parts, adapter=adapter)


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
    found = {name.removeprefix(_PREFIX): array for name, array in map_safetensors(path).items()}
    targets = {name.split(".")[-3] for name in found if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    expected: dict[str, Shape] = {}
    for name, shape in hf_shapes(model).items():
        if name.endswith("_proj.weight") and name.split(".")[-2] in targets:
            expected.update({part_name(name, "A"): (rank, shape[1]), part_name(name, "B"): (shape[0], rank)})
    require_tensors(found, expected, path, "is it an adapter of the model in paths.hf?")
    wanted = tuple(name for name in FIRST_OF if name in targets)
    if not wanted:
        raise UserError("holds no LoRA adapters", where=path, remedy="check the path")
    own = dict(found)
    for name in found:
        first = first_name(name)
        if ".lora_A." in name and first != name and first in found and same_bits(found[name], found[first]):
            del own[name]
    return weights_of_arrays(own, path, Adapter(rank, alpha, wanted))


def _scale(config: Mapping[str, Any], path: Path) -> tuple[int, float]:
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type is {config.get('peft_type')!r}", where=path, remedy="only LORA can be used")
    for key, value in config.items():
        if key not in _KNOWN and value not in (_INITIAL if key == "init_lora_weights" else _UNSET):
            remedy = "merge it into its base with PEFT (merge_and_unload(), then save_pretrained), and give the result"
            raise UserError(f"{key} is {value!r}, which is not supported", where=path, remedy=remedy)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, int) and isinstance(alpha, (int, float)) and rank > 0 and 0 < alpha < float("inf"):
        return rank, float(alpha)
    raise UserError(f"r is {rank!r}, lora_alpha {alpha!r}: not positive numbers", where=path, remedy=AGAIN)


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
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "target_modules": adapter.targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_object(directory / ADAPTER_CONFIG, content)
