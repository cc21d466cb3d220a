"""The NPUs: how many are seen, healthy and free, and whether this user can open their device files."""

from __future__ import annotations

import grp
import os
from collections import Counter
from pathlib import Path
from typing import Optional

from openpangu_sft.doctor.finding import Finding, failed, ok, skipped, warning
from openpangu_sft.doctor.npu_smi import Chip
from openpangu_sft.doctor.subject import Subject

FEW = "give the container more of them (NPUS=), or lower parallel.devices_per_node"
IDLE_MB = 8192
"""Memory of an NPU that nobody uses is below this: 2.8 to 4.5 GB in all the recordings of tests/npu_smi."""
CONTROL = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""The device files that all NPUs share."""


def seen(subject: Subject) -> Finding:
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
        return failed(f"{names} ({numbers(chips)})", FEW, expected)
    if others := [chip.name for chip in subject.used if not chip.name.startswith("910B")]:
        return warning(f"{names}: {others[0]} is no 910B, for which the recipe was written", "try it", expected)
    return ok(f"{names}; {numbers(subject.used)} will be used")


def healthy(subject: Subject) -> Finding:
    """Whether npu-smi calls them healthy. Warning is a minor alarm, Alarm a major, Critical a critical one."""
    if unknown := _unknown(subject):
        return unknown
    chips = subject.npus.listing.chips
    ill = [chip for chip in chips if chip.health != "OK"]
    if not ill:
        hottest = max((chip.temperature or 0 for chip in chips), default=0)
        return ok(f"all {len(chips)} OK, up to {hottest} °C")
    found = "\n".join(f"NPU {chip.npu}: {chip.health}" for chip in ill)
    numbers = ",".join(str(chip.npu) for chip in chips if chip.health in ("OK", "Warning"))
    remedy = f"see npu-smi info -t health -i {ill[0].npu}; take others: NPUS={numbers}; have it mended"
    if any(chip.health != "Warning" for chip in ill if chip in subject.used):
        return failed(found, remedy, "OK")
    return warning(found, remedy, "OK")


def free(subject: Subject) -> Finding:
    """Whether somebody else holds the NPUs that training would take."""
    if unknown := _unknown(subject):
        return unknown
    listing, used = subject.npus.listing, {chip.npu for chip in subject.used}
    busy = [process for process in listing.processes or () if process.npu in used]
    if busy:
        lines = [f"NPU {one.npu}: {one.name or 'a process'} ({one.pid}), {one.memory:,} MB" for one in busy]
        held = {process.npu for process in listing.processes or ()}
        others = [str(chip.npu) for chip in listing.chips if chip.npu not in held]
        remedy = "wait for them or end them" + (f"; or take others: NPUS={','.join(others)}" if others else "")
        return failed("\n".join(lines), remedy, "no process on them")
    if full := [chip for chip in subject.used if (chip.used or 0) > IDLE_MB]:
        lines = [f"NPU {chip.npu}: {chip.used:,} of {chip.total:,} MB in use, by no process seen here" for chip in full]
        return warning("\n".join(lines), "look for another container that uses them", "no process on them")
    if listing.processes is None:
        return ok("little of their memory is in use; npu-smi lists no processes here")
    return ok(f"no process on {numbers(subject.used)}")


def _unknown(subject: Subject) -> Optional[Finding]:
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    return skipped("not known, see NPUs") if subject.npus.problem else None


def numbers(chips: tuple[Chip, ...]) -> str:
    """NPU 0, 1, 2."""
    return f"NPU {', '.join(dict.fromkeys(str(chip.npu) for chip in chips))}"


def device_files(subject: Subject) -> Finding:
    """Whether this user can open what the driver is reached through, for reading and writing."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    machine, files = subject.machine, subject.device_files[: subject.recipe.parallel.devices_per_node]
    control = [machine.path(f"/dev/{name}") for name in CONTROL]
    expected = "/dev/davinci* and " + ", ".join(CONTROL)
    if missing := [file.name for file in control if not file.exists()]:
        remedy = "install the driver on the host; a container is given them by make, or by --device"
        return failed(f"not there: /dev/{', /dev/'.join(missing)}", remedy, expected)
    if not files:
        return failed("no /dev/davinci0", "see NPUs", expected)
    if closed := [file for file in [*files, *control] if not os.access(file, os.R_OK | os.W_OK)]:
        remedy = f"usermod -aG {_group(closed[0])} {_user()}, then log in again; in a container: --group-add"
        return failed("\n".join(f"no permission: {_described(file)}" for file in closed), remedy, expected)
    return ok(f"{len(files)} NPUs and {', '.join(CONTROL)}: {_described(files[0])}")


def _described(file: Path) -> str:
    """/dev/davinci0 root:HwHiAiUser 0660."""
    status = file.stat()
    return f"/dev/{file.name} of group {_group(file)}, mode {status.st_mode & 0o777:04o}"


def _group(file: Path) -> str:
    number = file.stat().st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())
