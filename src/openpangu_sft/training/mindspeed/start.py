"""Stage sft with the mindspeed engine: checks the machine, prepares the run's directory and starts MindSpeed-LLM."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, only_one_run, read_manifest, write_manifest
from openpangu_sft.artifacts.checks import require_room
from openpangu_sft.checkpoint.files.torch_read import is_whole
from openpangu_sft.checkpoint.mcore import OPTIMIZER_FILE, iteration_directory, rank_file
from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.dataset.index_file import PREFIX, VALIDATION
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.remote_code import classes_of, may_run
from openpangu_sft.training.mindspeed.flags import training_flags
from openpangu_sft.training.mindspeed.process import Command, Training
from openpangu_sft.training.mindspeed.sources import ROOT, SOURCES, STAND_IN, require_ready
from openpangu_sft.training.run.launch import torchrun_options, worker_environment
from openpangu_sft.training.run.provenance import record_start
from openpangu_sft.training.run.retention import bytes_at_start, newest_whole, nothing_to_do
from openpangu_sft.util.ascend import VARIABLE, visible
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError

ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "HCCL_CONNECT_TIMEOUT": "1200"}
"""As in the published script: Megatron-LM requires the first; loading takes longer than HCCL's default of 120 s."""


def run_mindspeed(recipe: Recipe, manifest: Manifest, command_line: Sequence[str], planned: int = 0) -> None:
    """Trains, or resumes a run; raises `UserError` where this machine lacks something, or training failed.

    The inputs in the run's manifest have been checked. `command_line` repeats this call; it is recorded in the run.
    `planned` are the peak bytes of tensors on a device; 0 if they are not known.
    """
    run, sources, base = recipe.path("run"), require_ready(SOURCES), recipe.path("hf")
    if not may_run(base, recipe.tokenizer.trust_remote_code) and classes_of(base):
        remedy = "read them, then set tokenizer.trust_remote_code"
        raise UserError("MindSpeed-LLM runs the Python files here", where=base, remedy=remedy)
    require_devices(recipe)
    require_network(os.environ)
    dataset = read_manifest(recipe.path("dataset"), "dataset", "run make merge")
    run.mkdir(parents=True, exist_ok=True)
    # with several nodes, which share the run, each one's part of it is locked
    locked = run if recipe.parallel.nodes == 1 else run.with_name(f"{run.name}-node{os.environ.get('NODE_RANK')}")
    with only_one_run(locked):
        require_room(run, bytes_at_start(recipe))
        first = os.environ.get("NODE_RANK", "0") == "0"
        if not first:
            require_shared(run)
        elif not (run / MANIFEST).is_file():
            write_manifest(run, manifest)  # first of all: other nodes wait for it
        data = link_data(run, recipe.path("dataset"), dataset.digest)
        command, done = plan(recipe, sources, data, is_main=first)
        if words := nothing_to_do(recipe, done):
            say(words)
            return
        if done:
            say(f"resuming after iteration {done}")
        if first:
            record_start(recipe, manifest, done, command_line, sources)
        Training(recipe, dataset, done, planned).start(command)


def require_shared(run: Path, seconds: float = 300) -> None:
    """Waits at most so long for the manifest that the first node writes.

    Checkpoints are written by the first nodes only. Without a shared disk the others would silently start a new run
    where the first one resumes. Raises `UserError` where the first node has not started, or writes elsewhere.
    """
    last = time.monotonic() + seconds
    while not (run / MANIFEST).is_file():
        if time.monotonic() > last:
            remedy = "start it too (NODE_RANK=0), with paths.run on a disk that all nodes share"
            raise UserError(f"the first node has written nothing here for {seconds:.0f} s", where=run, remedy=remedy)
        time.sleep(min(1, seconds / 10))


def link_data(run: Path, dataset: Path, digest: str) -> Path:
    """Makes a folder with links to the packed files, in which upstream writes its shuffle index; returns --data-path.

    Upstream names the index by seed and number of samples only, and reuses an existing one. With one folder per
    content of the data it never reuses the index of other data.
    """
    folder = run / f"data-{digest[:16]}"
    for stale in run.glob("data-*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)  # several nodes may do so at once
    folder.mkdir(exist_ok=True)
    for file in (*dataset.glob(f"{PREFIX}_packed_*"), *dataset.glob(f"{VALIDATION}_packed_*")):
        with contextlib.suppress(FileExistsError):
            (folder / file.name).symlink_to(file)
    return folder / PREFIX


def newest_complete(recipe: Recipe, is_main: bool) -> Optional[int]:
    """The newest iteration of the run with all files of all ranks; see retention.newest_whole."""
    run, layout = recipe.path("run"), layout_of(recipe.model, recipe.parallel)

    def is_complete(iteration: int) -> bool:
        models = [iteration_directory(run, iteration) / rank_file(*rank, layout.pipeline) for rank in layout.ranks()]
        files = [*models, *(model.with_name(OPTIMIZER_FILE) for model in models)]
        return all(file.is_file() and is_whole(file) for file in files)

    return newest_whole(run, is_complete, is_main)


def plan(recipe: Recipe, sources: Path, data: Path, is_main: bool) -> tuple[Command, int]:
    """The command, and the iteration that it resumes after, or 0; for `is_main` see retention.newest_whole."""
    done = newest_complete(recipe, is_main) or 0
    flags = training_flags(recipe, data, resumed=bool(done))
    folder, environment = environment_of(recipe, sources)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *torchrun_options(recipe)]
    # Not in upstream's own folder: CANN's compiler leaves its files (kernel_meta) in the working directory.
    work = recipe.path("run") / "work"
    return Command([*torchrun, str(folder / "posttrain_gpt.py"), *flags], work, environment), done


def dry_run(recipe: Recipe) -> str:
    """Environment and command of a start as shell commands; writes nothing and needs no device."""
    return str(plan(recipe, SOURCES, recipe.path("run") / "data" / PREFIX, is_main=False)[0])


def environment_of(recipe: Recipe, sources: Path) -> tuple[Path, dict[str, str]]:
    """Upstream's folder, which has its commands, and the environment that they need."""
    paths = [sources / "mindspeed", sources / "mindspeed-llm", ROOT / "src"]
    if recipe.train.device == "cpu":
        paths.insert(0, STAND_IN)
    environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH")]))
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the sources stay unchanged
    return sources / "mindspeed-llm", {**environment, **worker_environment(recipe)}


def require_devices(recipe: Recipe, devices: Path = Path("/dev")) -> None:
    """Raises `UserError` where there are fewer NPUs than processes, or ASCEND_RT_VISIBLE_DEVICES hides too many."""
    if recipe.train.device == "cpu":
        return
    wanted = recipe.parallel.devices_per_node
    found = len(list(devices.glob("davinci[0-9]*")))
    if found < wanted:
        what = f"parallel.devices_per_node is {wanted}, and there are {found} NPUs here (/dev/davinci*)"
        remedy = "lower it, choose others with NPUS=, or set train.device=cpu for the stand-in, which is slow"
        raise UserError(what, remedy=remedy)
    shown = len(visible(os.environ, found))
    if shown < wanted:
        what = f"parallel.devices_per_node is {wanted}, and {os.environ[VARIABLE]!r} leaves {shown} of {found} NPUs"
        remedy = f"name as many, from 0 to {found - 1}, ascending, or lower parallel.devices_per_node"
        raise UserError(what, where=VARIABLE, remedy=remedy)


def require_network(environment: Mapping[str, str], interfaces: Path = Path("/sys/class/net")) -> None:
    """Raises `UserError` for a network interface that is not here: HCCL would time out with a misleading message."""
    found = sorted(path.name for path in interfaces.iterdir() if path.is_dir())
    hccl, gloo = environment.get("HCCL_SOCKET_IFNAME", ""), environment.get("GLOO_SOCKET_IFNAME", "")
    wrong = [] if not hccl or _hccl_takes(hccl, found) else [("HCCL_SOCKET_IFNAME", hccl)]
    if gloo:  # takes full names, and connects on each of them
        wrong += [("GLOO_SOCKET_IFNAME", name) for name in gloo.removesuffix(",").split(",") if name not in found]
    for variable, value in wrong:
        raise UserError(f"{value!r} is no network interface here", where=variable, remedy=f"one of {', '.join(found)}")


def _hccl_takes(value: str, found: Sequence[str]) -> list[str]:
    """The interfaces of which HCCL takes the first: by prefix, by full name after "=", all others after "^".

    As CANN 8.0 describes HCCL_SOCKET_IFNAME:
    https://www.hiascend.com/document/detail/zh/canncommercial/800/apiref/envvar/envref_07_0075.html
    """
    others, value = value.startswith("^"), value.removeprefix("^")
    exact, names = value.startswith("="), [name for name in value.removeprefix("=").split(",") if name]
    named = {one for one in found for name in names if (one == name if exact else one.startswith(name))}
    return [one for one in found if (one in named) != others]
