"""The data benchmark runs from end to end, checks what it measures, and shows all of it. Speed is not tested."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.agreement import read_segments
from benchmarks.corpus import CONVERTERS, MODEL, Corpus, texts_of, write_samples
from benchmarks.packing import best_fit_packs
from benchmarks.raw import deal
from conftest import ROOT, SHARED, write_packs
from openpangu_sft.sample import parse_sample

DATA = SHARED / "data"


@pytest.fixture
def data() -> Path:
    missing = [name for name in (*CONVERTERS, MODEL) if not (DATA / name).is_file()]
    if missing:
        pytest.skip(f"{DATA / missing[0]} is not there: real conversations, which are not part of this project")
    return DATA


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.data", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_whole_benchmark(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the published way needs Hugging Face datasets")
    place = tmp_path / "kept"
    done = bench("--size=0.3", f"--data-dir={data}", "--repeat=1", "--workers=2", "--packing=20000", f"--keep={place}")
    assert done.returncode == 0, done.stderr
    assert "\nagreement: yes, both made the same segments\n" in done.stdout
    shown = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    lengths = ["lognormal", "uniform", "bimodal", "the data's"]
    runs = ["raw SentencePiece", "this engine: preprocess, merge", "the published way"]
    assert [name for name in shown if name.strip("-:")] == ["what", *runs, "lengths", *lengths, *lengths]
    assert str(place) not in done.stdout
    assert (place / "finetune_dataset/merged/manifest.json").is_file()
    segments = re.findall(r"^(?:engine|published): (.*);", done.stdout, re.MULTILINE)
    assert len(segments) == 2
    assert len(set(segments)) == 1


def test_no_data(tmp_path: Path) -> None:
    done = bench(f"--data-dir={tmp_path}")
    assert done.returncode == 1
    first = tmp_path / next(iter(CONVERTERS))
    assert done.stderr.startswith(f"bench-data: {first}: no such file -> set DATA_DIR to a directory that holds it")


def test_the_corpus_is_valid_and_the_same_for_a_seed(data: Path, tmp_path: Path) -> None:
    def write(name: str, seed: int) -> tuple[Corpus, list[bytes]]:
        corpus = write_samples(data, tmp_path / name, 200_000, 4096, seed)
        return corpus, [file.read_bytes() for file in sorted((tmp_path / name).iterdir())]

    corpus, files = write("a", 1)
    assert (corpus, files) == write("b", 1)
    assert files != write("c", 2)[1]
    lines = b"".join(files).splitlines()
    assert len(files) == 4
    assert len(set(lines)) == len(lines) == corpus.conversations
    assert sum(map(len, files)) == corpus.jsonl_bytes >= 200_000
    records = [json.loads(line) for line in lines]
    assert all(parse_sample(record).to_json() == record for record in records)
    assert sum(len(text.encode()) for record in records for text in texts_of(record)) == corpus.text_bytes


def test_segments_agree_in_any_order_and_only_if_all_are_the_same(tmp_path: Path) -> None:
    one, two, three = ([1, 5, 6], [-100, 5, 6]), ([1, 7], [-100, 7]), ([1, 5, 6], [-100, -100, 6])

    def written(name: str, *packs: list[tuple[list[int], list[int]]]) -> Path:
        (tmp_path / name).mkdir()
        arrays = [[(np.array(ids, np.int32), np.array(labels, np.int32)) for ids, labels in pack] for pack in packs]
        write_packs(tmp_path / name, arrays, 8, pad_id=0)
        return tmp_path / name

    numbered = read_segments(written("a", [one, two], [one]), 8)
    opened = read_segments(written("b", [two], [one, one]), 8, bos_id=1, pad_id=0)
    assert (numbered.lengths.tolist(), opened.lengths.tolist()) == ([3, 2, 3], [2, 3, 3])
    assert (numbered.trained, numbered.packs) == (5, 2)
    assert numbered.agrees(opened)
    for number, packs in enumerate([([one, two],), ([one, two], [three]), ([one, two], [two])]):
        assert not numbered.agrees(read_segments(written(str(number), *packs), 8))


def test_best_fit_by_counts_is_best_fit() -> None:
    pytest.importorskip("datasets", reason="the published way needs Hugging Face datasets")
    from benchmarks.published_way import best_fit

    draw = random.Random(0)
    for _ in range(300):
        capacity = draw.choice([8, 13, 64, 300])
        longest = draw.randint(1, capacity)
        lengths = [draw.randint(1, longest) for _ in range(draw.randint(1, 200))]
        assert best_fit_packs(np.array(lengths, np.int64), capacity) == len(best_fit(lengths, capacity))


def test_texts_are_dealt_evenly_and_all_of_them() -> None:
    texts = [f"{number} " + "好" * (number % 50) for number in range(1000)]
    hands = deal(texts, 3)
    assert sorted(text for hand in hands for batch in hand for text in batch) == sorted(texts)
    held = [sum(len(text.encode()) for batch in hand for text in batch) for hand in hands]
    assert max(held) < 1.1 * min(held)
