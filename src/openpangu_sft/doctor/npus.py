"""The NPUs: how many are seen, healthy and free, and whether their device files are there for this user."""

from __future__ import annotations

import grp
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

from openpangu_sft.doctor.finding import Finding, failed, ok, skipped, warning
from openpangu_sft.doctor.machine import Context
from openpangu_sft.doctor.npu_smi import Chip, Process
from openpangu_sft.plan.memory import memory_of, verdict
from openpangu_sft.plan.parts import GIB
from openpangu_sft.plan.search import nearest_that_fits
from openpangu_sft.recipe.rules import complaints
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.ascend import VARIABLE

FEW = "give the container more of them (NPUS=), or lower parallel.devices_per_node"
IDLE_MB = 8192
"""Memory of an NPU that nobody uses is below this: 2.8 to 4.5 GB in all the recordings of tests/npu_smi."""
CONTROL = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""The device files that all NPUs share."""


def seen(subject: Context) -> Finding:
    """Whether there are as many NPUs as processes, and of the kind that the recipe was written for."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    wanted, answer = subject.recipe.parallel.devices_per_node, subject.npus
    expected = f"{wanted} x 910B (parallel.devices_per_node)"
    files = len(subject.device_files)
    if answer.problem:
        found = f"{answer.problem}; {files or 'no'} device files /dev/davinci*"
        if not subject.npu_smi and files >= wanted:
            return warning(found, answer.remedy, expected)
        return failed(found, answer.remedy, expected)
    chips = answer.listing.chips
    names = ", ".join(f"{count} x {name}" for name, count in Counter(chip.name for chip in chips).items())
    if len(chips) < wanted:
        return failed(f"{names} ({numbers(subject, chips)})", FEW, expected)
    if len(subject.visible) < wanted:
        given = subject.machine.environment[VARIABLE]
        found = f"{names}; {VARIABLE}={given} leaves {len(subject.visible)} of them"
        remedy = _others(subject) or f"name {wanted} of 0 to {len(chips) - 1}, ascending, or unset it"
        return failed(found, remedy, expected)
    if others := [chip.name for chip in subject.used if not chip.name.startswith("910B")]:
        return warning(f"{names}: {others[0]} is no 910B, for which the recipe was written", "try it", expected)
    return ok(f"{names}; {numbers(subject, subject.used)} will be used")


def healthy(subject: Context) -> Finding:
    """Whether npu-smi calls them healthy. Warning is a minor alarm, Alarm a major, Critical a critical one."""
    if unknown := _unknown(subject):
        return unknown
    chips = subject.npus.listing.chips
    ill = [chip for chip in chips if chip.health != "OK"]
    if not ill:
        hottest = max((chip.temperature or 0 for chip in chips), default=0)
        return ok(f"all {len(chips)} OK, up to {hottest} °C")
    found = "\n".join(f"{subject.npus.listing.name(chip)}: {chip.health}" for chip in ill)
    steps = (f"see npu-smi info -t health -i {ill[0].npu}", _others(subject), "have it mended")
    remedy = "; ".join(filter(None, steps))
    if any(chip.health != "Warning" for chip in ill if chip in subject.used):
        return failed(found, remedy, "OK")
    return warning(found, remedy, "OK")


def free(subject: Context) -> Finding:
    """Whether somebody else holds the NPUs that training would take."""
    if unknown := _unknown(subject):
        return unknown
    listing, used = subject.npus.listing, {_place(chip) for chip in subject.used}
    if busy := [process for process in listing.processes or () if _place(process) in used]:
        lines = [f"{listing.name(one)}: {one.name or 'a process'} ({one.pid}), {one.memory:,} MB" for one in busy]
        remedy = "; or ".join(filter(None, ["wait for them or end them", _others(subject)]))
        return failed("\n".join(lines), remedy, "no process on them")
    if full := [chip for chip in subject.used if (chip.used or 0) > IDLE_MB]:
        name = listing.name
        lines = [f"{name(chip)}: {chip.used:,} of {chip.total:,} MB in use, by no process seen here" for chip in full]
        return warning("\n".join(lines), "look for another container that uses them", "no process on them")
    if listing.processes is None:
        return ok("little of their memory is in use; npu-smi lists no processes here")
    return ok(f"no process on {numbers(subject, subject.used)}")


def _place(one: Union[Chip, Process]) -> tuple[int, int]:
    return one.npu, one.chip


def _others(subject: Context) -> str:
    """How to take NPUs that are well and that nobody holds, with fewer processes if need be; empty if that can't be."""
    listing, recipe = subject.npus.listing, subject.recipe
    held = {_place(process) for process in listing.processes or ()}
    fit = [chip for chip in listing.chips if chip.health in ("OK", "Warning") and (chip.used or 0) <= IDLE_MB]
    fit = [chip for chip in fit if _place(chip) not in held]
    wanted = recipe.parallel.devices_per_node
    count = next((count for count in range(min(len(fit), wanted), 0, -1) if _goes(recipe, count)), 0)
    if not count:
        return ""
    fewer = f" with SET=parallel.devices_per_node={count}" if count < wanted else ""
    return f"take others: {subject.choice(fit[:count])}{fewer}"


def _goes(recipe: Recipe, count: int) -> bool:
    """Whether batch, tensor, pipeline and context parallelism can be divided over so many processes too."""
    parallel = recipe.parallel.model_copy(update={"devices_per_node": count})
    return not complaints(recipe.model_copy(update={"parallel": parallel}))


def _unknown(subject: Context) -> Optional[Finding]:
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    return skipped("not known, see NPUs") if subject.npus.problem else None


def numbers(subject: Context, chips: Sequence[Chip]) -> str:
    """NPU 0, 1, 2; or NPU 0 chip 0, 0 chip 1, where cards have several."""
    return "NPU " + ", ".join(subject.npus.listing.name(chip)[len("NPU ") :] for chip in chips)


def device_files(subject: Context) -> Finding:
    """Whether what the driver is reached through is there, and not closed to this user.

    They are asked for by access(2), which knows of a container's device cgroup too (inode_permission in Linux's
    fs/namei.c), and are not opened: opening /dev/davinciN in a container takes that NPU for it, until its last process
    has ended (uda_access_open in the driver's published source, https://gitcode.com/cann/driver).
    """
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    machine, wanted = subject.machine, subject.recipe.parallel.devices_per_node
    files = subject.device_files[:wanted]
    control = [machine.path(f"/dev/{name}") for name in CONTROL]
    expected = "/dev/davinci* and " + ", ".join(CONTROL)
    if missing := [file.name for file in control if not file.exists()]:
        remedy = "install the driver on the host; a container is given them by make, or by --device"
        return failed(f"not there: /dev/{', /dev/'.join(missing)}", remedy, expected)
    if len(files) < wanted:
        return failed(f"{len(files) or 'no'} /dev/davinci* for {wanted} processes", "see NPUs", expected)
    if closed := [file for file in [*files, *control] if not os.access(file, os.R_OK | os.W_OK)]:
        found = "\n".join(f"no permission: {_described(file)}" for file in closed)
        return failed(found, _opened(closed[0]), expected)
    return ok(f"{len(files)} NPUs and {', '.join(CONTROL)}: {_described(files[0])}")


def _opened(file: Path) -> str:
    """What opens a device file to this user."""
    status = file.stat()
    if os.geteuid() == 0:
        return "what keeps root from it is the container: give it the device (make does so; otherwise --device)"
    if status.st_gid and status.st_mode & 0o060 == 0o060:
        user = os.environ.get("USER") or str(os.getuid())
        return f"usermod -aG {_group(file)} {user}, then log in again; in a container: --group-add"
    return "run this as root, or let the driver give them to its group (HwHiAiUser) as it is installed"


def _described(file: Path) -> str:
    """/dev/davinci0 of group HwHiAiUser, mode 0660."""
    return f"/dev/{file.name} of group {_group(file)}, mode {file.stat().st_mode & 0o777:04o}"


def _group(file: Path) -> str:
    number = file.stat().st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def npu_memory(subject: Context) -> Finding:
    """Memory of the smallest NPU that would be used; a warning, as the plan was never compared with an NPU."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    sizes = [chip.total for chip in subject.used if chip.total]
    if not sizes:
        return skipped("not known, see NPUs")
    gib = min(sizes) / 1024
    memory = memory_of(subject.recipe)
    found, expected = f"{gib:.4g} GiB", f"{memory.needed / GIB:.1f} GiB by make plan, and a tenth left"
    if verdict(memory, gib) == "yes":
        return ok(f"{found}; {memory.needed / GIB:.1f} needed by make plan")
    nearest = nearest_that_fits(subject.recipe, gib)
    if not nearest:
        return warning(found, "take more devices, or a shorter data.seq_length", expected)
    then = ", then make convert" if nearest.converts else ""
    return warning(found, f'SET="{" ".join(nearest.settings)}"{then}; see make plan', expected)
