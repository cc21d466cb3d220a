"""Crafted files that once ended the process, ran code or took gigabytes; and many thousands of mutated ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pickles import (
    PROTO,
    array,
    call,
    dtype,
    encoded,
    named,
    number,
    state_of_array,
    storage,
    tensor,
    text,
    tuple_of,
    write_zip,
)

PROGRAM = Path(__file__).parents[2] / "hostile.py"


def hex_chain(times: int) -> bytes:
    """Text of 1,000 characters, encoded so often."""
    made = text("x" * 1000)
    for encoding in ["latin1", *["hex"] * times]:
        made = named("_codecs.encode") + made + text(encoding) + b"\x86R"
    return made


def items(*pairs: bytes) -> bytes:
    """A dict."""
    return b"}(" + b"".join(pairs) + b"u"


def laughs(levels: int) -> bytes:
    """Lists of the same list twice, 2^levels items in all."""
    inner = b"]q\0"
    for level in range(levels):
        inner = b"](" + inner + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return inner


POINTERS = encoded(b"\x41" * 16)
OBJECT = dtype("O8", "|")
BY_FIELD = dtype("V16", "|", (b"N", tuple_of(text("a")), items(text("a"), tuple_of(OBJECT, number(0)))))


ONE_FIELD = tuple_of(number(3), text("|"), b"N", tuple_of(text("a")), items(text("a"), tuple_of(OBJECT, number(0))))
OF_OBJECTS = tuple_of(text("storage"), OBJECT, text("0"), text("cpu"), number(2)) + b"Q"

PICKLES = {
    "objects": array(OBJECT, [2], POINTERS),
    "objects in a field": array(BY_FIELD, [1], POINTERS),
    "objects in a subarray": array(dtype("V16", "|", (tuple_of(OBJECT, number(2)), b"N", b"N")), [1], POINTERS),
    "an object": call("numpy.core.multiarray.scalar", OBJECT, encoded(b"\x41" * 8)),
    "an object and more": call("numpy.core.multiarray.scalar", OBJECT, POINTERS),
    "an object in a field": call("numpy.core.multiarray.scalar", BY_FIELD, POINTERS),
    "a field set on a dtype of floats": array(dtype("f8") + ONE_FIELD + b"b", [2], POINTERS),
    "objects set on an array": array(dtype("f8"), [2], POINTERS) + state_of_array(OBJECT, [2], POINTERS),
    "objects by new": named("numpy.ndarray") + tuple_of(tuple_of(number(2)), OBJECT, POINTERS) + b"\x81",
    "objects without bytes": array(OBJECT, [2], b"]"),
    "an array that is larger than its bytes": array(dtype("f8"), [1 << 40], POINTERS),
    "an array of gigabytes": named("numpy.ndarray") + tuple_of(tuple_of(number(1 << 33)), text("u1")) + b"R",
    "an array of negative size": array(dtype("f8"), [-2, -1], POINTERS),
    "numbers of the other byte order": array(dtype("f8", ">"), [2], POINTERS),
    "dates": array(dtype("M8[ns]"), [2], POINTERS),
    "bytes of gigabytes": call("builtins.bytes", number(1 << 33)),
    "a chain of encodings": hex_chain(20),
    "another encoding": call("_codecs.encode", text("x"), text("idna")),
    "a long integer": b"\x8b\xff\xff\xff\x7f",
    "long bytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "a frame": b"\x95" + b"\xff" * 7 + b"\x7f",
    "decimal digits": b"L" + b"9" * 3_000_000 + b"L\n",
    "a registered extension": b"\x82\x01",
    "deep lists": b"]" * 1_000_000 + b"a" * 999_999,
    "deep tuples": b")" + b"\x85" * 1_000_000,
    "a list in itself": b"]q\0h\0a",
    "a record in itself": named("megatron.x") + b")Rq\0h\0b",
    "a list of lists, again and again": laughs(60),
    "keys of one hash": items(*(number(k * (2**61 - 1)) + b"N" for k in range(30_000))),
    "a tuple as key": items(tuple_of(number(1)), b"N"),
    "items of a list": b"](K\0Nu",
    "a call of a result": call("megatron.x") + b")R",
    "a call of a text": text("os.system") + b")R",
    "a state of a text": text("x") + items(text("__class__"), b"N") + b"b",
    "an argument that is no tuple": named("megatron.x") + text("x") + b"bN\x86R",
    "a tensor wider than its storage": tensor(storage(), 0, [1 << 40], [0]),
    "a tensor beyond its storage": tensor(storage(), 2, [3], [1]),
    "a tensor before its storage": tensor(storage(), -1, [3], [1]),
    "a tensor of many dimensions": tensor(storage(), 0, [1] * 99, [1] * 99),
    "a tensor of objects": tensor(OF_OBJECTS, 0, [2], [1]),
    "a storage of more than its record": tensor(storage(elements=1 << 40), 0, [1], [1]),
    "a storage that is not there": tensor(storage("7"), 0, [1], [1]),
    "a storage out of the archive": tensor(storage("../../../etc/passwd"), 0, [1], [1]),
    "tensors of many times the file's size": b"](" + tensor(storage(), 0, [4], [1]) + b"q\0" + b"h\0" * 900_000 + b"e",
}  # fmt: skip
"""Each is refused."""

TENSOR = PROTO + tensor(storage(), 0, [4], [1]) + b"."
WHOLE = write_zip(TENSOR)


def changed(mark: bytes, nth: int, field: int, value: bytes) -> bytes:
    """A whole file with another value in the nth header of a kind."""
    content, at = bytearray(WHOLE), -1
    for _ in range(nth + 1):
        at = WHOLE.index(mark, at + 1)
    content[at + field : at + field + len(value)] = value
    return bytes(content)


FILES = {
    **{name: write_zip(PROTO + pickled + b".") for name, pickled in PICKLES.items()},
    "a compressed pickle": write_zip(PROTO + b"]" + b"0" * 10_000_000, deflated=1),
    "a compressed tensor": write_zip(TENSOR, [("data/0", bytes(10_000_000))], deflated=2),
    "two records of one name": write_zip(PROTO + b"N.", [("data/0", bytes(16)), ("data/0", bytes(16))]),
    "a large pickle": write_zip(PROTO + b"]" * 5_000_000 + b"."),
    "many records": write_zip(PROTO + b"N.", [(f"data/{'0' * 200}{n}", b"") for n in range(16_000)]),
    "records that overlap": changed(b"PK\1\2", 1, 42, b"\0\0\0\0"),
    "a record out of the file": changed(b"PK\1\2", 1, 42, b"\xff\xff\xff\x7f"),
    "a record longer than the file": changed(b"PK\1\2", 2, 20, b"\xff\xff\xff\x7f" * 2),
    "an encrypted record": changed(b"PK\1\2", 0, 8, b"\1"),
    "an unknown compression": changed(b"PK\1\2", 0, 10, b"\x63"),
    "a pickle of another sum": changed(b"PK\1\2", 0, 16, b"\0\0"),
}  # fmt: skip
HARMLESS = {
    "a tensor": WHOLE,
    "an array of floats": write_zip(PROTO + array(dtype("f8"), [2], POINTERS) + b"."),
    "a float": write_zip(PROTO + call("numpy.core.multiarray.scalar", dtype("f8"), encoded(bytes(8))) + b"."),
    "two encodings": write_zip(PROTO + tuple_of(POINTERS, encoded(b"\xff")) + b"."),
    "a large index of the memo": write_zip(PROTO + b"Nr\xff\xff\xff\x7f."),
}
"""Made by the same functions, and read."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the reader says of each file."""
    directory = tmp_path_factory.mktemp("hostile")
    paths = [directory / f"{number}.pt" for number in range(len(FILES) + len(HARMLESS))]
    for path, content in zip(paths, [*FILES.values(), *HARMLESS.values()]):
        path.write_bytes(content)
    ran = run("--as-they-are", *map(str, paths))
    return dict(zip([*FILES, *HARMLESS], json.loads(ran.stdout)))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program; OpenBLAS takes address space for every thread."""
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, env={"OPENBLAS_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    return ran


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused(said: dict[str, str], name: str) -> None:
    """In one line, by a process that ends by itself, takes less than 1 GB and 10 s."""
    assert said[name] == "refused"


@pytest.mark.parametrize("name", HARMLESS)
def test_a_file_without_the_attack_is_read(said: dict[str, str], name: str) -> None:
    assert said[name] == "read"


RANDOM = not settings.default.derandomize


@settings(max_examples=20 if RANDOM else 1, deadline=None)
@given(st.integers(0, 2**60))
def test_mutated_files_are_read_or_refused(seed: int) -> None:
    """1,000 in `make test`, 20,000 others in `make test-random`."""
    counts = json.loads(run("--seed", str(seed), "--inputs", "1000").stdout)
    assert counts["read"] > 100
    assert counts["refused"] > 400
    assert sum(counts.values()) == 1000
