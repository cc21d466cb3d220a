"""The benchmarks run from end to end, check what they measure, and show all of it. Speed is not tested."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.agreement import read_segments
from benchmarks.convert import Row
from benchmarks.corpus import FILES, MODEL, Corpus, texts_of, write_samples
from benchmarks.measure import Measured, run_measured
from benchmarks.packing import best_fit_packs
from benchmarks.random_model import write_random_model
from benchmarks.raw import deal
from benchmarks.step import FULL_SIZE_ONLY, WAYS, Bench, report, report_full_size
from benchmarks.step_formula import flops_per_token
from benchmarks.train import table
from benchmarks.train_once import ENGINES, Clock, Steps
from conftest import ROOT, SHARED, TINY, MakeRecipe, write_packs
from openpangu_sft.checkpoint.files.arrays import BF16
from openpangu_sft.checkpoint.hf import open_hf
from openpangu_sft.checkpoint.sharding import hf_shapes, parameter_count, whole
from openpangu_sft.conversations.conversation import parse_sample
from openpangu_sft.plan.choose import bytes_sent
from openpangu_sft.recipe.model_config import require_model
from openpangu_sft.training.mindspeed.sources import find_sources, require_ready
from upstream import require_compiler

DATA = SHARED / "data"


@pytest.fixture
def data() -> Path:
    missing = [name for name in (*FILES, MODEL) if not (DATA / name).is_file()]
    if missing:
        pytest.skip(f"{DATA / missing[0]} is not there: real conversations, which are not part of this project")
    return DATA


def bench(*options: str, name: str = "data") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_whole_benchmark(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the published way needs Hugging Face datasets")
    place = tmp_path / "kept"
    done = bench("--size=0.3", f"--data-dir={data}", "--repeat=1", "--workers=2", "--packing=20000", f"--keep={place}")
    assert done.returncode == 0, done.stderr
    assert "\nagreement: yes, both produced the same segments\n" in done.stdout
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
    first = tmp_path / next(iter(FILES))
    assert done.stderr.startswith(f"bench-data: {first}: no such file -> set DATA_DIR to a directory that contains it")


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


def test_the_whole_conversion_benchmark(tmp_path: Path) -> None:
    sizes = [f"--set={setting}" for setting in TINY if setting.startswith("model.")]
    done = bench(*sizes, "--repeat=2", f"--directory={tmp_path}", name="convert")
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    conversions = [
        f"{title} (TP {size}, PP {size})"
        for size in (1, 2)
        for title in ("convert: HF to mcore", "export: mcore to HF")
    ]
    assert [row[0] for row in table if row[0].strip("-:")] == ["what", "copy, fsync", *conversions]
    assert all(len(row[-1].split(", ")) == 2 for row in table[2:])  # both runs are shown
    reached = [line for line in done.stdout.splitlines() if " x copy (at most " in line]
    assert len(reached) == len(conversions)
    for title, row, line in zip(conversions, table[3:], reached):
        assert line.startswith(f"{title}: {row[3]} x copy (at most 2.5: ")
    assert str(tmp_path) not in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_place_without_room_for_the_conversion_benchmark(tmp_path: Path) -> None:
    done = bench("--set=model.vocab_size=1000000000", f"--directory={tmp_path}", name="convert")
    assert done.returncode == 1
    assert "bench-convert: " in done.stderr
    assert "MB are free on this disk" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_row_of_the_conversion_benchmark() -> None:
    copy = Row("copy", 2_000_000_000, [Measured(2.0, 5_000_000, 1_000_000), Measured(1.0, 5_000_000, 2_000_000)])
    runs = [Measured(seconds, 3_000_000_000, peak) for seconds, peak in ((2.5, 100_000_000), (4.0, 1_100_000_000))]
    row = Row("both", 2_200_000_000, runs)
    cells = ["2,200 MB", "2.50", "2.50", "2.17", "800", "1,100 MB", "3,000 MB", "2.50, 4.00"]
    assert row.cells(copy) == ["both", *cells]
    assert row.reach(copy) == "both: 2.50 x copy (at most 2.5: yes), 1,100 MB without files (at most 1,000 MB: NO)"
    assert row._replace(runs=runs[1:]).reach(copy).startswith("both: 4.00 x copy (at most 2.5: NO)")


def test_the_random_model_is_one_of_openpangus_form(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = make_recipe().model
    files = [write_random_model(tmp_path / name, model, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]
    assert require_model(tmp_path / "a", model)["model_type"] == "PanguEmbedded"
    weights = open_hf(tmp_path / "a", model)
    values = np.concatenate(
        [weights.read(whole(*item)).astype(np.float32).ravel() for item in hf_shapes(model).items()]
    )
    assert {weights.dtype(name) for name in hf_shapes(model)} == {BF16}
    assert len(values) == parameter_count(model)
    assert values.std() == pytest.approx(0.02, rel=0.02)


def test_memory_is_counted_with_and_without_mapped_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 << 20))
    program = (
        "import mmap, sys, time\n"
        "own = bytes(1) * (32 << 20)\n"
        "with open(sys.argv[1], 'rb') as stream:\n"
        "    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "sum(mapped[:: mmap.PAGESIZE])\n"
        "time.sleep(2)\n"
    )
    measured = run_measured(["-c", program, str(file)], tmp_path / "log")
    assert 32 << 20 < measured.peak_without_files < 64 << 20
    assert measured.peak > 96 << 20


SMALL_STEP = ["model.num_layers=2", "train.recompute.num_layers=2", "model.vocab_size=1600", "data.seq_length=256"]


def test_the_step_benchmark_counts_what_the_formulas_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_compiler()
    if not find_sources():
        pytest.skip("the upstream sources are not at hand: no make sources here")
    bench = Bench(tmp_path, require_ready(), SMALL_STEP, timed=1)
    bench.count()
    bench.turn()
    assert [one.way for one in bench.found.values()] == [*WAYS]
    packs, (published, equal, *_) = bench.packs, bench.found.values()
    for one in bench.found.values():
        recipe, share = bench.recipe(one.way, "bf16", 2), packs.trained / packs.tokens
        logits = 1 if one.way.published else share
        assert one.flops == packs.tokens * flops_per_token(recipe, packs.squares / packs.tokens, logits)
        assert one.sent("all-to-all") == bytes_sent(recipe, one.way.published)[0]
        assert [rank["losses"] for run in one.timed for rank in run] == [
            pytest.approx(published.timed[0][0]["losses"], rel=1e-6)
        ] * 2
    assert equal.peak < published.peak
    report([*bench.found.values()], packs)
    report_full_size(packs)
    shown = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    titles = [way.title for way in WAYS]
    full_size = [way.title.replace("DP 2", "DP 8") for way in (*WAYS, *FULL_SIZE_ONLY)]
    assert [name for name in shown if name.strip("-:")] == ["counted", *titles, "by formula, 1B", *full_size]


def test_the_training_benchmark_without_trl(tmp_path: Path) -> None:
    done = bench(f"--trl={tmp_path}", name="train")
    assert done.returncode == 1
    assert done.stderr.startswith(f"bench-train: {tmp_path}: TRL is not installed here -> pip install --no-deps ")


def test_rows_of_the_training_benchmark() -> None:
    seconds = {"this engine": ([1.0, 1.0], [3.0, 1.0]), "TRL": ([3.0], [4.0]), "Trainer": ([6.0], [8.0])}
    runs = {engine: [Steps(run, 0.875, 2.5) for run in seconds[engine]] for engine in ENGINES}
    assert table(runs, 600)[1:] == [
        ["this engine", "300", "1.50", "1.17", "88%", "2.5000", "300, 150"],
        ["TRL", "200", "1.00", "1.00", "88%", "2.5000", "200, 150"],
        ["Trainer", "100", "0.50", "0.50", "88%", "2.5000", "100, 75"],
    ]


def test_what_a_training_run_times_and_profiles() -> None:
    clock = Clock(iterations=6)
    left, right = torch.randn(300, 300), torch.randn(300, 300)
    for _ in range(6):
        left @ right
        clock.tick()
    steps = clock.steps(1.5)
    assert len(steps.seconds) == 2  # of six: two to warm up, two profiled
    assert 0 < steps.matrices <= 1
    assert steps.loss == 1.5
