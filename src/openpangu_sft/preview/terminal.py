"""A preview in the terminal: tokens above their ids, bars under trained ones, so that it reads without colour."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from openpangu_sft.preview.segments import NEWLINE, PART, SPACE, Token, Turn
from openpangu_sft.preview.stage import Preview
from openpangu_sft.util.console import print_rows

INDENT = 4
TRAINED = "green"
UNDERLINE = "━"
LEGEND = (
    f"{UNDERLINE * 3} under a token: trained; none: ignored. {SPACE} is a space, {NEWLINE} a newline, "
    f"{PART} a part of the character that follows."
)


def show(preview: Preview, console: Console) -> None:
    """Prints samples, then numbers."""
    console.print(Text(LEGEND, "dim"))
    for segment in preview.segments:
        where = f"pack {segment.pack:,}, segment {segment.position:,}, from token {segment.offset:,}"
        share = f"{segment.length:,} tokens, {segment.trained:,} trained ({segment.trained / segment.length:.1%})"
        console.print()
        console.print(Text.assemble((f"sample {segment.sample:,}", "bold"), f"  {where}; {share}"))
        for turn in segment.turns:
            _show_turn(turn, console)
    console.print()
    figures = preview.figures
    values = max(len(figure.value) for figure in figures.single)
    rows = [(figure.name, figure.value.rjust(values), figure.note) for figure in figures.single]
    turns = figures.roles.note or ", ".join(f"{count:,} {role}" for role, count in figures.roles.bars.items())
    rows += [(each.title, "", each.note) for each in (figures.lengths, figures.fill)]
    rows.append((figures.roles.title, "", turns))
    print_rows(f"dataset: {preview.dataset}", (), rows, console)


def _show_turn(turn: Turn, console: Console) -> None:
    trained = f"  {turn.trained} of {len(turn.tokens)} trained" if turn.trained else "  ignored"
    console.print(Text.assemble("  ", (turn.role, "bold"), (trained, "dim")))
    lines: list[list[Token]] = [[]]
    for token in turn.tokens:
        used = sum(_width(before) + 1 for before in lines[-1])
        if used and (lines[-1][-1].ends_line or used + _width(token) > console.width - INDENT):
            lines.append([])
        lines[-1].append(token)
    for line in lines:
        _show_line(line, console)


def _show_line(tokens: list[Token], console: Console) -> None:
    """Up to three lines: texts, ids, bars under what is trained."""
    texts, ids, bars = Text(" " * INDENT), Text(" " * INDENT), Text(" " * INDENT)
    for token in tokens:
        width, text, number = _width(token), token.text, str(token.number)
        texts.append(text, f"bold {TRAINED}" if token.trained else "dim")
        texts.append(" " * (width - cell_len(text) + 1))
        ids.append(number.ljust(width) + " ", TRAINED if token.trained else "dim")
        bars.append((UNDERLINE if token.trained else " ") * width + " ", TRAINED)
    for line in (texts, ids, bars):
        line.rstrip()
        if line:
            console.print(line, soft_wrap=True)


def _width(token: Token) -> int:
    return max(cell_len(token.text), len(str(token.number)))
