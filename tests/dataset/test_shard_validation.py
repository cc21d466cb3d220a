"""The validation split: decided by the first question, complete, and never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import MakeRecipe, conversation, write_samples
from openpangu_sft.artifacts.artifact import Manifest, read_manifest, require_settings
from openpangu_sft.dataset.encode import Encoded
from openpangu_sft.dataset.index_file import BEGINS, PREFIX, ROLES, VALIDATION, field_path, read_rows
from openpangu_sft.dataset.inspect import run_inspect
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.dataset.shard import is_validation
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from refusals import refusal_of

SHARE = "data.validation_share=0.25"


START = 9
ROLE_OF = {2: "system", 3: "user", 4: "assistant"}


def sample(question: list[int], answer: list[int], system: Sequence[int] = ()) -> np.ndarray:
    """Marked tokens: a system turn, a question and the assistant's header, then the answer and one more question."""
    before = [1, START, 2, *system, START, 3, *question, START, 4]
    return np.array([*(~token for token in before), *answer, *(~token for token in [START, 3, 5, START, 4]), 6])


def validation(marked: np.ndarray, share: float, seed: int) -> bool:
    ids = np.where(marked < 0, ~marked, marked)
    roles, role = np.zeros(len(ids), np.uint8), "system"
    for place, number in enumerate(ids.tolist()):
        if number == START:
            role = ROLE_OF.get(int(ids[place + 1]), "system")
        roles[place] = ROLES.index(role) + 1 + BEGINS * (number == START)
    return is_validation(Encoded(marked.astype(np.int32), roles), [START, 4], share, seed)


tokens = st.lists(st.integers(10, 2**17), min_size=1, max_size=6)


@given(tokens, tokens, tokens, tokens, st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
def test_only_the_first_question_counts(
    question: list[int], one: list[int], other: list[int], system: list[int], share: float, seed: int
) -> None:
    first = validation(sample(question, one), share, seed)
    assert validation(sample(question, other), share, seed) == first
    assert validation(sample(question, one, system), share, seed) == first
    assert validation(sample(question, one, [*system, START, *other]), share, seed) == first, "two system prompts"


@given(tokens, tokens, st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_larger_share_takes_the_same_and_more(
    question: list[int], answer: list[int], one: float, other: float, seed: int
) -> None:
    less, more = sorted((one, other))
    assert validation(sample(question, answer), less, seed) <= validation(sample(question, answer), more, seed)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_is_kept_and_another_seed_chooses_others(share: float) -> None:
    samples = [sample([number], [1]) for number in range(10, 10_010)]
    chosen = np.array([[validation(one, share, seed) for one in samples] for seed in (1, 2)])
    deviation = (share * (1 - share) / len(samples)) ** 0.5
    assert np.abs(chosen.mean(1) - share).max() < 5 * deviation
    assert abs((chosen[0] & chosen[1]).mean() - share**2) < 5 * deviation


def test_nothing_is_validation_without_a_share() -> None:
    assert not any(validation(sample([number], [1]), 0.0, 1) for number in range(10, 1010))


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
    trained, validation = (questions(recipe.path("dataset"), prefix) for prefix in (PREFIX, VALIDATION))
    assert (len(trained), len(validation)) == (counts["packed"], counts["validation"]["packed"])
    assert len(trained) + len(validation) == counts["read"] == 90
    assert validation
    assert not set(trained) & set(validation)
    assert len(set(trained) | set(validation)) == 70
    twice = [question for question in set(validation) if validation.count(question) == 2]
    assert twice, "of the 20 questions that come in both files some are validation questions, and both times"


SYSTEMS = [[""], ["简短"], ["Answer briefly, with care. "], ["one", "two"], ["第 3 个"], [" "]]
ASKED = ["{} apples?", "第 {} 个问题", " {}", "{}\n\n", "x [unused10] {}", "[unused9]用户：{}"]


@pytest.mark.parametrize("control_tokens", ["escape", "allow"])
def test_no_question_is_on_both_sides_under_any_system_prompt(make_recipe: MakeRecipe, control_tokens: str) -> None:
    recipe = make_recipe("data.validation_share=0.5", f"data.control_tokens={control_tokens}")
    texts = [text.format(number) for number in range(20) for text in ASKED]
    samples = [
        {**conversation(text, f"{question}", *["Why?", "So."] * (number % 2)), "meta_prompt": system}
        for question, text in enumerate(texts)
        for number, system in enumerate(SYSTEMS)
    ]
    write_samples(recipe.path("samples") / "a.jsonl", samples)
    run_preprocess(recipe)
    run_merge(recipe)
    tokenizer = Tokenizer(recipe.path("hf"), trust_remote_code=False)
    sides = [first_answers(recipe, prefix, tokenizer) for prefix in (PREFIX, VALIDATION)]
    assert sorted([*sides[0], *sides[1]]) == sorted([*range(len(texts))] * len(SYSTEMS))
    assert not set(sides[0]) & set(sides[1])
    assert 0.3 < len(sides[1]) / len(samples) < 0.7


def first_answers(recipe: Recipe, prefix: str, tokenizer: Tokenizer) -> list[int]:
    """The first answer of every sample, which is a number."""
    directory, length = recipe.path("dataset"), recipe.data.seq_length
    labels, mask = (read_rows(directory, prefix, name, length) for name in ("labels", "attention_mask"))
    found = []
    for row, numbers in zip(labels, mask):
        for number in range(1, numbers.max() + 1):
            one = row[numbers == number]
            begin = int(np.argmax(one != IGNORED))
            end = begin + int(np.argmax(one[begin:] == tokenizer.end_id))
            found.append(int(tokenizer.hf.decode(one[begin:end].tolist())))
    return found


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
    assert report.figures["validation: segments"] == str(manifest.counts["validation"]["packed"])


def test_parts_and_workers_hold_out_the_same(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    run_preprocess(recipe)
    run_merge(recipe)
    one = {prefix: set(questions(recipe.path("dataset"), prefix)) for prefix in (PREFIX, VALIDATION)}
    many = make_recipe(SHARE, "data.workers=2", "paths.shards=parts", "paths.dataset=joined")
    for number in (1, 2, 3):
        run_preprocess(many, number, 3)
    run_merge(many)
    assert {prefix: set(questions(many.path("dataset"), prefix)) for prefix in one} == one


def test_training_data_without_a_share_has_no_validation_files(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", numbered("a", 10))
    run_preprocess(recipe)
    counts = run_merge(recipe).counts
    assert "validation" not in counts
    assert not list(recipe.path("dataset").glob(f"{VALIDATION}*"))


def test_files_of_one_sample_may_be_validation_as_a_whole(make_recipe: MakeRecipe) -> None:
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
    assert f"{word} of the 5 samples falls into the validation split" in refusal_of(run_merge, recipe)
    assert not recipe.path("dataset").exists()


def test_another_share_makes_the_shards_anew_and_refuses_the_old_ones(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    run_preprocess(recipe)
    other = make_recipe("data.validation_share=0.5")
    assert "made with data.validation_share = 0.25, the recipe says 0.5" in refusal_of(run_merge, other)
    assert all(shard.made for shard in run_preprocess(other))
    run_merge(other)


def test_damage_in_what_is_validation_is_found(recipe: Recipe) -> None:
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
    assert "made with data.validation_share = 0.0, the recipe says 0.1" in refusal_of(
        require_settings, Path("x"), made.settings, {"data.validation_share": 0.1}, "run make merge again"
    )
