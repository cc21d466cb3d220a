"""Memory, shared memory, disk and input files against the recipe's minimum needs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Optional

from openpangu_sft.artifacts.artifact import require_no_obstacle
from openpangu_sft.checkpoint.checklist import CHECKLIST, check_published
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.doctor.machine import Context, Finding, failed, ok, skipped, warning
from openpangu_sft.plan.memory import total
from openpangu_sft.plan.transformers_memory import transformers_memory
from openpangu_sft.recipe.model_config import CONFIG, model_of, read_config
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.retention import bytes_at_start
from openpangu_sft.util.errors import UserError

SMALL_SHM = 1 << 30  # Docker's default is 64 MB; the real need was not measured
WRITTEN = ("samples", "shards", "dataset", "mcore", "run", "export")
STAGED = ("samples", "dataset", "mcore", "export")  # made beside their target and renamed: artifact.staged_directory
HIERARCHIES = (
    ("/sys/fs/cgroup", "", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Control groups v2, and v1 for memory: mount, controller, files of limit and use. See cgroups(7)."""


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def memory(context: Context) -> Finding:
    """Available main memory, within the limits of this process's control groups: a container, Slurm job or service."""
    machine, needed = context.machine, memory_bytes(context.recipe)
    known = re.search(r"^MemAvailable:\s+([0-9]{1,15}) kB$", machine.read("/proc/meminfo") or "", re.MULTILINE)
    if not known:
        return skipped("not known: /proc/meminfo does not say it")
    available, source, groups = int(known[1]) * 1024, "available", machine.read("/proc/self/cgroup")
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
    in_memory = context.recipe.train.engine == "transformers" and context.recipe.train.device != "cuda"
    return (failed if in_memory else warning)(found, remedy, expected)


def control_groups(cgroup: Optional[str], controller: str) -> list[str]:
    """A process's control group and its ancestors, as paths below their mount, the deepest first.

    Only `/` where the path leads out of the mount (/../x), as in a container whose namespace begins lower. `cgroup` is
    /proc/self/cgroup, see cgroups(7): lines of hierarchy:controllers:path. The controller is empty for v2, which has
    one hierarchy for all.
    """
    group = PurePosixPath("/")
    for controllers, path in re.findall(r"^[^:\n]*:([^:\n]*):/+(.*)$", cgroup or "", re.MULTILINE):
        if controller in controllers.split(","):
            group = PurePosixPath("/", path)
    if ".." in group.parts:
        group = PurePosixPath("/")
    return [str(each) for each in (group, *group.parents)]


def inactive_file(stat: Optional[str]) -> int:
    """Bytes of cached files that a control group and its descendants can release, from its memory.stat.

    v1 counts descendants in total_inactive_file only; v2 has inactive_file, which includes them.
    """
    found = dict(re.findall(r"^((?:total_)?inactive_file) ([0-9]{1,18})$", stat or "", re.MULTILINE))
    return int(found.get("total_inactive_file") or found.get("inactive_file") or 0)


def limit(text: Optional[str]) -> Optional[int]:
    """Bytes of a control group's file; None for max, a missing file, and v1's value for “unlimited”."""
    number = re.fullmatch(r"([0-9]{1,20})\s*", text or "")
    return int(number[1]) if number and int(number[1]) < 1 << 60 else None


def shared_memory(context: Context) -> Finding:
    """/dev/shm, through which the processes of a run exchange data."""
    if context.recipe.parallel.devices_per_node == 1:
        return skipped("not needed: one process (parallel.devices_per_node)")
    shm = context.machine.path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    if size < SMALL_SHM:
        remedy = "give the container more: --ipc=host (as make does), or --shm-size=16g"
        return warning(f"/dev/shm has {gb(size)}", remedy, gb(SMALL_SHM))
    return ok(f"/dev/shm has {gb(size)}")


def disk(context: Context) -> Finding:
    """Free space by disk, and write permission, for every path that the recipe writes to."""
    recipe, needed = context.recipe, disk_bytes(context.recipe)
    if closed := [refusal for name in WRITTEN for refusal in _refusals(name, recipe.path(name))]:
        remedy = "; ".join(dict.fromkeys(refusal.remedy for refusal in closed))
        return failed("\n".join(f"{refusal.where} {refusal.what}" for refusal in closed), remedy)
    disks: dict[int, list[str]] = {}
    for name in WRITTEN:
        disks.setdefault(_existing(recipe.path(name)).stat().st_dev, []).append(name)
    lines, full = [], []
    for names in disks.values():
        place = _existing(recipe.path(names[0]))
        free, need = shutil.disk_usage(place).free, sum(needed.get(name, 0) for name in names)
        parts = ", ".join(f"{name} {gb(needed[name])}" for name in names if name in needed)
        lines.append(f"{place}: {gb(free)} free for {', '.join(names)}")
        if free < need:
            full.append(f"{gb(need)} ({parts})")
    found = "\n".join(lines)
    if full:
        return failed(found, "free some space, or set paths.cache to another disk", ", ".join(full))
    if context.in_container and context.machine.path("/").stat().st_dev in disks:
        remedy = "mount a folder of the host there: CACHE=/data/cache, or docker run -v"
        return warning(f"{found}\nin the container's own layer, which is removed with the container", remedy)
    return ok(f"{found}; {gb(sum(needed.values()))} needed, the data not counted")


def inputs(context: Context) -> Finding:
    """Inputs of the first stages, and whether config.json is of this model family."""
    recipe, missing = context.recipe, []
    hf = recipe.path("hf")
    if not (hf / CONFIG).is_file():
        missing.append(f"paths.hf: no checkpoint in {hf}")
    raw = [recipe.paths.under_cache(source.path) for source in recipe.data.sources] or [recipe.path("raw")]
    absent = [path for path in raw if not path.exists()]
    made = recipe.path("samples") if absent else raw[0]
    if not made.exists():
        key = "data.sources" if recipe.data.sources else "paths.raw"
        missing.append(f"{key}: no conversations in {absent[0]}")
    if missing:
        remedy = "put them there before make format and make convert (make demo makes its own)"
        return warning("\n".join(missing), remedy)
    model_of(read_config(hf), hf / CONFIG)
    return ok(f"{hf}, {made}")


def published(context: Context) -> Finding:
    """Whether the checkpoint matches the vendor's sums beside it; reads the weights once."""
    found = check_published(context.recipe, context.recipe.path("hf"), bar=False)
    if not found.files:
        return skipped(f"not known: no sums beside the checkpoint ({CHECKLIST})")
    if any(found.differing.values()):
        return warning(str(found), "download it again, unless it was changed on purpose")
    return ok(str(found))


def _refusals(name: str, path: Path) -> Iterator[UserError]:
    if name in STAGED:
        try:
            require_no_obstacle(path)
        except UserError as error:
            yield UserError(error.what, where=f"paths.{name}: {error.where}", remedy=error.remedy)
    # locks and staging directories are in the parent
    folders = {"shards": [path], "run": [path, path.parent]}.get(name, [path.parent])
    for folder in dict.fromkeys(map(_existing, folders)):
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "is not a directory that this user may write to"
            remedy = "create it and give it to this user, or set paths.cache"
            yield UserError(what, where=f"paths.{name}: {folder}", remedy=remedy)


def _existing(path: Path) -> Path:
    """The deepest existing ancestor."""
    return next(place for place in (path, *path.parents) if place.exists())


def weight_bytes(recipe: Recipe) -> int:
    """In the precision that training writes."""
    return parameter_count(recipe.model, recipe.train.lora.adapter) * (2 if recipe.train.precision == "bf16" else 4)


def memory_bytes(recipe: Recipe) -> int:
    """Main memory of one machine when training starts and saves.

    The portable engine keeps fp32 weights, gradients and moments in each process, on a CPU all in main memory; with a
    GPU the weights pass through it. MindSpeed-LLM reads each process's weights to the CPU (torch.load with
    map_location='cpu' in Megatron's checkpointing.py) and gathers the optimizer there once to save it
    (get_parameter_state in distrib_optimizer.py).
    """
    parallel = recipe.parallel
    if recipe.train.engine == "transformers":
        held = transformers_memory(recipe).static  # the weights first
        return total(held[:1] if recipe.train.device == "cuda" else held) * parallel.devices_per_node
    optimizer = parameter_count(recipe.model, recipe.train.lora.adapter, trained=True) * 12  # as in a checkpoint
    return weight_bytes(recipe) * parallel.devices_per_node // (parallel.tensor * parallel.pipeline) + optimizer


def disk_bytes(recipe: Recipe) -> dict[str, int]:
    """Space for what is still to be written, by path: conversions, and the checkpoints that sft asks for before it
    starts. Datasets are not included.
    """
    needed = {"run": bytes_at_start(recipe)}
    for name in ("mcore", "export"):
        if not recipe.path(name).exists():
            needed[name] = weight_bytes(recipe)
    return needed
