"""Safetensors without torch: the same bytes as the library writes, and read as the library reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint.files.test_torch_write import arrays
from checkpoint_files import stored
from openpangu_sft.checkpoint.files.arrays import BF16, Array, same_bits
from openpangu_sft.checkpoint.files.safetensors import map_safetensors, write_safetensors
from openpangu_sft.model.tensors import to_array, to_tensor
from refusals import refusal_of

NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, arrays(), max_size=6))
def test_the_library_reads_what_we_write_and_we_what_it_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Array]
) -> None:
    ours, theirs = (tmp_path_factory.getbasetemp() / name for name in ("ours", "theirs"))
    write_safetensors({name: stored(array) for name, array in tensors.items()}, ours)
    save_file({name: to_tensor(array) for name, array in tensors.items()}, str(theirs), metadata={"format": "pt"})
    read, mapped = load_file(str(ours)), map_safetensors(theirs)
    assert set(read) == set(mapped) == set(tensors)
    for name, array in tensors.items():
        assert same_bits(to_array(read[name]), np.ascontiguousarray(array).reshape(array.shape))
        assert same_bits(mapped[name], np.ascontiguousarray(array).reshape(array.shape))


def test_a_models_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    """Order of tensors and header included: the files are the same."""
    tensors = {"b.bias": torch.zeros(3), "a.weight": torch.ones(2, 3).bfloat16(), "a.bias": torch.ones(2)}
    write_safetensors({name: stored(to_array(tensor)) for name, tensor in tensors.items()}, tmp_path / "ours")
    save_file(tensors, str(tmp_path / "theirs"), metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_dtype_of_quantized_weights_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    assert "tensor w is F8_E4M3, expected one of F32, BF16, F16" in refusal_of(map_safetensors, tmp_path / "x")


def test_mapped_tensors_cannot_be_changed(tmp_path: Path) -> None:
    write_safetensors({"w": stored(np.ones(4, BF16))}, tmp_path / "x")
    with pytest.raises(ValueError, match="read-only"):
        map_safetensors(tmp_path / "x")["w"][0] = 0
