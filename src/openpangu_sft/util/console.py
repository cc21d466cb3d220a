"""Progress of long work: a bar on a terminal, plain lines in a log. Everything goes to stderr."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False)

MB = 1_000_000
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields a function to call with (units done since the last call, a note shown behind the bar)."""
    if console.is_terminal:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        with bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(units: int, note: str = "") -> None:
                bar.update(task, advance=units, note=note)

            yield advance
        return
    began, last_line, position = time.monotonic(), time.monotonic(), done

    def log(units: int, note: str = "") -> None:
        nonlocal last_line, position
        position += units
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            left = (now - began) / max(position - done, 1) * (total - position)
            console.print(f"{what}: {position}/{total} {note} {left:.0f} s left".replace("  ", " "), soft_wrap=True)

    yield log


@contextlib.contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """The same for bytes, shown in MB. What it yields may be called from several threads."""
    done, lock = 0, threading.Lock()
    with progress(f"{what} (MB)", total // MB) as advance:

        def advance_bytes(units: int, note: str = "") -> None:
            nonlocal done
            with lock:
                advance((done + units) // MB - done // MB, note)
                done += units

        yield advance_bytes


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
