"""The NPUs: number, health, processes and memory, and this user's access to their device files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Union

from openpangu_sft.doctor.machine import Context, Finding, failed, ok, skipped, warning
from openpangu_sft.doctor.npu_smi import Chip, Process
from openpangu_sft.plan.choose import all_splits, ranking
from openpangu_sft.plan.estimate import memory_of
from openpangu_sft.plan.memory import GIB
from openpangu_sft.plan.show import advice
from openpangu_sft.recipe.schema import complaints
from openpangu_sft.training.run.provenance import IMAGE as IN_CONTAINER_OF_MAKE
from openpangu_sft.util.ascend import VARIABLE

FEW = "give the container more of them (NPUS=), or lower parallel.devices_per_node"
IDLE_MB = 8192  # memory in use on an idle NPU is below this: 2.8 to 4.5 GB in all recordings of tests/npu_smi
WITHOUT = "without any: RECIPE=recipes/cpu.yaml, or make demo"
CONTROL = ("davinci_manager", "devmm_svm", "hisi_hdc")  # device files shared by all NPUs


def seen(context: Context) -> Finding:
    """As many NPUs as processes, and 910B, which the recipes are written for."""
    wanted, answer = context.recipe.parallel.devices_per_node, context.npus
    expected = f"{wanted} x 910B (parallel.devices_per_node)"
    if answer.problem:
        files = len(context.device_files)
        state = warning if not context.npu_smi and files >= wanted else failed
        found = f"{answer.problem}; {files or 'no'} device files /dev/davinci*"
        return state(found, f"{answer.remedy}; {WITHOUT}", expected)
    chips = answer.chips
    names = ", ".join(f"{count} x {name}" for name, count in Counter(chip.name for chip in chips).items())
    if len(chips) < wanted:
        return failed(f"{names} ({numbers(context, chips)})", FEW, expected)
    if len(context.visible) < wanted:
        given = context.machine.environment[VARIABLE]
        found = f"{names}; {VARIABLE}={given} leaves {len(context.visible)} of them"
        remedy = _others(context) or f"name {wanted} of 0 to {len(chips) - 1}, ascending, or unset it"
        return failed(found, remedy, expected)
    if others := [chip.name for chip in context.used if not chip.name.startswith("910B")]:
        return warning(f"{names}: {others[0]} is not a 910B, which the recipe was written for", "try it", expected)
    return ok(f"{names}; {numbers(context, context.used)} will be used")


def healthy(context: Context) -> Finding:
    """Health by npu-smi: Warning is a minor alarm, Alarm a major, Critical a critical one."""
    chips = context.npus.chips
    ill = [chip for chip in chips if chip.health != "OK"]
    if not ill:
        return ok(f"all {len(chips)} OK")
    found = "\n".join(f"{context.npus.name(chip)}: {chip.health}" for chip in ill)
    steps = (f"see npu-smi info -t health -i {ill[0].npu}", _others(context), "have it repaired")
    state = failed if any(chip.health != "Warning" for chip in ill if chip in context.used) else warning
    return state(found, "; ".join(filter(None, steps)), "OK")


def free(context: Context) -> Finding:
    """Whether other processes hold the NPUs that training would take."""
    listing, used = context.npus, {_place(chip) for chip in context.used}
    if busy := [process for process in listing.processes or () if _place(process) in used]:
        lines = [f"{listing.name(one)}: {one.name or 'a process'} ({one.pid}), {one.memory:,} MB" for one in busy]
        remedy = "; or ".join(filter(None, ["wait for them or end them", _others(context)]))
        return failed("\n".join(lines), remedy, "no process on them")
    lines = [
        f"{listing.name(chip)}: {chip.used:,} of {chip.total:,} MB in use, by no process seen here"
        for chip in context.used
        if (chip.used or 0) > IDLE_MB
    ]
    if lines:
        return warning("\n".join(lines), "look for another container that uses them", "no process on them")
    if listing.processes is None:
        return ok("little of their memory is in use; npu-smi lists no processes here")
    return ok(f"no process on {numbers(context, context.used)}")


def _place(one: Union[Chip, Process]) -> tuple[int, int]:
    return one.npu, one.chip


def _others(context: Context) -> str:
    """How to take healthy, free NPUs, with fewer processes if need be; empty where that is impossible. The setting is
    make's in its containers, elsewhere CANN's.
    """
    listing, recipe = context.npus, context.recipe
    held = {_place(process) for process in listing.processes or ()}
    well = [chip for chip in listing.chips if chip.health in ("OK", "Warning") and (chip.used or 0) <= IDLE_MB]
    by_make = bool(context.machine.environment.get(IN_CONTAINER_OF_MAKE))
    fit = [chip.device if by_make else listing.chips.index(chip) for chip in well if _place(chip) not in held]
    wanted = recipe.parallel.devices_per_node
    for count in range(min(len(fit), wanted), 0, -1):
        parallel = recipe.parallel.model_copy(update={"devices_per_node": count})
        if not complaints(recipe.model_copy(update={"parallel": parallel})):
            fewer = f" with SET=parallel.devices_per_node={count}" if count < wanted else ""
            name, value = "NPUS" if by_make else f"export {VARIABLE}", ",".join(map(str, fit[:count]))
            return f"take others: {name}={value}{fewer}"
    return ""


def numbers(context: Context, chips: Sequence[Chip]) -> str:
    """NPU 0, 1, 2; or NPU 0 chip 0, 0 chip 1, where cards have several."""
    return "NPU " + ", ".join(context.npus.name(chip)[len("NPU ") :] for chip in chips)


def device_files(context: Context) -> Finding:
    """Whether the driver's device files exist and this user may open them.

    Checked by access(2), which respects a container's device cgroup (inode_permission in Linux's fs/namei.c). They are
    not opened: opening /dev/davinciN in a container reserves that NPU until the container's last process has ended
    (uda_access_open in the driver's published source, https://gitcode.com/cann/driver).
    """
    machine, wanted = context.machine, context.recipe.parallel.devices_per_node
    files = context.device_files[:wanted]
    control = [machine.path(f"/dev/{name}") for name in CONTROL]
    expected = "/dev/davinci* and " + ", ".join(CONTROL)
    if missing := [file.name for file in control if not file.exists()]:
        remedy = "install the driver on the host; a container is given them by make, or by --device"
        return failed(f"not there: /dev/{', /dev/'.join(missing)}", remedy, expected)
    if len(files) < wanted:
        return failed(f"{len(files) or 'no'} /dev/davinci* for {wanted} processes", "see NPUs", expected)
    if closed := [file for file in [*files, *control] if not os.access(file, os.R_OK | os.W_OK)]:
        found = "\n".join(f"no permission: {_described(file)}" for file in closed)
        remedy = "run this as root"
        if os.geteuid() == 0:
            remedy = "the container keeps root from it: give it the device (make does so; otherwise --device)"
        elif (status := closed[0].stat()).st_gid and status.st_mode & 0o060 == 0o060:
            remedy = f"usermod -aG {_group(closed[0])} USER, then log in again; in a container: --group-add"
        return failed(found, remedy, expected)
    return ok(f"{len(files)} NPUs and {', '.join(CONTROL)}: {_described(files[0])}")


def _described(file: Path) -> str:
    """/dev/davinci0 of group HwHiAiUser, mode 0660."""
    return f"/dev/{file.name} of group {_group(file)}, mode {file.stat().st_mode & 0o777:04o}"


def _group(file: Path) -> str:
    try:
        return file.group()
    except KeyError:  # a number without an entry in /etc/group
        return str(file.stat().st_gid)


def npu_memory(context: Context) -> Finding:
    """Memory of the smallest NPU in use; only a warning, as the plan was not compared with an NPU."""
    sizes = [chip.total for chip in context.used if chip.total]
    if not sizes:
        return skipped("not known, see NPUs")
    gib, memory = min(sizes) / 1024, memory_of(context.recipe)
    found, expected = f"{gib:.4g} GiB", f"{memory.needed / GIB:.1f} GiB by make plan, and a tenth left"
    if memory.verdict(gib) == "yes":
        return ok(f"{found}; {memory.needed / GIB:.1f} needed by make plan")
    best = ranking(all_splits(context.recipe), True, gib)
    return warning(found, f"{advice(best, gib)}; see make plan", expected)
