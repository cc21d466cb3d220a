"""Logits of a Megatron-core checkpoint as the real megatron-core 0.6.0 computes them, on CPU, for any TP and PP.

The code is that of training where `make sources` has put it, as in the npu image; else PyPI's with the same patches.
Each rank is a process of its own (rank.py); they talk over the loopback interface.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.mcore import rank_file
from openpangu_sft.training.mindspeed.sources import SOURCES, require_pinned
from openpangu_sft.util.errors import UserError
from openpangu_sft.util.git import apply_patch, require_git
from openpangu_sft.util.signals import end_with_parent

VERSION = "0.6.0"
PATCHES = Path(__file__).parents[3] / "patches" / "megatron-lm"

REFUSED = 3  # exit code of a rank where the checkpoint is at fault
_RANK = "openpangu_sft.verify.rank"
_WHEELS = "run make sources, which works everywhere; PyPI has wheels for CPython 3.10 and 3.11 on x86-64 only"


def copy_core(folder: Path) -> None:
    """Copies the installed megatron-core to a folder, as `megatron/core`; `UserError` if there is none or not 0.6.0."""
    try:
        installed = metadata.distribution("megatron-core")
    except metadata.PackageNotFoundError:
        raise UserError(f"megatron-core {VERSION} is not installed", remedy=_WHEELS) from None
    if installed.version != VERSION:
        what = f"megatron-core is {installed.version}, the patches are for {VERSION}"
        raise UserError(what, remedy="run make setup again")
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(str(installed.locate_file("megatron/core")), folder / "megatron/core", ignore=without)


def find_core(scratch: Path) -> Path:
    """A folder with a patched `megatron/core`: that of the upstream sources, or one made in scratch.

    Raises `UserError` where the sources are of other pins, or there are none and megatron-core is not installed.
    """
    if (SOURCES / MANIFEST).is_file():
        require_pinned(SOURCES)
        return SOURCES / "mindspeed-llm"
    (scratch / "core").mkdir()
    return patched_core(scratch / "core")


def patched_core(folder: Path) -> Path:
    """Puts PyPI's megatron-core, with the patches that training applies to Megatron-LM, into an empty folder.

    Raises `UserError` where megatron-core or git is not installed, or a patch does not apply.
    """
    patches = sorted(PATCHES.glob("*.patch"))
    if not patches:
        raise UserError("no patches for Megatron-LM here", where=PATCHES, remedy="run from a clone of this project")
    require_git("applies the patches to megatron-core")
    copy_core(folder)
    for patch in patches:
        apply_patch(folder, patch, f"megatron-core {VERSION}", "check out the file again, and run make setup")
    return folder


def file_of(iteration_directory: Path, rank: int, tensor: int, pipeline: int) -> Path:
    """The file of one of the TP x PP ranks; tensor ranks of one pipeline stage are neighbours."""
    return iteration_directory / rank_file(rank % tensor, rank // tensor, pipeline)


def megatron_logits(
    iteration_directory: Path,
    prompts: list[list[int]],
    dtype: Literal["fp32", "bf16"],
    vocab_size: int,
    tensor: int,
    pipeline: int,
    core: Optional[Path] = None,
) -> list[npt.NDArray[np.float32]]:
    """Loads a checkpoint strictly, as training does, and computes the logits of prompts in TP x PP processes.

    Args:
        iteration_directory: holds mp_rank_… for each rank.
        prompts: token ids of each, at least one.
        dtype: of weights and computation, whatever the checkpoint has.
        vocab_size: without the padding rows of the checkpoint.
        core: a folder from find_core, by default found here.

    Returns fp32 [tokens, vocab_size] for each prompt. Raises `UserError` where the checkpoint is not one that training
    would load, what runs it is not installed, or memory ran out.
    """
    for rank in range(tensor * pipeline):
        if not (path := file_of(iteration_directory, rank, tensor, pipeline)).is_file():
            raise UserError("no such file", where=path, remedy=f"is it a checkpoint for TP {tensor}, PP {pipeline}?")
    with tempfile.TemporaryDirectory(prefix="megatron-") as name:
        scratch = Path(name)
        job = {
            "core": str(core or find_core(scratch)),
            "checkpoint": str(iteration_directory),
            "prompts": prompts,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "tensor": tensor,
            "pipeline": pipeline,
        }
        (scratch / "job.json").write_text(json.dumps(job), "utf-8")
        run_together([[sys.executable, "-m", _RANK, name, str(rank)] for rank in range(tensor * pipeline)], scratch)
        with np.load(scratch / "result.npz") as result:
            return [result[f"arr_{number}"] for number in range(len(prompts))]


def run_together(commands: list[list[str]], scratch: Path) -> None:
    """Runs programs together, their output in `scratch`; when one fails, all are ended.

    Raises `UserError` where one of them refused the checkpoint or was killed, else `RuntimeError` with its output.
    """
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // len(commands))),
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",  # the sources stay as they were made
        "PYTORCH_JIT": "0",  # Megatron-core would compile at import, which takes longer than it saves
        "GLOO_SOCKET_IFNAME": "lo",  # the host's name need not resolve
    }
    processes: list[subprocess.Popen[bytes]] = []
    outputs = [scratch / f"rank{rank}.txt" for rank in range(len(commands))]
    try:
        for command, output in zip(commands, outputs):
            with output.open("wb") as stream:
                started = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=environment,
                    preexec_fn=end_with_parent,
                )
                processes.append(started)
        codes = _wait(processes)
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.wait()
    # One failure is followed by those of the ranks that wait for it: the first cause is reported.
    for code, output in zip(codes, outputs):
        if code == REFUSED:
            raise UserError(_text(output).splitlines()[-1])
    if -signal.SIGKILL in codes:
        remedy = "provide more memory: each weight is held twice while it loads"
        raise UserError("a process of megatron-core was killed", remedy=remedy)
    failed = [_text(output) for code, output in zip(codes, outputs) if code]
    if failed:
        raise RuntimeError("a rank of megatron-core failed:\n" + "\n".join(failed))


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[Optional[int]]:
    """Waits until all have ended well or one has failed; returns exit codes, None of those that still run."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return codes
        time.sleep(0.02)


def _text(output: Path) -> str:
    return output.read_text("utf-8", errors="replace").strip()
