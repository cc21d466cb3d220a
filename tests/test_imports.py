"""Imports point downwards, by the floors in docs/architecture.md, and form no circle."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ROOT / "src/openpangu_sft"

Import = tuple[str, str]
"""Two modules, as checkpoint.hf: the first imports the second."""


@cache
def floors() -> dict[str, int]:
    """The floor of each room, 0 the lowest, as the document lists them from the top."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    block = re.search(r"<!-- floors -->\n(.*?)<!-- /floors -->", text, re.DOTALL)
    assert block
    lines = [line.split() for line in block[1].splitlines() if line.strip()]
    return {room.rstrip("/"): floor for floor, line in enumerate(reversed(lines)) for room in line}


def room_of(module: str) -> str:
    """The folder of a module: training/mindspeed of training.mindspeed.flags."""
    folder = "/".join(module.split("."))
    while not (CODE / folder).is_dir():
        folder = folder.rpartition("/")[0]
    return folder


@cache
def imports() -> frozenset[Import]:
    """All imports of our own modules, those inside of functions too."""
    found = set()
    for path in CODE.rglob("*.py"):
        module = ".".join(path.relative_to(CODE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openpangu_sft"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("openpangu_sft")]
            found |= {(module, imported) for name in names if (imported := _module(name)) not in ("", module)}
    return frozenset(found)


def _module(name: str) -> str:
    """The module that a dotted name lies in, without openpangu_sft; empty for the package's own version."""
    parts = name.split(".")[1:]
    while parts and not ((CODE / Path(*parts)).with_suffix(".py").is_file() or (CODE / Path(*parts)).is_dir()):
        parts.pop()
    return ".".join(parts)


def test_every_room_is_on_a_floor() -> None:
    rooms = {room_of(module) for pair in imports() for module in pair} - {""}
    assert rooms == set(floors())


def test_no_import_points_upwards() -> None:
    above = []
    for importer, imported in sorted(imports()):
        here, there = room_of(importer), room_of(imported)
        if here and here != there and floors()[here] <= floors()[there]:
            above.append(f"{importer} imports {imported}")
    assert not above


def test_modules_form_no_circle() -> None:
    imported = defaultdict(set)
    for importer, name in imports():
        imported[importer].add(name)
    left = set(imported)
    while leaves := {module for module in left if not imported[module] & left}:
        left -= leaves
    assert not left, f"a circle goes through {sorted(left)}"


def test_the_test_sees_imports() -> None:
    """A change of this test that finds nothing must not pass."""
    assert len(imports()) > 300
    assert ("training.stage", "training.run.launch") in imports()
