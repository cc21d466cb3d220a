"""`make bench-convert`: conversions of a checkpoint against a copy of it, in one run on one machine.

A random model of the recipe's sizes is copied, converted to Megatron-core format and back, in turn. docs/benchmarks.md
describes what exactly is measured.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple, Optional

import click

from benchmarks.measure import Measured, machine, print_table, run_measured
from benchmarks.random_model import write_random_model
from openpangu_sft.artifacts.checks import require_room
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MOST_COPIES, MOST_MEMORY = 2.5, 1_000_000_000
"""Targets of a conversion: times the copy, and bytes of anonymous memory. Reported, not enforced."""
COPY = """
import os, shutil, sys, time
began = time.perf_counter()
shutil.copyfile(*sys.argv[1:])
with open(sys.argv[2], "rb") as stream:
    os.fsync(stream.fileno())
print(time.perf_counter() - began)
"""
WARM_UP = "import openpangu_sft.cli.main, openpangu_sft.checkpoint.convert, openpangu_sft.checkpoint.export"
"""Loads Python's modules from disk, which the first command would otherwise pay for."""
FORM = "--form=openpangu"
"""The other format also compares tokenizers, which takes additional seconds, and there is none here."""
LAYOUTS = ((1, 1), (2, 2))
"""TP and PP."""


class Row(NamedTuple):
    """One measured command: bytes of its output files, and one run per turn."""

    title: str
    written: int
    runs: list[Measured]

    @property
    def best(self) -> float:
        return min(run.seconds for run in self.runs)

    @property
    def median(self) -> float:
        return median(run.seconds for run in self.runs)

    @property
    def memory(self) -> int:
        """Peak bytes of memory without file pages."""
        return max(run.peak_without_files for run in self.runs)

    def cells(self, copy: Row) -> list[str]:
        """Its table row; ratios are to the copy."""
        ratios = [f"{self.best / copy.best:.2f}", f"{self.median / copy.median:.2f}"]
        peaks = [f"{peak / 1e6:,.0f} MB" for peak in (self.memory, max(run.peak for run in self.runs))]
        written, speed = f"{self.written / 1e6:,.0f} MB", f"{copy.written / self.best / 1e6:,.0f}"
        every = ", ".join(f"{run.seconds:.2f}" for run in self.runs)
        return [self.title, written, f"{self.best:.2f}", *ratios, speed, *peaks, every]

    def reach(self, copy: Row) -> str:
        """Its result against the targets."""
        ratio = self.best / copy.best
        time = f"{ratio:.2f} x copy (at most {MOST_COPIES}: {_yes(ratio <= MOST_COPIES)})"
        most = f"at most {MOST_MEMORY / 1e6:,.0f} MB: {_yes(self.memory <= MOST_MEMORY)}"
        return f"{self.title}: {time}, {self.memory / 1e6:,.0f} MB without files ({most})"


class Bench:
    """The working directory, the recipe there, the options that give it to a command, and the weights."""

    def __init__(self, directory: Path, recipe: Recipe, options: list[str], weights: Path) -> None:
        self.directory, self.recipe, self.options, self.weights = directory, recipe, options, weights
        self.rows: dict[str, Row] = {}

    def turn(self) -> None:
        """Measures everything once; removes outputs as soon as they are no longer needed."""
        copy = self.directory / "copy"
        done = run_measured(["-c", COPY, str(self.weights), str(copy)], self.directory / "copy.log")
        self._note("copy, fsync", done._replace(seconds=float(done.output)), copy)
        copy.unlink()
        mcore, exported = self.recipe.path("mcore"), self.recipe.path("export")
        for tensor, pipeline in LAYOUTS:
            layout = f"(TP {tensor}, PP {pipeline})"
            sizes = [f"--set=parallel.tensor={tensor}", f"--set=parallel.pipeline={pipeline}"]
            self._stage(f"convert: HF to mcore {layout}", mcore, "convert", *sizes)
            self._stage(f"export: mcore to HF {layout}", exported, "export", f"--from={mcore}", FORM)
            shutil.rmtree(exported)
            shutil.rmtree(mcore)

    def _stage(self, title: str, output: Path, stage: str, *options: str) -> None:
        command = ["-m", "openpangu_sft", stage, *self.options, *options]
        self._note(title, run_measured(command, self.directory / f"{stage}.log"), output)

    def _note(self, title: str, run: Measured, output: Path) -> None:
        files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
        written = sum(path.stat().st_size for path in files)
        self.rows.setdefault(title, Row(title, written, [])).runs.append(run)
        print(f"{title}: {run.seconds:.2f} s", file=sys.stderr, flush=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.option("--repeat", default=3, type=click.IntRange(1), help="number of measurements")
@click.option("--directory", type=Path, help="parent of the temporary directory; default: the system's")
@click.option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="other sizes: model.num_layers=2")
@click.option("--seed", default=1234, help="of the weights")
def main(repeat: int, directory: Optional[Path], overrides: tuple[str, ...], seed: int) -> None:
    """Measures conversions of a random model, and prints a Markdown table."""
    print(f"{machine('numpy', 'ml-dtypes', 'safetensors')}; load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=directory) as made:
        bench = _prepare(Path(made).absolute(), overrides, seed)
        run_measured(["-c", WARM_UP], bench.directory / "warm-up.log")
        for _ in range(repeat):
            bench.turn()
    copy, *conversions = bench.rows.values()
    head = ["what", "written", "seconds", "x copy", "of medians", "MB/s", "without files", "peak memory", "all runs, s"]
    print_table([head, *(row.cells(copy) for row in (copy, *conversions))])
    for row in conversions:
        print(row.reach(copy))


def _prepare(directory: Path, overrides: tuple[str, ...], seed: int) -> Bench:
    """The random model, and the published recipe with its paths in the directory."""
    settings = [
        f"paths.cache={directory}",
        "tokenizer.trust_remote_code=false",
        "train.recompute.num_layers=1",  # nothing is trained; valid for any number of layers
        *overrides,
    ]
    file = ROOT / "recipes/openpangu-1b.yaml"
    recipe = load_recipe(file, settings)
    parameters = parameter_count(recipe.model)
    require_room(directory, 8 * parameters)  # the model and two results, one of which may contain it twice
    weights = write_random_model(recipe.path("hf"), recipe.model, seed)
    print(f"{parameters:,} parameters in bfloat16, {weights.stat().st_size / 1e6:,.1f} MB\n", flush=True)
    return Bench(directory, recipe, ["--recipe", str(file), *(f"--set={setting}" for setting in settings)], weights)


def _yes(true: bool) -> str:
    return "yes" if true else "NO"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench-convert: {error}")
