"""Progress in a log and on a terminal, and tables."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys

import pytest

from openpangu_sft.util import console as module
from openpangu_sft.util.console import print_rows, print_table, progress, say


def test_a_log_gets_plain_lines_with_position_note_and_eta(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("training", total=10, done=2) as advance:
        for _ in range(4):
            advance(1, "loss 1.0")
    captured = capsys.readouterr()
    assert captured.out == ""
    # 2 units in 11 s leave 6 units: 33 s; 4 units in 30 s leave 4 units: 30 s
    assert captured.err.splitlines() == [
        "training: 4/10 loss 1.0 ETA 0:00:33",
        "training: 6/10 loss 1.0 ETA 0:00:30",
    ]


def test_a_short_piece_of_work_writes_nothing_into_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("quick", total=3) as advance:
        advance(3, "")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    leader, follower = pty.openpty()
    program = (
        "from openpangu_sft.util.console import progress\n"
        "with progress('training', 4) as advance:\n"
        "    for _ in range(4): advance(1, 'loss 1.0'); input()"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    assert process.stdin
    screen, shown = b"", 0
    try:
        while block := os.read(leader, 4096):
            screen += block
            while f"{shown + 1}/4".encode() in screen:
                shown += 1
                process.stdin.write(b"next\n")
                process.stdin.flush()
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    text = screen.decode()
    assert "training" in text
    assert "━" in text
    assert "3/4" in text
    assert "loss 1.0" in text
    assert "ETA" in text


EVIL = "\x1b[31mred\x9b2J\u202e"
"""Control characters of a terminal, of seven and of eight bits, and one that turns the direction of text."""


def test_control_characters_of_a_file_reach_no_terminal() -> None:
    program = (
        "import sys\n"
        "from openpangu_sft.util.console import console, print_rows, print_table, progress, say, stdout\n"
        f"evil = {EVIL!r}\n"
        "say(evil)\n"
        "console.print(evil, style='bold')\n"
        "print_table(evil, {evil: evil})\n"
        "print_rows(evil, (evil,), [(evil,)], stdout())\n"
        "with progress(evil, 2) as advance: advance(1, evil)"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    screen = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while block := os.read(leader, 4096):
            screen += block
    os.close(leader)
    assert process.wait() == 0, screen.decode()
    text = screen.decode()
    assert text.count(r"\x1b[31mred\x9b2J\u202e") == 8
    assert "\x1b[31m" not in text
    assert not {"\x9b", "\u202e"} & set(text)
    assert "\x1b[1m" in text  # its own styles


PATH = f"/cache/{'a' * 60}/{'b' * 60}/model-00001-of-00002.safetensors"


def test_a_path_stays_in_one_piece_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    narrow = module._console(width=60)
    print_table(f"run: {PATH}", {"written": PATH, "told": "several words " * 20}, narrow)
    print_rows("files", ("file", "bytes"), [(PATH, "1")], narrow)
    print_rows("beside words", (), [("two words", "1", f"{PATH}: 1"), ("three words", "1", "others")], narrow)
    shown = capsys.readouterr().out
    assert shown.count(PATH) == 4
    assert f"run: {PATH}\n" in shown
    assert max(map(len, shown.splitlines())) < len(PATH) + 30  # words are wrapped all the same


def test_a_table_that_fits_is_no_wider_than_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("run", {"path": "/cache/run", "told": "several words " * 20}, module._console(width=60))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_brackets_in_a_path_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        "run: /data/[old]", {"path": "/data/[old]/run", "other": "/data/[/old]/:smile:"}, module._console(width=80)
    )
    shown = capsys.readouterr().out
    assert "run: /data/[old]\n" in shown
    assert "│ /data/[old]/run " in shown
    assert "│ /data/[/old]/:smile: " in shown


def test_brackets_and_colons_of_paths_and_answers_stay(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[/x] [bold] :car:"
    say(text)
    print_table(text, {"run": text})
    with progress(text, 1) as advance:
        advance(1, "")
    assert capsys.readouterr().err.count(text) == 3
