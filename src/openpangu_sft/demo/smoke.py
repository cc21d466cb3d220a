"""`make smoke`: MindSpeed-LLM's own commands and ours compared on the NPU stand-in, in minutes.

A small model runs through upstream's preprocess, merge, convert and training, with one process and with two in every
parallel mode, then resume and export; a second one, untied like the 7B, through TP 4 x CP 2 to a chat. Results are
compared: files byte by byte, weights bit by bit, losses with those of the portable engine, which computes them with
Hugging Face's model, sample by sample.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from openpangu_sft.checkpoint.mcore import iteration_directory, write_tracker
from openpangu_sft.checkpoint.mcore_reader import open_mcore
from openpangu_sft.checkpoint.weights import Resharder, require_equal
from openpangu_sft.dataset.index_file import FIELDS, PREFIX, field_path
from openpangu_sft.demo.run import prepare
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.model_config import CONFIG, llama_config, read_config
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.sources import require_ready
from openpangu_sft.training.mindspeed.start import environment_of
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.util.console import print_rows, say
from openpangu_sft.util.errors import UserError

FIRST, LAST = 1e-5, 1e-4
"""Largest relative difference from the reference loss, in fp32: of the first iteration, and of later ones."""

RECIPE = Path(__file__).with_suffix(".yaml")
MINDSPEED = ["train.engine=mindspeed", "train.device=cpu"]
ONE_PACK = "train.micro_batch_size=1"
WAYS: dict[str, list[str]] = {
    "one process": [],
    "data parallel": ["parallel.devices_per_node=2"],
    "context parallel": ["parallel.devices_per_node=2", "parallel.context=2"],
    "tensor parallel": ["parallel.devices_per_node=2", "parallel.tensor=2"],
    "pipeline parallel": ["parallel.devices_per_node=2", "parallel.pipeline=2"],
    "micro batches of 2": ["train.micro_batch_size=2"],
}
UNTIED = [
    *("model.num_layers=2", "model.hidden_size=256", "model.ffn_hidden_size=800", "model.num_attention_heads=32"),
    *("model.num_query_groups=8", "model.kv_channels=8", "model.rotary_base=16e6", "model.tie_word_embeddings=false"),
    *("paths.hf=untied/hf", "paths.export=untied/export"),
]
"""The 7B's ratios: hidden size to MLP and vocabulary, heads to groups; and an untied output layer."""
TP4_CP2 = ["parallel.devices_per_node=8", "parallel.tensor=4", "parallel.context=2"]


class Smoke:
    """Runs everything below one directory, which it empties first."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.sources = cache, require_ready()
        self.began = self.noted = time.monotonic()
        self.rows: list[tuple[str, str, str]] = []

    def run(self) -> None:
        """Raises `UserError` where the two sides differ, or a step fails."""
        empty(self.cache)
        self._data()
        self._conversion()
        self._training()
        self._untied()
        print_rows("make smoke", ("what", "found", "seconds"), self.rows)
        say(f"all in {time.monotonic() - self.began:.0f} s, on the stand-in: it says nothing about NPUs' numerics")

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(RECIPE, [f"paths.cache={self.cache}", *overrides])

    def _data(self) -> None:
        prepare(self.recipe())
        for stage in ("format", "preprocess", "merge"):
            self._stage(stage)
        recipe = self.recipe()
        theirs = self.cache / "upstream"
        theirs.mkdir()
        for file in sorted(recipe.path("samples").glob("*.jsonl")):
            (theirs / "merged").mkdir(exist_ok=True)
            # as in the published recipe; upstream adds _packed to the prefix
            command = ["--input", str(file), "--output-prefix", str(theirs / "merged" / file.stem), "--workers", "2"]
            command += ["--log-interval", "1000", "--handler-name", "PanguInstructionHandler", "--pack"]
            command += ["--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", str(recipe.path("hf"))]
            self._upstream("preprocess_data.py", *command, "--seq-length", str(recipe.data.seq_length))
            ours = recipe.path("shards") / file.stem
            require_same_dataset(ours, PREFIX, theirs / "merged", file.stem)
        self._note("preprocess: their bytes, our bytes", "the same")
        keys = [f"packed_{field}_document" for field in FIELDS]
        command = ["--input", str(theirs / "merged"), "--output-prefix", str(theirs / PREFIX)]
        self._upstream("preprocess_data.py", *command, "--merge-group-keys", *keys)
        require_same_dataset(recipe.path("dataset"), PREFIX, theirs, PREFIX)
        self._note("merge: their bytes, our bytes", "the same")

    def _conversion(self, *settings: str) -> None:
        """Converts `paths.hf` both ways and compares what was made."""
        self._stage("convert", *settings)
        recipe = self.recipe(*settings)
        ours = recipe.path("mcore")
        hf, theirs = (self.cache / "upstream" / name / ours.relative_to(self.cache) for name in ("hf", "mcore"))
        shutil.copytree(recipe.path("hf"), hf)
        # openPangu's own class cannot be loaded without an NPU: the same weights as a Llama model
        (hf / CONFIG).write_text(json.dumps(llama_config(read_config(hf))), "utf-8")
        # as in the published recipe, but with the checkpoint's dtype
        given = "--model-type GPT --load-model-type hf --save-model-type mg --use-mcore-models --params-dtype fp32"
        given += f" --target-tensor-parallel-size {recipe.parallel.tensor} --target-pipeline-parallel-size 1"
        given += " --add-qkv-bias --add-dense-bias"
        command = [*given.split(), "--load-dir", str(hf), "--save-dir", str(theirs), "--tokenizer-model", str(hf)]
        self._upstream("convert_ckpt.py", *command)
        first, second = (open_mcore(directory, recipe.model).weights for directory in (ours, theirs))
        require_equal(Resharder(first, recipe.model), second, theirs)
        what = f"convert, TP {recipe.parallel.tensor}: their tensors, our tensors"
        self._note(what, f"all {len(first.names())} the same, bit by bit")

    def _training(self) -> None:
        references = {}
        for packs in ("1", "2"):  # the loss is a mean of the micro batches' means, so it depends on their size
            name, size = f"reference-{packs}", f"train.micro_batch_size={packs}"
            self._stage("sft", "train.engine=transformers", size, f"paths.run={name}")
            references[size] = losses(self.cache / name)
            self._note(f"Hugging Face, sample by sample, micro batches of {packs}", _shown(references[size]))
        for way, settings in WAYS.items():
            run = way.replace(" ", "-")
            reference = references[settings[0] if settings and settings[0] in references else ONE_PACK]
            cut = [setting for setting in settings if setting.startswith(("parallel.tensor", "parallel.pipeline"))]
            mcore = f"{run}-mcore" if cut else "whole-mcore"
            places = [f"paths.run={run}", f"paths.mcore={mcore}"]
            if not (self.cache / mcore).exists():
                self._stage("convert", *settings, *MINDSPEED, *places)
            self._stage("sft", *settings, *MINDSPEED, *places)
            self._compare(f"training: {way}", run, reference)
        self._resume(references[ONE_PACK])
        self._note("resume: 3 iterations, then 2 more", "as without interruption")
        self._stage("export", *MINDSPEED, "paths.run=one-process")
        self._note("export: back to Hugging Face", "done")
        say(f"export: {self.recipe().path('export')}")

    def _untied(self) -> None:
        """A model like the 7B, from convert to chat."""
        whole = [*UNTIED, "paths.mcore=untied/whole", "paths.run=untied/reference"]
        prepare(self.recipe(*whole))
        self._stage("convert", *whole)
        self._stage("sft", *whole)
        reference = losses(self.cache / "untied/reference")
        self._note("untied: Hugging Face, sample by sample", _shown(reference))
        settings = [*UNTIED, *TP4_CP2, *MINDSPEED, "paths.mcore=untied/mcore", "paths.run=untied/run"]
        self._conversion(*settings)
        self._stage("sft", *settings)
        self._compare("untied: training, TP 4 x CP 2", "untied/run", reference)
        self._stage("export", *settings)
        self._stage("chat", *settings, prompt="你好")
        self._note("untied: export, chat", "done")

    def _compare(self, what: str, run: str, reference: Sequence[float]) -> None:
        found = losses(self.cache / run)
        difference = require_close(what, found, reference)
        self._note(what, f"{_shown(found)}, at most {difference:.0e} off")

    def _resume(self, reference: Sequence[float]) -> None:
        whole, run = self.cache / "one-process", self.cache / "resumed"
        shutil.copytree(whole, run, symlinks=True)
        shutil.rmtree(iteration_directory(run, self.recipe().train.iterations))
        write_tracker(run, 3)
        self._stage("sft", *MINDSPEED, "paths.run=resumed", "paths.mcore=whole-mcore")
        require_close("resume", losses(run), reference)

    def _stage(self, stage: str, *settings: str, **options: str) -> None:
        command = [sys.executable, "-m", "openpangu_sft", stage, "--recipe", str(RECIPE)]
        command += [f"--set={setting}" for setting in (f"paths.cache={self.cache}", *settings)]
        command += [f"--{name}={value}" for name, value in options.items()]
        self._call(command)

    def _upstream(self, *command: str) -> None:
        folder, environment = environment_of(self.recipe(*MINDSPEED), self.sources)
        environment["OMP_NUM_THREADS"] = "1"  # the child that convert_ckpt.py forks waits for lost threads
        self._call([sys.executable, *command], folder, **environment)

    def _call(self, command: Sequence[str], folder: Optional[Path] = None, **variables: str) -> None:
        environment, pipe = {**os.environ, **variables}, subprocess.PIPE
        done = subprocess.run(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            say(done.stdout[-4000:])
            raise UserError(f"ended with exit code {done.returncode}", where=" ".join(command[:4]), remedy="see above")

    def _note(self, what: str, found: str) -> None:
        """A row, with the seconds since the row before."""
        now = time.monotonic()
        self.rows.append((what, found, f"{now - self.noted:.1f}"))
        self.noted = now
        say(f"{what}: {found}")


MARK = ".made-by-smoke"


def empty(directory: Path) -> None:
    """Makes a directory, or empties that of an earlier run; raises `UserError` if an earlier run has not made it."""
    if directory.exists() and not (directory / MARK).exists():
        raise UserError("is not from make smoke", where=directory, remedy="choose another directory, or remove it")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARK).touch()


def require_same_dataset(ours: Path, prefix: str, theirs: Path, their_prefix: str) -> None:
    """Raises `UserError` where one of the six files differs."""
    for field, suffix in itertools.product(FIELDS, ("bin", "idx")):
        our, their = field_path(ours, prefix, field, suffix), field_path(theirs, their_prefix, field, suffix)
        if our.read_bytes() != their.read_bytes():
            raise UserError(f"differs from {their}", where=our, remedy="this is a bug here: report it")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def require_close(what: str, found: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the largest relative difference; raises `UserError` if a loss is too far off, or one is missing."""
    differences = [abs(one - other) / other for one, other in zip(found, reference)]
    close = [difference <= (LAST if number else FIRST) for number, difference in enumerate(differences)]
    if len(found) != len(reference) or not all(close):
        raise UserError(f"{what}: losses {_shown(found)}, expected {_shown(reference)}", remedy="report it")
    return max(differences)


def _shown(values: Sequence[float]) -> str:
    return f"{values[0]:.6f} … {values[-1]:.6f}" if values else "none"
