"""Inspecting datasets, ours and MindSpeed-LLM's: sound ones pass, and each kind of damage is named with its place."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import ROOT, TINY, MakeRecipe, conversation, write_samples
from openpangu_sft import __version__
from openpangu_sft.dataset import segments
from openpangu_sft.dataset.index_file import FIELDS, HEADER, UNKNOWN, field_path
from openpangu_sft.dataset.inspect import Report, run_inspect
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError
from refusals import refusal_of

CODES = {"<i4": 4, "<u2": 8}
Rows = dict[str, list[list[int]]]
"""For each field its rows."""


def write_field(stem: Path, rows: list[list[int]], dtype: str = "<i4") -> None:
    """Writes rows of any length as Megatron's IndexedDatasetBuilder does, every row a document."""
    item = np.dtype(dtype).itemsize
    lengths = [len(row) for row in rows]
    offsets = [item * before for before in accumulate([0, *lengths[:-1]])][: len(rows)]
    index = HEADER.pack(b"MMIDIDX\0\0", 1, CODES[dtype], len(rows), len(rows) + 1)
    index += struct.pack(f"<{len(rows)}i", *lengths) + struct.pack(f"<{len(rows)}q", *offsets)
    stem.with_name(stem.name + ".idx").write_bytes(index + struct.pack(f"<{len(rows) + 1}q", *range(len(rows) + 1)))
    values = np.array([value for row in rows for value in row], np.int64)
    stem.with_name(stem.name + ".bin").write_bytes(values.astype(dtype).tobytes())


def write_dataset(directory: Path, rows: Rows, prefix: str = "demo_data") -> Path:
    """Writes a dataset without a manifest; returns its path prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    for field in FIELDS:
        write_field(directory / f"{prefix}_packed_{field}_document", rows[field])
    return directory / prefix


def sound_rows() -> Rows:
    """Three packs of 16 with segment numbers."""
    rng = np.random.RandomState(3)
    rows: Rows = {field: [] for field in FIELDS}
    for lengths in ([6, 7], [16], [3, 4, 5]):
        ids = [1 if at == 0 else int(rng.randint(5, 1000)) for length in lengths for at in range(length)]
        labels = [-100 if at < 2 else 0 for length in lengths for at in range(length)]
        padding = 16 - len(ids)
        rows["input_ids"].append(ids + [0] * padding)
        rows["labels"].append([label or token for label, token in zip(labels, ids)] + [-100] * padding)
        rows["attention_mask"].append(
            [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding
        )
    return rows


def published_rows(ones: bool = False) -> Rows:
    """The same as the published handler writes them: token ids in attention_mask, 1 where there is padding."""
    rows = sound_rows()
    rows["attention_mask"] = [
        [token if number and not ones else 1 for token, number in zip(ids, numbers)]
        for ids, numbers in zip(rows["input_ids"], rows["attention_mask"])
    ]
    return rows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    """The cache of a recipe of which two files of samples are preprocessed and merged. Read only."""
    cache = tmp_path_factory.mktemp("built")
    recipe = load_recipe(ROOT / "recipes/demo.yaml", [*TINY, f"paths.cache={cache}", f"paths.hf={tiny_hf}"])
    for name, count in (("a", 40), ("b", 5)):
        samples = [conversation(f"{name} {number}", "an answer " * (number % 4 + 1)) for number in range(count)]
        write_samples(recipe.path("samples") / f"{name}.jsonl", samples)
    run_preprocess(recipe)
    run_merge(recipe)
    return cache


@pytest.fixture
def recipe(make_recipe: MakeRecipe, built: Path) -> Recipe:
    """A recipe with a copy of that dataset."""
    recipe = make_recipe()
    shutil.copytree(built / "finetune_dataset", recipe.path("dataset").parent)
    return recipe


def findings(report: Report) -> list[str]:
    said = [str(finding) for finding in report.findings]
    assert all("\n" not in line and " -> " in line for line in said)
    return said


def foreign(make_recipe: MakeRecipe, prefix: Path, *overrides: str) -> list[str]:
    return findings(run_inspect(make_recipe("data.seq_length=16", *overrides), prefix))


def patch(path: Path, offset: int, value: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:offset] + value + content[offset + len(value) :])


# What is sound


def test_a_dataset_of_ours(recipe: Recipe) -> None:
    report = run_inspect(recipe)
    assert findings(report) == []
    assert report.path == str(recipe.path("dataset"))
    counts = json.loads((recipe.path("dataset") / "manifest.json").read_text("utf-8"))["counts"]
    rows, full = counts["packs"], counts["tokens"] / counts["packs"] / 128
    assert report.figures == {
        "made by": f"openpangu-sft {__version__} (dataset)",
        "rows": str(rows),
        "seq_length": "128",
        "turns": "45 system, 45 user, 45 assistant, 0 tool, 0 function",
        "tokens": f"{counts['tokens']:,}",
        "packing efficiency": f"{full:.1%}",
        "trained tokens": f"{counts['trained_tokens'] / counts['tokens']:.1%}",
        "segments": "45",
    }


@pytest.mark.parametrize("name", ["merged", "merged/data", "merged/data_packed_labels_document.bin", "shards/a"])
def test_what_a_dataset_of_ours_can_be_called(recipe: Recipe, name: str) -> None:
    report = run_inspect(recipe, recipe.path("dataset").parent / name)
    assert findings(report) == []
    kind = "shard" if name == "shards/a" else "dataset"
    assert report.figures["made by"] == f"openpangu-sft {__version__} ({kind})"


def test_a_manifest_counts_more_than_the_recipe(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    assert findings(run_inspect(make_recipe("data.seq_length=64"))) == []


@pytest.mark.parametrize("name", ["", "demo_data", "demo_data_packed_input_ids_document", "demo_data/"])
def test_what_another_dataset_can_be_called(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    write_dataset(tmp_path / "other", sound_rows())
    report = run_inspect(make_recipe("data.seq_length=16"), tmp_path / "other" / name)
    assert findings(report) == []
    assert report.path == f"{tmp_path}/other/demo_data"
    assert report.figures == {
        "made by": "other software: there is no manifest",
        "rows": "3",
        "seq_length": "16",
        "turns": UNKNOWN,
        "tokens": "41",
        "packing efficiency": "85.4%",
        "trained tokens": "70.7%",
        "segments": "6",
    }


def test_a_path_with_a_prefix_beside_a_directory_of_that_name(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, sound_rows())
    prefix.mkdir()
    assert foreign(make_recipe, prefix) == []


def peak(recipe: Recipe, prefix: Path, tokens: int) -> int:
    """Most bytes that an inspection holds, reading so many tokens at once."""
    segments.VALUES_AT_ONCE = tokens
    tracemalloc.start()
    report = run_inspect(recipe, prefix)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert findings(report) == []
    assert report.figures["segments"] == "120,000"
    return held


def test_memory_does_not_grow_with_the_dataset(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    many = {field: rows * 20_000 for field, rows in sound_rows().items()}
    prefix = write_dataset(tmp_path, many)  # 960,000 tokens: 3.8 MB in each field
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # of this process tracemalloc would see other threads
        whole, part = (
            alone.submit(peak, make_recipe("data.seq_length=16"), prefix, tokens).result()
            for tokens in (1 << 20, 1 << 14)
        )
    assert part < 4e6 < whole / 5


# Where nothing is to be inspected


GIVE = "give its directory, or its path up to _packed_input_ids_document.bin"


def test_nothing_there(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert refusal_of(run_inspect, make_recipe()) == f"{tmp_path}/finetune_dataset/merged: no such dataset -> {GIVE}"
    assert refusal_of(run_inspect, make_recipe(), tmp_path) == f"{tmp_path}: no packed dataset here -> {GIVE}"
    assert refusal_of(run_inspect, make_recipe(), tmp_path / "x/y") == f"{tmp_path}/x/y: no such dataset -> {GIVE}"


def test_several_in_one_directory(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_dataset(tmp_path, sound_rows(), "one")
    write_dataset(tmp_path, sound_rows(), "two")
    expected = f"{tmp_path}: holds several datasets: one, two -> name one: {tmp_path}/one"
    assert refusal_of(run_inspect, make_recipe(), tmp_path) == expected
    assert foreign(make_recipe, tmp_path / "two") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"kind": "samples"}', "holds samples, expected dataset or shard"), ("[]", "not a manifest: ")],
)
def test_a_manifest_of_something_else(make_recipe: MakeRecipe, tmp_path: Path, content: str, said: str) -> None:
    write_dataset(tmp_path, sound_rows(), "data")
    (tmp_path / "manifest.json").write_text(content, "utf-8")
    assert said in refusal_of(run_inspect, make_recipe(), tmp_path)


# Damage to files and indexes

LABELS_INDEX, LABELS = "data_packed_labels_document.idx", "data_packed_labels_document.bin"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(4))


def at_header(offset: int, value: bytes) -> Callable[[Path], None]:
    return lambda path: patch(path, offset, value)


def at_entry(kind: str, row: int, value: int) -> Callable[[Path], None]:
    """Replaces a length, an offset or a document boundary."""

    def damage(path: Path) -> None:
        (rows,) = struct.unpack_from("<Q", path.read_bytes(), 18)
        size = 4 if kind == "lengths" else 8
        begin = HEADER.size + {"lengths": 0, "offsets": 4, "documents": 12}[kind] * rows
        patch(path, begin + size * row, value.to_bytes(size, "little", signed=True))

    return damage


FILE_DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    (LABELS, Path.unlink, "is missing"),
    (LABELS_INDEX, Path.unlink, "is missing"),
    (LABELS, truncate, "is cut short: "),
    (LABELS, extend, "is longer than its index says: "),
    (LABELS_INDEX, lambda path: path.write_bytes(b"MMIDIDX"), "is cut short: 7 bytes"),
    (LABELS_INDEX, truncate, "is cut short: "),
    (LABELS_INDEX, extend, "is longer than its header says: "),
    (LABELS_INDEX, at_header(0, b"N"), "is not an index of Megatron's"),
    (LABELS_INDEX, at_header(9, b"\2"), "is not an index of Megatron's with int32 values"),
    (LABELS_INDEX, at_header(17, b"\7"), "is not an index of Megatron's with int32 values"),
    (LABELS_INDEX, at_header(17, b"\5"), "is not an index of Megatron's with int32 values"),
    (LABELS_INDEX, at_header(18, struct.pack("<Q", 2**63)), "is cut short: "),
    (LABELS_INDEX, at_entry("lengths", 2, -5), "rows of -5 to 128 tokens, but data_packed_input_ids_document.idx has "),
    (
        LABELS_INDEX,
        at_entry("lengths", 2, 127),
        "rows of 127 to 128 tokens, but data_packed_input_ids_document.idx has ",
    ),
    (LABELS_INDEX, at_entry("offsets", 0, 4), "first row 0: byte offset 4 does not follow from the row before it"),
    (LABELS_INDEX, at_entry("offsets", 3, 512), "2 of "),
    (LABELS_INDEX, at_entry("documents", 0, 1), "document boundaries are not 0 to "),
    (LABELS_INDEX, at_entry("documents", 3, 2), "document boundaries are not 0 to "),
]


@pytest.mark.parametrize("number", range(len(FILE_DAMAGE)))
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "other"])
def test_damaged_files(recipe: Recipe, number: int, ours: bool) -> None:
    name, damage, said = FILE_DAMAGE[number]
    directory = recipe.path("dataset")
    if not ours:
        (directory / "manifest.json").unlink()
    assert findings(run_inspect(recipe)) == []
    damage(directory / name)
    remedy = (
        "run make preprocess and make merge again"
        if ours
        else "preprocess the samples again with make preprocess, or copy the files again"
    )
    found = [line for line in findings(run_inspect(recipe)) if line.startswith(f"{directory / name}: ")]
    assert any(said in line for line in found), found
    assert all(line.endswith(f" -> {remedy}") for line in found)


@pytest.mark.parametrize("name", ["data_packed_labels_document.idx", "data_packed_attention_mask_document.bin"])
def test_more_than_one_file_can_be_missing(recipe: Recipe, name: str) -> None:
    for path in (recipe.path("dataset") / name, field_path(recipe.path("dataset"), "data", "input_ids", "bin")):
        path.unlink()
    report = run_inspect(recipe)
    assert len(findings(report)) == 2
    assert "rows" in report.figures or name.endswith("idx")
    assert "tokens" not in report.figures


def test_fields_of_different_length(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, sound_rows())
    write_field(tmp_path / "demo_data_packed_labels_document", sound_rows()["labels"][:2])
    (said,) = foreign(make_recipe, prefix)
    expected = "2 rows of 16 tokens, but demo_data_packed_input_ids_document.idx has 3 of 16"
    assert said.startswith(f"{prefix}_packed_labels_document.idx: {expected}")


def test_no_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, {field: [] for field in FIELDS})
    assert [line.split(" -> ")[0].split(": ")[1] for line in foreign(make_recipe, prefix)] == ["holds no rows"] * 3


def test_a_boundary_of_documents_too_many(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, sound_rows())
    path = Path(f"{prefix}_packed_labels_document.idx")
    patch(path, 26, struct.pack("<Q", 5))
    path.write_bytes(path.read_bytes() + struct.pack("<q", 3))
    (said,) = foreign(make_recipe, prefix)
    assert "document boundaries are not 0 to 3: every row is a document" in said


@pytest.mark.parametrize("row", range(7))
def test_any_row_of_an_index_is_checked(make_recipe: MakeRecipe, tmp_path: Path, row: int) -> None:
    sound = sound_rows()
    prefix = write_dataset(tmp_path, {field: (sound[field] * 3)[:7] for field in FIELDS})
    assert foreign(make_recipe, prefix) == []
    index = Path(f"{prefix}_packed_attention_mask_document.idx")
    at_entry("offsets", row, 64 * row + 4)(index)
    (said,) = foreign(make_recipe, prefix)
    count = 1 if row == 6 else 2
    assert f"{count} of 7 rows, first row {row}: byte offset {64 * row + 4} does not follow" in said


def test_labels_of_an_unsigned_type(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Megatron takes uint16 for small vocabularies, where -100 becomes 65436; MindSpeed-LLM packs int32 only."""
    prefix = write_dataset(tmp_path, sound_rows())
    write_field(tmp_path / "demo_data_packed_labels_document", sound_rows()["labels"], "<u2")
    (said,) = foreign(make_recipe, prefix)
    assert "labels_document.idx: is not an index of Megatron's with int32 values: " in said


# Row lengths


def test_rows_of_another_length_than_the_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path, sound_rows())
    (said,) = foreign(make_recipe, prefix, "data.seq_length=32")
    expected = "rows have 16 tokens, the recipe has data.seq_length = 32 -> set data.seq_length=16, or preprocess again"
    assert said == f"{prefix}_packed_input_ids_document.idx: {expected}"


def test_rows_that_were_not_padded(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    padded = sound_rows()
    ends = [16 - row.count(0) for row in padded["attention_mask"]]
    rows = {field: [[], *(row[:end] for row, end in zip(padded[field], ends))] for field in FIELDS}
    report = run_inspect(make_recipe("data.seq_length=16"), write_dataset(tmp_path, rows))
    (said,) = findings(report)
    assert "input_ids_document.idx: rows have 0 to 16 tokens, the recipe has data.seq_length = 16 -> preprocess" in said
    assert report.figures["seq_length"] == "0 to 16"
    assert "tokens" not in report.figures  # they were not read


@pytest.mark.parametrize("length", [0, -4])
def test_rows_of_no_tokens(make_recipe: MakeRecipe, tmp_path: Path, length: int) -> None:
    prefix = write_dataset(tmp_path, {field: [[], []] for field in FIELDS})
    for field in FIELDS:
        for row in range(2):
            at_entry("lengths", row, length)(Path(f"{prefix}_packed_{field}_document.idx"))
    assert any(f"rows have {length} tokens, the recipe has" in said for said in foreign(make_recipe, prefix))


def test_a_manifest_with_another_length(recipe: Recipe) -> None:
    edit_manifest(recipe, lambda content: content["settings"].update({"data.seq_length": 256}))
    (said,) = findings(run_inspect(recipe))
    assert "rows have 128 tokens, the manifest has data.seq_length = 256 -> run make preprocess" in said
    edit_manifest(recipe, lambda content: content["settings"].pop("data.seq_length"))
    (said,) = findings(run_inspect(recipe))
    assert "rows have 128 tokens, the manifest has data.seq_length = None -> run make preprocess" in said


# Rows

# field, row, column, value, the text about it; rows are those of `sound_rows`
ROW_DAMAGE: list[tuple[str, int, int, int, str]] = [
    ("input_ids", 1, 0, -1, "column 0: token id -1 is outside the vocabulary of 1536"),
    ("input_ids", 1, 1, 1536, "column 1: token id 1536 is outside the vocabulary of 1536"),
    ("labels", 1, 15, 3, "column 15: label 3 is neither the token id there ("),
    ("labels", 2, 13, -1, "column 13: label -1 is neither the token id there (0) nor -100"),
    ("labels", 2, 13, 0, "column 13: padding is trained"),
    ("input_ids", 2, 13, 9, "column 13: token id 9 in padding, which ends with 0"),
    ("attention_mask", 1, 0, 2, "column 0: begins with segment number 2, not 1"),
    ("attention_mask", 1, 3, -1, "column 3: segment number -1 after 1"),
    ("attention_mask", 0, 3, 2, "column 4: segment number 1 after 2"),
    ("attention_mask", 0, 12, 4, "column 12: segment number 4 after 2"),
    ("attention_mask", 0, 8, 0, "column 9: segment number 2 after padding (0)"),
    ("attention_mask", 2, 0, 0, "column 1: segment number 1 after padding (0)"),
    ("attention_mask", 2, 13, 3, "column 13: segment number 3 after padding (0)"),
    ("attention_mask", 1, 15, 2**31 - 1, "column 15: segment number 2147483647 after 1"),
]


@pytest.mark.parametrize(
    ("field", "row", "column", "value", "said"),
    ROW_DAMAGE,
    ids=[f"{field}[{row}, {column}]={value}" for field, row, column, value, _ in ROW_DAMAGE],
)
@pytest.mark.parametrize("block", [1, 32, 1 << 20])
def test_a_damaged_row(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    row: int,
    column: int,
    value: int,
    said: str,
    block: int,
) -> None:
    monkeypatch.setattr("openpangu_sft.dataset.segments.VALUES_AT_ONCE", block)
    rows = sound_rows()
    rows[field][row][column] = value
    found = foreign(make_recipe, write_dataset(tmp_path, rows))
    expected = f"{tmp_path}/demo_data_packed_{field}_document.bin: 1 of 3 rows, first row {row}, {said}"
    assert [line for line in found if line.startswith(expected)], found
    assert all(f"first row {row}, " in line for line in found)


def test_damaged_rows_are_counted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = {field: [list(row) for row in values * 4] for field, values in sound_rows().items()}
    for row in (4, 5, 10):
        rows["labels"][row][2] = rows["labels"][row][5] = 1300
    (said,) = foreign(make_recipe, write_dataset(tmp_path, rows))
    assert "3 of 12 rows, first row 4, column 2: label 1300 is neither" in said


@pytest.mark.parametrize("first_column", [False, True])
def test_a_row_without_a_trained_token(make_recipe: MakeRecipe, tmp_path: Path, first_column: bool) -> None:
    rows = sound_rows()
    rows["labels"][1] = [1 if first_column else -100] + [-100] * 15
    (said,) = foreign(make_recipe, write_dataset(tmp_path, rows))
    assert "labels_document.bin: 1 of 3 rows, first row 1: no trained token: the loss of such a row is 0/0" in said


# Without segment numbers

UNNUMBERED = (
    " and no segment numbers: MindSpeed-LLM would cut attention at every message end (openPangu's eos ends every "
    "message), so an answer never sees its question -> preprocess again with make preprocess"
)


@pytest.mark.parametrize(
    ("ones", "padding", "said"),
    [
        (False, 1, "first row 0: holds token ids"),
        (False, 0, "first row 0: holds token ids"),
        (True, 1, "holds 1 everywhere"),
    ],
)
def test_a_dataset_of_the_published_handler(
    make_recipe: MakeRecipe, tmp_path: Path, ones: bool, padding: int, said: str
) -> None:
    rows = published_rows(ones)
    rows["attention_mask"][0][13:] = [padding] * 3
    prefix = write_dataset(tmp_path, rows)
    report = run_inspect(make_recipe("data.seq_length=16"), prefix)
    assert findings(report) == [f"{prefix}_packed_attention_mask_document.bin: 3 of 3 rows, {said}{UNNUMBERED}"]
    for name in ("tokens", "packing efficiency", "trained tokens", "segments"):
        assert report.figures[name] == "unknown: attention_mask holds no segment numbers"


def test_padding_of_the_published_handler(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """It may have the ids that a row ends with, and an unknown token the id of padding."""
    rows = published_rows()
    rows["labels"][1][15] = -100  # a full row that ends untrained
    for field, values in {"input_ids": 9, "labels": 9, "attention_mask": 9}.items():
        rows[field][2][12:15] = [values] * 3  # a row with one token of padding
    for field, value in zip(FIELDS, (0, 0, -100)):
        rows[field][0][1] = value  # an unknown token, which has the id of padding
    report = run_inspect(make_recipe("data.seq_length=16"), write_dataset(tmp_path, rows))
    assert [line.endswith(f"3 of 3 rows, first row 0: holds token ids{UNNUMBERED}") for line in findings(report)] == [
        True
    ]


def test_a_row_of_one_token_id_is_not_taken_for_the_published_handlers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = sound_rows()
    rows["input_ids"][1], rows["labels"][1], rows["attention_mask"][1] = [5] * 16, [-100] * 16, [0, 1] * 8
    first, second = foreign(make_recipe, write_dataset(tmp_path, rows))
    assert "first row 1, column 1: segment number 1 after padding (0)" in first
    assert "first row 1: no trained token" in second


def test_ones_and_zeros(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Several samples under one number show in their bos; a long sample in each row is sound."""
    rows = sound_rows()
    rows["attention_mask"] = [[min(number, 1) for number in row] for row in rows["attention_mask"]]
    (said,) = foreign(make_recipe, write_dataset(tmp_path, rows))
    assert "2 of 3 rows, first row 0: holds 1 throughout, though the row's first token comes again" in said
    assert said.endswith(UNNUMBERED)
    for ids, labels in zip(rows["input_ids"], rows["labels"]):
        ids[1:13] = labels[1:13] = [7] * 12
    rows["labels"][2][12] = -100
    rows["input_ids"][2][12] = 0
    assert foreign(make_recipe, write_dataset(tmp_path, rows)) == []


def test_a_merge_of_both_kinds(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = {field: sound_rows()[field] + published_rows()[field] for field in FIELDS}
    report = run_inspect(make_recipe("data.seq_length=16"), write_dataset(tmp_path, rows))
    (said,) = findings(report)
    assert f"3 of 6 rows, first row 3: holds token ids{UNNUMBERED}" in said


def test_one_segment_in_every_row_of_ours(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.seq_length=64")
    length = 64
    while True:  # an answer that fills the pack to the last token
        write_samples(recipe.path("samples") / "a.jsonl", [conversation("q", "a " * length)])
        try:
            [(_, manifest, _)] = run_preprocess(recipe)
        except UserError:
            length -= 1
            continue
        break
    run_merge(recipe)
    report = run_inspect(recipe)
    assert findings(report) == []
    assert report.figures["segments"] == "1"
    assert report.figures["tokens"] == str(manifest.counts["tokens"])


# Manifests


def edit_manifest(recipe: Recipe, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = recipe.path("dataset") / "manifest.json"
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_changed_byte_is_found_by_its_digest(recipe: Recipe, field: str, suffix: str) -> None:
    edit_manifest(
        recipe, lambda content: content["files"][f"data_packed_{field}_document.{suffix}"].update(sha256="0" * 64)
    )
    path = field_path(recipe.path("dataset"), "data", field, suffix)
    assert findings(run_inspect(recipe)) == [
        f"{path}: its content is not what the manifest describes (sha256) -> run make preprocess and make merge again"
    ]


@pytest.mark.parametrize(
    ("key", "noun"),
    [("packs", "rows"), ("tokens", "tokens"), ("trained_tokens", "trained tokens"), ("packed", "segments")],
)
@pytest.mark.parametrize("gone", [True, False])
def test_wrong_counts_in_a_manifest(recipe: Recipe, key: str, noun: str, gone: bool) -> None:
    path = recipe.path("dataset") / "manifest.json"
    right = json.loads(path.read_text("utf-8"))["counts"][key]
    edit_manifest(
        recipe, lambda content: content["counts"].pop(key) if gone else content["counts"].update({key: right + 1})
    )
    said = (
        f"says {key} = {None if gone else right + 1}, found {right} {noun} -> run make preprocess and make merge again"
    )
    assert findings(run_inspect(recipe)) == [f"{path}: {said}"]


def test_files_that_a_manifest_lists(recipe: Recipe) -> None:
    directory = recipe.path("dataset")

    def edit(content: dict[str, Any]) -> None:
        del content["files"][LABELS]
        content["files"][LABELS_INDEX]["bytes"] += 1
        content["files"]["rejects.jsonl"] = {"bytes": 1, "sha256": ""}
        content["version"] = "[/]"  # markup

    edit_manifest(recipe, edit)
    report = run_inspect(recipe)
    assert report.figures["made by"] == "openpangu-sft [/] (dataset)"
    said = [line.split(" -> ")[0] for line in findings(report)]
    size = (directory / LABELS_INDEX).stat().st_size
    assert said == [
        f"{directory}/manifest.json: does not list {LABELS}",
        f"{directory}/rejects.jsonl: is missing",
        f"{directory}/{LABELS_INDEX}: {size} bytes, the manifest has {size + 1}",
    ]


def test_a_manifest_is_of_its_own_dataset_only(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    prefix = write_dataset(recipe.path("dataset"), sound_rows())
    assert foreign(make_recipe, prefix) == []
    assert findings(run_inspect(recipe)) == []


def test_rows_of_any_length_beside_a_manifest_without_one(recipe: Recipe) -> None:
    rows = {field: [row[:at] for row, at in zip(sound_rows()[field], (12, 16, 11))] for field in FIELDS}
    write_dataset(recipe.path("dataset"), rows, "data")
    edit_manifest(recipe, lambda content: content["settings"].pop("data.seq_length"))
    assert "rows have 11 to 16 tokens, the manifest has data.seq_length = None" in findings(run_inspect(recipe))[0]


# Anything


def breaks_a_rule(rows: Rows, vocab_size: int) -> bool:
    """The rules once more, value by value."""
    again = False
    for ids, numbers, labels in zip(*(rows[field] for field in FIELDS)):
        if not all(0 <= token < vocab_size for token in ids):
            return True
        if any(label not in (token, -100) for label, token in zip(labels, ids)):
            return True
        content = len(numbers)
        while content and numbers[content - 1] == 0:
            content -= 1
        if sorted(numbers[:content]) != numbers[:content] or numbers[0] != min(content, 1):
            return True
        if len(set(numbers[:content])) != max(numbers):
            return True
        if set(labels[content:]) - {-100} or len(set(ids[content:])) > 1 or set(labels[1:]) <= {-100}:
            return True
        again = again or ids[0] in ids[1:content]
    numbers = [number for row in rows["attention_mask"] for number in row]
    return max(numbers) == 1 and (min(numbers) == 1 or again)


@st.composite
def datasets(draw: st.DrawFn) -> Rows:
    """Packs of 8 to 12 tokens: segments that begin with bos and train their last token, then padding."""
    seq_length = draw(st.integers(8, 12))
    rows: Rows = {field: [] for field in FIELDS}
    for _ in range(draw(st.integers(1, 4))):
        ids: list[int] = []
        labels: list[int] = []
        numbers: list[int] = []
        for number, length in enumerate(draw(st.lists(st.integers(2, 6), min_size=1, max_size=5)), 1):
            if len(ids) + length <= seq_length and numbers[-1:] in ([], [number - 1]):
                body = draw(st.lists(st.integers(2, 1535), min_size=length - 1, max_size=length - 1))
                ids += [1, *body]
                labels += [-100] * (length - 1) + body[-1:]
                numbers += [number] * length
        padding = seq_length - len(ids)
        for field, row, pad in zip(FIELDS, (ids, numbers, labels), (0, 0, -100)):
            rows[field].append(row + [pad] * padding)
    return rows


WRONG = st.one_of(st.integers(-3, 5), st.sampled_from([-100, 1535, 1536, 2**31 - 1, -(2**31)]))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=datasets(), block=st.sampled_from([1, 20, 1 << 20]))
def test_any_dataset_and_any_wrong_number(
    tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path, data: st.DataObject, rows: Rows, block: int
) -> None:
    directory = tmp_path_factory.mktemp("any")
    seq_length = len(rows["labels"][0])
    recipe = load_recipe(
        ROOT / "recipes/demo.yaml", [*TINY, f"paths.cache={directory}", f"data.seq_length={seq_length}"]
    )
    assume(not breaks_a_rule(rows, 1536))
    prefix = write_dataset(directory, rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("openpangu_sft.dataset.segments.VALUES_AT_ONCE", block)
        report = run_inspect(recipe, prefix)
        assert findings(report) == []
        numbers = [number for row in rows["attention_mask"] for number in row]
        assert report.figures["segments"] == str(sum(max(row) for row in rows["attention_mask"]))
        assert report.figures["tokens"] == str(sum(number > 0 for number in numbers))

        field = data.draw(st.sampled_from(FIELDS))
        row = data.draw(st.integers(0, len(rows[field]) - 1))
        column = data.draw(st.integers(0, seq_length - 1))
        rows[field][row][column] = data.draw(WRONG)
        write_dataset(directory, rows)
        assert bool(findings(run_inspect(recipe, prefix))) == breaks_a_rule(rows, 1536)


# Megatron and the command line


def test_what_megatron_core_writes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    reason = "wheels: x86-64, Python 3.10+"
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=reason)
    torch = pytest.importorskip("torch")
    rows = sound_rows()

    def build(stem: Path, content: list[list[int]], merged: list[Path]) -> None:
        builder = indexed_dataset.IndexedDatasetBuilder(f"{stem}.bin")
        for path in merged:
            builder.add_index(str(path))
        for row in content:
            builder.add_item(torch.tensor(row))
            builder.end_document()
        builder.finalize(f"{stem}.idx")

    for field in FIELDS:
        stem = tmp_path / f"demo_data_packed_{field}_document"
        build(stem, rows[field], [])
        build(tmp_path / f"merge_demo_data_packed_{field}_document", [], [stem, stem])
    report = run_inspect(make_recipe("data.seq_length=16"), tmp_path / "merge_demo_data")
    assert findings(report) == []
    assert (report.figures["rows"], report.figures["segments"]) == ("6", "12")
    build(tmp_path / "demo_data_packed_attention_mask_document", published_rows()["attention_mask"], [])
    (said,) = foreign(make_recipe, tmp_path / "demo_data")
    assert said.endswith(UNNUMBERED)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openpangu_sft", "inspect", "--recipe", "recipes/demo.yaml", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line(recipe: Recipe, tmp_path: Path) -> None:
    overrides = [part for override in (*TINY, f"paths.cache={tmp_path}") for part in ("--set", override)]
    finished = command(*overrides)
    directory = recipe.path("dataset")
    assert (finished.returncode, finished.stdout) == (0, "PASS\n")
    assert finished.stderr.startswith(f"packed dataset: {directory}\n")
    assert f"openpangu-sft {__version__} (dataset)" in finished.stderr
    assert "->" not in finished.stderr

    prefix = write_dataset(tmp_path / "other", published_rows())
    finished = command(*overrides, str(prefix))
    *_, first, second = finished.stderr.splitlines()
    assert finished.returncode == 1
    assert first.startswith(f"{prefix}_packed_input_ids_document.idx: rows have 16 tokens")
    assert second.endswith(UNNUMBERED)
    assert finished.stdout == "FAIL: 2 findings\n"
    finished = command(*overrides, "--set", "data.seq_length=16", str(prefix))
    assert finished.returncode == 1
    assert finished.stdout == "FAIL: 1 finding\n"

    finished = command(*overrides, str(tmp_path / "none"))
    assert finished.returncode == 1
    assert finished.stderr == f"openpangu-sft: {tmp_path}/none: no such dataset -> {GIVE}\n"
