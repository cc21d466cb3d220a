"""Memory, shared memory, disk and limits of this machine against what the recipe needs at least."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from openpangu_sft.artifacts.artifact import require_no_obstacle
from openpangu_sft.checkpoint.checklist import CHECKLIST, check_published
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.doctor.finding import Finding, failed, ok, skipped, warning
from openpangu_sft.doctor.machine import Context
from openpangu_sft.doctor.npu_smi import Mount, control_groups, inactive_file, limit, memory_available, mount_of
from openpangu_sft.recipe.model_config import CONFIG, model_of, read_config
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import bytes_at_start
from openpangu_sft.util.errors import UserError

SMALL_SHM = 1 << 30
"""Docker gives 64 MB unless it is told otherwise; what is really needed has not been measured."""
FEW_FILES = 4096
"""The usual soft limit is 1024. Each process has the dataset, libraries and a connection to every other one open."""
WRITTEN = ("samples", "shards", "dataset", "mcore", "run", "export")
STAGED = ("samples", "dataset", "mcore", "export")
"""Those that are made beside their place and renamed, see artifact.staged_directory."""
OWN_LAYER = ("overlay", "aufs")
HIERARCHIES = (
    ("/sys/fs/cgroup", "", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Of control groups, v2's and v1's for memory: where it is mounted, its controller, limit and use. See cgroups(7)."""
LOCAL = ("ext4", "ext3", "xfs", "btrfs", "overlay", "aufs", "tmpfs", "zfs")


def gb(size: float) -> str:
    """A size in GB, or in MB where that says more."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def memory(subject: Context) -> Finding:
    """Main memory that is available, also to this process's control groups: a container, a Slurm job, a service."""
    machine, needed = subject.machine, memory_bytes(subject.recipe)
    available = memory_available(machine.read("/proc/meminfo") or "")
    if available is None:
        return skipped("not known: /proc/meminfo does not say it")
    source, groups = "available", machine.read("/proc/self/cgroup")
    for mount, controller, top, now in HIERARCHIES:
        for group in control_groups(groups, controller):
            folder = f"{mount}{group.rstrip('/')}"
            most = limit(machine.read(f"{folder}/{top}"))
            if most is None:
                continue
            cached = inactive_file(machine.read(f"{folder}/memory.stat"))
            left = most - max((limit(machine.read(f"{folder}/{now}")) or 0) - cached, 0)
            if left < available:
                available, source = left, f"left in the limit of control group {folder}"
    found, expected = f"{gb(available)} {source}", f"{gb(needed)} at least"
    remedy = "end other programs, or raise the limit of this container or job"
    if available >= needed:
        return ok(f"{found}; {expected} needed")
    in_memory = subject.recipe.train.engine == "transformers" and subject.recipe.train.device != "cuda"
    return (failed if in_memory else warning)(found, remedy, expected)


def shared_memory(subject: Context) -> Finding:
    """/dev/shm, through which the processes of a run hand each other data."""
    if subject.recipe.parallel.devices_per_node == 1:
        return skipped("not needed: one process (parallel.devices_per_node)")
    shm = subject.machine.path("/dev/shm")
    if not shm.is_dir():
        return failed("no /dev/shm", "mount a tmpfs there", gb(SMALL_SHM))
    size = shutil.disk_usage(shm).total
    if size < SMALL_SHM:
        remedy = "give the container more: --ipc=host (as make does), or --shm-size=16g"
        return warning(f"/dev/shm has {gb(size)}", remedy, gb(SMALL_SHM))
    return ok(f"/dev/shm has {gb(size)}")


def disk(subject: Context) -> Finding:
    """Free room and the right to write, for every path of the recipe that is written to, disk by disk."""
    recipe, needed = subject.recipe, disk_bytes(subject.recipe)
    mounts = subject.machine.read("/proc/self/mountinfo") or ""
    closed = [refusal for name in WRITTEN for refusal in _refusals(name, recipe.path(name))]
    if closed:
        remedy = "; ".join(dict.fromkeys(refusal.remedy for refusal in closed))
        return failed("\n".join(f"{refusal.where} {refusal.what}" for refusal in closed), remedy)
    disks: dict[int, list[str]] = {}
    for name in WRITTEN:
        disks.setdefault(_existing(recipe.path(name)).stat().st_dev, []).append(name)
    lines, full, lost, local = [], [], [], []
    for names in disks.values():
        place = _existing(recipe.path(names[0]))
        mount = mount_of(Path(os.path.realpath(place)), mounts) or Mount(str(place), "a disk")
        free, need = shutil.disk_usage(place).free, sum(needed.get(name, 0) for name in names)
        parts = ", ".join(f"{name} {gb(needed[name])}" for name in names if name in needed)
        lines.append(f"{mount.point} ({mount.kind}): {gb(free)} free for {', '.join(names)}")
        if free < need:
            full.append(f"{gb(need)} ({parts})")
        lost += names if subject.in_container and mount.kind in OWN_LAYER else []
        local += [mount.kind] if "run" in names and mount.kind in LOCAL else []
    found = "\n".join(lines)
    if full:
        return failed(found, "free some space, or set paths.cache to another disk", ", ".join(full))
    if lost:
        remedy = "mount a folder of the host there: CACHE=/data/cache, or docker run -v"
        return warning(f"{found}\nin the container's own layer, which goes with the container", remedy)
    if local and recipe.parallel.nodes > 1:
        return warning(found, "paths.run and paths.mcore must be on a disk that all machines share", "a shared disk")
    return ok(f"{found}; {gb(sum(needed.values()))} needed, the data not counted")


def limits(subject: Context) -> Finding:
    """ulimit: the size of a file, and how many may be open."""
    largest = largest_file(subject.recipe)
    size, files = resource.getrlimit(resource.RLIMIT_FSIZE)[0], resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if size != resource.RLIM_INFINITY and size < largest:
        return failed(f"files up to {gb(size)} (ulimit -f)", "ulimit -f unlimited", gb(largest))
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        return warning(f"{files:,} open files (ulimit -n)", f"ulimit -n {FEW_FILES * 16}", f"{FEW_FILES:,}")
    return ok(f"{'any number of' if files == resource.RLIM_INFINITY else f'{files:,}'} open files, files of any size")


def inputs(subject: Context) -> Finding:
    """Whether what the first stages read is there, and config.json is of this model family."""
    missing = []
    if not (subject.recipe.path("hf") / "config.json").is_file():
        missing.append(f"paths.hf: no checkpoint in {subject.recipe.path('hf')}")
    made: Optional[Path] = next((path for path in map(subject.recipe.path, ("raw", "samples")) if path.exists()), None)
    if made is None:
        missing.append(f"paths.raw: no conversations in {subject.recipe.path('raw')}")
    if missing:
        return warning(
            "\n".join(missing), "put them there before make format and make convert (make demo makes its own)"
        )
    model_of(read_config(subject.recipe.path("hf")), subject.recipe.path("hf") / CONFIG)
    return ok(f"{subject.recipe.path('hf')}, {made}")


def published(subject: Context) -> Finding:
    """Whether the checkpoint is as it was published, by the sums beside it; takes seconds once, for its weights."""
    found = check_published(subject.recipe, subject.recipe.path("hf"), bar=False)
    if not found.files:
        return skipped(f"not known: no sums beside the checkpoint ({CHECKLIST})")
    if any(found.differing.values()):
        return warning(str(found), "download it again, unless it was changed on purpose")
    return ok(str(found))


def _refusals(name: str, path: Path) -> Iterator[UserError]:
    """Why a path could not be written to."""
    if name in STAGED:
        try:
            require_no_obstacle(path)
        except UserError as error:
            yield UserError(error.what, where=f"paths.{name}: {error.where}", remedy=error.remedy)
    # locks lie in the parent, as what is staged does
    folders = {"shards": [path], "run": [path, path.parent]}.get(name, [path.parent])
    for folder in dict.fromkeys(map(_existing, folders)):
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "is no directory that this user may write to"
            remedy = "make it and give it to this user, or set paths.cache"
            yield UserError(what, where=f"paths.{name}: {folder}", remedy=remedy)


def _existing(path: Path) -> Path:
    """The deepest folder of a path that is there."""
    while not path.exists():
        path = path.parent
    return path


CODE = Path(__file__).parents[1]
SECONDS = 5.0
DAY = 86400.0


def clock(subject: Context) -> Finding:
    """The time against that of this code's own files, and whether systemd says that it is kept by NTP."""
    now = time.time()
    newest = max(file.stat().st_mtime for file in CODE.rglob("*.py"))
    shown = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now))
    if now < newest - DAY:
        made = time.strftime("%Y-%m-%d", time.localtime(newest))
        return failed(f"{shown}, and this code's files are of {made}", "set the clock", "a time after that")
    program = subject.machine.program("timedatectl")
    ran = subject.machine.run(program, "show", "-p", "NTPSynchronized", "--value", seconds=SECONDS) if program else None
    answer = ran.text.strip() if ran and not ran.problem else ""
    if answer == "no" and subject.recipe.parallel.nodes > 1:
        return warning(f"{shown}, not kept by NTP", "timedatectl set-ntp true, on every machine", "one time everywhere")
    kept = {"yes": "kept by NTP", "no": "not kept by NTP"}.get(answer, "whether NTP keeps it is not known here")
    return ok(f"{shown}; {kept}")


OPTIMIZER_BYTES = 12
"""Of a parameter: its fp32 value and Adam's two moments, as in checkpoint_bytes."""


def weight_bytes(recipe: Recipe) -> int:
    """Size of the weights in the precision that training writes."""
    return parameter_count(recipe.model) * (2 if recipe.train.precision == "bf16" else 4)


def memory_bytes(recipe: Recipe) -> int:
    """Main memory of one machine when training starts and saves.

    The portable engine has fp32 weights, gradients and moments in each process, on CPU all in main memory; on a GPU
    the weights pass through it. MindSpeed-LLM reads each process's weights to the CPU (torch.load with
    map_location='cpu' in Megatron's checkpointing.py) and gathers the optimizer there once to save it
    (get_parameter_state in distrib_optimizer.py).
    """
    parallel, parameters = recipe.parallel, parameter_count(recipe.model)
    if recipe.train.engine == "transformers":
        each = 4 if recipe.train.device == "cuda" else 4 + OPTIMIZER_BYTES
        return parameters * each * parallel.devices_per_node
    split = parallel.tensor * parallel.pipeline
    return weight_bytes(recipe) * parallel.devices_per_node // split + parameters * OPTIMIZER_BYTES


def largest_file(recipe: Recipe) -> int:
    """The optimizer's file of one part of the model."""
    return parameter_count(recipe.model) * OPTIMIZER_BYTES // (recipe.parallel.tensor * recipe.parallel.pipeline)


def disk_bytes(recipe: Recipe) -> dict[str, int]:
    """Room for what is still to be written, by the name of its path: conversions, and as many checkpoints as
    stage sft asks for before it starts. What depends on the data is not in it.
    """
    needed = {"run": bytes_at_start(recipe)}
    for name in ("mcore", "export"):
        if not recipe.path(name).exists():
            needed[name] = weight_bytes(recipe)
    return needed
