"""Driver, firmware and CANN on this machine; ascend.py says what goes together."""

from __future__ import annotations

import os
import re
from typing import Optional

from openpangu_sft.doctor import ascend
from openpangu_sft.doctor.finding import Finding, State, failed, ok, skipped, warning
from openpangu_sft.doctor.machine import Context, Machine
from openpangu_sft.doctor.npu_smi import parse_fields
from openpangu_sft.util.ascend import ASCEND, install_info, parse_info, toolkit_home

TOOLKIT = f"{ASCEND}/ascend-toolkit"
LIBRARIES = {
    "libhccl.so": "CANN's set_env.sh",
    "libascend_hal.so": f"{ASCEND}/driver/lib64, with common and driver in it",
}
"""What torch_npu wants to find when it is imported, and what puts it on LD_LIBRARY_PATH."""
LDCONFIG_SECONDS = 10.0


def driver(subject: Context) -> Finding:
    """The driver's version against CANN's."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    info = _driver_info(subject)
    if not info and subject.npus.problem:
        return failed(f"no {ASCEND}/driver/version.info", ascend.INSTALL, ascend.DRIVER)
    return ascend.judge_driver(info, _cann_info(subject) or {}, subject.npus.listing.driver)


def firmware(subject: Context) -> Finding:
    """The firmware of each NPU that is used, against the driver."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    installed = parse_info(subject.machine.read(f"{ASCEND}/firmware/version.info")).get("version", "")
    found: dict[tuple[str, str], list[str]] = {}
    for npu in dict.fromkeys(chip.npu for chip in subject.used):
        ran = subject.ask_npu_smi("info", "-t", "board", "-i", str(npu))
        fields = parse_fields(ran.text)
        version = fields.get("Firmware Version", "")
        known = version[:1].isdigit()  # NA for users who may not ask
        key = (version if known else installed, fields.get("Compatibility", ""))
        found.setdefault(key, []).append(str(npu))
        if ran.problem:  # it would hang once more for each
            break
    if not found:
        if not installed:
            return skipped("not known, see NPUs")
        found[installed, ""] = []
    judged = [ascend.judge_firmware(*key, _driver_info(subject)) for key in found]
    worst = max(judged, key=lambda one: [State.OK, State.WARNING, State.FAILED].index(one.state))
    if len(found) > 1 and worst.state == State.OK:
        each = "\n".join(f"NPU {', '.join(npus)}: {version}" for (version, _), npus in found.items())
        return warning(each, "install one firmware on all of them", "one firmware")
    return worst


def _driver_info(subject: Context) -> dict[str, str]:
    return parse_info(subject.machine.read(f"{ASCEND}/driver/version.info"))


def _cann_info(subject: Context) -> Optional[dict[str, str]]:
    """Fields of the CANN whose environment is set here; None where there is none."""
    home = toolkit_home(subject.machine.environment)
    info = install_info(subject.machine.path(home)) if home else None
    return None if info is None else parse_info(info)


def cann(subject: Context) -> Finding:
    """CANN's version, and whether its environment is set here."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    machine, environment = subject.machine, subject.machine.environment
    remedy = "run in the image, which has it (make image or make load)"
    home = toolkit_home(environment)
    if not home:
        if not machine.path(f"{TOOLKIT}/set_env.sh").is_file():
            return failed("not installed", f"{remedy}, or install CANN {ascend.CANN}", ascend.CANN)
        entrypoint = "start it through the image's entrypoint, which does so: docker run without --entrypoint"
        remedy = entrypoint if subject.in_image else f"source {TOOLKIT}/set_env.sh, then run it again"
        return failed("installed, but its environment is not set (ASCEND_TOOLKIT_HOME)", remedy, ascend.CANN)
    info = _cann_info(subject)
    if info is None:
        return failed(
            f"no ascend_toolkit_install.info in {home}", f"mend ASCEND_TOOLKIT_HOME, or {remedy}", ascend.CANN
        )
    finding = ascend.judge_cann(info.get("version", ""), remedy)
    if finding.state != State.OK:
        return finding
    folders = [part for part in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    for library, giver in LIBRARIES.items():
        places = [f"{folder}/{library}" for folder in folders] + _known_to_loader(machine, library)
        if not any(machine.path(place).exists() for place in places):
            found = f"{finding.found}; {library} is neither on LD_LIBRARY_PATH nor known to ldconfig"
            return failed(found, f"put it there: {giver}")
    return ok(f"{finding.found} in {home}")


def _known_to_loader(machine: Machine, library: str) -> list[str]:
    """Where ldconfig has a library: the driver's installation tells it its folders, in /etc/ld.so.conf.d.

    Only root may read that file (ascend_driver_so.conf, mode 0440), but everybody ldconfig's list.
    """
    tool = machine.program("ldconfig", "/sbin", "/usr/sbin")
    listed = machine.run(tool, "-p", seconds=LDCONFIG_SECONDS).text if tool else ""
    return re.findall(rf"^\s*{re.escape(library)} \(.*\) => (\S+)$", listed, re.MULTILINE)
