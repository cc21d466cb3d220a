"""What the documents say: their commands, each with its mark, their links and their headings.

A command that is not run by a test says why, behind it or in a comment above its block:

    make sft        # needs NPUs
    <!-- run by tests/test_demo.py -->
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[1]

NEEDS = {
    "NPUs": "tests/test_mindspeed_training.py",  # on the stand-in
    "Docker": "tests/image",
    "compose": "tests/image/test_run.py",
    "a registry": "tests/image/test_registry.py",
    "several machines": "tests/test_cluster.py",
    "Slurm": "tests/test_cluster.py",
    "Kubernetes": "tests/test_cluster.py",
    "a mirror": "tests/test_setup.py",
    "the network": "tests/test_upstream_fetch.py",
    "an archive": "tests/image/test_hand_over.py",
    "root": ".ci/run",
    "hours": "tests/test_benchmarks.py",
    "your own clone": "tests/test_makefile.py",
}
"""What a command may need that a test has not, and what covers it instead."""

PROGRAMS = "make openpangu-sft docker apt-get export sbatch squeue kubectl python sha256sum git pytest jq npu-smi tail "
PROGRAMS += "mkdir cp tar cat df du hccn_tool rm"
_COMMAND = re.compile(
    rf"(?:[A-Z_]+=\S* +)*(?:(?:{'|'.join(PROGRAMS.split())}|\.venv/bin/\w+|scripts/[\w/]+\.sh)(?= \S| *#| *$))"
)
_MARK = re.compile(r"\bneeds (?P<needs>[\w ]+?)(?= *(?:-->|[.;:,)]|$))|\brun by (?P<by>[\w./]+\w)")


class Command(NamedTuple):
    """One command, its continuation lines joined.

    Attributes:
        mark: what it needs, or the path of the test that runs it; None where this is for test_docs.py to run.
    """

    document: Path
    line: int
    text: str
    mark: Optional[str]
    needs: bool

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}: {self.text}"


class Block(NamedTuple):
    """A code block: its first line's number, its lines, and the comment above it."""

    line: int
    lines: list[str]
    comment: str

    @property
    def is_commands(self) -> bool:
        return any(_COMMAND.match(line) for line in self.lines)


def documents() -> list[Path]:
    """Every Markdown file of the repository; those that a hand-over gets among them."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() or [
        str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"))
    ]
    return sorted(ROOT / name for name in names)


def blocks(document: Path) -> list[Block]:
    """Its code blocks, indented by four spaces or fenced."""
    found: list[Block] = []
    fence, before, comment = False, "", ""
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            fence = not fence
            if fence:
                found.append(Block(number + 1, [], comment))
        elif fence:
            found[-1].lines.append(line)
        elif line.startswith("    ") and (not before or before.startswith("    ")):
            if not before.startswith("    ") and not (found and found[-1].line + len(found[-1].lines) == number):
                found.append(Block(number, [], comment))
            found[-1].lines.append(line[4:])
        elif line.startswith("<!--"):
            comment = line
        elif line:
            comment = ""
        before = line if line.strip() else ""
    return found


def commands(document: Path) -> list[Command]:
    """The commands of all its blocks.

    Raises:
        ValueError: a block has commands and something else, so a command may have been missed.
    """
    found = []
    for block in blocks(document):
        if not block.is_commands:
            continue
        begin, joined = block.line, ""
        for number, line in enumerate(block.lines, block.line):
            joined += line.rstrip("\\").strip() + " "
            if line.endswith("\\"):
                continue
            text, _, comment = re.sub(r"\s+", " ", joined).strip().partition(" #")
            if text and not text.startswith("#"):
                if not _COMMAND.match(text):
                    raise ValueError(f"{document.relative_to(ROOT)}:{begin}: no command: {text}")
                mark = _MARK.search(comment) or _MARK.search(block.comment)
                needs = mark["needs"] if mark else None
                found.append(
                    Command(document, begin, text.strip(), needs or (mark["by"] if mark else None), bool(needs))
                )
            begin, joined = number + 1, ""
    return found


def inline_commands(document: Path) -> list[str]:
    """Calls of make and openpangu-sft in running text, whole ones only."""
    text = _prose(document)
    return [code for code in re.findall(r"`((?:make|openpangu-sft) [^`]+)`", text) if "…" not in code]


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", _prose(document), re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """As GitHub names headings."""
    plain = (re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings(document))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(document: Path) -> list[str]:
    """Targets of links; those to other sites are left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", _prose(document))
    return [link for link in found if not re.match(r"https?://|mailto:", link)]


def _prose(document: Path) -> str:
    """Without code blocks."""
    text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
