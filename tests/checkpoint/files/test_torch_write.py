"""Files for torch.load, written without torch: torch reads them, and so does our own reader."""

from __future__ import annotations

import hashlib
import shutil
import struct
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from checkpoint_files import stored
from openpangu_sft.checkpoint.files.arrays import BF16, CHUNK, Array, Stored, first_difference, same_bits, slabs
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.checkpoint.files.torch_write import write_torch_file
from openpangu_sft.checkpoint.files.writer import OutputFile
from openpangu_sft.model.tensors import to_array, to_tensor

DTYPES = ["f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1", "?"]


def arrays() -> st.SearchStrategy[Array]:
    """Any bits of any dtype that a checkpoint may have, bfloat16 included; empty ones and scalars too."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    plain = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
    return plain | hnp.arrays("u2", shapes).map(lambda bits: bits.view(BF16))


def expected(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(array.shape)


@settings(deadline=None, max_examples=60)
@given(st.lists(arrays(), max_size=6), st.data())
def test_torch_and_our_reader_find_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Array], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    content = {"args": Namespace(a=1, text="汉字", none=None, nested=[1.5, (True, 2**70)]), "model": {}}
    model: dict[str, Any] = content["model"]  # type: ignore[assignment]
    for number, array in enumerate(tensors):
        model[f"t{number}"] = stored(array)
    model["none"] = None
    entry = write_torch_file(content, path)
    assert entry == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    for found in (torch.load(path), torch.load(str(path), mmap=True), load_checkpoint_file(path)):
        assert found["args"] == content["args"]
        assert list(found["model"]) == list(model)
        for number, array in enumerate(tensors):
            value = found["model"][f"t{number}"]
            assert same_bits(to_array(value) if isinstance(value, torch.Tensor) else value, expected(array))


def test_a_tensor_that_is_used_twice_is_written_once(tmp_path: Path) -> None:
    tensor = stored(np.arange(1000.0))
    write_torch_file([tensor, tensor, stored(np.arange(1000.0))], tmp_path / "x.pt")
    one, same, other = torch.load(tmp_path / "x.pt")
    assert one.data_ptr() == same.data_ptr() != other.data_ptr()
    assert (tmp_path / "x.pt").stat().st_size < 3 * 8000


def test_dtypes_are_torchs_own(tmp_path: Path) -> None:
    dtypes = [BF16, *(np.dtype(name) for name in DTYPES)]
    write_torch_file(dtypes, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt") == [
        torch.bfloat16, torch.float32, torch.float16, torch.float64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    ]  # fmt: skip


def test_more_than_4_gib(tmp_path: Path) -> None:
    """Where a zip has other headers; the 7B model's file at TP 1 is that large, and an fp32 embedding alone 2.5 GB."""
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("less than 10 GB of disk are free")
    size, step = 4_400_000_000, 20_000_000

    def chunks() -> Iterator[Array]:
        yield from (np.full(step, number, np.uint8) for number in range(size // step))

    large = Stored(np.dtype(np.uint8), (size,), chunks)
    write_torch_file([large, stored(np.arange(5.0))], tmp_path / "x.pt")
    for read in (torch.load(str(tmp_path / "x.pt"), mmap=True), load_checkpoint_file(tmp_path / "x.pt")):
        assert [int(read[0][place]) for place in (0, step, size - 1)] == [0, 1, size // step - 1]
        assert read[1].tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "x.pt").unlink()


def test_records_begin_at_multiples_of_64_and_have_right_sums(tmp_path: Path) -> None:
    tensors = [np.arange(size, dtype=np.float32) for size in (1, 100, 1000, 3, 5000)]
    write_torch_file([stored(array) for array in tensors], tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        assert [entry.filename for entry in archive.infolist()] == [
            "archive/data.pkl", "archive/byteorder", *(f"archive/data/{n}" for n in range(5)), "archive/version"
        ]  # fmt: skip
        for number, array in enumerate(tensors):
            header = archive.getinfo(f"archive/data/{number}").header_offset
            begin = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))  # as torch finds it
            assert content[begin : begin + array.nbytes] == array.tobytes()
            assert begin % 64 == 0
    for read in (torch.load(tmp_path / "x.pt"), [to_tensor(a) for a in load_checkpoint_file(tmp_path / "x.pt")]):
        assert [tensor.tolist() for tensor in read] == [array.tolist() for array in tensors]


def test_tensors_are_asked_for_one_after_the_other(tmp_path: Path) -> None:
    """So that they need not be in memory together."""
    alive: list[int] = []

    def chunks(number: int) -> Iterator[Array]:
        alive.append(number)
        assert alive == list(range(number + 1))
        yield np.full(10, number, np.float32)

    made = [Stored(np.dtype(np.float32), (10,), lambda number=number: chunks(number)) for number in range(3)]
    write_torch_file(made, tmp_path / "x.pt")
    assert [int(tensor[0]) for tensor in torch.load(tmp_path / "x.pt")] == [0, 1, 2]


# What lies below.


@settings(deadline=None)
@given(arrays())
def test_tensors_and_arrays_turn_into_each_other(array: Array) -> None:
    assert same_bits(to_array(to_tensor(array)), expected(array))
    assert not np.shares_memory(to_array(to_tensor(array)), array)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(0, 69))
def test_slabs_are_the_array_and_the_first_difference_is_found_in_any(rows: int, row: int) -> None:
    array = np.zeros((rows, CHUNK // 64), np.uint8)
    parts = list(slabs(array))
    assert sum(map(len, parts)) == rows
    assert all(part.nbytes <= CHUNK for part in parts)
    other = array.copy()
    assert first_difference(array, other) is None
    if row < rows:
        other[row, 5] = 1
        assert first_difference(array, other) == (row, 5)


def test_minus_zero_and_nan_have_bits_of_their_own() -> None:
    zero, minus, nan = (np.array([value], np.float32) for value in (0.0, -0.0, np.nan))
    assert first_difference(zero, minus) == (0,)
    assert first_difference(nan, nan.copy()) is None
    assert not same_bits(zero, zero.astype(np.float64))
    assert not same_bits(zero, zero[None])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.binary(max_size=300), max_size=30))
def test_the_sum_of_an_output_file_is_that_of_its_content(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "out"
    with OutputFile(path) as output:
        for part in parts:
            assert output.write(part) == len(part)
    content = b"".join(parts)
    assert path.read_bytes() == content
    assert output.entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_an_error_of_the_disk_that_comes_late_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("openpangu_sft.checkpoint.files.writer.FLUSHED_EVERY", 10)
    monkeypatch.setattr("os.fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"), OutputFile(tmp_path / "out") as output:
        output.write(b"x" * 20)
