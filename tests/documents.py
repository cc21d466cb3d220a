"""What the documents say: their commands, each with its mark, their links and their headings.

A command that is not run by a test says why, behind it or in a comment above its block:

    make sft        # needs NPUs
    <!-- run by tests/demo/test_run.py -->
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple, Optional
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
_MARKDOWN = MarkdownIt().enable("table")

NEEDS = {
    "NPUs": "tests/training/mindspeed/test_process.py",  # on the stand-in
    "Docker": "tests/image",
    "compose": "tests/image/test_run.py",
    "a registry": "tests/image/test_registry.py",
    "several machines": "tests/training/mindspeed/test_cluster.py",
    "Slurm": "tests/training/mindspeed/test_cluster.py",
    "Kubernetes": "tests/training/mindspeed/test_cluster.py",
    "a mirror": "tests/scripts/test_setup.py",
    "the network": "tests/training/mindspeed/test_fetch.py",
    "an archive": "tests/image/test_hand_over.py",
    "root": ".ci/run",
    "hours": "tests/test_benchmarks.py",
    "your own clone": "tests/scripts/test_makefile.py",
}
"""What a command may need that a test has not, and what covers it instead."""

PROGRAMS = "make openpangu-sft docker apt-get export sbatch squeue kubectl python sha256sum git pytest jq npu-smi tail "
PROGRAMS += "mkdir cp tar cat df du hccn_tool rm"
_COMMAND = re.compile(
    rf"(?:[A-Z_]+=\S* +)*(?:(?:{'|'.join(PROGRAMS.split())}|\.venv/bin/[\w-]+|scripts/[\w/]+\.sh)(?= \S| *#| *$))"
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
    return sorted({ROOT / name for name in names})


def parsed(document: Path) -> list[Token]:
    """Its parts as CommonMark has them, with tables."""
    return _MARKDOWN.parse(document.read_text("utf-8"))


def blocks(document: Path) -> list[Block]:
    """Its code blocks, indented or fenced."""
    found, before = [], ""
    for token in parsed(document):
        if token.type in ("code_block", "fence") and token.map:
            found.append(Block(token.map[0] + 1 + (token.type == "fence"), token.content.splitlines(), before))
        before = token.content if token.type == "html_block" else ""
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


def inline(document: Path) -> list[Token]:
    """What stands in its running text: texts, code, links."""
    return [child for token in parsed(document) for child in token.children or []]


def inline_commands(document: Path) -> list[str]:
    """Calls of make and openpangu-sft in running text, whole ones only."""
    codes = [token.content for token in inline(document) if token.type == "code_inline"]
    return [code for code in codes if re.match(r"(make|openpangu-sft) ", code) and "…" not in code]


def headings(document: Path) -> list[str]:
    tokens = parsed(document)
    return [text.content for head, text in zip(tokens, tokens[1:]) if head.type == "heading_open"]


def anchors(document: Path) -> set[str]:
    """As GitHub names headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(document)}


def links(document: Path) -> list[str]:
    """Targets of links; those to other sites are left out."""
    found = [str(token.attrs["href"]) for token in inline(document) if token.type == "link_open"]
    return [unquote(link) for link in found if not re.match(r"https?://|mailto:", link)]
