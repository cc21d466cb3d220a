"""Which raw files there are: directories as people keep them and as the hub lays them out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from openpangu_sft.conversations.files import raw_files
from openpangu_sft.conversations.format import run_format
from openpangu_sft.recipe.load import load_recipe
from raw_data import LINES, OTHER, TALK, contents, put
from refusals import refusal_of

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"

# --- Directories


def test_the_layout_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    for number, record in enumerate((TALK, OTHER)):
        (raw / "data").mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([record])
        parquet.write_table(table, raw / "data" / f"train-0000{number}-of-00002.parquet")
    put(raw / "more" / "deep" / "b.jsonl", LINES)
    for name in ("README.md", ".gitattributes", "LICENSE", "dataset_infos.json", ".cache/x.bin", "data/README"):
        put(raw / name, "{}")
    manifest = run_format(load_recipe(DEMO, [f"paths.cache={tmp_path}"]))
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "more/deep/b.jsonl"]
    assert [*manifest.inputs] == [*manifest.counts["files"]] == names
    assert sorted(manifest.files) == [
        "data-train-00000-of-00002.jsonl",
        "data-train-00001-of-00002.jsonl",
        "more-deep-b.jsonl",
    ]
    said = capsys.readouterr().err.splitlines()
    assert "passed over: .cache, .gitattributes, LICENSE, README.md, data/README, dataset_infos.json" in said
    assert not any("splits" in line for line in said)


def test_what_save_to_disk_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list([TALK, OTHER])
    whole.save_to_disk(tmp_path / "one")
    (file,) = raw_files(tmp_path / "one")
    assert contents(file.path) == [TALK, OTHER]
    assert file.samples == "data-00000-of-00001.jsonl"
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "two")
    put(tmp_path / "two" / "train" / "cache-0123.arrow", b"")
    capsys.readouterr()
    assert [file.samples for file in raw_files(tmp_path / "two")] == [
        "test-data-00000-of-00001.jsonl",
        "train-data-00000-of-00001.jsonl",
    ]
    passed, splits = capsys.readouterr().err.splitlines()
    assert passed.startswith(
        "passed over: dataset_dict.json, test/dataset_info.json, test/state.json, train/cache-0123"
    )
    assert splits.startswith("all splits become samples: test, train; ")


def test_names_that_are_like_those_of_descriptions_are_data(tmp_path: Path) -> None:
    put(tmp_path / "README.jsonl", LINES)
    put(tmp_path / "license" / "a.jsonl", LINES)
    assert len(raw_files(tmp_path)) == 2


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "raw" / "a" / "b.jsonl", LINES)
    put(tmp_path / "raw" / "a-b.json.gz", json.dumps([TALK]))
    message = refusal_of(run_format, load_recipe(DEMO, [f"paths.cache={tmp_path}"]))
    assert "a/b.jsonl and a-b.json.gz would both become a-b.jsonl" in message


def test_links_to_directories_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "there" / "a.jsonl", LINES)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "here").symlink_to(tmp_path / "there")
    assert [file.name for file in raw_files(tmp_path / "raw")] == ["here/a.jsonl"]
    (tmp_path / "there" / "back").symlink_to(tmp_path / "raw")
    assert "is a link to a directory that it lies in" in refusal_of(raw_files, tmp_path / "raw")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.txt", "write each conversation as a JSON object on a line of a .jsonl file"),
        ("a.tar.gz", "unpack or convert it, or move it away"),
        ("a.pt", "known are .jsonl, .json, .csv, .parquet, .arrow, each also with .gz or .zst"),
        ("a", "known are .jsonl"),
    ],
)
def test_other_kinds_are_refused_with_the_way_out(tmp_path: Path, name: str, remedy: str) -> None:
    put(tmp_path / "deep" / name, "x")
    message = refusal_of(raw_files, tmp_path)
    assert message.startswith(f"{tmp_path}/deep/{name}: unknown kind of file ")
    assert remedy in message.split(" -> ")[1]


def test_the_description_of_llama_factory_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", LINES)
    put(tmp_path / "dataset_info.json", json.dumps({"mine": {"file_name": "a.jsonl", "ranking": True}}))
    assert [file.name for file in raw_files(tmp_path)] == ["a.jsonl"]
