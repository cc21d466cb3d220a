"""Hostile checkpoint files, and what the reader does with each: in a child process with 1 GB of memory and 10 s.

`python tests/hostile.py --inputs 100000 [FILE…]` mutates the files given and some of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from openpangu_sft.checkpoint.files.inert import _CONSTANTS, _MAKERS
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.util.errors import UserError

MEMORY, SECONDS = 1 << 30, 10
BATCH = 200
PROTO = b"\x80\x02"

Random = random.Random


# Opcodes.


def text(value: str) -> bytes:
    """A string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value: int) -> bytes:
    """An integer."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)[:255]
    return b"\x8a" + bytes([len(data)]) + data


def named(name: str) -> bytes:
    """A class or function, by its name with dots."""
    module, _, own = name.rpartition(".")
    return b"c" + f"{module}\n{own}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    """A tuple of any length."""
    return b"(" + b"".join(values) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    """A call."""
    return named(name) + tuple_of(*arguments) + b"R"


def encoded(data: bytes) -> bytes:
    """Bytes, as protocol 2 has them."""
    return call("_codecs.encode", text(data.decode("latin1")), text("latin1"))


def storage(key: str = "0", elements: int = 4, kind: str = "FloatStorage") -> bytes:
    """A persistent id."""
    return tuple_of(text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), number(elements)) + b"Q"


def tensor(of: bytes, offset: int, size: Sequence[int], stride: Sequence[int]) -> bytes:
    """A tensor as torch.save writes it."""
    shape, steps = (tuple_of(*map(number, values)) for values in (size, stride))
    more = b"\x89" + call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", of, number(offset), shape, steps, more)


def dtype(name: str, order: str = "<", fields: Sequence[bytes] = (b"N", b"N", b"N")) -> bytes:
    """numpy's dtype; fields: subdtype, names and fields of its state. The flags, which say “objects”, are cleared."""
    size = number(-1 if fields[1] == b"N" else int(name.strip("V") or 0))
    state = tuple_of(number(3), text(order), *fields, size, number(-1 if fields[1] == b"N" else 1), number(0))
    return call("numpy.dtype", text(name), b"\x89", b"\x88") + state + b"b"


def state_of_array(of: bytes, shape: Sequence[int], data: bytes) -> bytes:
    """Sets dtype, shape and content of a numpy array; data: opcodes."""
    return tuple_of(number(1), tuple_of(*map(number, shape)), of, b"\x89", data) + b"b"


def array(of: bytes, shape: Sequence[int], data: bytes) -> bytes:
    """numpy's array, as its `__reduce__` writes it."""
    made = call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), tuple_of(number(0)), encoded(b"b"))
    return made + state_of_array(of, shape, data)


# Files.


def write_zip(
    pickled: bytes, records: Iterable[tuple[str, bytes]] = (("data/0", bytes(16)),), deflated: int = 0
) -> bytes:
    """A file around a pickle, as torch.save writes it; the first `deflated` records are compressed."""
    stream = BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")  # two records of one name
        for place, (name, data) in enumerate([("data.pkl", pickled), *records, ("version", b"3\n")]):
            kind = zipfile.ZIP_DEFLATED if place < deflated else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, kind)
    return stream.getvalue()


def records_of(content: bytes) -> dict[str, bytes]:
    """Those of a whole file, without the name of the archive."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_bases(directory: Path) -> None:
    """Writes files as torch.save writes them, to be mutated. Imports torch."""
    import torch

    generator = np.random.RandomState(1)
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    args = Namespace(lr=1e-5, dtype=torch.bfloat16, big=2**70, names=["a"], loss=np.float64(1), shape=torch.Size([2]))
    rng = {"python": random.getstate()[1][:9], "numpy": generator.randint(9, size=5), "torch": torch.zeros(9).byte()}
    torch.save({"args": args, "model": module.state_dict(), "rng_state": [rng]}, directory / "model.pt")
    torch.save({"optimizer": optimizer.state_dict(), "bytes": [b"", b"\xff"], "set": {1, "a"}}, directory / "state.pt")


# Generated pickles.

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


# Reading.


def use(value: Any) -> None:
    """Touches all that was read, as those do who copy it."""
    if isinstance(value, np.ndarray):
        np.array(value).tobytes()
    elif isinstance(value, (dict, Namespace)):
        list(map(use, (value if isinstance(value, dict) else vars(value)).values()))
    elif isinstance(value, (list, tuple, set)):
        list(map(use, value))


def outcome(content: bytes, path: Path) -> str:
    """read, refused, or what went wrong."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    path.write_bytes(content)
    try:
        use(load_checkpoint_file(path))
    except UserError as error:
        hidden = error.__context__
        whole = len(str(error).splitlines()) == 1 and str(error).isprintable()
        return "refused" if whole and not isinstance(hidden, (MemoryError, RecursionError)) else f"said {error}"
    except BaseException:
        return traceback.format_exc()
    return "read"


def _child(contents: Callable[[int], bytes], numbers: Sequence[int], path: Path, write: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for one in numbers:
        os.write(write, json.dumps(outcome(contents(one), path)[-3000:]).encode() + b"\n")


def outcomes(contents: Callable[[int], bytes], numbers: Sequence[int], path: Path) -> Iterator[tuple[int, str]]:
    """Reads files in child processes, each of which reads up to `BATCH` of them.

    Args:
        contents: gives the bytes of a numbered file.
        path: where it is written.
    """
    done = 0
    while done < len(numbers):
        batch = numbers[done : done + BATCH]
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                _child(contents, batch, path, write)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            said = [json.loads(line) for line in stream]
        status = os.waitpid(child, 0)[1]
        if len(said) < len(batch):
            said.append(f"the process ended with status {status}")
        yield from zip(batch, said)
        done += len(said)


def main() -> None:
    """Prints how many files were read and refused, and each that did something else; exits with their number."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as-they-are", action="store_true", help="read the files, and mutate nothing")
    parser.add_argument("files", type=Path, nargs="*")
    asked = parser.parse_args()
    bases = [path.read_bytes() for path in asked.files]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as made:
        target = Path(made, "x.pt")
        if asked.as_they_are:
            found = list(outcomes(lambda one: bases[one], range(len(bases)), target))
            print(json.dumps([said for _, said in found]))
            return
        if not os.fork():  # torch would take more address space than the readers may have
            try:
                write_bases(Path(made))
            finally:
                os._exit(0)
        os.wait()
        bases += [path.read_bytes() for path in sorted(Path(made).iterdir())]
        seeds = range(asked.seed, asked.seed + asked.inputs)
        for seed, said in outcomes(lambda seed: mutant(seed, bases), seeds, target):
            counts[said if said in ("read", "refused") else "wrong"] += 1
            if said not in ("read", "refused"):
                print(f"seed {seed}: {said}", file=sys.stderr)
    print(json.dumps(counts))
    sys.exit(min(counts["wrong"], 100))


if __name__ == "__main__":
    main()
