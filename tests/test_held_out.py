"""The held-out split: decided by how a conversation begins, complete, and never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeRecipe, conversation, write_samples
from openpangu_sft.artefact import Manifest, read_manifest, require_settings
from openpangu_sft.dataset.held_out import is_held_out
from openpangu_sft.dataset.indexed import PREFIX, VALIDATION, field_path, read_rows
from openpangu_sft.dataset.inspection import run_inspect
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.errors import UserError
from openpangu_sft.recipe import Recipe
from openpangu_sft.tokenizer import IGNORED

SHARE = "data.validation_share=0.25"


def sample(question: list[int], answer: list[int]) -> np.ndarray:
    return np.array([*(~token for token in question), *answer], np.int32)


tokens = st.lists(st.integers(0, 2**17), min_size=1, max_size=6)


@given(tokens, tokens, tokens, st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
def test_only_what_stands_before_the_first_answer_counts(
    question: list[int], one: list[int], other: list[int], share: float, seed: int
) -> None:
    assert is_held_out(sample(question, one), share, seed) == is_held_out(sample(question, other), share, seed)


@given(tokens, tokens, st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_larger_share_holds_out_the_same_and_more(
    question: list[int], answer: list[int], one: float, other: float, seed: int
) -> None:
    less, more = sorted((one, other))
    assert is_held_out(sample(question, answer), less, seed) <= is_held_out(sample(question, answer), more, seed)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_is_held_out_and_another_seed_holds_out_others(share: float) -> None:
    samples = [sample([number], [1]) for number in range(10_000)]
    chosen = np.array([[is_held_out(one, share, seed) for one in samples] for seed in (1, 2)])
    deviation = (share * (1 - share) / len(samples)) ** 0.5
    assert np.abs(chosen.mean(1) - share).max() < 5 * deviation
    assert abs((chosen[0] & chosen[1]).mean() - share**2) < 5 * deviation


def test_nothing_is_held_out_without_a_share() -> None:
    assert not any(is_held_out(sample([number], [1]), 0.0, 1) for number in range(1000))


def numbered(name: str, count: int) -> list[dict[str, Any]]:
    return [conversation(f"{name} {number}", f"answer {number} " * (number % 5 + 1)) for number in range(count)]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    recipe = make_recipe(SHARE)
    write_samples(recipe.path("samples") / "a.jsonl", numbered("a", 40))
    write_samples(recipe.path("samples") / "b.jsonl", [*numbered("b", 30), *numbered("a", 20)])
    return recipe


def questions(directory: Path, prefix: str, length: int = 128) -> list[tuple[int, ...]]:
    """What stands before the first trained token of every sample."""
    rows = [read_rows(directory, prefix, name, length) for name in ("input_ids", "labels", "attention_mask")]
    found = []
    for ids, labels, numbers in zip(*rows):
        for number in range(1, numbers.max() + 1):
            inside = numbers == number
            first = int(np.argmax(labels[inside] != IGNORED))
            found.append(tuple(ids[inside][:first].tolist()))
    return found


def test_every_sample_is_on_one_side_and_the_same_question_never_on_both(recipe: Recipe) -> None:
    run_preprocess(recipe)
    counts = run_merge(recipe).counts
    trained, held_out = (questions(recipe.path("dataset"), prefix) for prefix in (PREFIX, VALIDATION))
    assert (len(trained), len(held_out)) == (counts["packed"], counts["validation"]["packed"])
    assert len(trained) + len(held_out) == counts["read"] == 90
    assert held_out
    assert not set(trained) & set(held_out)
    assert len(set(trained) | set(held_out)) == 70
    twice = [question for question in set(held_out) if held_out.count(question) == 2]
    assert twice, "of the 20 questions that come in both files some are held out, and both times"


def test_counts_are_those_of_the_files(recipe: Recipe) -> None:
    run_preprocess(recipe)
    run_merge(recipe)
    manifest = read_manifest(recipe.path("dataset"), "dataset", "")
    for prefix, counts in ((PREFIX, manifest.counts), (VALIDATION, manifest.counts["validation"])):
        labels = read_rows(recipe.path("dataset"), prefix, "labels", 128)
        mask = read_rows(recipe.path("dataset"), prefix, "attention_mask", 128)
        found = {"packs": len(labels), "tokens": (mask > 0).sum(), "trained_tokens": (labels != IGNORED).sum()}
        assert {name: counts[name] for name in found} == found
    report = run_inspect(recipe)
    assert not report.findings
    assert report.figures["held out: segments"] == str(manifest.counts["validation"]["packed"])


def test_parts_and_workers_hold_out_the_same(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    run_preprocess(recipe)
    run_merge(recipe)
    one = {prefix: set(questions(recipe.path("dataset"), prefix)) for prefix in (PREFIX, VALIDATION)}
    many = make_recipe(SHARE, "data.workers=2", "paths.shards=parts", "paths.dataset=joined")
    for number in (1, 2, 3):
        run_preprocess(many, number, 3)
    run_merge(many)
    assert {prefix: set(questions(many.path("dataset"), prefix)) for prefix in one} == one


def test_training_data_without_a_share_has_no_held_out_files(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", numbered("a", 10))
    run_preprocess(recipe)
    counts = run_merge(recipe).counts
    assert "validation" not in counts
    assert not list(recipe.path("dataset").glob(f"{VALIDATION}*"))


def test_files_of_one_sample_may_be_held_out_as_a_whole(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.validation_share=0.5")
    for number, one in enumerate(numbered("single", 12)):
        write_samples(recipe.path("samples") / f"{number}.jsonl", [one])
    run_preprocess(recipe)
    shards = [run_inspect(recipe, path.parent) for path in recipe.path("shards").glob("*/manifest.json")]
    assert not [finding for report in shards for finding in report.findings]
    counts = run_merge(recipe).counts
    assert counts["packed"] + counts["validation"]["packed"] == 12
    assert not run_inspect(recipe).findings


@pytest.mark.parametrize(("share", "word"), [("0.0000001", "none"), ("0.9999999", "all")])
def test_a_side_without_a_sample_is_refused_and_nothing_is_written(
    make_recipe: MakeRecipe, share: str, word: str
) -> None:
    recipe = make_recipe(f"data.validation_share={share}")
    write_samples(recipe.path("samples") / "a.jsonl", numbered("a", 5))
    run_preprocess(recipe)
    with pytest.raises(UserError, match=f"{word} of the 5 samples is held out"):
        run_merge(recipe)
    assert not recipe.path("dataset").exists()


def test_another_share_makes_the_shards_anew_and_refuses_the_old_ones(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    run_preprocess(recipe)
    other = make_recipe("data.validation_share=0.5")
    with pytest.raises(UserError, match=r"made with data.validation_share = 0.25, the recipe says 0.5"):
        run_merge(other)
    assert all(shard.made for shard in run_preprocess(other))
    run_merge(other)


def test_damage_in_what_is_held_out_is_found(recipe: Recipe) -> None:
    run_preprocess(recipe)
    run_merge(recipe)
    path = field_path(recipe.path("dataset"), VALIDATION, "labels", "bin")
    content = bytearray(path.read_bytes())
    content[:4] = b"\x07\0\0\0"
    path.write_bytes(content)
    found = [str(finding) for finding in run_inspect(recipe).findings]
    assert sum(str(path) in finding for finding in found) == 2, "the label, and the sum"
    assert sum("says trained_tokens" in finding for finding in found) == 1
    alone = run_inspect(recipe, recipe.path("dataset") / VALIDATION)
    assert any("label 7 is neither" in str(finding) for finding in alone.findings)


def test_manifests_of_versions_before_the_split_mean_a_share_of_nothing() -> None:
    made = Manifest("dataset", {"data.seed": 1})
    require_settings(Path("x"), made.settings, {"data.seed": 1, "data.validation_share": 0.0}, "")
    with pytest.raises(UserError, match=r"made with data.validation_share = 0.0, the recipe says 0.1"):
        require_settings(Path("x"), made.settings, {"data.validation_share": 0.1}, "")
