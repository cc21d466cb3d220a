"""Parses the documents: commands with their marks, links and headings.

A command that no test runs is marked with the reason, after it or in a comment above its block:

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
    "an archive": "tests/image/test_bundle.py",
    "root": ".ci/run",
    "hours": "tests/test_benchmarks.py",
    "your own clone": "tests/scripts/test_makefile.py",
}
"""Requirements of commands that tests do not have, and what covers them instead."""

PROGRAMS = "make openpangu-sft docker apt-get export sbatch squeue kubectl python sha256sum git pytest jq npu-smi tail "
PROGRAMS += "mkdir cp tar cat df du hccn_tool rm"
_COMMAND = re.compile(
    rf"(?:[A-Z_]+=\S* +)*(?:(?:{'|'.join(PROGRAMS.split())}|\.venv/bin/[\w-]+|scripts/[\w/]+\.sh)(?= \S| *#| *$))"
)
_MARK = re.compile(r"\bneeds (?P<needs>[\w ]+?)(?= *(?:-->|[.;:,)]|$))|\brun by (?P<by>[\w./]+\w)")


class Command(NamedTuple):
    """One command, with continuation lines joined.

    Attributes:
        mark: what it needs, or the path of the test that runs it; None if test_docs.py runs it.
    """

    document: Path
    line: int
    text: str
    mark: Optional[str]
    needs: bool

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}: {self.text}"


class Block(NamedTuple):
    """A code block: number of its first line, its lines, and the comment above it."""

    line: int
    lines: list[str]
    comment: str

    @property
    def is_commands(self) -> bool:
        return any(_COMMAND.match(line) for line in self.lines)


def documents() -> list[Path]:
    """Every Markdown file of the repository; including those of an offline bundle."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() or [
        str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"))
    ]
    return sorted({ROOT / name for name in names})


def parsed(document: Path) -> list[Token]:
    return _MARKDOWN.parse(document.read_text("utf-8"))


def blocks(document: Path) -> list[Block]:
    """Code blocks, indented or fenced."""
    found, before = [], ""
    for token in parsed(document):
        if token.type in ("code_block", "fence") and token.map:
            found.append(Block(token.map[0] + 1 + (token.type == "fence"), token.content.splitlines(), before))
        before = token.content if token.type == "html_block" else ""
    return found


def commands(document: Path) -> list[Command]:
    """The commands of all blocks.

    Raises:
        ValueError: a block mixes commands with other lines, so a command may have been missed.
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
    """Inline tokens: text, code, links."""
    return [child for token in parsed(document) for child in token.children or []]


def inline_commands(document: Path) -> list[str]:
    """Complete calls of make and openpangu-sft in running text."""
    codes = [token.content for token in inline(document) if token.type == "code_inline"]
    return [code for code in codes if re.match(r"(make|openpangu-sft) ", code) and "…" not in code]


def headings(document: Path) -> list[str]:
    tokens = parsed(document)
    return [text.content for head, text in zip(tokens, tokens[1:]) if head.type == "heading_open"]


def anchors(document: Path) -> set[str]:
    """Anchors of headings, as on GitHub."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(document)}


def links(document: Path) -> list[str]:
    """Targets of links within the repository."""
    found = [str(token.attrs["href"]) for token in inline(document) if token.type == "link_open"]
    return [unquote(link) for link in found if not re.match(r"https?://|mailto:", link)]
