"""The preview shows what the dataset holds: numbers as a count by hand gives them, samples as they were encoded."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from conftest import MakeRecipe, conversation, write_samples
from openpangu_sft.artifacts.artifact import MANIFEST, read_manifest
from openpangu_sft.conversations.conversation import parse_sample
from openpangu_sft.dataset.encode import encode_samples, input_ids_of, labels_of
from openpangu_sft.dataset.index_file import PREFIX, Rows, field_path, roles_path
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.dataset.segments import segment_bounds, segment_runs
from openpangu_sft.preview.figures import figures_of, measure
from openpangu_sft.preview.segments import Token, read_segment, shown_tokens
from openpangu_sft.preview.stage import Preview, run_preview
from openpangu_sft.preview.terminal import show
from openpangu_sft.recipe.data import Data
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from refusals import refusal_of

HOSTILE = '<script>document.documentElement.dataset.acted = "yes"</script><img src=x onerror="acted()">'
ESCAPES = "\x1b[31mred\x1b[0m \x07 \u202eevil [bold]markup[/bold]"


def tool_call(city: str) -> dict[str, Any]:
    data = [
        {"role": "user", "content": f"{city}今天天气怎么样？🌤️"},
        {"role": "assistant", "content": json.dumps({"city": city}, ensure_ascii=False)},
        {"role": "tool", "content": '{"sky": "sunny"}'},
        {"role": "tool", "content": '{"wind": 3}'},
        {"role": "assistant", "content": "  晴，\n\n    不用带伞。\t🎉"},
    ]
    return {"meta_prompt": ["你是天气助手。", "[]"], "data": data}


SAMPLES = [
    *(conversation(f"Question {number}?", f" answer {number}\n" * (number % 3 + 1)) for number in range(20)),
    conversation("你好", "您好，有什么可以帮您？", "Now in English", "Hello!", system="回答要简短。"),
    conversation("助手：我是谁？", "用户：你是用户。"),
    conversation(HOSTILE, ESCAPES),
    *map(tool_call, ("上海", "北京", "Oslo")),
]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    """A merged dataset of two files."""
    recipe = make_recipe("data.seq_length=160", "data.on_bad_sample=skip")
    write_samples(recipe.path("samples") / "a.jsonl", SAMPLES[:15])
    write_samples(recipe.path("samples") / "b.jsonl", [*SAMPLES[15:], {"data": "nonsense"}])
    run_preprocess(recipe)
    run_merge(recipe)
    return recipe


@pytest.fixture
def tokenizer(tiny_hf: Path) -> Tokenizer:
    return Tokenizer(tiny_hf, trust_remote_code=False)


class Row(NamedTuple):
    input_ids: np.ndarray
    labels: np.ndarray


def encoded(tokenizer: Tokenizer) -> list[Row]:
    """The samples, each one alone."""
    parsed = [parse_sample(sample) for sample in SAMPLES]
    outcomes = encode_samples(parsed, tokenizer, Data(seed=1, workers=1, seq_length=160))
    return [Row(input_ids_of(outcome.marked), labels_of(outcome.marked)) for outcome in outcomes]  # type: ignore[union-attr]


def printed(preview: Preview, width: int = 80, colour: bool = False) -> str:
    stream = io.StringIO()
    system = "truecolor" if colour else None
    show(preview, Console(file=stream, width=width, highlight=False, force_terminal=colour, color_system=system))  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize("block_tokens", [1, 400, 1 << 20])
def test_numbers_are_those_of_a_count_by_hand(
    recipe: Recipe, tokenizer: Tokenizer, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openpangu_sft.dataset.segments.VALUES_AT_ONCE", block_tokens)
    rows = Rows(recipe.path("dataset"), 160)
    found = measure(rows)
    by_hand = encoded(tokenizer)
    lengths = sorted(len(sample.input_ids) for sample in by_hand)
    roles: Counter[str] = Counter()
    for sample in SAMPLES:
        roles["system"] += len(sample["meta_prompt"])
        roles.update(message["role"] for message in sample["data"])
    fill = [int((row != 0).sum()) for row in rows.segments]

    assert (sorted(found.lengths.tolist()), found.tokens) == (lengths, sum(lengths))
    assert found.trained_tokens == sum(int((sample.labels != IGNORED).sum()) for sample in by_hand)
    assert found.turns == {**roles, "function": 0}
    assert found.fill.tolist() == fill
    assert found.samples.tolist() == [int(row.max()) for row in rows.segments]
    shown = figures_of(found, read_manifest(recipe.path("dataset"), "dataset", "")).lengths.note
    assert shown.startswith(f"shortest {lengths[0]}, median {lengths[(len(lengths) - 1) // 2]}, mean ")
    assert shown.endswith(f", longest {lengths[-1]}")


@pytest.mark.parametrize("block_tokens", [1, 400, 1 << 20])
def test_samples_are_their_encodings_in_the_order_of_the_packs(
    recipe: Recipe, tokenizer: Tokenizer, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openpangu_sft.dataset.segments.VALUES_AT_ONCE", block_tokens)
    rows = Rows(recipe.path("dataset"), 160)
    measured = measure(rows)
    by_hand = {tuple(sample.input_ids.tolist()): number for number, sample in enumerate(encoded(tokenizer))}
    labels = [sample.labels for sample in encoded(tokenizer)]
    places = []
    for sample in range(1, len(SAMPLES) + 1):
        segment = read_segment(rows, measured, tokenizer, sample)
        tokens = [token for turn in segment.turns for token in turn.tokens]
        number = by_hand.pop(tuple(token.number for token in tokens))
        assert [token.trained for token in tokens] == (labels[number] != IGNORED).tolist()
        expected = ["system"] * len(SAMPLES[number]["meta_prompt"])
        expected += [message["role"] for message in SAMPLES[number]["data"]]
        assert [turn.role for turn in segment.turns] == expected
        assert (segment.length, segment.trained) == (len(tokens), sum(token.trained for token in tokens))
        places.append((segment.pack, segment.position, segment.offset))
    assert not by_hand
    assert places == sorted(places)
    assert places[0] == (1, 1, 0)


def test_segments_are_those_that_training_attends_to() -> None:
    random = np.random.RandomState(0)
    for _ in range(50):
        packs = []
        for _ in range(random.randint(1, 5)):
            sizes = random.randint(1, 6, random.randint(1, 4))
            numbers = np.repeat(np.arange(1, len(sizes) + 1), sizes)[:16]
            packs.append(np.pad(numbers, (0, 16 - len(numbers))).astype(np.int32))
        expected = [
            (row, begin, end)
            for row, pack in enumerate(packs)
            for begin, end in segment_bounds(pack)
            if pack[begin]  # padding is no sample
        ]
        assert list(zip(*(part.tolist() for part in segment_runs(np.stack(packs))))) == expected


def test_tokens_are_shown_as_they_are(tokenizer: Tokenizer) -> None:
    text = "  A\tb\n好🎉\x1b[31me\u0301"
    ids = tokenizer.hf.encode(text, add_special_tokens=False)
    tokens = shown_tokens(tokenizer, np.array(ids, np.int32), np.full(len(ids), IGNORED, np.int32))
    assert [token.number for token in tokens] == ids
    shown = " ".join(token.text for token in tokens)
    assert shown.startswith("· · A \\t b ↵ ")
    assert " … … … 🎉 " in shown
    assert "\\x1b" in shown
    assert shown.endswith("e … U+0301")
    assert shown.isprintable()
    assert [token.ends_line for token in tokens].count(True) == 1


def test_bytes_that_are_no_character(tokenizer: Tokenizer) -> None:
    def shown(*pieces: str) -> list[Token]:
        ids = np.array(tokenizer.hf.convert_tokens_to_ids(list(pieces)), np.int32)
        return shown_tokens(tokenizer, ids, ids)

    assert [token.text for token in shown("<0xC3>", "<0xA9>", "a")] == ["…", "é", "a"]
    broken = shown("<0x89>", "<0xF0>", "<0x9F>", "a", *["<0x8E>"] * 9)
    assert all(token.text in ("…", "a") or "\ufffd" in token.text for token in broken)
    assert [token.control for token in shown("<s>", "[unused9]", "a")] == [True, True, False]


def test_roles_of_a_dataset_that_has_none(recipe: Recipe) -> None:
    roles_path(recipe.path("dataset"), PREFIX).unlink()
    manifest = recipe.path("dataset") / MANIFEST
    content = json.loads(manifest.read_text("utf-8"))
    del content["files"]["data_roles.bin"]
    manifest.write_text(json.dumps(content), "utf-8")
    preview, html = run_preview(recipe)
    assert {turn.role for turn in preview.segments[0].turns} == {"unknown role"}
    assert len(preview.segments[0].turns) >= 3
    for text in (printed(preview, 200), html.read_text("utf-8")):
        assert "unknown: this dataset records none" in text
        assert "run make preprocess and make merge again" in text


def test_first_samples_or_a_chosen_one(recipe: Recipe) -> None:
    def shown(**options: int) -> list[int]:
        return [segment.sample for segment in run_preview(recipe, **options)[0].segments]

    assert shown() == [1, 2, 3]
    assert shown(count=5) == [1, 2, 3, 4, 5]
    assert shown(sample=7) == [7]
    assert shown(sample=7, count=2) == [7, 8]
    assert shown(sample=len(SAMPLES), count=9) == [len(SAMPLES)]
    assert shown(count=10**9) == list(range(1, len(SAMPLES) + 1))


@pytest.mark.parametrize("sample", [0, -1, len(SAMPLES) + 1, 10**30])
def test_no_such_sample(recipe: Recipe, sample: int) -> None:
    expected = f"{recipe.path('dataset')}: there is no sample {sample} -> choose one from 1 to {len(SAMPLES)}"
    assert refusal_of(run_preview, recipe, sample) == expected


def test_nothing_to_show_or_another_recipe(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    assert refusal_of(run_preview, make_recipe("paths.dataset=none")).endswith("-> run make merge")
    assert "made with data.seq_length = 160, the recipe says 128" in refusal_of(run_preview, make_recipe())
    assert "holds shard, expected dataset" in refusal_of(
        run_preview, make_recipe("paths.dataset=finetune_dataset/shards/a", "paths.shards=s")
    )


def test_a_dataset_that_is_not_what_its_manifest_says(recipe: Recipe) -> None:
    path = field_path(recipe.path("dataset"), "data", "labels", "bin")
    labels = np.memmap(path, "<i4", "r+")
    labels[np.flatnonzero(labels != IGNORED)[0]] = IGNORED
    labels.flush()
    trained = read_manifest(recipe.path("dataset"), "dataset", "").counts["trained_tokens"]
    assert f"holds trained_tokens {trained - 1}, its manifest says {trained}" in refusal_of(run_preview, recipe)


def test_an_id_that_the_tokenizer_does_not_have(recipe: Recipe) -> None:
    path = field_path(recipe.path("dataset"), "data", "input_ids", "bin")
    ids = np.memmap(path, "<i4", "r+")
    ids[2] = 999_999
    ids.flush()
    assert "token id 999999 is not in this tokenizer" in refusal_of(run_preview, recipe)


@pytest.mark.parametrize("name", ["notes.txt", "page", "there.html"])
def test_the_page_replaces_nothing_but_a_page(recipe: Recipe, tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    (tmp_path / "there.html").mkdir()
    assert refusal_of(run_preview, recipe, html=tmp_path / name).endswith("-> name another file with HTML=…")
    assert (tmp_path / "notes.txt").read_text("utf-8") == "mine"


def test_no_page_in_an_artifact(recipe: Recipe) -> None:
    html = recipe.path("dataset") / "x/preview.html"
    assert refusal_of(run_preview, recipe, html=html).startswith(
        f"{html}: lies in {recipe.path('dataset')}, which a stage replaces"
    )
    assert not html.parent.exists()


def test_page_goes_into_the_cache_or_where_it_is_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    assert run_preview(recipe)[1] == tmp_path / "preview.html"
    chosen = tmp_path / "new/folder/p.HTML"
    said = f"{chosen.parent}: there is no such directory for the page -> make it, or name another file with HTML=…"
    assert refusal_of(run_preview, recipe, html=chosen) == said
    assert not (tmp_path / "new").exists()
    chosen.parent.mkdir(parents=True)
    assert run_preview(recipe, html=chosen)[1] == chosen
    assert chosen.read_bytes() == (tmp_path / "preview.html").read_bytes()
    assert [path.name for path in chosen.parent.iterdir()] == ["p.HTML"]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_marks_what_is_trained_without_colour(recipe: Recipe, tokenizer: Tokenizer, width: int) -> None:
    preview, _ = run_preview(recipe, count=len(SAMPLES))
    text = printed(preview, width)
    assert "\x1b" not in text
    lines = text.splitlines()
    path = f"dataset: {preview.dataset}"  # is not cut, so that it can be copied
    assert max(cell_len(line) for line in lines if line != path) <= width
    marked = ignored = 0
    for above, below in zip(lines, lines[1:]):
        if below.startswith("    ") and below.replace("━", "").isspace():
            # as many bars as ids above them: each bar begins in the column of its token's id
            bars = [column for column, mark in enumerate(below) if mark == "━" and below[column - 1] == " "]
            assert all(above[column].isdigit() and above[column - 1] == " " for column in bars)
            marked += len(bars)
        elif above.startswith("    ") and above.replace(" ", "").isdigit():
            ignored += 1
    assert marked == sum(int((sample.labels != IGNORED).sum()) for sample in encoded(tokenizer))
    assert ignored


def test_terminal_shows_numbers_and_where_a_sample_lies(recipe: Recipe) -> None:
    preview, _ = run_preview(recipe, sample=2)
    segment = preview.segments[0]
    text = printed(preview, 120)
    assert f"sample 2  pack {segment.pack}, segment {segment.position}, from token {segment.offset};" in text
    assert f"{len(SAMPLES)} │ 27 read, 1 rejected" in text
    (turns,) = [line for line in text.splitlines() if "Turns by role" in line]
    assert all(f"{count} {role}" in turns for role, count in {"user": 27, "assistant": 30, "tool": 6}.items())


def test_terminal_acts_on_nothing_that_a_sample_holds(recipe: Recipe) -> None:
    preview, _ = run_preview(recipe, count=len(SAMPLES))
    text = printed(preview)
    assert all(mark.isprintable() or mark == "\n" for mark in text)
    assert "\\x1b" in text
    coloured = printed(preview, colour=True)
    assert "\x1b[1;32m" in coloured  # bold green: trained
    assert "\x1b[31m" not in coloured
    assert "\x07" not in coloured
    assert "\u202e" not in coloured


def test_reasons_of_rejections_where_the_manifest_has_them(recipe: Recipe, tokenizer: Tokenizer) -> None:
    path = recipe.path("dataset") / MANIFEST
    content = json.loads(path.read_text("utf-8"))
    content["counts"]["reasons"] = {"too long": 1, "\x1b[31m<b>": 1200}
    path.write_text(json.dumps(content), "utf-8")
    preview, html = run_preview(recipe)
    assert "reasons │ 1,201 │ \\x1b[31m<b>: 1,200, too long: 1" in " ".join(printed(preview, 120).split())
    assert "\\x1b[31m&lt;b&gt;: 1,200, too long: 1" in html.read_text("utf-8")


def test_a_long_reason_is_not_broken_on_a_narrow_terminal(recipe: Recipe) -> None:
    path, reason = recipe.path("dataset") / MANIFEST, f"/cache/{'a' * 60}/{'b' * 60}"
    content = json.loads(path.read_text("utf-8"))
    content["counts"]["reasons"] = {reason: 1}
    path.write_text(json.dumps(content), "utf-8")
    assert f"{reason}:" in printed(run_preview(recipe)[0], 80)


@pytest.mark.parametrize("longest", [1, 2, 15, 16, 17, 99, 100, 101, 4096, 32768])
def test_bars_cover_all_lengths_with_round_edges(recipe: Recipe, longest: int) -> None:
    rows = Rows(recipe.path("dataset"), 160)
    changed = replace(measure(rows), lengths=np.arange(1, longest + 1, dtype=np.int32))
    lengths = figures_of(changed, read_manifest(recipe.path("dataset"), "dataset", "")).lengths
    assert sum(lengths.bars.values()) == longest
    assert len(lengths.bars) <= 16
    first = [int(label.split("–")[0].replace(",", "")) for label in lengths.bars]
    widths = set(np.diff(first).tolist())
    assert len(widths) <= 1
    assert all(str(width).rstrip("0") in "125" for width in widths)
