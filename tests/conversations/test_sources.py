"""Several sources mixed by weight, duplicates, and counts that add up."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from conftest import ROOT
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.conversations.format import run_format
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from parameter_ids import named_by
from refusals import refusal_of

DEMO = (ROOT / "recipes/demo.yaml").read_text("utf-8")


def recipe(cache: Path, sources: Optional[list[dict[str, Any]]] = None, **data: Any) -> Recipe:
    """The demo's recipe with sources (default: none, so paths.raw) and other keys of its section data, as a file."""
    content = YAML(typ="safe").load(DEMO)
    content["paths"]["cache"] = str(cache)
    content["data"].update(data, **({"sources": sources} if sources else {}))
    path = cache / "recipe.yaml"
    with path.open("w", encoding="utf-8") as stream:
        YAML(typ="safe").dump(content, stream)
    return load_recipe(path)


def talk(text: str, **more: Any) -> dict[str, Any]:
    return {"instruction": text, "output": "a", **more}


def put(path: Path, *records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def numbered(path: Path, count: int = 200, prefix: str = "") -> None:
    put(path, *(talk(f"{prefix}{number}") for number in range(count)))


def written(cache: Path, name: str) -> list[dict[str, Any]]:
    path = cache / "dataset" / name
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def questions(cache: Path, name: str) -> list[str]:
    return [sample["data"][0]["content"] for sample in written(cache, name)]


def times(cache: Path, name: str) -> Counter[str]:
    """How often each question is written."""
    return Counter(questions(cache, name))


# --- Weights


def test_a_weight_above_1_repeats_conversations(tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl")
    manifest = run_format(recipe(tmp_path, [{"path": "a.jsonl", "weight": 2.5}]))
    found = times(tmp_path, "1-a.jsonl")
    assert set(found) == set(map(str, range(200)))
    assert set(found.values()) == {2, 3}
    assert 70 < sum(value == 3 for value in found.values()) < 130
    assert manifest.counts["added"] == sum(found.values()) - 200
    assert (manifest.counts["left_out"], manifest.counts["duplicates"]) == (0, 0)
    order = questions(tmp_path, "1-a.jsonl")
    assert order == sorted(order, key=int)


def test_a_weight_below_1_leaves_whole_conversations_out(tmp_path: Path) -> None:
    records = [talk(str(number), history=[["b", "c"]]) for number in range(200)]
    put(tmp_path / "a.jsonl", *records)
    manifest = run_format(recipe(tmp_path, [{"path": "a.jsonl", "weight": 0.25}]))
    samples = written(tmp_path, "1-a.jsonl")
    assert 25 < len(samples) < 75
    assert all(len(sample["data"]) == 4 for sample in samples)
    assert (manifest.counts["written"], manifest.counts["left_out"]) == (len(samples), 200 - len(samples))
    assert manifest.counts["added"] == 0


def test_whole_weights_draw_nothing(tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl", 20)
    for weight in (1, 1.0, 3):
        run_format(recipe(tmp_path, [{"path": "a.jsonl", "weight": weight}]))
        assert set(times(tmp_path, "1-a.jsonl").values()) == {weight}


def test_the_choice_depends_on_seed_and_place_only(tmp_path: Path) -> None:
    numbered(tmp_path / "a/x.jsonl")
    numbered(tmp_path / "b/x.jsonl", prefix="b")
    half = {"path": "a", "weight": 0.5}

    def chosen(name: str, *sources: dict[str, Any], seed: int = 3) -> list[str]:
        run_format(recipe(tmp_path, list(sources), seed=seed))
        return questions(tmp_path, name)

    alone = chosen("1-x.jsonl", half)
    assert chosen("1-x.jsonl", half) == alone
    assert chosen("1-x.jsonl", half, {"path": "b"}) == alone
    assert chosen("2-x.jsonl", {"path": "b", "weight": 0.5}, half) == alone
    assert [f"b{text}" for text in alone] != questions(tmp_path, "1-x.jsonl")
    assert chosen("1-x.jsonl", half, seed=4) != alone
    put(tmp_path / "a/x.jsonl", *(talk(f"other {number}") for number in range(200)))
    assert chosen("1-x.jsonl", half) == [f"other {text}" for text in alone]


def test_everything_left_out_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", talk("q"))
    said = refusal_of(run_format, recipe(tmp_path, [{"path": "a.jsonl", "weight": 1e-9}]))
    assert said.endswith("none of the 1 records is a sample; 1 x left out by the weights of data.sources -> raise them")


@pytest.mark.parametrize(
    ("weight", "said"),
    named_by(
        0,
        (0, "Input should be greater than 0"),
        (-1, "Input should be greater than 0"),
        (1001, "Input should be less than or equal to 1000"),
        (float("nan"), "Input should be"),
        ("twice", "Input should be a valid number"),
        (True, "Input should be a valid number"),
    ),
)
def test_a_wrong_weight_is_named_with_its_line(tmp_path: Path, weight: Any, said: str) -> None:
    message = refusal_of(recipe, tmp_path, [{"path": "a"}, {"path": "b", "weight": weight}])
    lines = (tmp_path / "recipe.yaml").read_text("utf-8").splitlines()
    number = next(number for number, line in enumerate(lines, 1) if "weight: " in line and "_decay" not in line)
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}:{number}: data.sources.1.weight = ")
    assert said in message


# --- Settings of a source


def test_each_source_has_its_own_format_columns_and_system_prompt(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", {"ask": "q", "reply": "a"})
    put(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    put(tmp_path / "c.jsonl", talk("q"), talk("q", system="own"))
    sources = [
        {"path": "a.jsonl", "columns": {"prompt": "ask", "response": "reply"}},
        {"path": "b.jsonl", "format": "openai"},
        {"path": str(tmp_path / "c.jsonl"), "system": "short"},
    ]
    manifest = run_format(recipe(tmp_path, sources))
    (first,), (second,), third = (written(tmp_path, f"{number}-{name}.jsonl") for number, name in enumerate("abc", 1))
    assert first == second == {**third[0], "meta_prompt": [""]}
    assert [sample["meta_prompt"] for sample in third] == [["short"], ["own"]]
    assert manifest.counts["duplicates"] == 1
    assert manifest.settings["data.sources"][2]["system"] == "short"
    assert manifest.settings["data.seed"] == 3
    sources[1]["format"] = "alpaca"
    assert f"{tmp_path / 'b.jsonl'}:1: unknown key messages" in refusal_of(run_format, recipe(tmp_path, sources))


def test_files_of_one_name(tmp_path: Path) -> None:
    for name in ("zh", "en"):
        put(tmp_path / name / "train.jsonl", talk(name))
    manifest = run_format(recipe(tmp_path, [{"path": "zh"}, {"path": "en"}]))
    assert list(manifest.inputs) == list(manifest.counts["files"]) == ["1-train.jsonl", "2-train.jsonl"]
    assert questions(tmp_path, "1-train.jsonl") == ["zh"]
    assert questions(tmp_path, "2-train.jsonl") == ["en"]


@pytest.mark.parametrize("path", ["dataset", "dataset/a", "."])
def test_sources_and_samples_must_not_lie_in_each_other(tmp_path: Path, path: str) -> None:
    put(tmp_path / "dataset/a/x.jsonl", talk("q"))
    said = refusal_of(run_format, recipe(tmp_path, [{"path": path}]))
    assert "data.sources[0]" in said
    assert "lie in each other" in said


def test_a_source_that_is_missing(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", talk("q"))
    said = refusal_of(run_format, recipe(tmp_path, [{"path": "a.jsonl"}, {"path": "b"}]))
    assert said.startswith(f"{tmp_path / 'b'}: no raw conversations here")


@pytest.mark.parametrize("key", ["data.columns", "data.sources[1].columns"])
def test_a_column_that_no_record_has(tmp_path: Path, key: str) -> None:
    put(tmp_path / "raw/a.jsonl", talk("q"), talk("r"))
    columns = {"columns": {"input": "contxt"}}
    sources = [{"path": "raw"}, {"path": "raw", **columns}]
    found = recipe(tmp_path, sources) if "sources" in key else recipe(tmp_path, **columns)
    assert refusal_of(run_format, found) == f"{key}: no record has the column contxt -> check its name against a record"
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    named_by(
        1,
        ({"columns": {"prompt": "q"}}, "data.columns is not used with data.sources -> set it in each source"),
        ({"source_format": "openai"}, "data.source_format is not used with data.sources -> set it in each source"),
        ({"sources": [{"path": "a", "colums": {}}]}, "data.sources.0.colums -> did you mean data.sources.0.columns?"),
        ({"sources": [{"weight": 2}]}, "key data.sources.0.path is missing"),
        ({"sources": ["a"]}, "data.sources.0 = 'a': Input should be"),
        ({"sources": [{"path": "a", "columns": {"promt": "q"}}]}, "data.sources.0.columns.promt"),
    ),
)
def test_sources_that_are_refused(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    message = refusal_of(recipe, tmp_path, **{"sources": [{"path": "a"}], **data})
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}:")
    assert said in message


def test_an_override_of_sources_is_named() -> None:
    for value in ("[{path: a, weight: 0}]", "[{path: a, wieght: 1}]"):
        message = refusal_of(load_recipe, ROOT / "recipes/demo.yaml", [f"data.sources={value}"])
        assert message.startswith("--set data.sources: ")


# --- Duplicates


@pytest.mark.parametrize("deduplicate", ["no", "exact"])
def test_duplicates_are_counted_and_dropped_on_request(tmp_path: Path, deduplicate: str) -> None:
    put(tmp_path / "raw/a.jsonl", talk("q", id=1), talk("r"), talk("q", id=2))
    put(tmp_path / "raw/b.jsonl", {"prompt": "q", "completion": "a"}, talk("q", system="s"), talk("q", output="b"))
    manifest = run_format(recipe(tmp_path, deduplicate=deduplicate))
    files = manifest.counts["files"]
    assert [files[name]["duplicates"] for name in ("a.jsonl", "b.jsonl")] == [1, 1]
    kept = deduplicate == "no"
    assert questions(tmp_path, "a.jsonl") == ["q", "r"] + ["q"] * kept
    assert questions(tmp_path, "b.jsonl") == ["q"] * kept + ["q", "q"]
    assert manifest.counts["written"] == (6 if kept else 4)


def test_copies_by_weight_are_no_duplicates(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", talk("q"))
    put(tmp_path / "b.jsonl", talk("q"), talk("r"))
    sources = [{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 2}]
    manifest = run_format(recipe(tmp_path, sources, deduplicate="exact"))
    assert times(tmp_path, "1-a.jsonl") == {"q": 3}
    assert times(tmp_path, "2-b.jsonl") == {"r": 2}
    assert {key: manifest.counts[key] for key in ("read", "written", "duplicates", "added")} == {
        "read": 3,
        "written": 5,
        "duplicates": 1,
        "added": 3,
    }


def test_what_a_weight_left_out_does_not_take_the_place_of_another_source(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", talk("q"))
    put(tmp_path / "b.jsonl", talk("q"))
    sources = [{"path": "a.jsonl", "weight": 1e-9}, {"path": "b.jsonl"}]
    manifest = run_format(recipe(tmp_path, sources, deduplicate="exact"))
    assert questions(tmp_path, "2-b.jsonl") == ["q"]
    assert (manifest.counts["left_out"], manifest.counts["duplicates"]) == (1, 0)


# --- Counts

RECORDS = st.lists(st.sampled_from([talk("q"), talk("r"), talk("s"), talk(""), {"no": "format"}, 3]), max_size=8)
SOURCES = st.lists(st.tuples(st.lists(RECORDS.filter(bool), min_size=1, max_size=2), st.floats(0.2, 3)), max_size=3)


def require_sums(manifest: Manifest, cache: Path, dropped: bool) -> None:
    counts = manifest.counts
    for found in (counts, *counts["files"].values()):
        left = found["written"] + found["rejected"] + found.get("left_out", 0) + found["duplicates"] * dropped
        assert found["read"] + found.get("added", 0) == left
    for name, one in counts["files"].items():
        made = name.replace("/", "-")
        assert one["written"] == len(written(cache, made))
        assert one["rejected"] == len(written(cache, f"rejects/{made}"))
        assert all(counts[key] >= value for key, value in one.items())
    for key in next(iter(counts["files"].values())):
        assert counts[key] == sum(one[key] for one in counts["files"].values())
    assert sum(counts["reasons"].values()) == counts["rejected"]


@settings(max_examples=60, deadline=None)
@given(SOURCES.filter(bool), st.booleans(), st.booleans())
def test_counts_add_up(sources: list[tuple[list[list[Any]], float]], mixed: bool, dropped: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        for number, (files, _) in enumerate(sources):
            for name, records in zip("ab", files):
                put(cache / f"raw/{number}/{name}.jsonl", *records)
        listed = [{"path": f"raw/{number}", "weight": weight} for number, (_, weight) in enumerate(sources)]
        data = {"on_bad_sample": "skip", "deduplicate": "exact" if dropped else "no"}
        put(cache / "raw/0/good.jsonl", *(talk(f"good {number}") for number in range(30)))
        require_sums(run_format(recipe(cache, listed if mixed else None, **data)), cache, dropped)
