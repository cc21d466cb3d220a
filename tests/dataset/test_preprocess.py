"""Stage preprocess: every sample in the packs exactly once or rejected by name, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaTokenizer

from conftest import PATIENCE, ROOT, TINY, MakeRecipe, SmallDisk, conversation, write_samples
from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.conversations.conversation import Rules, parse_sample
from openpangu_sft.dataset import pool, preprocess, spans
from openpangu_sft.dataset.index_file import FIELDS, read_rows
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.pool import ordered_map
from openpangu_sft.dataset.preprocess import _spans_to_compare, run_preprocess, sample_files
from openpangu_sft.dataset.spans import parts_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.template import sample_spans
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.util.errors import UserError, explain_os_error
from refusals import refusal_of, without_progress


def samples(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Different samples of different lengths, some with tools and several turns."""
    made = []
    for number in range(start, start + count):
        sample = conversation(f"问题 {number}?", f"答案 {number} " * (number % 7 + 1), system="系统" * (number % 3))
        if number % 5 == 0:
            more = [("tool", "{}"), ("assistant", f"查到 {number}"), ("user", "谢谢"), ("assistant", "不客气")]
            sample["data"] += [{"role": role, "content": content} for role, content in more]
        made.append(sample)
    return made


def tree(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory, but for the locks."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_shard(recipe: Recipe, name: str) -> dict[str, np.ndarray]:
    return {field: read_rows(recipe.path("shards") / name, "data", field, recipe.data.seq_length) for field in FIELDS}


def segments_of(shard: dict[str, np.ndarray], pad_id: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(input_ids, labels) of every segment; checks the rules for rows on the way."""
    for input_ids, numbers, labels in zip(*(shard[field] for field in FIELDS)):
        count = int(numbers.max())
        filled = int((numbers > 0).sum())
        assert (np.diff(numbers[:filled]) >= 0).all()
        assert set(numbers[:filled].tolist()) == set(range(1, count + 1))
        assert (numbers[filled:] == 0).all()
        assert (input_ids[filled:] == pad_id).all()
        assert (labels[filled:] == -100).all()
        assert ((labels == input_ids) | (labels == -100)).all()
        assert (labels != -100).any()  # else the loss of this row is 0/0
        for number in range(1, count + 1):
            inside = numbers == number
            yield tuple(input_ids[inside].tolist()), tuple(labels[inside].tolist())


def expected_segments(
    recipe: Recipe, records: list[dict[str, Any]]
) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Encoded by the plain Hugging Face tokenizer, piece by piece."""
    hf = Tokenizer(recipe.path("hf"), trust_remote_code=False).hf
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for record in records:
        input_ids: list[int] = []
        labels: list[int] = []
        for text, trained, opens, _ in sample_spans(parse_sample(record)):
            ids = hf.encode(text, add_special_tokens=opens)
            input_ids += ids
            labels += ids if trained else [-100] * len(ids)
        found[tuple(input_ids), tuple(labels)] += 1
    return found


# --- what is in a shard ------------------------------------------------------------------------------------------


def test_every_sample_is_in_the_packs_exactly_once(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    records = [*samples(150), *samples(3)]  # three of them twice
    write_samples(recipe.path("samples") / "a.jsonl", records)
    [(_, manifest, made)] = run_preprocess(recipe)
    assert made
    written = read_shard(recipe, "a")
    found = list(segments_of(written, pad_id=0))
    assert Counter(found) == expected_segments(recipe, records)
    assert all(input_ids[0] == 1 and 1 not in input_ids[1:] for input_ids, _ in found)  # bos
    rows = len(written["labels"])
    assert manifest.counts == {
        "read": 153,
        "packed": 153,
        "rejected": 0,
        "dropped": 0,
        "truncated": 0,
        "reasons": {},
        "ignored_keys": {},
        "changes": {},
        "packs": rows,
        "tokens": int((written["attention_mask"] > 0).sum()),
        "trained_tokens": int((written["labels"] != -100).sum()),
    }
    assert manifest.counts["tokens"] / (rows * 128) > 0.9
    assert {path.name for path in (recipe.path("shards") / "a").iterdir()} == {*manifest.files, "manifest.json"}
    assert len(manifest.files) == 7  # no spool, no rejects


def test_one_worker_and_several_and_a_second_run_give_the_same_bytes(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "SMALLEST", 700)
    monkeypatch.setattr("openpangu_sft.dataset.segments.VALUES_AT_ONCE", 300)
    write_samples(make_recipe().path("samples") / "a.jsonl", [*samples(100), {"bad": 1}, *samples(60, 100)])
    trees = []
    for count in (1, 3, 3, 2):
        recipe = make_recipe("data.on_bad_sample=skip", f"data.workers={count}")
        run_preprocess(recipe)
        trees.append(tree(recipe.path("shards")))
    assert len(trees[0]) == 9
    assert trees[0] == trees[1] == trees[2] == trees[3]
    other = make_recipe("data.on_bad_sample=skip", "data.seed=99")
    run_preprocess(other)
    assert (
        tree(other.path("shards"))["a/data_packed_labels_document.bin"] != trees[0]["a/data_packed_labels_document.bin"]
    )


def test_one_shard_per_file_and_those_of_files_that_are_gone_go(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    names = ["b", "a", "数据 一", "-x", "a.b", "[red]x[bold]", "it's", 'q"q', "%s{0}", "new\nline", "x.staging"]
    for place, name in enumerate(names):
        write_samples(recipe.path("samples") / f"{name}.jsonl", samples(3, 3 * place))
    made = run_preprocess(recipe)
    assert [next(iter(manifest.inputs)) for _, manifest, _ in made] == sorted(f"{name}.jsonl" for name in names)
    shards = recipe.path("shards")
    assert {path.name for path in shards.iterdir() if not path.name.startswith(".")} == set(names)
    for place, name in enumerate(names):
        assert Counter(segments_of(read_shard(recipe, name), 0)) == expected_segments(recipe, samples(3, 3 * place))
    for name in names[1:]:
        (recipe.path("samples") / f"{name}.jsonl").unlink()
    run_preprocess(recipe)
    assert [path.name for path in shards.iterdir() if not path.name.startswith(".")] == ["b"]
    assert not list(shards.glob(".*.staging"))


def test_progress_shows_the_name_of_the_file_as_it_is(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("openpangu_sft.util.console.SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr("openpangu_sft.util.console.MB", 100)
    monkeypatch.setattr(spans, "SMALLEST", 1000)
    recipe = make_recipe()
    path = recipe.path("samples") / "[red]x[bold].jsonl"
    write_samples(path, samples(30))
    run_preprocess(recipe)
    lines = capsys.readouterr().err.splitlines()
    encoding = [line for line in lines if line.startswith("encoding [red]x[bold].jsonl (MB): ")]
    positions = [int(line.split(": ")[1].split("/")[0]) for line in encoding]
    assert len(positions) > 3
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size // 100
    assert any(line.startswith("writing [red]x[bold].jsonl (packs): ") for line in lines)


def test_what_is_no_shard_is_never_removed(make_recipe: MakeRecipe, tiny_hf: Path) -> None:
    """`paths.shards` may be mistyped: checkpoints have manifests, too."""
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(3))
    write_samples(recipe.path("samples") / "b.jsonl", samples(3))
    run_preprocess(recipe)
    shards = recipe.path("shards")
    (shards / "checkpoint").mkdir()
    (shards / "checkpoint/manifest.json").write_bytes((tiny_hf / "manifest.json").read_bytes())
    (shards / "odd").mkdir()
    (shards / "odd/manifest.json").write_text("[]", "utf-8")
    (shards / "b/notes.txt").write_text("mine", "utf-8")
    (recipe.path("samples") / "b.jsonl").unlink()
    message = refusal_of(run_preprocess, recipe)
    assert message.startswith(f"{shards / 'b/notes.txt'}: lies in the shard of a samples file that is gone")
    assert {path.name for path in shards.iterdir()} >= {"a", "b", "checkpoint", "odd"}
    (shards / "b/notes.txt").unlink()
    run_preprocess(recipe)
    assert {path.name for path in shards.iterdir() if path.name[0] != "."} == {"a", "checkpoint", "odd"}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.rstrip(b"\n"),
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: b"\n\r\n  \n" + content.replace(b"\n", b"\n\n"),
    ],
    ids=["no newline at the end", "CRLF", "BOM", "empty lines"],
)
def test_odd_files_give_the_same_packs(make_recipe: MakeRecipe, change: Any) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, samples(20))
    run_preprocess(recipe)
    before = tree(recipe.path("shards") / "a")
    path.write_bytes(change(path.read_bytes()))
    run_preprocess(recipe)
    after = tree(recipe.path("shards") / "a")
    assert before.pop("manifest.json") != after.pop("manifest.json")  # other content, the next stages see it
    assert before == after


def test_samples_may_be_one_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(f"paths.samples={tmp_path}/elsewhere/mine.jsonl")
    write_samples(tmp_path / "elsewhere/mine.jsonl", samples(5))
    run_preprocess(recipe)
    assert Counter(segments_of(read_shard(recipe, "mine"), 0)) == expected_segments(recipe, samples(5))


# --- bad samples -------------------------------------------------------------------------------------------------

BAD: list[tuple[str, str]] = [
    ('{"meta_prompt": [""], "data": []}', "data has no messages"),
    ("{broken", "not valid JSON"),
    ('{"meta_prompt": [""], "data": [{"role": "user", "content": NaN}]}', "number that JSON does not know: NaN"),
    ("[]", "is a list, not an object"),
    (json.dumps(conversation("\ud800", "答")), "message 1 holds half a character"),
    (json.dumps(conversation("a[unused10]b", "答")), "message 1 holds the control token [unused10], which could forge"),
    (json.dumps(conversation("问", "[unused9]")), "message 2 holds the control token [unused9]"),
    (json.dumps(conversation("问", "答", system="<s>")), "meta_prompt holds the control token <s>"),
    (json.dumps(conversation("问 " * 200, "答")), "tokens, above data.seq_length 128: shorten it"),
]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("line", "reason"),
    BAD,
    ids=["no messages", "not JSON", "NaN", "list", "half a character", "in user", "in assistant", "in system", "long"],
)
def test_a_bad_sample_is_refused_by_line_and_nothing_is_left(
    make_recipe: MakeRecipe, line: str, reason: str, count: int
) -> None:
    recipe = make_recipe(f"data.workers={count}")
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, samples(4))
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" + line + "\n" + json.dumps(conversation("", "")) + "\n")
    message = refusal_of(run_preprocess, recipe)
    assert message.startswith(f"{path}:6: ")
    assert reason in message
    assert message.endswith("-> fix it, or set data.on_bad_sample=skip")
    assert tree(recipe.path("shards")) == {}


def test_a_refusal_leaves_the_earlier_result(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, samples(4))
    run_preprocess(recipe)
    before = tree(recipe.path("shards"))
    write_samples(path, [*samples(4), {}])
    refusal_of(run_preprocess, recipe)
    assert tree(recipe.path("shards")) == before


@pytest.mark.parametrize("count", [1, 2])
def test_bad_samples_are_skipped_into_a_file(make_recipe: MakeRecipe, count: int) -> None:
    recipe = make_recipe("data.on_bad_sample=skip", f"data.workers={count}")
    path = recipe.path("samples") / "a.jsonl"
    path.parent.mkdir()
    good = samples(len(BAD))
    lines = [text for sample, (bad, _) in zip(good, BAD) for text in (json.dumps(sample), bad)]
    path.write_text("\n".join(lines), "utf-8")
    [(_, manifest, _)] = run_preprocess(recipe)
    assert Counter(segments_of(read_shard(recipe, "a"), 0)) == expected_segments(recipe, good)
    assert [manifest.counts[name] for name in ("read", "packed", "rejected")] == [2 * len(BAD), len(BAD), len(BAD)]
    rejects = (recipe.path("shards") / "a/rejects.jsonl").read_text("utf-8").splitlines()
    for place, (reject, (line, reason)) in enumerate(zip(map(json.loads, rejects), BAD)):
        assert set(reject) == {"file", "place", "reason", "record"}
        assert (reject["file"], reject["place"]) == ("a.jsonl", str(2 * place + 2))
        assert reason in reject["reason"]
        same = reject["record"] == line if isinstance(reject["record"], str) else reject["record"] == json.loads(line)
        assert same
    assert len(rejects) == len(BAD)


def test_a_bad_sample_of_a_later_part_has_its_line_in_the_file(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    path.parent.mkdir()
    lines = [json.dumps(sample) for sample in samples(12)]
    path.write_text("\n".join([*lines[:10], "{}", *lines[10:]]), "utf-8")
    assert refusal_of(run_preprocess, recipe, 2, 2).startswith(f"{path}:11: meta_prompt is missing")


def test_rejects_can_be_mended_and_run_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.on_bad_sample=skip")
    path = recipe.path("samples") / "a.jsonl"
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples(12)]
    broken = [lines[0][:-1], lines[1].replace("assistant", "gpt"), lines[2].replace("[{", "[1, {", 1)]
    path.parent.mkdir()
    path.write_text("\n".join([*broken, *lines[3:]]), "utf-8")
    run_preprocess(recipe)
    rejects = (recipe.path("shards") / "a/rejects.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(reject)["record"] for reject in rejects]
    back = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    assert back == broken
    mended = [back[0] + "}", back[1].replace("gpt", "assistant"), back[2].replace("[1, {", "[{")]
    (path.parent / "mended.jsonl").write_text("\n".join(mended), "utf-8")
    run_preprocess(recipe)
    assert Counter(segments_of(read_shard(recipe, "mended"), 0)) == expected_segments(recipe, samples(3))


def test_a_class_that_changes_the_users_texts_is_used_itself(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No odd text shows it, only the user's own: they are compared before the class is done without."""
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(30))
    run_preprocess(recipe)
    assert "its class is used" not in capsys.readouterr().err
    directly = read_shard(recipe, "a")["input_ids"].tolist()
    tokenize = LlamaTokenizer._tokenize
    monkeypatch.setattr(
        LlamaTokenizer, "_tokenize", lambda self, text, **more: tokenize(self, text.replace("答案", "回答"), **more)
    )
    (recipe.path("shards") / "a/manifest.json").unlink()
    shutil.rmtree(recipe.path("shards") / "a")
    run_preprocess(recipe)
    said = " ".join(capsys.readouterr().err.split())
    assert "tokenizer: its class is used, which is slower: it gives other ids than SentencePiece alone for" in said
    assert Counter(segments_of(read_shard(recipe, "a"), 0)) == expected_segments(recipe, samples(30))
    assert read_shard(recipe, "a")["input_ids"].tolist() != directly


def test_the_longest_sample_fills_a_pack_and_one_token_more_is_too_long(make_recipe: MakeRecipe) -> None:
    record = samples(1)[0]
    recipe = make_recipe()
    length = len(next(iter(expected_segments(recipe, [record])))[0])
    write_samples(recipe.path("samples") / "a.jsonl", [record])
    run_preprocess(make_recipe(f"data.seq_length={length}"))
    assert f"{length} tokens, above data.seq_length {length - 1}" in refusal_of(
        run_preprocess, make_recipe(f"data.seq_length={length - 1}")
    )


# --- again, and in parts -----------------------------------------------------------------------------------------


def test_what_has_not_changed_is_not_made_again(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(5))
    write_samples(recipe.path("samples") / "b.jsonl", samples(5))
    first = run_preprocess(recipe)
    assert [made for _, _, made in first] == [True, True]
    before = tree(recipe.path("shards"))

    again = run_preprocess(recipe)
    assert [made for _, _, made in again] == [False, False]
    assert [manifest for _, manifest, _ in again] == [manifest for _, manifest, _ in first]
    assert tree(recipe.path("shards")) == before

    write_samples(recipe.path("samples") / "b.jsonl", samples(6))
    assert [made for _, _, made in run_preprocess(recipe)] == [False, True]
    (recipe.path("shards") / "a/data_packed_labels_document.bin").write_bytes(b"")
    assert [made for _, _, made in run_preprocess(recipe)] == [True, False]
    for overrides in (["data.seed=7"], ["data.seq_length=256"], ["data.too_long=drop"], ["data.control_tokens=escape"]):
        assert [made for _, _, made in run_preprocess(make_recipe(*overrides))] == [True, True], overrides
        assert [made for _, _, made in run_preprocess(make_recipe(*overrides))] == [False, False], overrides


def test_a_file_that_changes_after_its_sum_was_taken(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, samples(5))
    sum_of = preprocess.sha256_of_span

    def sum_and_change(span: spans.Span) -> str:
        digest = sum_of(span)
        write_samples(path, samples(6))
        return digest

    monkeypatch.setattr(preprocess, "sha256_of_span", sum_and_change)
    assert refusal_of(run_preprocess, recipe).startswith(f"{path}: changed while it was read")
    assert not (recipe.path("shards") / "a").exists()


@pytest.mark.parametrize("what", ["template", "tokenizer", "version"])
def test_what_was_made_with_something_else_is_made_again(
    make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    shutil.copytree(tiny_hf, tmp_path / "hf")
    recipe = make_recipe(f"paths.hf={tmp_path}/hf")
    write_samples(recipe.path("samples") / "a.jsonl", samples(5))
    run_preprocess(recipe)
    if what == "template":
        monkeypatch.setattr("openpangu_sft.dataset.preprocess.TEMPLATE_DIGEST", "another")
    elif what == "tokenizer":
        (tmp_path / "hf/special_tokens_map.json").write_text("{}", "utf-8")
    else:
        path = recipe.path("shards") / "a/manifest.json"
        path.write_text(path.read_text("utf-8").replace(__version__, "0.0.1"), "utf-8")
    assert [made for _, _, made in run_preprocess(recipe)] == [True]
    assert [made for _, _, made in run_preprocess(recipe)] == [False]


def test_parts_in_any_order_give_one_dataset(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    files = {"a": samples(60), "b": samples(2, 60), "c": samples(40, 62)}
    for name, records in files.items():
        write_samples(recipe.path("samples") / f"{name}.jsonl", records)
    trees = []
    for order in ((1, 2, 3, 4), (4, 2, 1, 3)):
        for number in order:
            for part, _, made in run_preprocess(recipe, number, 4):
                assert (part.part, made) == (f"{number}/4", not trees)
        trees.append(tree(recipe.path("shards")))
        run_merge(recipe)
        trees.append(tree(recipe.path("dataset")))
    assert trees[:2] == trees[2:]
    names = [path.name for path in sorted(recipe.path("shards").iterdir()) if path.name[0] != "."]
    assert names == ["a.1-of-4", "a.2-of-4", "a.3-of-4", "b", "c.3-of-4", "c.4-of-4"]
    merged = {field: read_rows(recipe.path("dataset"), "data", field, 128) for field in FIELDS}
    assert Counter(segments_of(merged, 0)) == expected_segments(recipe, [*files["a"], *files["b"], *files["c"]])
    assert list(read_manifest(recipe.path("dataset"), "dataset", "").inputs) == names


def test_a_missing_part_is_named(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(60))
    for number in (1, 3):
        run_preprocess(recipe, number, 3)
    expected = f"{recipe.path('shards') / 'a.2-of-3'}: part 2/3 is missing: no such shard"
    assert refusal_of(run_merge, recipe) == f"{expected} -> run make preprocess SHARD=2/3"


def test_divisions_are_not_mixed(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(60))
    run_preprocess(recipe)
    run_preprocess(recipe, 2, 2)
    assert "different divisions: a is of 1, a.2-of-2 is of 2 -> remove" in refusal_of(run_merge, recipe)
    run_preprocess(recipe, 1, 2)  # the first one clears away what belongs to no part
    assert run_merge(recipe).counts["packed"] == 60
    run_preprocess(recipe)
    assert [path.name for path in recipe.path("shards").iterdir() if path.name[0] != "."] == ["a"]


def test_a_bad_line_of_a_later_part_is_named_by_its_place_in_the_file(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, [*samples(50), {}, *samples(3)])
    assert refusal_of(run_preprocess, recipe, 3, 3).startswith(f"{path}:51: meta_prompt is missing")


# --- nothing to read ---------------------------------------------------------------------------------------------


def touch(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def link(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda at: None, "{at}: no such directory -> run make format, or put samples (jsonl) there"),
        (lambda at: at.mkdir(), "{at}: no .jsonl files here -> run make format, or put samples there"),
        (lambda at: touch(at / ".hidden.jsonl"), "{at}: no .jsonl files here"),
        (lambda at: touch(at / "readme.txt"), "{at}: no .jsonl files here"),
        (lambda at: touch(at / "a.jsonl"), "{at}/a.jsonl: holds no records -> fill it, or move it away"),
        (lambda at: touch(at / "a.jsonl", b"\n \n"), "{at}/a.jsonl: holds no records"),
        (
            lambda at: touch(at / "a.json", b"[]"),
            "{at}/a.json: is not a .jsonl file -> run make format on it, or move it",
        ),
        (lambda at: touch(at / "A.JSONL"), "{at}/A.JSONL: is not a .jsonl file"),
        (lambda at: touch(at / "a.parquet"), "{at}/a.parquet: is not a .jsonl file"),
        (lambda at: touch(at / "a.jsonl.gz"), "{at}/a.jsonl.gz: is not a .jsonl file"),
        (lambda at: (at / "a.jsonl").mkdir(parents=True), "{at}/a.jsonl: is not a regular file, or is a broken link"),
        (lambda at: link(at / "a.jsonl"), "{at}/a.jsonl: is not a regular file, or is a broken link -> move it away"),
        (lambda at: touch(at, b"{}"), "{at}: no .jsonl files here"),
        (
            lambda at: touch(Path(os.fsdecode(bytes(at) + b"/\xff.jsonl"))),
            "{at}/\\udcff.jsonl: has a name that is not UTF-8 -> rename it",
        ),
        (lambda at: touch(at / "manifest.json", b"{"), "{at}/manifest.json: not a manifest"),
        (
            lambda at: touch(at / "a.jsonl", '{"meta_prompt": "你是一个有用的助手"}'.encode("gb18030")),
            "{at}/a.jsonl: looks like GB18030 (GBK), not UTF-8 -> save it as UTF-8, or set data.encoding=gb18030",
        ),
        (lambda at: touch(at / "a.jsonl", "{}".encode("utf-16")), "{at}/a.jsonl: looks like UTF-16, not UTF-8"),
    ],
    ids=[
        "no directory",
        "empty directory",
        "hidden file",
        "text file",
        "empty file",
        "blank lines",
        "array",
        "upper case",
        "parquet",
        "compressed",
        "directory as file",
        "broken link",
        "file as directory",
        "name not UTF-8",
        "cut manifest",
        "GBK",
        "UTF-16",
    ],
)
def test_nothing_to_read(make_recipe: MakeRecipe, prepare: Any, said: str) -> None:
    recipe = make_recipe()
    prepare(recipe.path("samples"))
    assert refusal_of(run_preprocess, recipe).startswith(said.format(at=recipe.path("samples")))
    assert tree(recipe.path("shards")) == {}


def test_samples_with_keys_to_ignore_are_compared_too(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.ignore_keys=[mood]")
    (sample,) = samples(1)
    write_samples(recipe.path("samples") / "a.jsonl", [{**sample, "mood": 1}])
    [part] = parts_of(sample_files(recipe.path("samples")))
    assert list(_spans_to_compare([part.span], Rules(recipe.data)))
    assert not list(_spans_to_compare([part.span], Rules()))


def test_keys_of_rejected_samples_are_not_counted(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.on_bad_sample=skip", "data.turns=lenient")
    good, bad = conversation("问", "答"), conversation("问", "[unused9]")
    bad["data"].insert(0, bad["data"][0])
    write_samples(recipe.path("samples") / "a.jsonl", [{**good, "id": 1}, {**bad, "source": 1}])
    [(_, manifest, _)] = run_preprocess(recipe)
    counts = manifest.counts
    assert (counts["rejected"], counts["ignored_keys"], counts["changes"]) == (1, {"id": 1}, {})


def test_all_samples_rejected(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.on_bad_sample=skip")
    write_samples(recipe.path("samples") / "a.jsonl", [{}, {}])
    assert "no sample is left to train on" in refusal_of(run_preprocess, recipe)
    assert tree(recipe.path("shards")) == {}


def test_a_tokenizer_that_does_not_fit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_samples(make_recipe().path("samples") / "a.jsonl", samples(3))
    assert "the tokenizer has 1536 tokens, model.vocab_size is 64" in refusal_of(
        run_preprocess, make_recipe("model.vocab_size=64")
    )
    assert "nothing: no such directory" in refusal_of(run_preprocess, make_recipe(f"paths.hf={tmp_path}/nothing"))


# --- several processes -------------------------------------------------------------------------------------------


def children() -> set[int]:
    """Processes that this one has started and that live."""
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def test_results_come_in_order_and_memory_is_bounded() -> None:
    drawn = 0

    def numbers() -> Iterator[int]:
        nonlocal drawn
        while drawn < 200:
            yield drawn
            drawn += 1

    def slow_at_times(number: int) -> tuple[int, bytes]:
        time.sleep(0.05 if number in (0, 50) else 0)
        return number, bytes(200_000)  # more than a pipe holds

    for expected, (number, _) in enumerate(ordered_map(slow_at_times, numbers(), 3)):
        assert number == expected
        assert drawn <= number + pool.AHEAD * 3 + 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_fewer_items_than_workers(count: int) -> None:
    assert list(ordered_map(str, range(count), 3)) == [str(number) for number in range(count)]


def test_whoever_stops_early_waits_for_nothing_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = children()

    def work(item: bytes) -> bytes:
        time.sleep(0 if item == b"first" else 1e6)
        return item

    results = ordered_map(work, [b"first", *[bytes(1 << 20)] * 50], 2)
    assert next(results) == b"first"
    assert len(children() - before) == 2
    results.close()
    assert children() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["between tasks", "in a task"])
def test_a_killed_worker_is_told_in_one_line(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = children()

    def work(item: bytes) -> bytes:
        if len(item) == 3 and how == "in a task":
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    def items() -> Iterator[bytes]:
        yield from [b"first", b"second", b"3rd"]
        if how == "between tasks":
            for child in children() - before:
                os.kill(child, signal.SIGKILL)
        yield from [bytes(1 << 20)] * 20

    message = refusal_of(list, ordered_map(work, items(), 2))
    assert message == "a worker process was ended by SIGKILL -> if memory ran out, lower data.workers"
    assert children() == before
    assert capfd.readouterr() == ("", "")


def test_no_worker_outlives_a_refusal(make_recipe: MakeRecipe) -> None:
    before = children()
    recipe = make_recipe("data.workers=2")
    write_samples(recipe.path("samples") / "a.jsonl", [*samples(300), {}, *samples(2000)])

    def run() -> None:
        try:
            run_preprocess(recipe)
        except UserError:  # its traceback holds every frame, and with them what they did not close
            assert children() == before
            raise

    refusal_of(run)


def test_an_error_in_the_source_ends_the_workers() -> None:
    before = children()

    def items() -> Iterator[int]:
        yield from range(50)
        raise UserError("cut short", remedy="complete it")

    assert "cut short" in refusal_of(list, ordered_map(str, items(), 2))
    assert children() == before


def on_screen(recipe: Recipe, *options: str) -> str:
    finished = subprocess.run([*command(recipe, 2), *options], capture_output=True, text=True, env=ENVIRONMENT)
    assert (finished.returncode, finished.stdout) == (0, ""), finished.stderr
    return finished.stderr


def test_the_screen_says_what_became_of_every_sample(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", [*samples(20), {}, {"meta_prompt": None}, {}])
    write_samples(recipe.path("samples") / "b.jsonl", [*samples(5), conversation("问 " * 200, "答")])
    options = ["--set", "data.on_bad_sample=skip", "--set", "data.too_long=drop"]
    for times in ("20 samples in ", "unchanged, not made again"):
        screen = on_screen(recipe, *options)
        assert f"shard of a.jsonl: {times}" in screen
        rows = dict(re.findall(r"│ (\w[\w ]*?) +│ (.*?) +│", screen))
        assert [rows[name] for name in ("read", "packed", "rejected", "dropped")] == ["29", "25", "3", "1"]
        for reason in ("meta_prompt is missing: 2", "data is missing: 1", "N tokens, above data.seq_length N: 1"):
            assert reason in re.sub(r" *│\n│ +│ ", " ", screen)
        assert rows["packing efficiency"].endswith("%")
        assert rows["share trained"].endswith("%")


def test_what_is_validation_is_part_of_the_sum_on_the_screen(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(40))
    screen = on_screen(recipe, "--set", "data.validation_share=0.3")
    rows = dict(re.findall(r"│ (\w[\w ]*?) +│ (\d+)", screen))
    assert rows["read"] == "40"
    assert 0 < int(rows["validation"]) < 40
    assert int(rows["packed"]) + int(rows["validation"]) == 40


def test_many_shards_are_told_on_one_screen(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    for number in range(13):
        write_samples(recipe.path("samples") / f"{number}.jsonl", samples(2))
    run_preprocess(recipe)
    write_samples(recipe.path("samples") / "7.jsonl", samples(3))
    screen = on_screen(recipe)
    assert "13 shards: 1 made, 12 unchanged\n" in screen
    assert "shard of" not in screen
    assert "│ 27 " in screen


def test_parts_on_the_command_line(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(2))
    assert "shard of a.jsonl[0:" in on_screen(recipe, "--shard", "1/2")
    assert on_screen(recipe, "--shard", "2/9") == "part 2/9 of the inputs holds no lines: nothing to do\n"
    finished = subprocess.run([*command(recipe, 1), "--shard=0/9"], capture_output=True, text=True, env=ENVIRONMENT)
    assert finished.returncode == 1
    assert finished.stderr.startswith("openpangu-sft: --shard: '0/9' is not a part of the inputs")


# --- no room, no permission, somebody else -----------------------------------------------------------------------


def attempt(recipe: Recipe, count: int, *before: str) -> str:
    """Runs the stage in a process of its own, which must fail with one line; returns it."""
    shell = [*before, "exec " + shlex.join(command(recipe, count))]
    finished = subprocess.run(["bash", "-c", " && ".join(shell)], capture_output=True, text=True, env=ENVIRONMENT)
    assert (finished.returncode, finished.stdout) == (1, "")
    [line] = without_progress(finished.stderr).splitlines()
    return line


@pytest.mark.parametrize("count", [1, 2])
def test_no_room(make_recipe: MakeRecipe, count: int) -> None:
    """A limit on the size of files stands for a full disk: both fail in the middle of a write."""
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, samples(50))
    run_preprocess(recipe)
    before = tree(recipe.path("shards"))
    write_samples(path, samples(4000))
    line = attempt(recipe, count, "trap '' XFSZ", "ulimit -f 64")
    assert line.startswith(f"openpangu-sft: {recipe.path('shards')}/.a.staging/spool/")
    assert line.endswith("File too large for this disk or its limit (ulimit -f) -> raise the limit or use another disk")
    assert tree(recipe.path("shards")) == before


def test_a_full_disk(make_recipe: MakeRecipe, small_disk: SmallDisk) -> None:
    disk = small_disk(300)
    recipe = make_recipe(f"paths.shards={disk}/shards")
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, samples(50))
    run_preprocess(recipe)
    before = tree(recipe.path("shards"))
    for count in (4000, 600):  # no room for the spool, or none for the rows
        write_samples(path, samples(count))
        with pytest.raises(OSError, match="No space left") as caught:
            run_preprocess(recipe)
        said = str(explain_os_error(caught.value))
        assert said.startswith(f"{disk}/shards/")
        assert said.endswith("no room left on the disk -> free some space, then run the stage again")
        assert tree(recipe.path("shards")) == before


def test_no_permission(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(5))
    run_preprocess(recipe)
    before = tree(recipe.path("shards"))
    write_samples(recipe.path("samples") / "a.jsonl", samples(6))
    if os.geteuid():
        recipe.path("shards").chmod(0o500)
        undo, said = [], "no permission -> check the owner and mode of this path"
    else:  # root may write everywhere but where a file system is mounted read-only
        shards = str(recipe.path("shards"))
        for options in (["--bind"], ["-o", "remount,bind,ro"]):
            mounted = subprocess.run(["mount", *options, shards, shards], capture_output=True, text=True)
            if mounted.returncode:
                pytest.skip(f"no right to mount: {mounted.stderr.strip()}")
        undo, said = ["umount", shards], "this file system is read-only -> choose another path in the recipe, or mount"
    try:
        assert said in attempt(recipe, 1)
    finally:
        if undo:
            subprocess.run(undo, check=True)
        recipe.path("shards").chmod(0o700)
    assert tree(recipe.path("shards")) == before


def test_another_run_on_the_same_output(much: Recipe) -> None:
    running = start(much, 2)
    os.killpg(running.pid, signal.SIGSTOP)  # however slow this machine is
    line = attempt(much, 2)
    os.killpg(running.pid, signal.SIGCONT)
    where = much.path("shards") / "a"
    assert line == f"openpangu-sft: {where}: another run is writing here -> wait for it or choose another path"
    assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    running.communicate(timeout=PATIENCE)


# --- killed and interrupted, for real ----------------------------------------------------------------------------


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def command(recipe: Recipe, count: int) -> list[str]:
    overrides = [*TINY, f"paths.cache={recipe.paths.cache}", f"paths.hf={recipe.paths.hf}", f"data.workers={count}"]
    options = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-m", "openpangu_sft", "preprocess", "--recipe", str(ROOT / "recipes/demo.yaml"), *options]


def in_group(group: int) -> list[int]:
    """Living processes of a process group; zombies do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, process_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def start(recipe: Recipe, count: int, must_live: bool = True) -> subprocess.Popen[str]:
    """Begins a run in a process group of its own; returns once it has encoded something and its workers work."""
    running = subprocess.Popen(
        command(recipe, count),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
        start_new_session=True,
    )
    spool = recipe.path("shards") / ".a.staging/spool"
    until = time.monotonic() + PATIENCE
    while not (any(file.stat().st_size for file in spool.glob("*")) and len(in_group(running.pid)) == count + 1):
        if running.poll() is not None and not must_live:
            break
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    return running


def wait_until_gone(group: int) -> None:
    until = time.monotonic() + PATIENCE
    while left := in_group(group):
        if time.monotonic() > until:
            os.killpg(group, signal.SIGKILL)
            pytest.fail(f"processes stay behind: {left}")
        time.sleep(0.02)


@pytest.fixture
def much(make_recipe: MakeRecipe) -> Recipe:
    """A recipe with samples for many seconds of work."""
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    write_samples(path, samples(1500))
    path.write_bytes(path.read_bytes() * 60)
    return recipe


def test_kill_in_the_middle_leaves_no_process_and_no_half_result(make_recipe: MakeRecipe, much: Recipe) -> None:
    running = start(much, 3)
    running.kill()
    running.wait()  # its pipes stay open as long as a worker lives
    wait_until_gone(running.pid)
    running.communicate()
    assert not (much.path("shards") / "a").exists()
    write_samples(much.path("samples") / "a.jsonl", samples(200))
    recipe = make_recipe("data.workers=2")
    run_preprocess(recipe)
    after_the_kill = tree(recipe.path("shards"))
    assert set(after_the_kill) == {
        f"a/{name}" for name in [*read_manifest(recipe.path("shards") / "a", "shard", "").files, "manifest.json"]
    }
    undisturbed = make_recipe(f"paths.shards={recipe.path('shards')}2")
    run_preprocess(undisturbed)
    assert tree(undisturbed.path("shards")) == after_the_kill


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_killed_at_any_moment_and_run_again_it_is_as_if_undisturbed(make_recipe: MakeRecipe, moment: float) -> None:
    """The whole process group is killed some time after the first samples are in the spool, twice."""
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "a.jsonl", samples(1500))
    write_samples(recipe.path("samples") / "b.jsonl", samples(300))
    undisturbed = make_recipe(f"paths.shards={recipe.path('shards')}2")
    run_preprocess(undisturbed)
    for _ in range(2):
        running = start(recipe, 2, must_live=False)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        wait_until_gone(running.pid)  # a worker holds the lock too, until it has died
        for name in ("a", "b"):
            if (recipe.path("shards") / name).exists():
                read_manifest(recipe.path("shards") / name, "shard", "")
    run_preprocess(recipe)
    assert tree(recipe.path("shards")) == tree(undisturbed.path("shards"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(much: Recipe, number: int) -> None:
    running = start(much, 3)
    os.killpg(running.pid, number)
    out, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, out) == (128 + number, "")
    assert without_progress(err).strip() == "openpangu-sft: interrupted; nothing half-written is left"
    wait_until_gone(running.pid)
    assert tree(much.path("shards")) == {}


def test_a_worker_killed_for_memory_is_one_line(much: Recipe) -> None:
    running = start(much, 2)
    victim = next(process for process in in_group(running.pid) if process != running.pid)
    os.kill(victim, signal.SIGKILL)
    _, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    said = without_progress(err)
    assert said == "openpangu-sft: a worker process was ended by SIGKILL -> if memory ran out, lower data.workers\n"
    wait_until_gone(running.pid)
    assert tree(much.path("shards")) == {}
