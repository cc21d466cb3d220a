"""`make bench-data`: preprocessing compared with its limit and with the published way, in one run on one machine.

Samples of real conversations are preprocessed by this engine and by the published way, and encoded by SentencePiece
alone, which is the limit; then packs are planned for many samples. docs/benchmarks.md describes what is measured.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

import click

from benchmarks.agreement import Segments, read_segments
from benchmarks.corpus import MODEL, Corpus, require_data, write_samples, write_tokenizer
from benchmarks.measure import Measured, machine, print_table, run_measured
from benchmarks.packing import SEQ_LENGTHS, distributions, measure_packing
from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RUNS = {"raw": "raw SentencePiece", "engine": "this engine: preprocess, merge", "published": "the published way"}
PARTS = (*RUNS, "packing")
BOS_ID, PAD_ID = 1, 0
"""Of corpus.py's tokenizer. No text encodes to them, so they mark starts of segments and ends of rows."""
SOFTWARE = ("sentencepiece", "transformers", "datasets", "numpy")
OUTPUTS: dict[str, list[str]] = {
    "raw": [],
    "engine": ["finetune_dataset"],
    "published": ["published", "published_cache"],
}
WARM_UP = "import benchmarks.published_way, openpangu_sft.dataset.merge, transformers.models.llama.tokenization_llama"
"""Loads Python's modules from disk, which the first command would otherwise pay for."""


class Bench(NamedTuple):
    """The working directory, the recipe there, the options that give it to a command, and the SentencePiece model."""

    directory: Path
    recipe: Recipe
    options: list[str]
    model: Path

    def measure(self, part: str) -> Measured:
        """Runs one part, without earlier output."""
        for name in OUTPUTS[part]:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        log = self.directory / f"{part}.log"
        samples, workers = str(self.recipe.path("samples")), str(self.recipe.data.workers)
        if part == "raw":
            run = run_measured(["-m", "benchmarks.raw", str(self.model), samples, workers], log)
            return run._replace(seconds=float(run.output))
        if part == "engine":
            stages = [["-m", "openpangu_sft", stage, *self.options] for stage in ("preprocess", "merge")]
            return run_measured(stages[0], log).then(run_measured(stages[1], log))
        output, cache = (str(self.directory / name) for name in OUTPUTS[part])
        paths = [samples, str(self.recipe.path("hf")), output, cache]
        command = ["-m", "benchmarks.published_way", *paths, str(self.recipe.data.seq_length), workers]
        return run_measured(command, log, HF_HOME=cache, HF_HUB_OFFLINE="1")

    def read_back(self, part: str, corpus: Corpus) -> Optional[Segments]:
        """The segments in the output of a part."""
        seq_length = self.recipe.data.seq_length
        if part == "engine":
            counts = read_manifest(self.recipe.path("dataset"), "dataset", "").counts
            assert counts["rejected"] == 0, "conversations were rejected, so the parts did different work"
            assert counts["packed"] == corpus.conversations, "conversations were lost"
            return read_segments(self.recipe.path("dataset"), seq_length)
        if part == "published":
            return read_segments(self.directory / "published", seq_length, BOS_ID, PAD_ID)
        return None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.option("--size", default=200.0, help="MB of samples (jsonl)")
@click.option("--data-dir", type=Path, required=True, help="real conversations and the tokenizer's model")
@click.option("--only", default=",".join(PARTS), metavar="PARTS", help="what to measure")
@click.option(
    "--repeat",
    default=2,
    type=click.IntRange(1),
    help="measurements of raw and the engine; one fewer of the published way",
)
@click.option("--seq-length", default=4096, help="tokens of a pack")
@click.option("--workers", default=len(os.sched_getaffinity(0)), help="processes", show_default="one per core")
@click.option("--packing", default=10_000_000, type=click.IntRange(1), help="samples to plan packs for")
@click.option("--seed", default=1234, help="of the sampling")
@click.option("--keep", type=Path, help="a new working directory to keep; default: a temporary one")
def main(
    size: float,
    data_dir: Path,
    only: str,
    repeat: int,
    seq_length: int,
    workers: int,
    packing: int,
    seed: int,
    keep: Optional[Path],
) -> None:
    """Measures preprocessing, and prints Markdown tables."""
    parts = only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--only has no part {min(unknown)!r}", remedy=f"choose from {','.join(PARTS)}")
    data_dir = data_dir.absolute()
    require_data(data_dir)
    print(f"{machine(*SOFTWARE)}; load before: {os.getloadavg()[0]:.1f}")
    made: dict[str, Segments] = {}
    if wanted := [part for part in RUNS if part in parts]:
        with _directory(keep) as directory:
            settings = [f"data.seq_length={seq_length}", f"data.workers={workers}"]
            bench = _prepare(directory, settings, data_dir / MODEL)
            corpus = write_samples(data_dir, bench.recipe.path("samples"), int(size * 1e6), seq_length, seed)
            print(f"{corpus.conversations:,} conversations, {corpus.jsonl_bytes / 1e6:.1f} MB of jsonl, ", end="")
            print(f"{corpus.text_bytes / 1e6:.1f} MB of text; seq_length {seq_length}, {workers} workers\n", flush=True)
            runs, made = _measure_all(bench, wanted, repeat, corpus)
        _print_speeds(runs, corpus.text_bytes / 1e6)
        _print_agreement(made)
    if "packing" in parts:
        data = next((segments for segments in made.values()), None)
        _print_packing(packing, seed, data)
    if len(made) == 2 and not made["engine"].agrees(made["published"]):
        sys.exit("bench-data: the segments differ, so the figures are meaningless")


def _prepare(directory: Path, settings: list[str], model: Path) -> Bench:
    """The tokenizer, and the published recipe with its paths in the directory."""
    settings = [
        f"paths.cache={directory}",
        "tokenizer.trust_remote_code=false",
        "parallel.context=1",  # does not affect the data; valid for any --seq-length
        "data.on_bad_sample=refuse",
        *settings,
    ]
    file = ROOT / "recipes/openpangu-1b.yaml"
    recipe = load_recipe(file, settings)
    write_tokenizer(model, recipe.path("hf"))
    return Bench(directory, recipe, ["--recipe", str(file), *(f"--set={setting}" for setting in settings)], model)


def _measure_all(
    bench: Bench, parts: list[str], repeat: int, corpus: Corpus
) -> tuple[dict[str, list[Measured]], dict[str, Segments]]:
    """Measures the parts in turn, ending with raw and the engine again, so that drift of the machine is visible."""
    runs: dict[str, list[Measured]] = {}
    made: dict[str, Segments] = {}
    run_measured(["-c", WARM_UP], bench.directory / "warm-up.log")
    for turn in range(repeat):
        for part in parts:
            if part == "published" and 0 < turn == repeat - 1:
                continue
            runs.setdefault(part, []).append(bench.measure(part))
            print(f"{part}: {runs[part][-1].seconds:.2f} s", file=sys.stderr, flush=True)
            if part not in made and (found := bench.read_back(part, corpus)):
                made[part] = found
    return runs, made


def _print_speeds(runs: dict[str, list[Measured]], megabytes: float) -> None:
    rows = [["what", "seconds", "MB/s", "x raw", "x published", "peak memory", "without files", "all runs, s"]]
    best = {part: min(run.seconds for run in measured) for part, measured in runs.items()}
    for part, measured in runs.items():
        ratios = [f"{best[base] / best[part]:.2f}" if base in best else "-" for base in ("raw", "published")]
        peaks = [max(run.peak for run in measured), max(run.peak_without_files for run in measured)]
        memory = [f"{peak / 1e6:,.0f} MB" for peak in peaks] if part != "raw" else ["-", "-"]  # all text is in it
        every = ", ".join(f"{run.seconds:.2f}" for run in measured)
        rows.append([RUNS[part], f"{best[part]:.2f}", f"{megabytes / best[part]:.2f}", *ratios, *memory, every])
    print_table(rows)


def _print_agreement(made: dict[str, Segments]) -> None:
    for part, segments in made.items():
        print(f"{part}: {segments}; {segments.packs:,} packs")
    said = "not checked, it needs both the engine and the published way"
    if len(made) == 2:
        agreed = made["engine"].agrees(made["published"])
        said = "yes, both produced the same segments" if agreed else "NO, the segments differ"
    print(f"agreement: {said}\n", flush=True)


def _print_packing(samples: int, seed: int, data: Optional[Segments]) -> None:
    print(f"plan_packs for {samples:,} samples, in one process:\n")
    rows = [["lengths", "seq_length", "seconds", "full", "packs", "packs of best fit", "ratio"]]
    for seq_length in SEQ_LENGTHS:
        drawn = distributions(samples, seq_length, seed, data.lengths if data else None)
        for name, lengths in drawn.items():
            found = measure_packing(lengths, seq_length, seed)
            counts = [f"{found.packs:,}", f"{found.best_fit:,}", f"{found.packs / found.best_fit:.4f}"]
            rows.append([name, str(seq_length), f"{found.seconds:.2f}", f"{found.full:.2%}", *counts])
    print_table(rows)


@contextmanager
def _directory(keep: Optional[Path]) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="bench-data-") as directory:
            yield Path(directory)
        return
    if keep.exists():
        raise UserError("exists already", where=keep, remedy="give --keep a new directory")
    keep.mkdir(parents=True)
    yield keep.absolute()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench-data: {error}")
