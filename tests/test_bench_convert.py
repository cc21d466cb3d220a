"""The conversion benchmark runs, on a model that takes no time, and counts what it says it counts."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from benchmarks.convert import Row, main
from benchmarks.measure import Measured

TINY = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
    "model.num_query_groups=2", "model.kv_channels=16", "model.vocab_size=512", "data.seq_length=128",
    "parallel.context=1",
]  # fmt: skip


def test_a_run_with_a_tiny_model(capfd: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(main, ["--repeat", "1", *(f"--set={setting}" for setting in TINY)])
    assert result.exit_code == 0, result.exception
    rows = re.findall(r"^\| (.*?) +\| +([\d,]+) MB \| +([\d.]+) \| +([\d.]+) \|", result.output, re.M)
    conversions = [(f"HF → mcore, {name}", f"mcore, {name} → HF") for name in ("TP 1 PP 1", "TP 2 PP 2")]
    assert [row[0] for row in rows] == ["copy, fsync", *(title for pair in conversions for title in pair)]
    assert rows[0][3] == "1.00"
    assert all(float(row[2]) > 0 for row in rows[1:])
    assert result.output.count("x copy (at most 2.5: ") == 4


def test_least_and_middle_seconds_and_most_memory() -> None:
    copy = Row("copy", 1_000_000_000, [Measured(2.0, 5, 1), Measured(1.0, 6, 2)])
    row = Row("x", 1, [Measured(4.0, 3_000_000, 900_000_001), Measured(2.0, 0, 0), Measured(3.0, 0, 0)])
    assert (row.best, row.median, row.memory) == (2.0, 3.0, 900_000_001)
    assert row.cells(copy)[2:6] == ["2.00", "2.00", "2.00", "500"]
    assert row.reach(copy) == "x: 2.00 x copy (at most 2.5: yes), 900 MB without files (at most 1,000 MB: yes)"
    assert "NO" in Row("x", 1, [Measured(2.6, 0, 0)]).reach(copy)
