"""Progress: lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from openpangu_sft.util import console as module
from openpangu_sft.util.console import progress


def test_a_log_gets_plain_lines_with_place_note_and_time_left(
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
        "training: 4/10 loss 1.0 33 s left",
        "training: 6/10 loss 1.0 30 s left",
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
