"""tests/passed.json: entered only when all of a suite has passed, and missed when the tree is another one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Callable

import pytest

import stamp
from stamp import FILE, ROOT, SUITES, Stamp, stale, tree


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with a file in each folder that a suite depends on, and one elsewhere."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for name in ("src/a.py", "patches/a.patch", "recipes/a.yaml", "tests/a.py", "docs/a.md", "Dockerfile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def edit(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text("other")


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        *((edit(name), True) for name in ("src/a.py", "patches/a.patch", "recipes/a.yaml", "tests/a.py", "src/new.py")),
        (lambda root: (root / "src/a.py").rename(root / "src/b.py"), True),
        (lambda root: (root / "src/a.py").unlink(), True),
        *((edit(name), False) for name in ("docs/a.md", "Dockerfile", str(FILE.relative_to(ROOT)))),
    ],
)
def test_a_tree_is_named_by_what_the_suite_depends_on(
    clone: Path, change: Callable[[Path], object], changes: bool
) -> None:
    before = tree("test-upstream", clone)
    change(clone)
    assert (tree("test-upstream", clone) != before) == changes


def test_the_image_depends_on_more(clone: Path) -> None:
    before = tree("test-image", clone)
    edit("Dockerfile")(clone)
    assert tree("test-image", clone) != before


def test_outside_a_clone_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert stale(tmp_path) == []


def test_a_suite_is_missed_until_it_passes_on_this_tree(clone: Path) -> None:
    assert [line.split(":")[0] for line in stale(clone)] == [
        "make test-upstream",
        "make test-image",
        "make test-image ARCH=arm64",
    ]
    entries = {suite: {"tree": tree(suite, clone), "date": "2026-01-02"} for suite in SUITES}
    (clone / FILE.relative_to(ROOT)).write_text(json.dumps(entries))
    assert stale(clone) == []
    edit("recipes/a.yaml")(clone)
    assert all("another tree, 2026-01-02" in line for line in stale(clone))
    assert len(stale(clone)) == len(SUITES)


class Reporter:
    def __init__(self, **counts: int) -> None:
        self.stats = {name: [None] * count for name, count in counts.items()}
        self.lines: list[str] = []

    def write_line(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("exitstatus", "counts"),
    [
        (1, {"passed": 3, "failed": 1}),
        (0, {"passed": 3, "skipped": 1}),
        (0, {"passed": 3, "deselected": 1}),
        (5, {}),
        (0, {"deselected": 2}),
    ],
)
def test_only_what_has_passed_as_a_whole_is_entered(tmp_path: Path, exitstatus: int, counts: dict[str, int]) -> None:
    reporter = Reporter(**counts)
    Stamp("test-upstream", tmp_path / "passed.json").pytest_terminal_summary(reporter, exitstatus)
    assert not (tmp_path / "passed.json").exists()
    assert "not all of test-upstream has passed" in reporter.lines[0]


def test_an_entry_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "passed.json"
    file.write_text('{"test-image": {"tree": "1"}}')
    Stamp("test-upstream", file).pytest_terminal_summary(Reporter(passed=3), 0)
    entries = json.loads(file.read_text())
    assert entries["test-image"] == {"tree": "1"}
    assert entries["test-upstream"]["tree"] == tree("test-upstream")
    assert entries["test-upstream"]["passed"] == 3


def test_a_tree_that_changes_meanwhile_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, running = Reporter(passed=3), Stamp("test-upstream", tmp_path / "passed.json")
    monkeypatch.setattr(stamp, "tree", lambda suite: "other")
    running.pytest_terminal_summary(reporter, 0)
    assert not (tmp_path / "passed.json").exists()
    assert "has changed" in reporter.lines[0]
