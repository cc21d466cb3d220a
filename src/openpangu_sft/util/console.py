"""Progress bars and tables. Everything goes to stderr but what a command was asked for: see `stdout`."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Callable, Optional

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from openpangu_sft.util.errors import TEXT, printable


class _Printable(Console):
    """What it prints may come from files: of control characters only its own reach the terminal."""

    def render(self, renderable: RenderableType, options: Optional[ConsoleOptions] = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, TEXT), style, control)


_console = partial(_Printable, markup=False, emoji=False, highlight=False)  # [x] and :x: may be in a path or an answer
console = _console(stderr=True)

MB = 1_000_000
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal; in a log a line every ten seconds. `what` names the unit too: `merge (packs)`.

    Yields a function to call with (units done since the last call, a note to show).
    """
    if console.is_terminal:
        text, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
        columns = (text, BarColumn(), MofNCompleteColumn(), note)
        with Progress(*columns, "ETA", TimeRemainingColumn(), console=console, transient=True) as bar:
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
            words = [f"{what}: {position}/{total}", note]
            if position > done:
                words.append(f"ETA {timedelta(seconds=round((now - began) / (position - done) * (total - position)))}")
            console.print(" ".join(filter(None, words)), soft_wrap=True)

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


def say(text: str) -> None:
    """Prints to stderr without wrapping: no path is broken."""
    console.print(text, soft_wrap=True)


def stdout() -> Console:
    """The console for what a command was asked for; characters that the locale does not have are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return _console()


def print_table(title: str, rows: Mapping[str, str], to: Console = console) -> None:
    """A table of names and values, without a head."""
    print_rows(title, (), list(rows.items()), to)


def print_rows(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], to: Console = console) -> None:
    """A table, with a head unless it is empty; wider than the console where a word is, so that no path is broken.

    Only the widest column is wrapped: rich narrows columns to less than their longest word, which it then cuts.
    """
    to.print(title, style="bold", soft_wrap=True)
    table = Table(*head, show_header=bool(head))
    rows = [[printable(cell, TEXT) for cell in row] for row in rows]  # here too, for their widths
    for row in rows:
        table.add_row(*map(Text, row))  # as text: a path may have brackets, which are markup in a str
    widths = [max(map(cell_len, column)) for column in zip(*filter(None, [head, *rows]))]
    for number, column in enumerate(table.columns):
        column.width = None if number == widths.index(max(widths)) else widths[number]
    least = to.measure(table, options=to.options.update(max_width=sys.maxsize)).minimum
    table.width = least if least > to.width else None
    to.print(table, soft_wrap=True)
