"""Damaged and malicious files: convert and export refuse them in one line, or give just what the file says."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from openpangu_sft.checkpoint.hf import WEIGHTS
from rubbish import MODEL_FILE, Outcome, Place, edits

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
NORM, Q, K = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Place:
    return Place(tmp_path_factory.mktemp("rubbish"), tiny_hf)


# safetensors.


def converted(place: Place, content: bytes) -> Outcome:
    """Converts a file; where that is done, with the bits that the format's own library reads."""
    kind, value = place.convert(content)
    if kind == "done":
        assert value == {name: bytes(entry["data"]) for name, entry in deserialize(content)}
    return kind, value


@FUZZ
@given(edits(262_000, [0, 8, 60, 400, 2000]))
def test_mutated_safetensors(place: Place, edit: Callable[[bytes], bytes]) -> None:
    converted(place, edit(place.whole[place.hf / WEIGHTS]))


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes, length: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) + length) % 2**64) + text + data


NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 2**64 - 1, -(2**63), 32, 1.5, "1", None]), st.integers()
)
DTYPES = st.sampled_from(
    ["F8_E4M3", "F8_E5M2", "F4", "F64", "F16", "BF16", "I32", "U32", "I8", "BOOL", "C64", "", "f32", "F32\n", None, 7]
)


@st.composite
def headers(draw: st.DrawFn) -> Callable[[dict[str, Any]], Any]:
    """Changes of a header that leave it JSON."""
    names = st.sampled_from([NORM, Q, K, "lm_head.weight", "__metadata__", "", "\0", "\u2028", "x" * 3000])
    shape = st.lists(NUMBERS, max_size=4)
    changes = st.one_of(
        st.tuples(st.just("dtype"), names, DTYPES),
        st.tuples(st.just("shape"), names, st.one_of(shape, NUMBERS)),
        st.tuples(st.just("data_offsets"), names, st.one_of(shape, NUMBERS)),
        st.tuples(st.just("rename"), names, names),
        st.tuples(st.just("copy"), names, names),
        st.tuples(st.just("swap"), names, names),
        st.tuples(st.just("entry"), names, st.one_of(st.none(), shape, st.just({}), st.just({"format": 1}))),
    )
    planned = draw(st.lists(changes, min_size=1, max_size=3))

    def change(header: dict[str, Any]) -> Any:
        for kind, name, value in planned:
            if kind == "entry":
                header[name] = value
            elif name not in header or not isinstance(header[name], dict):
                continue
            elif kind == "rename":
                header[value] = header.pop(name)
            elif kind == "copy":
                header[value] = dict(header[name])
            elif kind == "swap":
                header[name], header[value] = header.get(value), header[name]
            else:
                header[name][kind] = value
        return header

    return change


@FUZZ
@given(headers())
@example(lambda header: {**header, NORM: {**header[NORM], "dtype": "F8_E4M3"}})
@example(lambda header: {**header, NORM: {**header[NORM], "shape": []}})
@example(lambda header: {**header, NORM: {**header[NORM], "shape": [0]}})
@example(lambda header: {**header, Q: header[K], K: header[Q]})
@example(lambda header: {**header, Q: {**header[Q], "data_offsets": header[NORM]["data_offsets"]}})
@example(lambda header: {**header, Q: {**header[Q], "shape": header[Q]["shape"][::-1]}})
def test_headers_that_say_something_else(place: Place, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = parts_of(place.whole[place.hf / WEIGHTS])
    converted(place, joined(change(header), data))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"{}", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"NaN",
        pytest.param(b"[" * 100_000, id="nested lists"), pytest.param(b'{"a":' * 100_000, id="nested objects"),
        b'{"__metadata__": {"format": "pt"}}', b'{"__metadata__": 7}', b'{"\\ud800": {}}',
        pytest.param(b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', id="infinite shape"),
        pytest.param(b'{"a": {"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 4]}}', id="2^64"),
        pytest.param(
            b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}', id="2^32 x 2^32"
        ),
        pytest.param(
            b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
            b'"b": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
            id="empty and scalar",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("data", [0, 4])
def test_headers_of_another_kind(place: Place, text: bytes, data: int) -> None:
    assert converted(place, joined(text, bytes(data)))[0] == "refused"


@pytest.mark.parametrize("length", [-1, 1, 7, 8, 1000, 2**20, 2**31, 2**40, 2**62, 2**63, -8, -2000])
def test_a_wrong_length_of_the_header(place: Place, length: int) -> None:
    header, data = parts_of(place.whole[place.hf / WEIGHTS])
    assert converted(place, joined(header, data, length))[0] == "refused"


def test_duplicate_keys(place: Place) -> None:
    """Two readers may take different ones: never another tensor than the format's own library takes."""
    header, data = parts_of(place.whole[place.hf / WEIGHTS])
    for name, other in ((Q, K), (NORM, Q), (NORM, "model.layers.0.input_layernorm.weight")):
        doubled = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[other])}}}'
        converted(place, joined(doubled.encode(), data))
        inner = json.dumps(header).replace(f'"{name}": {{', f'"{name}": {{"data_offsets": [0, 0], "shape": [7], ', 1)
        converted(place, joined(inner.encode(), data))


# Megatron-core's files.


def exported(place: Place, content: bytes) -> Outcome:
    """Exports a file; where that is done, with the bits that stand in each tensor's own record."""
    kind, value = place.export_of(content)
    if kind == "done":
        assert value == place.bits_in_records(content)
    return kind, value


@FUZZ
@given(st.data())
def test_mutated_files_of_a_rank(place: Place, data: st.DataObject) -> None:
    content = place.whole[place.mcore / MODEL_FILE]
    with zipfile.ZipFile(BytesIO(content)) as archive:
        ends = [archive.start_dir, archive.start_dir + 1000, len(content) - 22]
        records = [record.header_offset for record in archive.infolist()]
    edit = data.draw(edits(len(content), [0, 100, 1000, *ends, *ends, *records[:6]]))
    exported(place, edit(content))


def test_records_that_are_mixed_up(place: Place) -> None:
    """The list of records at the end sends a name to another record of the same size."""
    content = bytearray(place.whole[place.mcore / MODEL_FILE])
    with zipfile.ZipFile(BytesIO(content)) as archive:
        at, places = archive.start_dir, {}
        for record in archive.infolist():
            places[record.filename] = (at + 42, record.file_size)
            at += 46 + len(record.filename) + len(record.extra)
    alike = [name for name, (_, size) in places.items() if size == 128 and "/data/" in name]
    one, other = (slice(places[name][0], places[name][0] + 4) for name in alike[:2])
    content[one], content[other] = content[other], content[one]
    kind, said = exported(place, bytes(content))
    assert kind == "refused"
    assert "is damaged or no checkpoint" in said
