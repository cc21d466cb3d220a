"""Benchmarks: the real harness on small tasks from local files, in the template of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeRecipe
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.evaluate.benchmark import Benchmarks, _Model
from openpangu_sft.evaluate.record import Evaluation, Result
from openpangu_sft.model.chat import Chat
from openpangu_sft.util.errors import UserError
from refusals import refusal_of

CHOICE = {
    "task": "capitals",
    "output_type": "multiple_choice",
    "doc_to_choice": ["北京", "上海市区"],
    "metric_list": [{"metric": "acc"}],
}
ANSWERS = {
    "task": "capitals_written",
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}
QUESTIONS = [("中国的首都是哪里？", 0), ("人口最多的城市是哪一座？", 1), ("And the capital?", 0)]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def chat(make_recipe: MakeRecipe) -> Chat:
    recipe = make_recipe("chat.max_new_tokens=8")
    return Chat(recipe, recipe.path("hf"))


def task(folder: Path, form: dict[str, Any], **other: Any) -> str:
    """Writes a task and its data; returns the task's path."""
    lines = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    rest = {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    path = folder / f"{form['task']}.yaml"
    path.write_text(json.dumps({**source, **rest, **form, **other}), "utf-8")  # JSON is YAML
    return str(path)


def test_the_likelier_answer_is_the_one_that_transformers_finds(chat: Chat, tmp_path: Path) -> None:
    name = task(tmp_path, CHOICE)
    right = 0
    for question, expected in QUESTIONS:
        prompt, likelihoods = chat.prompt([Message("user", question)]), []
        for choice in CHOICE["doc_to_choice"]:
            ids = [*prompt, *chat.tokenizer.hf.encode(choice, add_special_tokens=False)]
            with torch.no_grad():
                logits = chat.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            places = range(len(prompt), len(ids))
            likelihoods.append(sum(float(logits[place - 1, ids[place]]) for place in places))
        right += likelihoods.index(max(likelihoods)) == expected
    benchmarks = Benchmarks([name])
    scores = benchmarks.scores(benchmarks.names[0], chat)
    assert scores == {"capitals acc": [pytest.approx(right / 3), pytest.approx(scores["capitals acc"][1])]}


def test_generated_answers_are_those_of_chat(chat: Chat, tmp_path: Path) -> None:
    """In batches of several prompts of different lengths."""
    answers = [chat.reply([Message("user", question)]).text.split("\n")[0] for question, _ in QUESTIONS]
    assert any(answers)
    written = {"doc_to_target": "{{" + repr(answers) + "[" + repr([q for q, _ in QUESTIONS]) + ".index(question)]}}"}
    benchmarks = Benchmarks([task(tmp_path, ANSWERS, **written)])
    assert benchmarks.scores(benchmarks.names[0], chat) == {"capitals_written exact_match": [1.0, 0.0]}
    other = Benchmarks([task(tmp_path, ANSWERS, doc_to_target="nothing of the kind")])
    assert other.scores(other.names[0], chat) == {"capitals_written exact_match": [0.0, 0.0]}


def test_thinking_is_not_scored(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = chat.tokenizer.hf.encode("[unused16]上海？不，[unused17]北京", add_special_tokens=False)

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.stack([torch.tensor([*row.tolist(), *ids, chat.tokenizer.end_id]) for row in input_ids])

    monkeypatch.setattr(chat.model, "generate", generate)
    benchmarks = Benchmarks([task(tmp_path, ANSWERS, doc_to_target="北京")])
    assert benchmarks.scores(benchmarks.names[0], chat) == {"capitals_written exact_match": [1.0, 0.0]}


def test_examples_are_turns_and_descriptions_system_prompts(chat: Chat) -> None:
    model = _Model(chat)
    turns = [("system", "简短"), ("user", "一"), ("assistant", "二"), ("user", "三")]
    history = [{"role": role, "content": text} for role, text in turns]
    messages = [Message(role, text) for role, text in turns[1:]]
    assert model.tok_encode(model.apply_chat_template(history)) == chat.prompt(messages, "简短")
    begun = model.tok_encode(model.apply_chat_template([*history, {"role": "assistant", "content": "答案是"}], False))
    after = chat.tokenizer.hf.encode("答案是", add_special_tokens=False)
    assert begun == chat.prompt(messages, "简短") + after


def test_a_changed_task_is_another_benchmark(tmp_path: Path) -> None:
    [before] = Benchmarks([task(tmp_path, CHOICE)]).names
    [same] = Benchmarks([task(tmp_path, CHOICE)]).names
    [after] = Benchmarks([task(tmp_path, CHOICE, num_fewshot=0)]).names
    assert before == same != after


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"doc_to_text": "[unused10]{{question}}"}, "the message holds the control token [unused10]"),
        ({"doc_to_text": "{{question * 2000}}"}, "more than the model can hold"),
        ({"generation_kwargs": {"until": [], "max_gen_toks": -10}}, "and the task's answers leave room for 10"),
        ({"generation_kwargs": {"until": [], "max_gen_toks": 0}}, "must be less than model's maximum sequence length"),
    ],
)
def test_prompts_that_are_refused(chat: Chat, tmp_path: Path, form: dict[str, Any], said: str) -> None:
    if "generation_kwargs" in form:  # as many tokens less than the context
        form["generation_kwargs"]["max_gen_toks"] += chat.context
    benchmarks = Benchmarks([task(tmp_path, {**ANSWERS, **form})])
    with pytest.raises(UserError) as raised:
        benchmarks.scores(benchmarks.names[0], chat)
    assert said in str(raised.value)


def test_tasks_that_are_none(tmp_path: Path) -> None:
    path = task(tmp_path, CHOICE)
    (tmp_path / "data.jsonl").unlink()
    assert f"{path}: is no task: Unable to find" in refusal_of(lambda: Benchmarks([path]))
    Path(path).write_text("task: [", "utf-8")
    assert f"{path}: is no task: " in refusal_of(lambda: Benchmarks([path]))
    said = refusal_of(lambda: Benchmarks(["no_such_task"]))
    assert said == ("BENCH: no_such_task is no task of lm-evaluation-harness, nor a file -> see lm-eval --tasks list")


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    from openpangu_sft.evaluate import stage

    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    said = refusal_of(lambda: stage._benchmarks(["gsm8k"]))
    assert said == "BENCH: lm-eval is not installed -> run make setup, or use the npu image"


def test_values_are_shown_with_their_errors() -> None:
    results = [
        Result(0, "a", [], None, [], {"x": {"gsm8k exact_match": [0.5, 0.25], "gsm8k f1": [1.0]}}),
        Result(9, "a", [], None, [], {"x": {"gsm8k exact_match": [0.75, 0.125]}}),
    ]
    shown = Evaluation({}, {}, {}, [], results).benchmarks
    assert shown == {"gsm8k exact_match": {0: "0.5000 ± 0.2500", 9: "0.7500 ± 0.1250"}, "gsm8k f1": {0: "1.0000"}}
