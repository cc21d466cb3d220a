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
from typing import Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.files.arrays import DTYPES, DType
from openpangu_sft.checkpoint.mcore import FIRST, arguments, rank_file
from openpangu_sft.checkpoint.sharding import Layout
from openpangu_sft.model.tensors import Precision
from openpangu_sft.recipe.sections import Model
from openpangu_sft.training.mindspeed.sources import PATCHES, SOURCES, read_pins, require_pinned
from openpangu_sft.util.errors import UserError
from openpangu_sft.util.git import apply_patch, require_git
from openpangu_sft.util.signals import end_with_parent

VERSION = "0.6.0"
REFUSED = 3  # exit code of a rank where the checkpoint is at fault
_RANK = "openpangu_sft.verify.rank"
_WHEELS = "run make sources, which works everywhere; PyPI has wheels for CPython 3.10 and 3.11 on x86-64 only"


def find_core(folder: Path) -> Path:
    """A folder with the `megatron/core` of training: in the upstream sources, or else `folder`, to which PyPI's package
    is copied and patched.

    Raises `UserError` where the sources are of other pins, megatron-core, git or the patches are not here, or a patch
    does not apply.
    """
    if (SOURCES / MANIFEST).is_file():
        require_pinned(SOURCES)
        return SOURCES / "mindspeed-llm"
    pinned = [PATCHES / patch for patch in read_pins()["megatron-lm"].patches]
    patches = [path for path in pinned if "a/megatron/core/" in path.read_text("utf-8")]  # PyPI's has no more than core
    require_git("applies the patches to megatron-core")
    try:
        installed = metadata.distribution("megatron-core").locate_file("megatron/core")
    except metadata.PackageNotFoundError:
        raise UserError(f"megatron-core {VERSION} is not installed", remedy=_WHEELS) from None
    shutil.copytree(str(installed), folder / "megatron/core", ignore=shutil.ignore_patterns("__pycache__"))
    for patch in patches:
        apply_patch(folder, patch, f"megatron-core {VERSION}", "check out the file again, and run make setup")
    return folder


def megatron_logits(
    iteration_directory: Path,
    prompts: list[list[int]],
    precision: Precision,
    model: Model,
    layout: Layout,
    rounded: Optional[DType] = None,
    core: Optional[Path] = None,
) -> list[npt.NDArray[np.float32]]:
    """Loads a checkpoint strictly, as training does, and computes the logits of prompts in TP x PP processes.

    Args:
        iteration_directory: holds mp_rank_… for each rank.
        prompts: token ids of each, at least one.
        precision: of weights and computation, whatever the checkpoint has.
        model: the sizes, which training takes from the recipe too.
        rounded: a dtype to which the weights are rounded first.
        core: a folder from find_core, by default found here.

    Returns fp32 [tokens, vocab_size] for each prompt, without the padding rows of the vocabulary. Raises `UserError`
    where the checkpoint is not one that training would load, what runs it is not installed, or memory ran out.
    """
    ranks = list(layout.ranks())
    with tempfile.TemporaryDirectory(prefix="megatron-") as name:
        scratch = Path(name)
        job = {
            "core": str(core or find_core(scratch / "core")),
            "files": [str(iteration_directory / rank_file(*rank, layout.pipeline)) for rank in ranks],
            "prompts": prompts,
            "precision": precision,
            "arguments": vars(arguments(model, layout, DTYPES[precision], FIRST)),
            "stages": layout.stages,
            "vocab_size": model.vocab_size,
            "rounded": str(rounded or DTYPES[precision]),
        }
        (scratch / "job.json").write_text(json.dumps(job, default=str), "utf-8")
        run_together([[sys.executable, "-m", _RANK, name, str(rank)] for rank in range(len(ranks))], scratch)
        with np.load(scratch / "result.npz") as result:
            return [result[f"arr_{number}"] for number in range(len(prompts))]


def run_together(commands: list[list[str]], scratch: Path) -> None:
    """Runs programs together, their output in `scratch`; when one fails, all are ended.

    Raises `UserError` where one of them refused the checkpoint or was killed, else `RuntimeError` with its output.
    """
    cores = len(os.sched_getaffinity(0))
    env = {
        "OMP_NUM_THREADS": str(max(1, cores // len(commands))),
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",  # the sources stay as they were made
        "PYTORCH_JIT": "0",  # Megatron-core would compile at import, which takes longer than it saves
        "GLOO_SOCKET_IFNAME": "lo",  # the host's name need not resolve
    }
    processes: list[subprocess.Popen[bytes]] = []
    outputs = [scratch / f"rank{rank}.txt" for rank in range(len(commands))]
    codes: list[Optional[int]] = [None]
    try:
        for command, output in zip(commands, outputs):
            with output.open("wb") as stream:
                started = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=env, preexec_fn=end_with_parent
                )
                processes.append(started)
        while None in codes and not any(codes):  # until all have ended well or one has failed
            time.sleep(0.02)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.wait()
    # One failure is followed by those of the ranks that wait for it: the first cause is reported.
    failed = [(code, path.read_text("utf-8", errors="replace").strip()) for code, path in zip(codes, outputs) if code]
    for code, text in failed:
        if code == REFUSED:
            raise UserError(text.splitlines()[-1])
    if -signal.SIGKILL in codes:
        remedy = "provide more memory: each weight is held twice while it loads"
        raise UserError("a process of megatron-core was killed", remedy=remedy)
    if failed:
        raise RuntimeError("a rank of megatron-core failed:\n" + "\n".join(text for _, text in failed))
