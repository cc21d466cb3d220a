"""Roles are known from encoding on: beside the packed files, outside the digest, with any class of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Trainable
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from conftest import MakeRecipe, conversation, example_texts, write_samples
from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, read_manifest
from openpangu_sft.conversations.conversation import parse_sample
from openpangu_sft.dataset.index_file import (
    BEGINS,
    FIELDS,
    PREFIX,
    ROLES,
    VALIDATION,
    read_roles,
    read_rows,
    role_of,
    roles_path,
)
from openpangu_sft.dataset.inspect import run_inspect
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.dataset.segments import segment_runs
from openpangu_sft.evaluate.questions import validation_questions
from openpangu_sft.preview.stage import run_preview
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.template import START, sample_spans
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from refusals import refusal_of

SAMPLES = [
    conversation(
        f"第 {number} 个问题？🎉", f" answer {number}\n", "Und dann?", "  再见。", system="简短" if number % 2 else ""
    )
    for number in range(12)
]
TOOLS = {
    "meta_prompt": ["你是天气助手。", "[]"],
    "data": [
        {"role": "user", "content": "助手：我是谁？"},
        {"role": "assistant", "content": "{}"},
        {"role": "tool", "content": "用户：晴"},
        {"role": "assistant", "content": "晴。"},
    ],
}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer, as GPT-2 and Qwen have it: no SentencePiece anywhere."""
    directory = tmp_path_factory.mktemp("byte_level")
    trained = Trainable(BPE())
    trained.pre_tokenizer, trained.decoder = ByteLevel(add_prefix_space=False), Decoder()
    alphabet = ByteLevel.alphabet()
    trained.train_from_iterator(example_texts(), BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    trained.model.save(str(directory))
    marks = ["[unused9]", "[unused10]"]
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "[unused10]", "unk_token": "<unk>"}
    config |= {"pad_token": "<unk>", "add_bos_token": True, "additional_special_tokens": marks}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


@pytest.fixture(params=["sentencepiece", "byte-level"])
def recipe(make_recipe: MakeRecipe, request: pytest.FixtureRequest) -> Recipe:
    """A merged dataset of two files with a validation split."""
    other = [f"paths.hf={request.getfixturevalue('byte_level')}"] if request.param == "byte-level" else []
    recipe = make_recipe("data.validation_share=0.4", "data.seq_length=256", *other)
    write_samples(recipe.path("samples") / "a.jsonl", SAMPLES)
    write_samples(recipe.path("samples") / "b.jsonl", [TOOLS])
    run_preprocess(recipe)
    run_merge(recipe)
    return recipe


def test_each_token_has_the_role_of_its_message(recipe: Recipe) -> None:
    tokenizer = Tokenizer(recipe.path("hf"), trust_remote_code=False)
    expected = {}
    for sample in [*SAMPLES, TOOLS]:
        ids, roles = [], []
        for span in sample_spans(parse_sample(sample)):
            ids += (encoded := tokenizer.span_ids(span))
            begins = [BEGINS * (number == tokenizer.start_id) for number in encoded]
            roles += [ROLES.index(span.role) + 1 + begin for begin in begins]
        expected[tuple(ids)] = roles
    for prefix in (PREFIX, VALIDATION):
        ids, numbers, _ = (read_rows(recipe.path("dataset"), prefix, field, 256) for field in FIELDS)
        roles = read_roles(recipe.path("dataset"), prefix, *ids.shape)
        assert roles is not None
        assert not roles[numbers == 0].any()
        for row, begin, end in zip(*segment_runs(numbers)):
            assert expected.pop(tuple(ids[row, begin:end].tolist())) == roles[row, begin:end].tolist()
    assert not expected


def test_the_numbers_of_the_format() -> None:
    assert [role_of(value) for value in (1, 2, 3, 4, 5)] == ["system", "user", "assistant", "tool", "function"]
    assert [role_of(value + BEGINS) for value in (1, 2, 3, 4, 5)] == list(ROLES)


def test_preview_and_evaluate_show_what_was_written(recipe: Recipe) -> None:
    """With a byte-level tokenizer, too: its tokens are bytes in an alphabet of their own."""
    preview, _ = run_preview(recipe, count=20)
    written = [[message["content"] for message in sample["data"]] for sample in [*SAMPLES, TOOLS]]
    for segment in preview.segments:
        names = [turn.role for turn in segment.turns if turn.role != "system"]
        assert names[:2] == ["user", "assistant"]
        texts = ["".join(token.text for token in turn.tokens).replace("…", "") for turn in segment.turns]
        contents = [text.split("：", 1)[1].removesuffix("[unused10]") for text in texts if "系统：" not in text]
        assert [text.replace("·", " ").replace("↵", "\n") for text in contents] in written
    questions = validation_questions(recipe, Tokenizer(recipe.path("hf"), trust_remote_code=False))
    assert questions
    for question in questions:
        asked = [text for role, text in question.turns if role != "system"]
        assert [*asked, question.reference] in written
        assert [role for role, _ in question.turns][-3:] == ["user", "assistant", "user"]


def as_version_0_5_0(directory: Path) -> None:
    """Takes the roles out of a shard or a dataset."""
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    for prefix in (PREFIX, VALIDATION):
        roles_path(directory, prefix).unlink()
        del manifest["files"][roles_path(directory, prefix).name]
    (directory / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def test_roles_are_no_part_of_the_digest(recipe: Recipe) -> None:
    dataset = recipe.path("dataset")
    before = read_manifest(dataset, "dataset", "")
    as_version_0_5_0(dataset)
    without = read_manifest(dataset, "dataset", "")
    assert len(before.files) - len(without.files) == 2
    assert before.digest == without.digest
    assert Manifest("dataset", files={"data_roles.bin": {"sha256": "a"}}).digest == Manifest("dataset").digest


def test_a_shard_without_roles_is_not_mixed_in(recipe: Recipe) -> None:
    before, shard = run_merge(recipe), recipe.path("shards") / "b"
    as_version_0_5_0(shard)
    what = "was made by an earlier version and holds no roles"
    assert refusal_of(run_merge, recipe) == f"{shard}: {what} -> run make preprocess"
    made = {shard.part.name: shard.made for shard in run_preprocess(recipe)}
    assert made == {"a": False, "b": True}
    assert run_merge(recipe).files == before.files


def test_questions_of_a_dataset_without_roles(recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(recipe.path("hf"), trust_remote_code=False)
    known = validation_questions(recipe, tokenizer)
    as_version_0_5_0(recipe.path("dataset"))
    capfd.readouterr()
    found = validation_questions(recipe, tokenizer)
    said = " ".join(capfd.readouterr().err.split())
    assert said.startswith("roles of the validation samples are unknown: this dataset records none")
    assert [(each.prompt, each.reference) for each in found] == [(each.prompt, each.reference) for each in known]
    for question in found:
        [[role, text]] = question.turns
        assert role == "prompt"
        assert text.endswith(f"{START}助手：")
        assert text.count(START) == 5  # system and four messages


def test_inspect_counts_turns_and_finds_damage(recipe: Recipe) -> None:
    counts = read_manifest(recipe.path("dataset"), "dataset", "").counts
    figures = run_inspect(recipe).figures
    validation, trained = counts["validation"]["packed"], counts["packed"]
    tools = "1 tool" in figures["turns"]
    assert figures["turns"] == (
        f"{trained + tools} system, {2 * trained - tools} user, {2 * trained} assistant, {int(tools)} tool, 0 function"
    )
    assert figures["validation: turns"].startswith(f"{validation + (not tools)} system")
    path = roles_path(recipe.path("dataset"), PREFIX)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert any("(sha256)" in str(finding) and path.name in str(finding) for finding in run_inspect(recipe).findings)
    path.write_bytes(content[:-1])
    assert any("does not hold" in str(finding) for finding in run_inspect(recipe).findings)
    rows = np.prod(read_rows(recipe.path("dataset"), PREFIX, "labels", 256).shape) // 256
    assert f"does not hold {rows} rows of 256 roles" in refusal_of(read_roles, path.parent, PREFIX, rows, 256)


@pytest.mark.parametrize("value", [0, 6, 128, 255])
def test_a_value_that_is_no_role_is_refused(value: int) -> None:
    assert f"a token's role is {value}" in refusal_of(role_of, value)
