"""Evaluation: the loss is Hugging Face's own, sample by sample; answers are chat's; nothing is done twice."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from conftest import ROOT, TINY, conversation, write_samples
from evaluate.test_benchmark import CHOICE, task
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.checkpoint.weights import Weights
from openpangu_sft.cli.main import app
from openpangu_sft.cli.reports import _show
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.conversations.format import run_format
from openpangu_sft.dataset.index_file import VALIDATION, read_rows
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.evaluate import questions, stage
from openpangu_sft.evaluate.benchmark import Benchmarks
from openpangu_sft.evaluate.questions import questions_in, validation_questions
from openpangu_sft.evaluate.record import EVALUATION, read_evaluation
from openpangu_sft.evaluate.stage import run_evaluate
from openpangu_sft.model.chat import Chat, Completion
from openpangu_sft.model.llama import SEGMENTS, build_model, inference_device
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.report.page import run_report
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.training.run.retention import prune
from openpangu_sft.training.stage import run_sft
from openpangu_sft.util.errors import UserError
from refusals import refusal_of
from training.portable.test_lora import stored, with_peft

SETTINGS = ["data.validation_share=0.2", "chat.max_new_tokens=4", "train.iterations=6", "train.save_interval=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> list[str]:
    """Overrides of a run that has been trained on a dataset with a validation split."""
    cache = tmp_path_factory.mktemp("evaluate")
    overrides = [*TINY, f"paths.cache={cache}", f"paths.hf={tiny_hf}", *SETTINGS]
    recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides)
    samples = [
        conversation(f"第 {n} 个问题？", f" 第 {n} 个回答。", "And?", f"n {n}", system="简短" if n % 2 else "")
        for n in range(60)
    ]
    write_samples(recipe.path("samples") / "all.jsonl", samples)
    run_preprocess(recipe)
    run_merge(recipe)
    run_convert(recipe)
    run_sft(recipe, [])
    return overrides


@pytest.fixture
def make(trained: list[str], tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes of a copy of the run."""
    original = load_recipe(ROOT / "recipes/demo.yaml", trained).path("run")
    shutil.copytree(original, tmp_path / "run")

    def recipe(*overrides: str) -> Recipe:
        return load_recipe(ROOT / "recipes/demo.yaml", [*trained, f"paths.run={tmp_path / 'run'}", *overrides])

    return recipe


@pytest.fixture
def recipe(make: Callable[..., Recipe]) -> Recipe:
    return make()


def loss_alone(recipe: Recipe, root: Path, attention: str = "eager") -> float:
    """Mean loss per trained token of the validation samples, each given to stock transformers by itself."""
    tensors = tensors_of(open_mcore(root, recipe.model).weights, recipe.model)
    return loss_of(build_model(recipe.path("hf"), tensors, attention, torch.device("cpu")), recipe)


def loss_of(model: LlamaForCausalLM, recipe: Recipe) -> float:
    """The same of a model; eager attention ignores segments."""
    model.eval()
    fields = [
        read_rows(recipe.path("dataset"), VALIDATION, name, recipe.data.seq_length)
        for name in ("input_ids", "labels", "attention_mask")
    ]
    total, targets = 0.0, 0
    for ids, labels, numbers in zip(*fields):
        for number in range(1, numbers.max() + 1):
            one = torch.from_numpy(np.stack([ids, labels])[:, numbers == number].astype(np.int64))
            with torch.no_grad():
                logits = model.eval()(
                    one[:1], segments=[[(0, one.shape[1])]]
                ).logits  # eager attention ignores segments
            total += torch.nn.functional.cross_entropy(logits[0, :-1].float(), one[1, 1:], reduction="sum").item()
            targets += int((one[1, 1:] != -100).sum())
    return total / targets


def test_the_loss_is_that_of_stock_transformers_on_each_sample_alone(recipe: Recipe) -> None:
    before, after = run_evaluate(recipe).results
    assert (before.iteration, after.iteration) == (0, 6)
    assert before.loss == pytest.approx(loss_alone(recipe, recipe.path("mcore")), rel=1e-5)
    assert after.loss == pytest.approx(loss_alone(recipe, recipe.path("run")), rel=1e-5)
    assert before.loss != after.loss


def test_the_loss_of_a_lora_run_is_that_of_stock_peft(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make("train.lora.rank=4", f"paths.mcore={tmp_path / 'mcore'}", f"paths.run={tmp_path / 'adapted'}")
    run_convert(recipe)
    run_sft(recipe, [])
    before, after = run_evaluate(recipe).results
    assert before.loss == run_evaluate(make()).results[0].loss
    assert after.loss == pytest.approx(loss_of(with_peft(recipe, stored(recipe.path("run"), recipe)), recipe), rel=1e-5)
    assert after.loss != before.loss


def test_validation_questions_are_read_from_their_token_ids(recipe: Recipe) -> None:
    found = run_evaluate(recipe).questions
    assert len(found) == 4
    for question in found:
        *system, user, assistant, again = question.turns
        number = user[1].split()[1]
        assert system == ([["system", "简短"]] if int(number) % 2 else [])
        assert [user, assistant, again] == [
            ["user", f"第 {number} 个问题？"],
            ["assistant", f" 第 {number} 个回答。"],
            ["user", "And?"],
        ]
        assert question.reference == f"n {number}"


def test_answers_are_those_of_chat(recipe: Recipe) -> None:
    evaluation = run_evaluate(recipe)
    for result, root in zip(evaluation.results, (recipe.path("mcore"), recipe.path("run"))):
        chat = Chat(recipe, root)
        for question, answer in zip(evaluation.questions, result.answers):
            system = "".join(text for role, text in question.turns if role == "system")
            messages = tuple(Message(role, text) for role, text in question.turns if role != "system")
            assert chat.reply(messages, system).text == answer


def test_prompts_from_a_file(recipe: Recipe, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("你好\n\n  What now?  \n", "utf-8")
    evaluation = run_evaluate(recipe, prompts)
    assert [question.source for question in evaluation.questions] == ["prompts.txt:1", "prompts.txt:3"]
    assert [question.turns for question in evaluation.questions] == [[["user", "你好"]], [["user", "What now?"]]]
    expected = Chat(recipe, recipe.path("run")).reply((Message("user", "What now?"),)).text
    assert evaluation.results[1].answers[1] == expected

    conversations = tmp_path / "prompts.json"
    openai = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    conversations.write_text(json.dumps([{"messages": openai}]), "utf-8")
    (question,) = run_evaluate(recipe, conversations).questions
    assert (question.turns, question.reference) == ([["system", "S"], ["user", "Q"]], "A")


def asked_as(tmp_path: Path, *records: dict[str, Any]) -> Path:
    """A prompt file of records."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return tmp_path / "q.jsonl"


def test_questions_of_every_format_may_have_a_score(recipe: Recipe, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "[unused16]hm[unused17]42"}]
    prompts = asked_as(
        tmp_path,
        {"meta_prompt": [""], "data": turns, "score": "exact"},
        {"messages": turns, "score": "contains"},
        {"instruction": "q", "output": "b", "score": "choice"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "score": None},
        {"prompt": "q", "completion": "a"},
    )
    tokenizer = Tokenizer(recipe.path("hf"), recipe.tokenizer.trust_remote_code)
    found = questions_in(prompts, recipe, tokenizer)
    assert [(one.score, one.reference) for one in found] == [
        ("exact", "42"),
        ("contains", "42"),
        ("choice", "b"),
        (None, "a"),
        (None, "a"),
    ]
    (tmp_path / "q.csv").write_text("instruction,output,score\nq,12,contains\nq,12,\n", "utf-8")
    found = questions_in(tmp_path / "q.csv", recipe, tokenizer)
    assert [one.score for one in found] == ["contains", None]


def test_scores_before_and_after_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["twelve", "12", "So it is 12", "1"])
    monkeypatch.setattr(Chat, "complete", lambda self, prompt: Completion(next(answers), 1, True))
    record = {"instruction": "6 + 6?", "output": "12", "score": "contains"}
    evaluation = run_evaluate(recipe, asked_as(tmp_path, record, {**record, "instruction": "11 + 1?"}))
    assert evaluation.scores == {0: "1/2", 6: "1/2"}
    assert read_evaluation(recipe.path("run")) == evaluation
    _show(evaluation, recipe.path("run"))
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("q.jsonl:")]
    assert headings == ["q.jsonl:1: became right", "q.jsonl:2: became wrong"]


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"output": "a", "score": "fuzzy"}, "score is 'fuzzy', expected exact, contains, choice"),
        ({"output": "a", "score": 4.5}, "score is 4.5, expected exact"),
        ({"output": "a", "score": ["exact"]}, "score is ['exact'], expected exact"),
        ({"output": "", "score": "exact"}, "message 2 (assistant) is empty"),
        ({"output": "。", "score": "contains"}, "score contains expects a text as the last answer"),
        ({"output": "AB", "score": "choice"}, "score choice expects a text as the last answer, for choice one letter"),
        (
            {"output": {"role": "assistant", "content": "12", "tool_calls": [CALL]}, "score": "exact"},
            "score exact expects a text as the last answer, for choice one letter, and no calls",
        ),
    ],
)
def test_scores_that_are_none(recipe: Recipe, tmp_path: Path, record: dict[str, Any], message: str) -> None:
    good = {"instruction": "q", "output": "a", "score": "exact"}
    prompts = asked_as(tmp_path, good, {"instruction": "q", **record})
    refusal = refusal_of(run_evaluate, recipe, prompts)
    assert f"q.jsonl:2: {message}" in refusal
    assert not (recipe.path("run") / EVALUATION).exists()


def test_score_is_a_key_of_prompt_files_only(make: Callable[..., Recipe], tmp_path: Path) -> None:
    record = {"instruction": "q", "output": "a", "score": "exact"}
    prompts = asked_as(tmp_path, record)
    recipe = make(f"paths.raw={prompts}", f"paths.samples={tmp_path / 'samples'}")
    assert "unknown key score" in refusal_of(run_format, recipe)
    ignored = make("data.ignore_keys=[score]")
    tokenizer = Tokenizer(ignored.path("hf"), ignored.tokenizer.trust_remote_code)
    assert [one.score for one in questions_in(prompts, ignored, tokenizer)] == [None]


def test_nothing_is_evaluated_twice_and_other_questions_keep_the_losses(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_evaluate(recipe)
    losses: list[int] = []
    answered: list[int] = []
    real_loss, real_answer = stage.validation_loss, Chat.complete

    def loss(recipe: Recipe, weights: Weights, iteration: int) -> float:
        losses.append(iteration)
        return real_loss(recipe, weights, iteration)

    def complete(self: Chat, prompt: list[int]) -> str:
        answered.append(len(prompt))
        return real_answer(self, prompt)

    monkeypatch.setattr(stage, "validation_loss", loss)
    monkeypatch.setattr(Chat, "complete", complete)
    assert run_evaluate(recipe) == first
    assert (losses, answered) == ([], [])
    every = run_evaluate(recipe, None, "all")
    assert [result.iteration for result in every.results] == [0, 3, 6]
    assert (losses, len(answered)) == ([3], 4)
    assert read_evaluation(recipe.path("run")) == every
    prompts = tmp_path / "p.txt"
    prompts.write_text("hm", "utf-8")
    again = run_evaluate(recipe, prompts, "all")
    assert losses == [3]
    assert [result.loss for result in again.results] == [result.loss for result in every.results]
    # a checkpoint that was written again is another one
    file = next(recipe.path("run").glob("iter_0000003/mp_rank_00/model_optim_rng.pt"))
    os.utime(file, (1, 1))
    run_evaluate(recipe, prompts, "3")
    assert losses == [3, 3]


def written(recipe: Recipe) -> dict[int, tuple[Any, int]]:
    """Loss and number of answers by iteration, as evaluation.json has them."""
    found = read_evaluation(recipe.path("run"))
    return {result.iteration: (result.loss, len(result.answers)) for result in found.results} if found else {}


def prompt_file(tmp_path: Path, text: str = "hm\nwell") -> Path:
    (tmp_path / "p.txt").write_text(text, "utf-8")
    return tmp_path / "p.txt"


def no_loss(recipe: Recipe, weights: Weights, iteration: int) -> float:
    raise AssertionError(f"the loss of iteration {iteration} was there")


def test_a_checkpoint_that_is_not_there_costs_no_result(recipe: Recipe, tmp_path: Path) -> None:
    run_evaluate(recipe, None, "all")
    before = (recipe.path("run") / EVALUATION).read_bytes()
    assert "iteration 999 is not there" in refusal_of(run_evaluate, recipe, prompt_file(tmp_path), "999")
    assert (recipe.path("run") / EVALUATION).read_bytes() == before


def test_a_damaged_checkpoint_ends_the_evaluation_before_it_begins(recipe: Recipe) -> None:
    file = next(recipe.path("run").glob("iter_0000003/mp_rank_00/model_optim_rng.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file) in refusal_of(run_evaluate, recipe, None, "all")
    assert written(recipe) == {}


def test_other_questions_keep_the_losses_of_checkpoints_that_are_not_asked(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {result.iteration: result.loss for result in run_evaluate(recipe, None, "all").results}
    monkeypatch.setattr(stage, "validation_loss", no_loss)
    prompts = prompt_file(tmp_path)
    run_evaluate(recipe, prompts)
    assert written(recipe) == {0: (first[0], 2), 3: (first[3], 0), 6: (first[6], 2)}
    run_report(recipe)
    run_evaluate(recipe, prompts, "3")
    assert written(recipe) == {number: (loss, 2) for number, loss in first.items()}
    run_evaluate(recipe, prompt_file(tmp_path, "other"), "3")
    assert written(recipe) == {0: (first[0], 1), 3: (first[3], 1), 6: (first[6], 0)}


def test_whoever_is_killed_keeps_all_that_was_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {result.iteration: result.loss for result in run_evaluate(recipe, None, "all").results}
    answered = 0
    real = Chat.complete

    def complete(self: Chat, prompt: list[int]) -> str:
        nonlocal answered
        answered += 1
        if answered == 4:
            raise KeyboardInterrupt
        return real(self, prompt)

    monkeypatch.setattr(stage, "validation_loss", no_loss)
    monkeypatch.setattr(Chat, "complete", complete)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(recipe, prompt_file(tmp_path), "all")
    assert written(recipe) == {0: (losses[0], 2), 3: (losses[3], 0), 6: (losses[6], 0)}
    run_evaluate(recipe, prompt_file(tmp_path), "all")
    assert written(recipe) == {number: (loss, 2) for number, loss in losses.items()}
    assert answered == 4 + 4, "what was answered before is not asked again"


def test_the_loss_is_written_before_the_answers_are_made(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(self: Chat, prompt: list[int]) -> str:
        raise UserError("out of memory", remedy="free some")

    with monkeypatch.context() as patch:
        patch.setattr(Chat, "complete", complete)
        assert refusal_of(run_evaluate, recipe) == "out of memory -> free some"
    assert list(written(recipe)) == [0]
    loss, answers = written(recipe)[0]
    assert (loss, answers) == (pytest.approx(loss_alone(recipe, recipe.path("mcore")), rel=1e-5), 0)
    assert "None yet: run make evaluate" in run_report(recipe).read_text("utf-8")
    assert [len(result.answers) for result in run_evaluate(recipe).results] == [4, 4]


def test_a_question_that_is_too_long_is_named_before_anything_is_computed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "validation_loss", no_loss)
    length = recipe.model.max_position_embeddings
    message = refusal_of(run_evaluate, recipe, prompt_file(tmp_path, f"ok\n{'好' * length}\n"))
    found = re.search(r"p\.txt:2: has ([\d,]+) tokens, and the model holds ([\d,]+), the answer's among", message)
    assert found, message
    assert int(found[1].replace(",", "")) >= length == int(found[2].replace(",", ""))
    assert written(recipe) == {}


def test_a_question_may_leave_room_for_one_token(recipe: Recipe, tmp_path: Path) -> None:
    tokenizer = Tokenizer(recipe.path("hf"), recipe.tokenizer.trust_remote_code)
    (asked,) = questions_in(prompt_file(tmp_path, "你好"), recipe, tokenizer)
    fits, too_long = (
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"max_position_embeddings": length})})
        for length in (len(asked.prompt) + 1, len(asked.prompt))
    )
    assert questions_in(tmp_path / "p.txt", fits, tokenizer) == [asked]
    assert "shorten it" in refusal_of(questions_in, tmp_path / "p.txt", too_long, tokenizer)


def test_a_reference_need_not_be_trained(recipe: Recipe, tmp_path: Path) -> None:
    tokenizer = Tokenizer(recipe.path("hf"), recipe.tokenizer.trust_remote_code)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns}), "utf-8")
    (asked,) = questions_in(tmp_path / "p.jsonl", recipe, tokenizer)
    assert asked.reference == "a"


def test_validation_samples_with_a_long_prompt_are_not_asked(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(recipe.path("hf"), recipe.tokenizer.trust_remote_code)
    monkeypatch.setattr(questions, "ASKED", 1000)
    every = validation_questions(recipe, tokenizer)
    lengths = sorted(len(question.prompt) for question in every)
    limit = lengths[len(lengths) // 2]
    assert lengths[0] <= limit < lengths[-1]
    monkeypatch.setattr(questions, "LONGEST", limit)
    found = validation_questions(recipe, tokenizer)
    assert found == [question for question in every if len(question.prompt) <= limit]


@pytest.mark.parametrize("where", ["mcore", "run"])
def test_bf16_is_that_of_stock_transformers_under_autocast(make: Callable[..., Recipe], where: str) -> None:
    recipe = make("train.precision=bf16")
    loss = stage.validation_loss(recipe, open_mcore(recipe.path(where), recipe.model).weights, 0)
    exact = loss_alone(recipe, recipe.path(where))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_alone(recipe, recipe.path(where), SEGMENTS)  # eager attention would round elsewhere
    assert abs(loss - rounded) < abs(loss - exact) / 10, (loss, rounded, exact)


def test_a_loss_in_another_precision_is_another_loss(make: Callable[..., Recipe], tmp_path: Path) -> None:
    full = {result.iteration: result.loss for result in run_evaluate(make(), None, "all").results}
    half = {result.iteration: result.loss for result in run_evaluate(make("train.precision=bf16")).results}
    assert list(half) == [0, 6], "what was not evaluated again is left out"
    assert all(half[number] != full[number] for number in half)
    assert all(abs(half[number] - full[number]) < 0.05 for number in half)


def test_checkpoints_that_training_removes_meanwhile_are_left_out_of_all(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = stage.validation_loss

    def loss(recipe: Recipe, weights: Weights, iteration: int) -> float:
        if iteration == 0:
            prune(recipe.path("run"), 1, 6)
        return real(recipe, weights, iteration)

    monkeypatch.setattr(stage, "validation_loss", loss)
    monkeypatch.setattr(stage, "iterations", lambda run: [2, 3, 6])  # 2 is gone as soon as it is listed
    assert [result.iteration for result in run_evaluate(recipe, None, "all").results] == [0, 6]
    assert [line for line in capsys.readouterr().err.splitlines() if "removed" in line] == [
        f"iteration {number} was removed meanwhile: left out" for number in (2, 3)
    ]


def test_a_checkpoint_that_is_removed_between_loss_and_answers_keeps_its_loss(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.validation_loss

    def loss(recipe: Recipe, weights: Weights, iteration: int) -> float:
        found = real(recipe, weights, iteration)
        if iteration == 3:
            prune(recipe.path("run"), 1, 6)
        return found

    monkeypatch.setattr(stage, "validation_loss", loss)
    run_evaluate(recipe, None, "all")
    assert {number: answers for number, (_, answers) in written(recipe).items()} == {0: 4, 3: 0, 6: 4}


def test_an_iteration_that_is_asked_for_by_its_number_must_be_there(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.validation_loss

    def loss(recipe: Recipe, weights: Weights, iteration: int) -> float:
        prune(recipe.path("run"), 1, 6)
        return real(recipe, weights, iteration)

    monkeypatch.setattr(stage, "validation_loss", loss)
    assert "iteration 3 is not there -> take another one: ITERATION=6" in refusal_of(run_evaluate, recipe, None, "3")
    assert list(written(recipe)) == [0]


def test_a_prompt_file_whose_name_is_no_text(recipe: Recipe, tmp_path: Path) -> None:
    prompts = Path(os.fsdecode(os.fsencode(tmp_path) + b"/p\xff.txt"))
    prompts.write_text("hm", "utf-8")
    evaluation = run_evaluate(recipe, prompts)
    assert [question.source for question in evaluation.questions] == ["p\\udcff.txt:1"]
    assert read_evaluation(recipe.path("run")) == evaluation


def test_other_settings_of_generation_ask_again(make: Callable[..., Recipe]) -> None:
    one = run_evaluate(make())
    other = run_evaluate(make("chat.max_new_tokens=2"))
    assert [result.loss for result in one.results] == [result.loss for result in other.results]
    assert one.settings != other.settings
    assert all(
        len(short) <= len(long) for a, b in zip(one.results, other.results) for long, short in zip(a.answers, b.answers)
    )


def test_a_random_answer_can_be_repeated(make: Callable[..., Recipe]) -> None:
    recipe = make("chat.temperature=3.0", "chat.max_new_tokens=8")
    first = run_evaluate(recipe).results[0].answers
    (recipe.path("run") / EVALUATION).unlink()
    assert run_evaluate(recipe).results[0].answers == first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no questions -> write one on each line"),
        ("p.txt", b"ok\n\xff\n", "not UTF-8"),
        ("p.txt", b"ok\nend [unused10]\n", "p.txt:2: the message holds the control token [unused10] -> take it out"),
        ("p.yaml", b"a: b", "unknown kind of file .yaml -> known: .txt, "),
        ("p.jsonl", b'{"messages": []}\n', "p.jsonl:1: "),
        ("p.jsonl", b"{\n", "p.jsonl:1: "),
        ("p.json", b"[]", "holds no records"),
        (
            "p.jsonl",
            b'{"instruction": "half \\ud800", "output": "a"}\n',
            "p.jsonl:1: message 1 holds half a",
        ),
        (
            "p.jsonl",
            b'{"instruction": "q", "output": "half \\ud800"}\n',
            "p.jsonl:1: message 2 holds half a",
        ),
    ],
    ids=[
        "empty",
        "not UTF-8",
        "control token",
        "yaml",
        "no messages",
        "not JSON",
        "no records",
        "half a character in the question",
        "half a character in the answer",
    ],
)
def test_prompt_files_that_are_none(recipe: Recipe, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal_of(run_evaluate, recipe, tmp_path / name)
    assert not (recipe.path("run") / EVALUATION).exists()


def test_what_cannot_be_evaluated(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make()
    assert "is a directory -> give a prompt file: PROMPTS=" in refusal_of(run_evaluate, recipe, tmp_path)
    assert "no such file -> give a prompt file: PROMPTS=" in refusal_of(run_evaluate, recipe, tmp_path / "none.txt")
    assert "ITERATION=soon is neither a number, best nor all" in refusal_of(run_evaluate, recipe, None, "soon")
    assert "no checkpoint here was evaluated during training" in refusal_of(run_evaluate, recipe, None, "best")
    assert "iteration 5 is not there -> take another one: ITERATION=6" in refusal_of(run_evaluate, recipe, None, "5")
    assert "no such directory" in refusal_of(run_evaluate, make(f"paths.run={tmp_path / 'none'}"))
    (recipe.path("run") / EVALUATION).write_text("{}", "utf-8")
    assert "not an evaluation" in refusal_of(run_evaluate, recipe)


def test_a_run_of_another_dataset_or_base_is_refused(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(
        f"paths.dataset={tmp_path / 'other'}", f"paths.samples={tmp_path / 's'}", f"paths.shards={tmp_path / 'h'}"
    )
    write_samples(recipe.path("samples") / "a.jsonl", [conversation(f"q {n}", "a") for n in range(30)])
    run_preprocess(recipe)
    run_merge(recipe)
    assert "is not what this run was trained on" in refusal_of(run_evaluate, recipe)
    recipe = make(f"paths.mcore={tmp_path / 'mcore'}")
    assert "no such directory" in refusal_of(run_evaluate, recipe)


def test_without_a_validation_split_prompts_or_benchmarks_are_needed(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*trained, "data.validation_share=0", f"paths.run={tmp_path / 'run'}"]
    overrides += [f"paths.dataset={tmp_path / 'dataset'}", f"paths.shards={tmp_path / 'shards'}"]
    recipe = load_recipe(ROOT / "recipes/demo.yaml", [*overrides, "train.iterations=3"])
    run_preprocess(recipe)
    run_merge(recipe)
    run_sft(recipe, [])
    assert "there is no validation split (data.validation_share is 0)" in refusal_of(run_evaluate, recipe)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    evaluation = run_evaluate(recipe, tasks=[task(tmp_path, CHOICE)])
    assert (evaluation.questions, [len(result.benchmarks) for result in evaluation.results]) == ([], [1, 1])
    prompts = tmp_path / "p.txt"
    prompts.write_text("hm", "utf-8")
    evaluation = run_evaluate(recipe, prompts)
    assert [result.loss for result in evaluation.results] == [None, None]
    assert all(len(result.answers) == 1 for result in evaluation.results)


def test_the_command_shows_losses_and_answers(trained: list[str], make: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = [*trained, f"paths.run={make().path('run')}"]
    arguments = ["evaluate", "--recipe", str(ROOT / "recipes/demo.yaml"), *(f"--set={one}" for one in overrides)]
    done = CliRunner().invoke(app, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    found = read_evaluation(make().path("run"))
    assert found
    for result in found.results:
        assert f"{result.loss:.4f}" in done.output
    assert "reference: n " in done.output


def test_the_command_shows_losses_of_checkpoints_that_were_not_asked(
    make: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make()
    evaluation = run_evaluate(recipe, None, "all")
    evaluation.results[2] = replace(evaluation.results[2], answers=[])
    evaluation.results[0] = replace(evaluation.results[0], loss=math.nan)
    evaluation.results[1] = replace(
        evaluation.results[1], loss=60.0, answers=["3: one", "3: two", "3: three", "3: four"]
    )
    _show(evaluation, recipe.path("run"))
    shown = capsys.readouterr().out
    rows = [line.strip("│\n ").split("│") for line in shown.splitlines() if line.startswith("│")]
    losses = [[cell.strip() for cell in row] for row in rows]
    assert losses[:2] == [["before training", "nan"], ["iteration 3", "60.0000"]]  # no perplexity
    assert losses[2][:2] == ["iteration 6", f"{evaluation.results[2].loss:.4f}"]
    assert "iteration 3: 3: four" in shown
    assert "iteration 6: " not in shown


def test_an_npu_is_taken_where_torch_npu_sees_one(
    recipe: Recipe, make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(npu=SimpleNamespace(is_available=lambda: True), __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    npus = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"engine": "mindspeed", "device": "auto"})}
    )
    assert inference_device(make()).type == "cpu"
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "device", str)
        assert inference_device(npus) == "npu"
        fake.npu.is_available = lambda: False
        assert inference_device(npus) == "cpu"


def test_benchmarks_before_and_after_once_each(
    make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the questions of an earlier evaluation, and without any questions where there are none to ask."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    recipe, name = make(), task(tmp_path, CHOICE)
    (tmp_path / "asked.txt").write_text("一？\n", "utf-8")
    asked = run_evaluate(recipe, tmp_path / "asked.txt")
    found = run_evaluate(recipe, wanted="all", tasks=[name])
    assert found.questions == asked.questions
    assert [result.answers for result in found.results][:: len(found.results) - 1] == [
        result.answers for result in asked.results
    ]
    [benchmark] = Benchmarks([name]).names
    assert [[*result.benchmarks] for result in found.results] == [[benchmark]] * 3
    assert [*found.benchmarks["capitals acc"]] == [0, 3, 6]
    _show(found, recipe.path("run"))
    assert re.search(r"capitals acc\n(.*\n)?.*before training[ │]+[0-9.]+ ± [0-9.]+", capsys.readouterr().out)
    page = run_report(recipe).read_text("utf-8")
    assert "<h3>capitals acc</h3>" in page
    monkeypatch.setattr(Benchmarks, "scores", lambda *_: pytest.fail("is done already"))
    assert run_evaluate(recipe, wanted="all", tasks=[name]).results == found.results
    (tmp_path / "asked.txt").write_text("二？\n", "utf-8")
    other = run_evaluate(recipe, tmp_path / "asked.txt")
    assert [[*result.benchmarks] for result in other.results] == [[benchmark]] * 3
