"""Consent to the Python files beside a tokenizer: the recipe has their sha256, or the user was asked.

Which code transformers would load: AutoTokenizer.from_pretrained of 4.53.2. It takes any class of its own that
tokenizer_class names, and only without one does it follow config.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from openpangu_sft.artifacts.artifact import sha256_of
from openpangu_sft.util.errors import UserError, printable

Trust = Union[bool, Mapping[str, str]]  # `tokenizer.trust_remote_code`: sha256 by file name, or whether to ask
YES = "OPENPANGU_YES"
_agreed: set[str] = set()


def may_run(directory: Path, trust: Trust) -> bool:
    """Whether transformers is to run the Python files of a checkpoint directory; True asks on the terminal, once.

    Raises `UserError` as `classes_of`, and for files that were not agreed to, or that have another sha256 or none in
    the recipe, and for classes that are in no file of the directory.
    """
    classes = classes_of(directory)
    if not trust or not classes:
        return False
    sums = _sums(directory)
    for name in classes:
        file = re.fullmatch(r"(\w+)\.\w+", str(name))
        if not file or f"{file[1]}.py" not in sums:
            remedy = "put the file here, and name it as file.Class"
            raise UserError(f"auto_map names {name}: no class of a Python file here", where=directory, remedy=remedy)
    if isinstance(trust, Mapping):
        for name, found in sums.items():
            if trust.get(name) != found:
                remedy = "read it, then put this sum into tokenizer.trust_remote_code; or get the file again"
                raise UserError(f"its sha256 is {found}, not the recipe's", where=directory / name, remedy=remedy)
    elif os.environ.get(YES) != "1":
        _ask(directory, json.dumps(sums))
        if _sums(directory) != sums:
            raise UserError("its Python files changed meanwhile", where=directory, remedy="read them again")
    return True


def classes_of(directory: Path) -> list[Any]:
    """The classes of its own that a tokenizer names; raises `UserError` where its tokenizer_class is no tokenizer."""
    path = directory / "tokenizer_config.json"
    import transformers  # slow, and not every stage needs it
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Base

    try:
        config = dict(json.loads(path.read_text("utf-8")))
        kind = str(config.get("tokenizer_class"))
        found = getattr(transformers, kind, Base)  # from_pretrained of a model would unpickle its adapter
    except (ValueError, TypeError, RecursionError, RuntimeError, ImportError) as error:
        raise UserError(f"the tokenizer does not load: {error}", where=path, remedy="check its files") from None
    if kind == "None" or not isinstance(found, type) or not issubclass(found, Base):
        raise UserError(f"tokenizer_class is {kind}: no tokenizer", where=path, remedy="get the file again")
    classes = config.get("auto_map") or ()
    classes = classes.get("AutoTokenizer") or () if isinstance(classes, dict) else classes
    return [name for name in classes if name is not None]


def _sums(directory: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(directory.glob("*.py")) if path.is_file()}


def _ask(directory: Path, files: str) -> None:
    """Asks for consent to these files, which is kept in the home directory: one in the data could be forged."""
    home = os.environ.get("XDG_STATE_HOME") or f"{os.environ.get('HOME', os.devnull)}/.local/state"
    kept = Path(home, "openpangu-sft/trusted_code")
    with contextlib.suppress(OSError):
        _agreed.update(kept.read_text("utf-8", "replace").splitlines())
    if files in _agreed:
        return
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        remedy = "read it, then give YES=1 (--yes), or the recipe these sums as tokenizer.trust_remote_code"
        raise UserError(f"its Python code would be run: {files}", where=directory, remedy=remedy)
    print(f"{printable(str(directory))} has Python code, with this sha256: {files}", file=sys.stderr)
    print("Read it first. Run it now and from now on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("its Python code is not run", where=directory, remedy="read it, then agree to it")
    _agreed.add(files)
    with contextlib.suppress(OSError):  # asked again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a") as file:
            file.write(f"{files}\n")
