"""Stages as processes of their own, with a model that takes a while to write; tests stop them on the way."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import torch

from checkpoint_files import hf_sizes, random_checkpoint, set_config, write_hf
from conftest import PATIENCE, ROOT, TINY
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from refusals import without_progress

LARGER = [
    "model.num_layers=4",
    "model.hidden_size=512",
    "model.ffn_hidden_size=1024",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.kv_channels=64",
    "model.vocab_size=32768",
]
"""52 MB in bf16; 70 MB in TP 2, PP 2, where the last stage has a copy of the embedding."""
TP2_PP2 = ["train.engine=mindspeed", "parallel.devices_per_node=4", "parallel.tensor=2", "parallel.pipeline=2"]


def larger_base(directory: Path, tiny_hf: Path) -> Path:
    """A Hugging Face checkpoint of that size, in three files."""
    recipe = load_recipe(ROOT / "recipes/demo.yaml", [*TINY, *LARGER])
    write_hf(directory, tiny_hf, random_checkpoint(recipe.model, lambda name: torch.bfloat16), shards=3)
    set_config(directory, **hf_sizes(recipe.model), torch_dtype="bfloat16")
    return directory


class Stage:
    """A stage's command line.

    Args:
        name: of the command.
        overrides: of the demo's recipe.
        options: of the command.
    """

    def __init__(self, name: str, overrides: list[str], *options: object) -> None:
        self.recipe: Recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides)
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "openpangu_sft", name, "--recipe", str(ROOT / "recipes/demo.yaml")]
        self.command = [*command, *sets, *map(str, options)]

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """Starts it."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(self.command, text=True, **{**pipes, **options})

    def run(self, limit: str = "") -> subprocess.CompletedProcess[str]:
        """Runs it to its end.

        Args:
            limit: what the shell sets before it, as `ulimit -f 100`.
        """
        command = ["bash", "-c", f'{limit}; exec "$@"', "bash", *self.command] if limit else self.command
        return subprocess.run(command, text=True, capture_output=True, timeout=PATIENCE)

    def refusal(self, limit: str = "") -> str:
        """What it says, in one line, where it ends with exit code 1."""
        ran = self.run(limit)
        assert ran.returncode == 1, ran.stderr
        [line] = without_progress(ran.stderr).splitlines()
        assert line.startswith("openpangu-sft: ")
        return line[len("openpangu-sft: ") :]


def stopped_while_writing(
    stage: Stage, target: Path, least: float, most: float = math.inf, earlier: Optional[Path] = None
) -> subprocess.Popen[str]:
    """Starts a stage and halts it (SIGSTOP) with its result half-written; where that comes too late, again.

    Args:
        stage: what writes `target`.
        target: the result, not in place yet.
        least: bytes that are to be written by then.
        most: bytes that may be.
        earlier: a copy of the result that was there before.
    """
    staging = target.parent / f".{target.name}.staging"
    for _ in range(20):
        process = stage.start()
        while process.poll() is None and not (staging.is_dir() and bytes_below(staging) >= least):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if process.poll() is None and staging.is_dir() and least <= bytes_below(staging) <= most:
            return process
        process.send_signal(signal.SIGCONT)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        shutil.rmtree(target)
        if earlier:
            shutil.copytree(earlier, target)
    raise AssertionError("always too late")


def sums(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def bytes_below(directory: Path) -> int:
    """Size of all files; 0 where something goes away while it is counted."""
    try:
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except FileNotFoundError:
        return 0
