"""Checkpoint files generated or mutated at random, each from a seed."""

from __future__ import annotations

import pickletools
import random
import struct
from collections.abc import Sequence

from openpangu_sft.checkpoint.files.inert import _CONSTANTS, _MAKERS
from pickles import (
    PROTO,
    array,
    dtype,
    encoded,
    named,
    number,
    records_of,
    storage,
    tensor,
    text,
    tuple_of,
    write_zip,
)

Random = random.Random

INTEGERS = [0, 1, -1, 2, 4, 255, 256, 2**16, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63, 2**64, 2**200, -(2**900)]
EVIL = ["builtins.eval", "os.system", "numpy.memmap", "io.open", "pickle.loads", "builtins.bytearray"]
NAMES = [*_MAKERS, *_CONSTANTS, "megatron.core.enums.ModelType", "mindspeed_llm.x", "__builtin__.getattr"]
DTYPES = [
    "O",
    "O8",
    "V8",
    "V16",
    "f4",
    "f8",
    "i8",
    "u1",
    "S8",
    "U2",
    "M8[ns]",
    "c16",
    "b1",
    "",
    "f4,O",
    "(9999,9999)f4",
]


def integer(r: Random) -> int:
    """Mostly small."""
    return r.choice(INTEGERS) if r.random() < 0.3 else r.randrange(5)


def some(r: Random, depth: int, most: int = 4) -> list[bytes]:
    """Values."""
    return [generated(r, depth + 1) for _ in range(r.randrange(most))]


def generated(r: Random, depth: int = 0) -> bytes:
    """Opcodes that leave one value on the stack; rarely they do something else."""
    if r.random() < 0.04:
        return noise(r)
    kind = r.randrange(7 if depth > 5 else 16)
    if kind < 2:
        return r.choice([b"N", b"\x88", b"\x89", b"]", b"}", b")"])
    if kind < 4:
        return number(integer(r))
    if kind == 4:
        return text(r.choice(["latin1", "hex", "storage", "0", "", "x" * 999, "\ud800", "encode", "data", *DTYPES]))
    if kind == 5:
        return b"G" + struct.pack(">d", r.choice([0.0, 1.5, float("nan"), float("inf"), -1e308]))
    if kind == 6:
        return r.choice([b"h", b"h", b"q"]) + bytes([r.randrange(8)]) if depth else named(r.choice(NAMES))
    if kind == 7:
        return b"](" + b"".join(some(r, depth, 6)) + b"e"
    if kind == 8:
        return (
            b"}("
            + b"".join(r.choice([text("a"), number(integer(r)), generated(r, 6)]) + v for v in some(r, depth))
            + b"u"
        )
    if kind == 9:
        return tuple_of(*some(r, depth))
    if kind == 10:
        return generated(r, depth + 1) + b"q" + bytes([r.randrange(8)])
    if kind == 11:
        of = r.choice([storage(elements=integer(r)), storage(), storage(), generated(r, depth + 1)])
        return tensor(of, integer(r), *([integer(r) for _ in range(r.randrange(4))] for _ in range(2)))
    if kind == 12:
        if r.random() < 0.5:
            return dtype(r.choice(DTYPES), r.choice("<>|="))
        object_field = b"}" + text("a") + tuple_of(dtype("O", "|"), number(integer(r))) + b"s"
        return dtype(
            r.choice(["V8", "V16"]), "|", (b"N", r.choice([tuple_of(text("a")), generated(r, 6)]), object_field)
        )
    if kind == 13:
        data = r.choice([encoded(bytes(8)), encoded(b"\x41" * 16), generated(r, depth + 1)])
        kind_of = r.choice([dtype("O", "|"), dtype("f8"), generated(r, depth + 1)])
        return array(kind_of, [integer(r) for _ in range(r.randrange(3))], data)
    name = named(r.choice(EVIL if r.random() < 0.03 else NAMES))
    made = name + tuple_of(*some(r, depth)) + r.choice([b"R", b"R", b"\x81"])
    return made + r.choice([b"", b"", generated(r, depth + 1) + b"b", b"(" + text("a") + b"Nu", b"(Ne"])


def noise(r: Random) -> bytes:
    """Any opcode, with an operand that is too large, or of bytes."""
    kind = r.choice(pickletools.opcodes).code.encode("latin1")
    huge = r.choice([b"\xff", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0\0\0\x40", b"9" * 5000 + b"\n", b"", b"\0" * 9])
    some_code = bytes(r.choice(b"(.aebscRQtul)]}\x81\x85\x86\x87N2101") for _ in range(r.randrange(1, 9)))
    return r.choice([kind + huge, kind + bytes([r.randrange(256)]), some_code, some_code * 300])


def rearranged(r: Random, pickled: bytes) -> bytes:
    """The opcodes of a pickle: some gone, doubled, exchanged, repeated, replaced."""
    places = [position or 0 for _, _, position in pickletools.genops(pickled)]
    codes = [pickled[begin:end] for begin, end in zip(places, [*places[1:], len(pickled)])]
    for _ in range(r.randrange(1, 5)):
        at, other = r.randrange(len(codes)), r.randrange(len(codes))
        kind = r.randrange(8)
        if kind == 0:
            codes[at] = b""
        elif kind == 1:
            codes[at] = codes[other]
        elif kind == 2:
            codes[at], codes[other] = codes[other], codes[at]
        elif kind == 3:
            begin, end = sorted((at, min(other, at + 30)))
            codes[at] = b"".join(codes[begin:end])[:3000] * r.choice([2, 10, 1000])
        elif kind == 4:
            codes[at] = generated(r)
        elif kind == 5:
            codes[at] += noise(r)
        elif kind == 6:
            codes[at] = codes[at][:1] + r.getrandbits(8 * len(codes[at])).to_bytes(len(codes[at]), "little")[1:]
        else:
            codes[at] = generated(r) + r.choice([b"b", b"R", b"Q", b"a", b"s"])
    return b"".join(codes)


def with_fields(r: Random, content: bytes) -> bytes:
    """Fields of the zip's headers and lists changed."""
    changed = bytearray(content)
    heads = {b"PK\1\2": range(4, 46), b"PK\3\4": range(4, 30), b"PK\5\6": range(4, 22)}
    for _ in range(r.randrange(1, 4)):
        mark = r.choice(list(heads))
        places = [at for at in range(len(content)) if content.startswith(mark, at)] if len(content) < 20_000 else []
        at = (r.choice(places) if places else max(0, content.rfind(mark))) + r.choice(heads[mark])
        value = r.choice(
            [b"\0\0", b"\1\0", b"\x08\0", b"\xff\xff", b"\xff" * 4, b"\0" * 4, r.getrandbits(32).to_bytes(4, "little")]
        )
        changed[at : at + len(value)] = value
    return bytes(changed)


def with_bytes(r: Random, content: bytes) -> bytes:
    """Bytes changed, cut, doubled."""
    changed = bytearray(content)
    for _ in range(r.choice([1, 1, 3, 20])):
        at = r.randrange(len(changed) + 1)
        kind = r.randrange(8)
        if kind < 4:
            changed[at : at + 1] = bytes([r.randrange(256)])
        elif kind == 4:
            del changed[at : at + r.randrange(200)]
        elif kind == 5:
            changed[at:at] = changed[at : at + r.randrange(200)]
        elif kind == 6:
            changed[at:at] = r.getrandbits(64).to_bytes(8, "little")
        else:
            changed[at : at + 4] = r.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
    return bytes(changed)


def mutant(seed: int, bases: Sequence[bytes]) -> bytes:
    """The file of a seed."""
    r = Random(seed)
    kind = r.randrange(8)
    if kind < 3:
        return write_zip(PROTO + generated(r) + b".")
    base = r.choice(bases)
    if kind == 3:
        return with_bytes(r, base)
    if kind == 4:
        return with_fields(r, base)
    records = records_of(base)
    pickled = records.pop("data.pkl")
    pickled = with_bytes(r, pickled) if kind == 5 else rearranged(r, pickled) if kind < 7 else pickled
    others = list(records.items())
    for _ in range(r.randrange(3) if kind == 7 else 0):
        name, data = r.choice(others)
        others.append(
            (
                r.choice([name, "constants.pkl", "byteorder", "../x", "x" * 999]),
                r.choice([data, data[:999] * 1000, b""]),
            )
        )
    return write_zip(pickled, others, r.choice([0, 0, 0, 1, 9]) if kind == 7 else 0)
