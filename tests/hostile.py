"""Hostile checkpoint files, and what the reader does with each: in a child process with 1 GB of memory and 10 s.

`python tests/hostile.py --inputs 100000 [FILE…]` mutates the files given and some of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mutants import mutant
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.util.errors import UserError

MEMORY, SECONDS = 1 << 30, 10
BATCH = 200


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
