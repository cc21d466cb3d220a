"""On which tree the suites that CI cannot run have passed: passed.json, which `make test-upstream` and the like write.

A tree is named by the content of all files that the suite depends on. `make test` says which entry is of another tree.

Run as: python tests/stamp.py     one line for each entry that is not of this tree
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests/passed.json"

_CODE = ("src", "patches", "recipes", "tests")
_IMAGE = (*_CODE, "Dockerfile", "Makefile", "docker-compose.yml", "examples", "locks", "pyproject.toml", "scripts")
SUITES = {"test-upstream": _CODE, "test-image": _IMAGE, "test-image-arm64": _IMAGE}
"""The folders and files that a suite, a Make target, depends on."""


def tree(suite: str, root: Path = ROOT) -> Optional[str]:
    """sha256 over names and content of what the suite depends on, as it is now; None outside a clone."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SUITES[suite]]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode:
        return None
    total = hashlib.sha256()
    for name in sorted(set(listed.stdout.split("\0"))):
        if (root / name).is_file() and Path(name) != FILE.relative_to(ROOT):
            total.update(f"{name}\0{hashlib.sha256((root / name).read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Entries by suite; none where there is no file."""
    content: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return content


def stale(root: Path = ROOT) -> list[str]:
    """A line for each suite that has not passed on this tree."""
    entries = read(root / FILE.relative_to(ROOT))
    lines = []
    for suite in SUITES:
        now, entry = tree(suite, root), entries.get(suite)
        if now and (not entry or entry["tree"] != now):
            when = f"last passed on another tree, {entry['date']}" if entry else "has not passed yet"
            lines.append(f"make {suite.replace('-arm64', ' ARCH=arm64')}: {when} (tests/passed.json)")
    return lines


class Stamp:
    """A pytest plugin that enters a suite when all of it has passed, and nothing was skipped or left out."""

    def __init__(self, suite: str, file: Path = FILE) -> None:
        self.suite, self.file, self.began, self.tree = suite, file, time.monotonic(), tree(suite)

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        """Writes the entry, or says why there is none."""
        counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "skipped", "deselected")}
        if exitstatus or not counts["passed"] or counts["skipped"] or counts["deselected"]:
            terminalreporter.write_line(
                f"{self.file.name} keeps its entry: {counts}, not all of {self.suite} has passed"
            )
        elif not self.tree or self.tree != tree(self.suite):
            terminalreporter.write_line(
                f"{self.file.name} keeps its entry: the tree has changed meanwhile, or is no clone"
            )
        else:
            entry = {
                "tree": self.tree,
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                "passed": counts["passed"],
                "seconds": round(time.monotonic() - self.began),
                "python": platform.python_version(),
            }
            entries = {**read(self.file), self.suite: entry}
            self.file.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n", "utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --stamp."""
    parser.addoption("--stamp", choices=list(SUITES), help="enter this suite in tests/passed.json when all has passed")


def pytest_configure(config: pytest.Config) -> None:
    """Makes the stamp of a suite; not in workers."""
    if (suite := config.getoption("--stamp")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Stamp(suite))


if __name__ == "__main__":
    for line in stale():
        print(line)
