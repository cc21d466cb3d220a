"""Conversations with thinking and tools through preprocess, merge, inspect and preview."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Optional

import pytest

from conftest import MakeRecipe, write_samples
from openpangu_sft.artifacts.artifact import read_manifest, sum_counts
from openpangu_sft.dataset.index_file import PREFIX, VALIDATION, read_rows
from openpangu_sft.dataset.inspect import run_inspect
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.dataset.segments import segment_runs
from openpangu_sft.preview.stage import run_preview
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from refusals import refusal_of

LONGER = "data.seq_length=256"
TOOLS = '[{"name":"weather"}]'


def thought(*answers: str, **extra: Any) -> dict[str, Any]:
    """A conversation in which every answer has thinking."""
    data: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        data += [{"role": "user", "content": f"{answers[0]} {number}?"}]
        data += [{"role": "assistant", "thinking": "想", "content": answer}]
    return {"meta_prompt": [""], "data": data, **extra}


def counts(recipe: Recipe, *records: dict[str, Any]) -> dict[str, Any]:
    """Of a shard of these records; those that are there."""
    write_samples(recipe.path("samples") / "a.jsonl", list(records))
    [(_, manifest, _)] = run_preprocess(recipe)
    kept = ("read", "packed", "rejected", "dropped", "truncated", "reasons", "ignored_keys", "changes")
    return {name: manifest.counts[name] for name in kept if manifest.counts[name]}


def test_what_was_done_to_samples_is_counted(make_recipe: MakeRecipe) -> None:
    plain = {"meta_prompt": [""], "data": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    records = [thought("一", "二", "三", id=1), thought("四", source="x", tools=TOOLS), plain]
    added = {"samples added for answers with thinking": 2}
    ignored = {"id": 1, "source": 1}
    assert counts(make_recipe(LONGER), *records) == {"read": 3, "packed": 5, "ignored_keys": ignored, "changes": added}
    out = {"read": 3, "packed": 3, "ignored_keys": ignored}
    assert counts(make_recipe(LONGER, "data.thinking=all"), *records) == out
    left_out = {"thinking of answers left out": 4}
    assert counts(make_recipe(LONGER, "data.thinking=drop"), *records) == {**out, "changes": left_out}
    assert counts(make_recipe(LONGER, "data.train_on=last"), *records) == out


def test_a_conversation_is_refused_once_and_as_a_whole(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.on_bad_sample=skip")
    bad = thought("一", "二", "三[unused9]")
    reason = "message N holds the control token [unusedN], which could forge a turn"
    found = counts(recipe, thought("好"), bad)
    assert found == {"read": 2, "packed": 1, "rejected": 1, "reasons": {reason: 1}}
    [line] = (recipe.path("shards") / "a/rejects.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["record"] == bad


LONG = thought("一", "二", "长 " * 150)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop", {"read": 2, "packed": 1, "dropped": 1}),
        ("refuse", {"read": 2, "packed": 1, "rejected": 1}),
        (
            "truncate",
            {"read": 2, "packed": 3, "truncated": 1, "changes": {"samples added for answers with thinking": 1}},
        ),
    ],
)
def test_a_conversation_that_is_too_long(make_recipe: MakeRecipe, policy: str, expected: dict[str, Any]) -> None:
    found = counts(make_recipe(f"data.too_long={policy}", "data.on_bad_sample=skip"), thought("好"), LONG)
    assert {name: count for name, count in found.items() if name != "reasons"} == expected
    assert sum(found.get("reasons", {}).values()) == 2 - expected.get("truncated", 0) - 1


def test_truncation_leaves_out_answers_and_no_sample(make_recipe: MakeRecipe) -> None:
    """Without thinking the same conversation is cut after the same answer."""
    found = counts(make_recipe("data.too_long=truncate", "data.thinking=drop"), LONG)
    assert (found["packed"], found["truncated"]) == (1, 1)
    with pytest.raises(Exception, match=r"a\.jsonl:1: \d+ tokens to the end of its first answer"):
        counts(make_recipe("data.too_long=truncate"), thought("长 " * 150, "好"))


def conversations_in(recipe: Recipe, prefix: str) -> list[str]:
    """The first marked name, like <7>, in every sample of a dataset."""
    tokenizer = Tokenizer(recipe.path("hf"), trust_remote_code=False)
    ids, numbers = (read_rows(recipe.path("dataset"), prefix, name, 128) for name in ("input_ids", "attention_mask"))
    texts = [tokenizer.decode(ids[row, begin:end].tolist()) for row, begin, end in zip(*segment_runs(numbers))]
    return [re.findall(r"<(\d+)>", text)[0] for text in texts]


@pytest.mark.parametrize("first", [None, "tool", "user"])
def test_a_conversation_is_on_one_side_of_the_split(make_recipe: MakeRecipe, first: Optional[str]) -> None:
    """Also where it begins with an answer, and no question or a late one could decide."""
    recipe = make_recipe("data.validation_share=0.5", "data.turns=lenient")
    records = [thought(f"<{number}>", "好") for number in range(20)]
    if first:
        for number, record in enumerate(records):
            record["data"] = record["data"][1:]
            record["data"][1] = {"role": first, "content": f"{number}"}
    write_samples(recipe.path("samples") / "a.jsonl", records)
    run_preprocess(recipe)
    run_merge(recipe)
    sides = [conversations_in(recipe, prefix) for prefix in (PREFIX, VALIDATION)]
    assert not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted([*map(str, range(20))] * 2)
    assert not run_inspect(recipe).findings


def test_the_tool_prompt_is_shown_and_belongs_to_the_system(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.tool_prompt='Tools: {{ tools | tojson }}'")
    counts(recipe, thought("晴", tools=TOOLS))
    run_merge(recipe)
    assert not run_inspect(recipe).findings
    assert run_inspect(recipe).figures["turns"] == "1 system, 1 user, 1 assistant, 0 tool, 0 function"
    [segment] = run_preview(recipe, 1)[0].segments
    texts = [(turn.role, "".join(token.text for token in turn.tokens).replace("…", "")) for turn in segment.turns]
    assert [role for role, _ in texts] == ["system", "user", "assistant"]
    assert texts[0][1] == f"<s>[unused9]系统：Tools:·{TOOLS}[unused10]"
    trained = "".join(token.text for token in segment.turns[-1].tokens if token.trained).replace("…", "")
    assert trained == "[unused16]想[unused17]晴[unused10]"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.thinking=all", "data.thinking = last, the recipe says all"),
        ("data.train_on=last", "data.train_on = all, the recipe says last"),
        ("data.tool_prompt=none", "data.tool_prompt = None, the recipe says none"),
        ("data.ignore_keys=[tools]", "data.ignore_keys = [], the recipe says ['tools']"),
        ("data.turns=lenient", "data.turns = strict, the recipe says lenient"),
    ],
)
def test_another_setting_makes_the_shards_again(make_recipe: MakeRecipe, setting: str, said: str) -> None:
    recipe, other = make_recipe(LONGER), make_recipe(LONGER, setting)
    counts(recipe, thought("一", "二", tools=TOOLS))
    assert said in refusal_of(run_merge, other)
    assert [shard.made for shard in run_preprocess(other)] == [True]
    assert [shard.made for shard in run_preprocess(other)] == [False]
    run_merge(other)


def test_counts_of_earlier_versions_are_summed() -> None:
    old: dict[str, Any] = {"packed": 1, "reasons": {}}
    new: dict[str, Any] = {"packed": 2, "reasons": {"a": 1}, "changes": {"b": 3}}
    expected = {"packed": 3, "reasons": {"a": 1}, "changes": {"b": 3}}
    assert sum_counts([old, new]) == sum_counts([new, old]) == expected


def test_the_manifest_of_the_dataset_has_the_notes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    counts(recipe, thought("一", "二", id=7))
    run_merge(recipe)
    found = read_manifest(recipe.path("dataset"), "dataset", "").counts
    assert found["changes"] == {"samples added for answers with thinking": 1}
    assert found["ignored_keys"] == {"id": 1}
