"""Consent to the Python files beside a tokenizer: the recipe has their sha256, or the user was asked."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Union

from openpangu_sft.artifacts.artifact import sha256_of
from openpangu_sft.recipe.model_config import CONFIG
from openpangu_sft.util.errors import UserError, printable

Trust = Union[bool, Mapping[str, str]]  # `tokenizer.trust_remote_code`: sha256 by file name, or whether to ask
YES = "OPENPANGU_YES"


def may_run(directory: Path, trust: Trust) -> bool:
    """Whether transformers may run the Python files of a checkpoint directory; True asks on the terminal, once.

    Raises `UserError` for files that were not agreed to, or that have another sha256 or none in the recipe, and for
    classes that are in another repository.
    """
    if not trust:
        return False
    for name in ("tokenizer_config.json", CONFIG):
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):  # said when it is loaded
            if "--" in str(json.loads((directory / name).read_bytes()).get("auto_map")):  # repository--module.class
                remedy = "put the Python file here, and its class without the repository"
                raise UserError("auto_map names code in another repository", where=directory / name, remedy=remedy)
    sums = {path.name: sha256_of(path) for path in sorted(directory.glob("*.py"))}
    if isinstance(trust, Mapping):
        for name, found in sums.items():
            if trust.get(name) != found:
                remedy = "read it, then put this sum into tokenizer.trust_remote_code; or get the file again"
                raise UserError(f"its sha256 is {found}, not the recipe's", where=directory / name, remedy=remedy)
    elif sums and os.environ.get(YES) != "1":
        _ask(directory, json.dumps(sums))
    return True


def _ask(directory: Path, files: str) -> None:
    """Asks for consent to these files, which is kept in the home directory: one in the data could be forged."""
    kept = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state", "openpangu-sft/trusted_code")
    with contextlib.suppress(OSError, RuntimeError):  # nobody's home
        kept = kept.expanduser()
        if files.encode() in kept.read_bytes().splitlines():
            return
    if sys.stdin and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{printable(str(directory))} has Python code, with this sha256: {files}", file=sys.stderr)
        print("Read it first. Run it now and from now on? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("its Python code is not run", where=directory, remedy="read it, then agree to it")
        with contextlib.suppress(OSError):  # asked again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            with kept.open("a") as file:
                file.write(f"{files}\n")
        return
    remedy = "read it, then give YES=1 (--yes), or the recipe these sums as tokenizer.trust_remote_code"
    raise UserError(f"its Python code would be run: {files}", where=directory, remedy=remedy)
