"""Tables on the terminal: what a stage has done goes to stderr, what a command was asked for to stdout."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from openpangu_sft.progress import console


def stdout() -> Console:
    """The console of what a command was asked for. A locale without the characters of it does not end the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(highlight=False)


def print_table(title: str, rows: dict[str, str], to: Console = console) -> None:
    """Names and values."""
    to.print(title, style="bold", soft_wrap=True, markup=False)
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    to.print(table)


def print_rows(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], to: Console = console) -> None:
    """A table with a head."""
    to.print(title, style="bold", soft_wrap=True, markup=False)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    to.print(table)
