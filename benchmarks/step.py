"""`make bench-step`: the training step of MindSpeed-LLM as published against this project's, counted on the stand-in.

The real upstream code trains a small model in the 1B's ratios in two processes, in turn with and without the patches
that make a step cheaper. docs/benchmarks.md describes what exactly is counted.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import click
import numpy as np

from benchmarks.measure import machine, print_table
from benchmarks.step_formula import SCALE, flops_per_token
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.dataset.index_file import PREFIX, PackedWriter
from openpangu_sft.demo.base_model import make_base_model
from openpangu_sft.plan.choose import bytes_sent, choose
from openpangu_sft.plan.memory import GIB
from openpangu_sft.plan.mindspeed_memory import mindspeed_memory
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import IGNORED
from openpangu_sft.training.mindspeed.sources import PATCHES, ROOT, read_pins, require_ready
from openpangu_sft.training.mindspeed.start import link_data, plan
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError
from openpangu_sft.util.git import git

RECIPE = ROOT / "recipes/openpangu-1b.yaml"
SIZES = ["model.num_layers=13", "model.hidden_size=96", "model.ffn_hidden_size=384", "model.kv_channels=8"]
SIZES += ["model.vocab_size=4800", "model.max_position_embeddings=2048", "data.seq_length=2048"]
SIZES += ["train.recompute.num_layers=13"]
"""The 1B's at 32K, divided by 16; layers by 2 and the vocabulary by 32, so that the output layer has its share."""
SETTINGS = ["train.engine=mindspeed", "train.device=cpu", "parallel.devices_per_node=2", "train.global_batch_size=2"]
SETTINGS += ["train.lr=1e-3", "train.min_lr=1e-4", "train.lr_warmup_iterations=1", "train.save_interval=1000"]
SETTINGS += ["train.loss=micro_batch", "tokenizer.trust_remote_code=false"]
CP2, AGAIN, NOT_AGAIN = "parallel.context=2", "train.recompute.granularity=full", "train.recompute.granularity=none"
FLOPS, PEAK, SECONDS = 0.78, 0.5, 0.75
"""Targets, as ratios to the published step. Reported, not enforced."""
MEDIAN, SIGMA, PROMPT = 39, 0.8, 0.26
"""Lengths of segments are lognormal, with this median for packs of 2048; the first 26 % are not trained."""


class Way(NamedTuple):
    """A way to train: its settings, and whether the patches that make a step cheaper are left out."""

    title: str
    published: bool
    overrides: tuple[str, ...]


WAYS = (
    Way("published: CP 2, recompute all", True, (CP2, AGAIN)),
    Way("ours: CP 2, recompute all", False, (CP2, AGAIN)),
    Way("ours: CP 2, recompute none", False, (CP2, NOT_AGAIN)),
    Way("ours: DP 2, recompute none", False, ("parallel.context=1", NOT_AGAIN)),
)
FULL_SIZE_ONLY = (
    Way("ours: DP 8, recompute all", False, ("parallel.context=1", AGAIN)),
    Way("ours: as auto chooses", False, ("parallel=auto", "train.recompute=auto")),
)


class Packs(NamedTuple):
    """One global batch: tokens, targets, and the sum of the squared lengths of its segments."""

    tokens: int
    trained: int
    squares: int


class Found(NamedTuple):
    """Of a way: what each rank has noted in its counted run, and in each of its timed ones."""

    way: Way
    counted: list[dict[str, Any]]
    timed: list[list[dict[str, Any]]]

    @property
    def flops(self) -> int:
        """Of an iteration, all devices together."""
        return sum(int(rank["flops"]) for rank in self.counted)

    @property
    def peak(self) -> int:
        """Bytes, of the fullest device."""
        return max(int(rank["peak"]) for rank in self.counted)

    @property
    def runs(self) -> list[float]:
        """Processor seconds of an iteration in each run, all devices together."""
        return [sum(sum(rank["seconds"]) / len(rank["seconds"]) for rank in run) for run in self.timed]

    @property
    def seconds(self) -> float:
        return min(self.runs)

    def sent(self, kind: str) -> int:
        """Bytes that the device which sends most sends in an iteration."""
        return max(int(rank["sent"].get(kind, 0)) for rank in self.counted)


class Bench:
    """The working directory, both trees of sources, and what was found."""

    def __init__(self, directory: Path, sources: Path, overrides: Sequence[str], timed: int) -> None:
        self.directory, self.overrides, self.timed = directory, overrides, timed
        self.sources = {False: sources, True: published_sources(sources, directory / "published")}
        self.found: dict[str, Found] = {}
        recipe = self.recipe(WAYS[0], "fp32", 1)
        make_base_model(recipe, random_texts(recipe.model.vocab_size))
        self.packs = write_packs(recipe)
        run_convert(recipe)

    def recipe(self, way: Way, precision: str, iterations: int) -> Recipe:
        run = [f"train.precision={precision}", f"train.iterations={1 + iterations}", f"paths.cache={self.directory}"]
        return load_recipe(RECIPE, [*SIZES, *SETTINGS, *run, *self.overrides, *way.overrides])

    def count(self) -> None:
        """Counts every way, in bf16."""
        for way in WAYS:
            one = self.found[way.title] = Found(way, self._run(way, "counted", "bf16", 2), [])
            say(f"{way.title}: {one.flops / 1e9:.2f} GFLOP, peak {one.peak / 1e6:.2f} MB")

    def turn(self) -> None:
        """Times every way once, in fp32."""
        for way, _, timed in self.found.values():
            timed.append(self._run(way, "timed", "fp32", self.timed))
            say(f"{way.title}: {self.found[way.title].runs[-1]:.2f} s, losses {timed[-1][0]['losses']}")

    def _run(self, way: Way, mode: str, precision: str, iterations: int) -> list[dict[str, Any]]:
        """Trains, and gives what each rank has noted."""
        recipe = self.recipe(way, precision, iterations)
        run = recipe.path("run")
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        data = link_data(run, recipe.path("dataset"), "packs")
        command = plan(recipe, self.sources[way.published], data, is_main=True)[0]
        command.folder.mkdir()
        program = next(place for place, word in enumerate(command.arguments) if word.endswith("posttrain_gpt.py"))
        arguments = [*command.arguments]
        arguments[program:program] = ["-m", "benchmarks.step_process", str(run), mode]
        environment = {**os.environ, **command.environment}
        environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        log = self.directory / "log"
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(arguments, cwd=command.folder, env=environment, stdout=stream, stderr=stream)
            try:
                process.wait()
            finally:
                process.terminate()  # not kill: torchrun ends its ranks
                process.wait()
        if process.returncode:
            raise UserError(f"{way.title} ended with exit code {process.returncode}:\n{log.read_text('utf-8')[-4000:]}")
        return [json.loads((run / f"{rank}.json").read_text("utf-8")) for rank in range(recipe.parallel.world)]


def published_sources(sources: Path, copy: Path) -> Path:
    """A copy of the sources without the patches of MindSpeed-LLM that change what a step costs.

    The first five correct what is trained on; they belong to both ways.
    """
    shutil.copytree(sources, copy)
    for patch in reversed(read_pins()["mindspeed-llm"].patches[5:]):
        git("apply", "--reverse", str(PATCHES / patch), folder=copy / "mindspeed-llm")
    return copy


def random_texts(vocabulary: int) -> list[str]:
    """Texts with enough different pieces for a tokenizer of this size."""
    drawn = random.Random(1)
    letters = [chr(number) for number in range(0x4E00, 0x4E00 + 200)]
    return [" ".join("".join(drawn.choices(letters, k=3)) for _ in range(20)) for _ in range(vocabulary // 4)]


def write_packs(recipe: Recipe) -> Packs:
    """Writes one global batch of packs to `paths.dataset`: every iteration trains on all of them."""
    rows, length = recipe.train.global_batch_size, recipe.data.seq_length
    drawn, squares = np.random.default_rng(recipe.data.seed), 0
    ids = drawn.integers(300, recipe.model.vocab_size, (rows, length), np.int32)  # none of the tokenizer's own
    numbers, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
    for row in range(rows):
        begin, number = 0, 0
        while begin < length:
            end = min(begin + max(4, round(drawn.lognormal(np.log(MEDIAN * length / 2048), SIGMA))), length)
            first, number, squares = begin + round(PROMPT * (end - begin)), number + 1, squares + (end - begin) ** 2
            numbers[row, begin:end], labels[row, first:end] = number, ids[row, first:end]
            begin = end
    directory = recipe.path("dataset")
    directory.mkdir(parents=True)
    PackedWriter(directory, PREFIX, rows, length).write(0, input_ids=ids, attention_mask=numbers, labels=labels)
    return Packs(ids.size, int((labels[:, 1:] != IGNORED).sum()), squares)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.option("--repeat", default=3, type=click.IntRange(1), help="number of turns")
@click.option("--iterations", default=2, type=click.IntRange(1), help="timed iterations of a run")
@click.option("--directory", type=Path, help="parent of the temporary directory; default: the system's")
@click.option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="other sizes: model.num_layers=2")
def main(repeat: int, iterations: int, directory: Optional[Path], overrides: tuple[str, ...]) -> None:
    """Counts and times a training step of MindSpeed-LLM as published and as patched, and prints Markdown tables."""
    print(f"{machine('torch', 'numpy')}; load before: {os.getloadavg()[0]:.1f}")
    sources = require_ready()
    with tempfile.TemporaryDirectory(prefix="bench-step-", dir=directory) as made:
        bench = Bench(Path(made).absolute(), sources, overrides, iterations)
        packs = bench.packs
        print(f"{packs.tokens:,} tokens an iteration, {packs.trained / packs.tokens:.0%} trained\n", flush=True)
        bench.count()
        for _ in range(repeat):
            bench.turn()
    report(list(bench.found.values()), packs)
    report_full_size(packs)


def report(found: Sequence[Found], packs: Packs) -> None:
    """Prints the table of what was counted, the targets, and how far losses are apart."""
    first, kinds = found[0], ["all-to-all", "all-gather", "reduce-scatter", "all-reduce", "broadcast"]
    head = ["counted", "MFLOP/trained token", "ratio", "peak MB", "ratio", *(f"{kind} MB" for kind in kinds)]
    rows = [[*head, "processor s", "ratio", "all runs, s"]]
    for one in found:
        row = [one.way.title, f"{one.flops / packs.trained / 1e6:.2f}", f"{one.flops / first.flops:.3f}"]
        row += [f"{one.peak / 1e6:.1f}", f"{one.peak / first.peak:.3f}"]
        row += [f"{one.sent(kind) / 1e6:.2f}" for kind in kinds]
        row += [f"{one.seconds:.2f}", f"{one.seconds / first.seconds:.3f}"]
        rows.append([*row, ", ".join(f"{seconds:.2f}" for seconds in one.runs)])
    print_table(rows)
    for what, ratio, most in (
        ("FLOPs per trained token", min(one.flops for one in found) / first.flops, FLOPS),
        ("peak bytes at equal recompute", found[1].peak / first.peak, PEAK),
        ("processor seconds", min(one.seconds for one in found) / first.seconds, SECONDS),
    ):
        print(f"{what}: {ratio:.3f} of the published (at most {most}: {'yes' if ratio <= most else 'NO'})")
    theirs = first.timed[0][0]["losses"]
    runs = [run[0]["losses"] for one in found for run in one.timed]
    apart = max(abs(loss - its) / its for losses in runs for loss, its in zip(losses, theirs))
    print(f"losses of {len(theirs)} iterations in fp32: at most {apart:.1e} apart, relative\n")


def report_full_size(packs: Packs) -> None:
    """Prints the table by formula for the 1B, with packs in which all lengths are those of the small ones x SCALE."""
    pairs, trained = SCALE * packs.squares / packs.tokens / 2, packs.trained / packs.tokens  # half: attention is causal
    rows = [["by formula, 1B", "GFLOP/trained token", "ratio", "GiB", "of 64 GiB", "all-to-all GB/step"]]
    first = 0.0
    for way in (*WAYS, *FULL_SIZE_ONLY):
        recipe = load_recipe(RECIPE, way.overrides, choose)
        flops = flops_per_token(recipe, pairs, 1 if way.published else trained) / trained
        first = first or flops
        memory = mindspeed_memory(recipe, published=way.published)
        row = [way.title.replace("DP 2", "DP 8"), f"{flops / 1e9:.2f}", f"{flops / first:.3f}"]
        row += [f"{memory.needed / GIB:.1f}", {"yes": "fits", "no": "too much"}.get(memory.verdict(64), "tight")]
        rows.append([*row, f"{bytes_sent(recipe, way.published)[0] / 1e9:.0f}"])
    print_table(rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench-step: {error}")
