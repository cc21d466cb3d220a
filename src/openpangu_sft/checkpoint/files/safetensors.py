"""Maps and writes safetensors files without torch (format: github.com/huggingface/safetensors).

Eight bytes with the header's length, the header (JSON: dtype, shape and offsets of each tensor), then the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from openpangu_sft.checkpoint.files.arrays import BF16, Array, DType, Stored
from openpangu_sft.checkpoint.files.writer import Advance, Entry, OutputFile, nothing
from openpangu_sft.util.errors import UserError, naming

_DTYPES: dict[str, DType] = {
    "BF16": BF16,
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "BOOL": np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


def map_safetensors(path: Path) -> dict[str, Array]:
    """Maps the tensors of a file, to be read on use; `UserError` if it is damaged or a tensor is quantized."""
    try:
        with safe_open(str(path), "np"):  # checks the header against the file: no gaps, no overlaps, nothing beyond
            pass
    except SafetensorError as error:
        raise UserError(f"damaged: {error}", where=path, remedy="download it again") from None
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    content = np.memmap(path, np.uint8, "r") if header else np.empty(0, np.uint8)
    found: dict[str, Array] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            what = f"tensor {name} is {entry['dtype']}, expected one of F32, BF16, F16"
            raise UserError(what, where=path, remedy="take a checkpoint that is not quantized")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        values = np.ndarray.view(content[begin:end], np.ndarray)
        found[name] = values.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def write_safetensors(tensors: Mapping[str, Stored], path: Path, advance: Advance = nothing) -> Entry:
    """Writes a file in safetensors' own order, widest dtype first, then by name; returns its manifest entry."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        tensor, begin = tensors[name], position
        position += tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, position]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with naming(path), OutputFile(path) as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for chunk in tensors[name].chunks():
                output.write(chunk)
                advance(chunk.nbytes, "")
    return output.entry
