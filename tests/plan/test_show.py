"""make plan as a user sees it: on 80 columns, as JSON, with and without a dataset; what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from cli.test_main import run, sets
from conftest import ROOT, MakeRecipe, conversation, write_samples
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.plan.report import Report
from openpangu_sft.plan.show import show_report
from openpangu_sft.util.console import stdout

NARROW = {**os.environ, "COLUMNS": "80"}


def test_published_recipe_on_80_columns_with_nothing_there(tmp_path: Path) -> None:
    finished = run("plan", *sets(f"paths.cache={tmp_path}"), env=NARROW)
    assert finished.returncode == 0
    assert finished.stderr == ""
    text = finished.stdout
    above_paths, _, _ = text.partition("data and checkpoints")
    assert max(map(len, above_paths.splitlines())) <= 80
    assert "mindspeed, 1,155,912,192 parameters, 8 x NPU: DP 4, CP 2, TP 1, PP 1" in text
    for row in (r"weights +│ 2.15", r"gradients +│ 4.31", r"optimizer state +│ 1.61", r"logits +│ 2.93"):
        assert re.search(row, text), row
    assert "fits 32 GiB" in text
    assert "fits 64 GiB" in text
    assert re.search(r"│ now +│ DP 4, CP 2, TP 1, PP 1 │ 26 ", text)
    assert re.search(r"│ 1 +│ DP 8, CP 1, TP 1, PP 1 │ 3 \+ act\. ", text)
    assert "An estimate, not yet" in text
    assert "none yet in" in text
    assert "make merge" in text
    assert "TOKENS_PER_SECOND" in text
    assert not list(tmp_path.iterdir())


def test_lora_names_what_is_trained(tmp_path: Path) -> None:
    text = run("plan", *sets(f"paths.cache={tmp_path}", "train.lora.rank=32"), env=NARROW).stdout.replace("\n", " ")
    assert "LoRA of rank 32: 24,281,088 parameters in adapters are trained" in text
    assert "24,281,088 of adapters x 4: accumulated in" in text


def test_where_a_recipe_does_not_fit_auto_does(tmp_path: Path) -> None:
    shown = run("plan", "--memory", "16", *sets(f"paths.cache={tmp_path}"), env=NARROW).stdout
    assert "does not fit 16 GiB" in shown
    advised = re.search(r'to fit: SET="(.*?)"', shown.replace("\n", " "))
    assert advised
    again = run("plan", "--memory", "16", *sets(f"paths.cache={tmp_path}", *advised[1].split()), env=NARROW).stdout
    assert "fits 16 GiB, with" in again
    assert "auto, for devices of 16 GiB: DP" in again
    nothing = run("plan", "--memory", "2", *sets(f"paths.cache={tmp_path}"), env=NARROW).stdout
    assert "to fit: take more devices" in nothing


def test_the_table_in_the_document_is_what_is_shown(tmp_path: Path) -> None:
    """As far as it does not depend on where it is run."""
    text = (ROOT / "docs/plan.md").read_text("utf-8")
    block = text[text.index("    mindspeed, 1,155,912,192") : text.index("    data and checkpoints")]
    shown = run("plan", *sets(f"paths.cache={tmp_path}"), env=NARROW).stdout.partition("data and checkpoints")[0]
    assert [line.strip() for line in block.splitlines()] == [line.strip() for line in shown.splitlines()]


def test_json_is_on_stdout(tmp_path: Path) -> None:
    finished = run("plan", "--json", "--memory", "48", "--tokens-per-second", "1e5", *sets(f"paths.cache={tmp_path}"))
    assert (finished.returncode, finished.stderr) == (0, "")
    shown = json.loads(finished.stdout)
    assert shown["memory"]["fits"] == {"48": "yes"}
    assert shown["time"]["source"] == "given"
    assert shown["dataset"] is None


@pytest.mark.parametrize("option", ["--memory=0", "--memory=-1", "--tokens-per-second=0", "--memory=much"])
def test_a_size_that_is_none(option: str) -> None:
    finished = run("plan", option)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr


def test_with_a_dataset(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe("train.iterations=60")
    write_samples(recipe.path("samples") / "a.jsonl", [conversation(f"问 {n}", f"答 {n}") for n in range(200)])
    run_preprocess(recipe)
    counts = run_merge(recipe).counts
    report = Report(recipe, [32])
    assert report.counts == counts
    assert report.course is not None
    assert report.course.epochs == 120 / counts["packs"]
    show_report(report, stdout())
    shown = capsys.readouterr().out
    assert f"{counts['packs']:,} packs" in shown
    longer = Report(make_recipe("data.seq_length=256"), [32])
    assert longer.warnings[0] == "the dataset has packs of 128 tokens, data.seq_length is 256 -> make merge"


def test_half_a_dataset_is_refused(make_recipe: MakeRecipe) -> None:
    directory = make_recipe().path("dataset")
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps(vars(Manifest("dataset", files={"a": {"size": 3}}))))
    finished = run("plan", "--recipe", "recipes/demo.yaml", *sets(f"paths.dataset={directory}"))
    assert finished.returncode == 1
    (line,) = finished.stderr.strip().splitlines()
    assert str(directory) in line
    assert " -> " in line
