"""The stage `format`: what it leaves behind, what stops it, and that an earlier result outlives every failure."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from conftest import PATIENCE
from openpangu_sft.artifacts.artifact import Manifest, read_manifest
from openpangu_sft.conversations import format as format_stage
from openpangu_sft.conversations.conversation import parse_sample, reason_class
from openpangu_sft.conversations.format import run_format
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from refusals import refusal_of

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"instruction": "你好", "output": "好\u2028的"}
BAD = {"instruction": "a", "output": ""}
EMPTY = "message 2 (assistant) is empty"


def recipe(cache: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "demo.yaml", [f"paths.cache={cache}", *overrides])


def put(cache: Path, name: str, *records: Any) -> Path:
    """Writes a raw file; texts stand for lines as they are."""
    path = cache / "raw" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(records), "utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    else:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def test_one_samples_file_per_raw_file(tmp_path: Path) -> None:
    put(tmp_path, "b.json", GOOD, GOOD)
    put(tmp_path, "a.jsonl", GOOD)
    put(tmp_path, "c.parquet", {**GOOD, "history": None}, {**GOOD, "history": [["x", "y"]]})
    manifest = run_format(recipe(tmp_path))
    target = tmp_path / "dataset"
    assert sorted(path.name for path in target.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl", "manifest.json"]
    expected = {
        "meta_prompt": [""],
        "data": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好\u2028的"}],
    }
    assert lines_of(target / "a.jsonl") == [expected]
    assert lines_of(target / "b.jsonl") == [expected, expected]
    assert [len(sample["data"]) for sample in lines_of(target / "c.jsonl")] == [2, 4]
    assert "你好".encode() in (target / "a.jsonl").read_bytes()
    assert (target / "a.jsonl").read_bytes().count(b"\n") == 1
    assert manifest.counts == {
        "read": 5,
        "written": 5,
        "rejected": 0,
        "duplicates": 3,
        "reasons": {},
        "ignored_keys": {},
        "changes": {},
        "files": {
            "a.jsonl": {"read": 1, "written": 1, "rejected": 0, "duplicates": 0},
            "b.json": {"read": 2, "written": 2, "rejected": 0, "duplicates": 2},
            "c.parquet": {"read": 2, "written": 2, "rejected": 0, "duplicates": 1},
        },
    }


def test_keys_and_turns_that_were_changed_are_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": text, "name": "Ines"} for text in ("a", "b")]
    put(tmp_path, "a.jsonl", {"messages": [*turns, {"role": "assistant", "content": "c"}], "mood": 1, "id": 7}, GOOD)
    put(tmp_path, "b.jsonl", {**GOOD, "mood": 2, "output": "c"})
    assert "a.jsonl:1: unknown key mood: " in refusal_of(run_format, recipe(tmp_path))
    manifest = run_format(recipe(tmp_path, "data.ignore_keys=[mood]", "data.turns=lenient"))
    assert manifest.counts["ignored_keys"] == {"id": 1, "mood": 2, "name": 2}
    assert manifest.counts["changes"] == {"messages of one user in a row joined": 1}


def test_bad_examples_are_left_out_even_where_bad_records_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", {**GOOD, "label": False}, {**GOOD, "label": True})
    assert "a.jsonl:1: holds preference data (KTO: label)" in refusal_of(run_format, recipe(tmp_path))
    manifest = run_format(recipe(tmp_path, "data.preference=chosen"))
    assert (manifest.counts["written"], manifest.counts["rejected"]) == (1, 1)
    assert manifest.counts["reasons"] == {"a bad example, left out by data.preference=chosen": 1}


def test_only_bad_examples(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", {**GOOD, "label": False})
    for policy in ("refuse", "skip"):
        found = recipe(tmp_path, "data.preference=chosen", f"data.on_bad_sample={policy}")
        assert refusal_of(run_format, found).endswith("left out by data.preference=chosen -> add good examples")


def test_keys_and_changes_of_rejected_records_are_not_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": ""}]
    put(tmp_path, "a.jsonl", {"messages": turns, "id": 7}, {**GOOD, "source": "x"})
    manifest = run_format(recipe(tmp_path, "data.turns=lenient", "data.on_bad_sample=skip"))
    assert manifest.counts["rejected"] == 1
    assert (manifest.counts["ignored_keys"], manifest.counts["changes"]) == ({"source": 1}, {})


def test_columns_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", {"ask": "a", "reply": "b"})
    assert "name your columns in data.columns" in refusal_of(run_format, recipe(tmp_path))
    said = refusal_of(run_format, recipe(tmp_path, "data.columns={prompt: ask, response: replies}"))
    assert "unknown key reply" in said
    assert run_format(recipe(tmp_path, "data.columns={prompt: ask, response: reply}")).counts["written"] == 1
    put(tmp_path, "a.jsonl", GOOD)
    said = refusal_of(run_format, recipe(tmp_path, "data.columns={response: reply}"))
    assert said == "data.columns: no record has the column reply -> check its name against a record"


def test_the_manifest_says_what_made_the_samples(tmp_path: Path) -> None:
    raw = put(tmp_path, "a.json", GOOD)
    run_format(recipe(tmp_path, "data.source_format=alpaca"))
    manifest = read_manifest(tmp_path / "dataset", "samples", "")
    assert manifest.settings == {
        "data.source_format": "alpaca",
        "data.sources": [],
        "data.columns": {},
        "data.encoding": "utf-8",
        "data.on_bad_sample": "refuse",
        "data.ignore_keys": [],
        "data.turns": "strict",
        "data.preference": "refuse",
        "data.deduplicate": "no",
    }
    assert manifest.inputs == {"a.json": hashlib.sha256(raw.read_bytes()).hexdigest()}
    assert list(manifest.files) == ["a.jsonl"]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for cache in (tmp_path / "one", tmp_path / "two"):
        put(cache, "a.json", GOOD, BAD, 3)
        put(cache, "b.jsonl", BAD, GOOD)
        run_format(recipe(cache, "data.on_bad_sample=skip"))
    assert tree(tmp_path / "one" / "dataset") == tree(tmp_path / "two" / "dataset")


def test_a_single_file_may_be_the_raw_path(tmp_path: Path) -> None:
    raw = put(tmp_path, "talk.jsonl", GOOD)
    assert run_format(recipe(tmp_path, f"paths.raw={raw}")).counts["written"] == 1
    assert len(lines_of(tmp_path / "dataset" / "talk.jsonl")) == 1


def test_its_own_samples_are_a_source_too(tmp_path: Path) -> None:
    put(tmp_path, "a.json", GOOD, GOOD)
    run_format(recipe(tmp_path))
    run_format(recipe(tmp_path, "paths.raw=dataset/a.jsonl", "paths.samples=again"))
    assert (tmp_path / "again" / "a.jsonl").read_bytes() == (tmp_path / "dataset" / "a.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "place"), [("a.jsonl", "a.jsonl:2"), ("a.json", "a.json[1]"), ("a.parquet", "a.parquet:row 1")]
)
def test_a_bad_record_stops_the_stage(tmp_path: Path, name: str, place: str) -> None:
    put(tmp_path, name, GOOD, BAD, GOOD)
    what, remedy = refusal_of(run_format, recipe(tmp_path)).split(" -> ")
    assert what == f"{tmp_path / 'raw'}/{place}: {EMPTY}: there is nothing to train on but its end"
    assert "data.on_bad_sample=skip" in remedy
    assert not (tmp_path / "dataset").exists()
    assert not list(tmp_path.glob(".*.staging"))


def test_skip_puts_bad_records_aside_with_place_and_reason(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", GOOD, "{broken", BAD, '{"a": NaN}', {"messages": []}, 7)
    put(tmp_path, "b.json", BAD, GOOD)
    put(tmp_path, "c.jsonl", GOOD)
    manifest = run_format(recipe(tmp_path, "data.on_bad_sample=skip"))
    target = tmp_path / "dataset"
    rejects = lines_of(target / "rejects" / "a.jsonl")
    assert [(entry["file"], entry["place"]) for entry in rejects] == [("a.jsonl", str(line)) for line in range(2, 7)]
    assert [entry["record"] for entry in rejects] == ["{broken", BAD, '{"a": NaN}', {"messages": []}, 7]
    assert rejects[1]["reason"].startswith(EMPTY)
    assert lines_of(target / "rejects" / "b.jsonl")[0]["place"] == "[0]"
    assert not (target / "rejects" / "c.jsonl").exists()
    assert [path.name for path in sorted(target.glob("*.jsonl"))] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert manifest.counts["files"]["a.jsonl"] == {"read": 6, "written": 1, "rejected": 5, "duplicates": 0}
    assert {key: manifest.counts[key] for key in ("read", "written", "rejected")} == {
        "read": 9,
        "written": 3,
        "rejected": 6,
    }
    assert manifest.counts["reasons"][reason_class(EMPTY)] == 2
    assert manifest.counts["reasons"]["not valid JSON"] == 1
    assert sum(manifest.counts["reasons"].values()) == 6
    assert "rejects/a.jsonl" in manifest.files


def test_a_file_of_bad_records_alone_leaves_no_empty_samples_file(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", BAD)
    put(tmp_path, "b.jsonl", GOOD)
    run_format(recipe(tmp_path, "data.on_bad_sample=skip"))
    assert [path.name for path in (tmp_path / "dataset").glob("*.jsonl")] == ["b.jsonl"]


def test_nothing_but_bad_records_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", BAD, BAD, 3)
    said = refusal_of(run_format, recipe(tmp_path, "data.on_bad_sample=skip"))
    assert f"none of the 3 records is a sample; 2 x {reason_class(EMPTY)}" in said
    assert not (tmp_path / "dataset").exists()


def test_half_a_surrogate_pair_is_a_bad_record(tmp_path: Path) -> None:
    half = r'{"instruction": "a\ud83d", "output": "b"}'
    put(tmp_path, "a.jsonl", r'{"instruction": "a\ud83d\ude00", "output": "b"}', half)
    said = refusal_of(run_format, recipe(tmp_path))
    assert "holds half a character" in said
    said.encode("utf-8")
    run_format(recipe(tmp_path, "data.on_bad_sample=skip"))
    assert lines_of(tmp_path / "dataset" / "a.jsonl")[0]["data"][0]["content"] == "a😀"
    (reject,) = lines_of(tmp_path / "dataset" / "rejects" / "a.jsonl")
    assert reject["record"] == json.loads(half)


def test_rejects_hold_what_json_cannot(tmp_path: Path) -> None:
    put(tmp_path, "a.parquet", *({**record, "score": float("nan"), "raw": b"\xff"} for record in (GOOD, BAD)))
    run_format(recipe(tmp_path, "data.on_bad_sample=skip", "data.ignore_keys=[score,raw]"))
    (reject,) = lines_of(tmp_path / "dataset" / "rejects" / "a.jsonl")
    assert reject["reason"].startswith(EMPTY)
    assert "nan" in reject["record"]


def test_a_fixed_format_is_not_guessed(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", GOOD)
    assert "unknown key instruction" in refusal_of(run_format, recipe(tmp_path, "data.source_format=openai"))


@pytest.mark.parametrize("names", [("a.json", "a.jsonl"), ("a.jsonl", "a.parquet"), ("a.JSONL", "a.jsonl")])
def test_two_files_for_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        put(tmp_path, name, GOOD)
    if len(list((tmp_path / "raw").iterdir())) < 2:
        pytest.skip("this file system does not tell upper from lower case")
    assert "would both become" in refusal_of(run_format, recipe(tmp_path))


def test_missing_raw_path(tmp_path: Path) -> None:
    what, remedy = refusal_of(run_format, recipe(tmp_path)).split(" -> ")
    assert what.startswith(f"{tmp_path / 'raw'}: ")
    assert "paths.raw" in remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raw", "samples"),
    [("x", "x"), ("x/y", "x"), ("x/a.jsonl", "x"), ("x", "x/y"), ("x/../x", "./x"), ("link", "x"), ("link/y", "x")],
)
def test_raw_and_samples_must_not_lie_in_each_other(tmp_path: Path, raw: str, samples: str) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert "lie in each other" in refusal_of(
        run_format, recipe(tmp_path, f"paths.raw={raw}", f"paths.samples={samples}")
    )


def test_a_link_in_a_circle_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(tmp_path / "raw")
    refusal_of(run_format, recipe(tmp_path))


def test_names_with_brackets_are_printed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("openpangu_sft.util.console.SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr("openpangu_sft.util.console.MB", 1024)
    monkeypatch.setattr("openpangu_sft.util.console.console.print", lambda text, **_: shown.append(text))
    put(tmp_path, "[red]a.jsonl", *[{**GOOD, "id": "x" * 99}] * 900)
    run_format(recipe(tmp_path))
    assert all("[red]a.jsonl" in line for line in shown)
    done = [int(line.split(": ")[1].split("/")[0]) for line in shown]
    total = int(shown[0].split("/")[1].split(" ")[0])
    assert done == sorted(done)
    assert done[-1] == total == (tmp_path / "raw" / "[red]a.jsonl").stat().st_size // 1024


# --- An earlier result outlives what goes wrong


def finished(cache: Path) -> dict[str, bytes]:
    put(cache, "a.json", GOOD)
    run_format(recipe(cache))
    return tree(cache / "dataset")


def test_a_new_run_replaces_the_earlier_result(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "raw" / "a.json").unlink()
    put(tmp_path, "b.json", GOOD)
    run_format(recipe(tmp_path))
    assert sorted(tree(tmp_path / "dataset")) == ["b.jsonl", "manifest.json"]


def test_a_refusal_leaves_the_earlier_result(tmp_path: Path) -> None:
    before = finished(tmp_path)
    put(tmp_path, "b.jsonl", GOOD, BAD)
    refusal_of(run_format, recipe(tmp_path))
    put(tmp_path, "b.jsonl", "")
    assert "holds no records" in refusal_of(run_format, recipe(tmp_path, "data.on_bad_sample=skip"))
    assert tree(tmp_path / "dataset") == before
    assert not list(tmp_path.glob(".*.staging"))


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "a.json", GOOD)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "thesis.txt").write_text("mine")
    assert "was not made by this stage" in refusal_of(run_format, recipe(tmp_path))
    assert tree(tmp_path / "dataset") == {"thesis.txt": b"mine"}


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = put(tmp_path, "a.jsonl", GOOD)
    original = format_stage.read_records

    def read_and_append(path: Path, encoding: str) -> Iterator[Any]:
        yield from original(path, encoding)
        with raw.open("a") as stream:
            stream.write(json.dumps(GOOD) + "\n")

    monkeypatch.setattr(format_stage, "read_records", read_and_append)
    assert "changed while it was read" in refusal_of(run_format, recipe(tmp_path))
    assert not (tmp_path / "dataset").exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from openpangu_sft.conversations.format import run_format
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.util.errors import explain_os_error

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    run_format(load_recipe(Path(sys.argv[1]), ["paths.cache=" + sys.argv[2], "data.on_bad_sample=skip"]))
except OSError as error:
    print(explain_os_error(error))
    sys.exit(1)
"""


@pytest.mark.parametrize("record", [GOOD, BAD])
def test_a_full_disk_leaves_the_earlier_result(tmp_path: Path, record: dict[str, Any]) -> None:
    before = finished(tmp_path)
    put(tmp_path, "b.jsonl", *[{**record, "instruction": "a" * 100}] * 2000)
    source = str(ROOT / "src")
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(ROOT / "recipes" / "demo.yaml"), str(tmp_path), "100000"],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout.startswith(f"{tmp_path / 'dataset'}: File too large")
    assert tree(tmp_path / "dataset") == before
    assert not list(tmp_path.glob(".*.staging"))


# --- Whatever is thrown at it

LINES = st.one_of(
    st.just(json.dumps(GOOD).encode()),
    st.just(json.dumps(BAD).encode()),
    st.binary(max_size=20).map(lambda line: b"\xff" + line.replace(b"\n", b"")),  # in no encoding that is recognised
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=8))
def test_every_line_is_written_or_rejected(lines: list[bytes]) -> None:
    """Nothing else than a `UserError` ever comes out; under skip, only for want of any sample."""
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        (cache / "raw").mkdir()
        (cache / "raw" / "a.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        good = sum(line == json.dumps(GOOD).encode() for line in lines)
        records = [line for line in b"\n".join(lines).removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        if not good:
            refusal_of(run_format, recipe(cache, "data.on_bad_sample=skip"))
            assert not (cache / "dataset").exists()
            return
        manifest = run_format(recipe(cache, "data.on_bad_sample=skip"))
        check_counts(manifest, cache / "dataset")
        assert (manifest.counts["read"], manifest.counts["written"]) == (len(records), good)


def check_counts(manifest: Manifest, target: Path) -> None:
    counts = manifest.counts
    assert counts["read"] == counts["written"] + counts["rejected"]
    assert sum(counts["reasons"].values()) == counts["rejected"]
    written = [sample for path in target.glob("*.jsonl") for sample in lines_of(path)]
    rejected = [entry for path in target.glob("rejects/*.jsonl") for entry in lines_of(path)]
    assert (len(written), len(rejected)) == (counts["written"], counts["rejected"])
    for sample in written:
        assert parse_sample(sample).to_json() == sample
    assert all(entry["reason"] and entry["place"] for entry in rejected)
