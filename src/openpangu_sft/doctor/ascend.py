"""Driver, firmware and CANN: which versions are here, and which go together by what their own files say.

A driver names in compatible_version of its version.info the series of CANN that it serves (V100R001C19 is that of
8.0.RC3, whose own innerversion begins with it), and in compatible_version_fw the range of firmware; so it says by
itself whether an older CANN is still served. CANN names in compatible_version of its ascend_toolkit_install.info the
series of drivers that it takes, single ones and ranges; a driver's series is the beginning of its Innerversion. These
meanings are inferred from such files, not taken from a specification. util/ascend.py reads them.
"""

from __future__ import annotations

import os
import re
from typing import Optional

from openpangu_sft.doctor.finding import Finding, State, failed, ok, skipped, warning
from openpangu_sft.doctor.machine import Context, Machine
from openpangu_sft.doctor.npu_smi import parse_fields
from openpangu_sft.util.ascend import ASCEND, install_info, parse_info, toolkit_home

CANN = "8.0.RC3"  # what torch_npu 2.1.0.post8 pairs with
DRIVER = "24.1.RC3"  # the Ascend HDK of CANN 8.0.RC3
FIRMWARE = "7.5.0.1.129"  # of that HDK
CANN_SERIES = "V100R001C19"  # CANN 8.0.RC3 in the driver's file
TOOLKIT = f"{ASCEND}/ascend-toolkit"
LIBRARIES = {
    "libhccl.so": "CANN's set_env.sh",
    "libascend_hal.so": f"{ASCEND}/driver/lib64, with common and driver in it",
}
"""Libraries that torch_npu needs to be imported, and what puts them on LD_LIBRARY_PATH."""

INSTALL = f"install the HDK {DRIVER} (firmware, then driver) on the host, and reboot"


def driver(context: Context) -> Finding:
    info = _driver_info(context)
    if not info and context.npus.problem:
        return failed(f"no {ASCEND}/driver/version.info", INSTALL, DRIVER)
    return judge_driver(info, _cann_info(context) or {}, context.npus.listing.driver)


def firmware(context: Context) -> Finding:
    """The firmware of each used NPU against the driver."""
    installed = parse_info(context.machine.read(f"{ASCEND}/firmware/version.info")).get("version", "")
    found: dict[tuple[str, str], list[str]] = {}
    for npu in dict.fromkeys(chip.npu for chip in context.used):
        ran = context.ask_npu_smi("info", "-t", "board", "-i", str(npu))
        fields = parse_fields(ran.text)
        version = fields.get("Firmware Version", "")
        known = version[:1].isdigit()  # NA without the permission to ask
        key = (version if known else installed, fields.get("Compatibility", ""))
        found.setdefault(key, []).append(str(npu))
        if ran.problem:  # it would hang again for each
            break
    if not found and not installed:
        return skipped("not known, see NPUs")
    judged = [judge_firmware(*key, _driver_info(context)) for key in found or [(installed, "")]]
    worst = max(judged, key=lambda one: list(State).index(one.state))
    if len(found) > 1 and worst.state == State.OK:
        each = "\n".join(f"NPU {', '.join(npus)}: {version}" for (version, _), npus in found.items())
        return warning(each, "install one firmware on all of them", "one firmware")
    return worst


def _driver_info(context: Context) -> dict[str, str]:
    return parse_info(context.machine.read(f"{ASCEND}/driver/version.info"))


def _cann_info(context: Context) -> Optional[dict[str, str]]:
    """Fields of the CANN whose environment is set here; None where there is none."""
    home = toolkit_home(context.machine.environment)
    info = install_info(context.machine.path(home)) if home else None
    return None if info is None else parse_info(info)


def cann(context: Context) -> Finding:
    """CANN's version, and whether its environment is set."""
    machine, environment = context.machine, context.machine.environment
    remedy = "run in the image, which has it (make image or make load)"
    home = toolkit_home(environment)
    if not home:
        if not machine.path(f"{TOOLKIT}/set_env.sh").is_file():
            return failed("not installed", f"{remedy}, or install CANN {CANN}", CANN)
        entrypoint = "start it through the image's entrypoint, which does so: docker run without --entrypoint"
        remedy = entrypoint if context.in_image else f"source {TOOLKIT}/set_env.sh, then run it again"
        return failed("installed, but its environment is not set (ASCEND_TOOLKIT_HOME)", remedy, CANN)
    info = _cann_info(context)
    if info is None:
        found = f"no ascend_toolkit_install.info in {home}"
        return failed(found, f"fix ASCEND_TOOLKIT_HOME, or {remedy}", CANN)
    finding = judge_cann(info.get("version", ""), remedy)
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
    """Paths in ldconfig's cache: the driver registers its folders in /etc/ld.so.conf.d, in a file that only root may
    read (ascend_driver_so.conf, mode 0440), but anyone may read the cache.
    """
    tool = machine.program("ldconfig", "/sbin", "/usr/sbin")
    listed = machine.run(tool, "-p", seconds=10).text if tool else ""
    return re.findall(rf"^\s*{re.escape(library)} \(.*\) => (\S+)$", listed, re.MULTILINE)


def serves(driver: dict[str, str], series: str = CANN_SERIES) -> Optional[bool]:
    """Whether a driver names a series of CANN as served; None where it names none."""
    named = re.findall(r"\[([^\]]*)\]", driver.get("compatible_version", ""))
    return series in named if named else None


def takes(cann: dict[str, str], driver: dict[str, str]) -> Optional[bool]:
    """Whether CANN names a driver's series, by itself or in a range; None where either file does not say."""
    own = _series(driver.get("innerversion", ""))
    named = re.findall(r"\[([^\],]*)(?:,([^\]]*))?\]", cann.get("compatible_version", ""))
    if not own or not named:
        return None
    return any(_series(low) <= own <= _series(high or low) for low, high in named)


def _series(version: str) -> tuple[int, ...]:
    """V100R001C18SPC001B233 is of series (100, 1, 18); empty for other texts."""
    match = re.match(r"V([0-9]{1,9})R([0-9]{1,9})C([0-9]{1,9})", version.strip(), re.IGNORECASE)
    return tuple(map(int, match.groups())) if match else ()


def judge_driver(driver: dict[str, str], cann: dict[str, str], seen: str = "") -> Finding:
    """The driver against CANN 8.0.RC3: fields of both files, which may be empty, and the version that npu-smi says."""
    version = driver.get("version") or seen
    if not version:
        return warning("not known: neither driver/version.info nor npu-smi says it", INSTALL, DRIVER)
    if in_series(version, DRIVER):
        return ok(version)
    served, taken = serves(driver), takes(cann, driver)
    if version_key(version) < version_key(DRIVER):  # then either of the two files has to name the other side
        if taken or served:
            by = "CANN's own file takes it" if taken else f"its version.info names {CANN_SERIES}"
            found = f"{version}, older than the one that Huawei pairs with CANN {CANN}; {by}"
            return warning(found, f"try it; if it fails, {INSTALL}", DRIVER)
        if served is None or taken is None:
            return warning(f"{version}, older; the files here do not say whether CANN takes it", INSTALL, DRIVER)
        found = f"{version}, older; neither its version.info nor CANN's own file names the other"
        return failed(found, INSTALL, DRIVER)
    if served:
        return ok(f"{version}, newer; its version.info names {CANN_SERIES}, which is CANN {CANN}")
    said = "does not say whether" if served is None else "does not say that"
    return warning(f"{version}, newer; its version.info {said} it serves CANN {CANN}", INSTALL, DRIVER)


def judge_firmware(version: str, compatibility: str, driver: dict[str, str]) -> Finding:
    """The firmware against the HDK and its driver, whose fields may be empty. npu-smi has said whether these two are
    compatible: OK, NOK, UNKNOWN, NOT SUPPORT, or nothing.
    """
    if not re.match(r"[0-9]", version):
        remedy = "see npu-smi info -t board -i 0 on the host, as root"
        return warning("not known: npu-smi does not say it here, and firmware/version.info is not here", remedy)
    if compatibility.upper() == "NOK":
        return failed(f"{version}: npu-smi says that the driver does not go with it", INSTALL, FIRMWARE)
    limits = re.findall(r"\[([0-9.]+),([0-9.]+)\]", driver.get("compatible_version_fw", ""))
    key = version_key(version)
    if limits and not any(version_key(low) <= key <= version_key(high) for low, high in limits):
        ranges = " or ".join(f"{low} to {high}" for low, high in limits)
        return failed(f"{version}: the driver wants {ranges}", INSTALL, FIRMWARE)
    if key < version_key(FIRMWARE):
        return warning(f"{version}, older than that of HDK {DRIVER}", INSTALL, FIRMWARE)
    return ok(version if compatibility.upper() != "OK" else f"{version}; npu-smi says that the driver goes with it")


def judge_cann(version: str, remedy: str) -> Finding:
    if not version:
        return warning("its ascend_toolkit_install.info names no version", remedy, CANN)
    if in_series(version, CANN):
        return ok(version)
    if version_key(version) < version_key(CANN):
        return failed(f"{version}, older than torch_npu wants", remedy, CANN)
    return warning(f"{version}, newer than torch_npu was made for", remedy, CANN)


Key = tuple[tuple[int, int], ...]

_RANKS = {"alpha": -3, "beta": -2, "rc": -1, "post": 2}
"""Pre-releases sort before their release, post-releases after it. Other words do not count."""
_END, _NUMBER = (0, 0), 1


def version_key(version: str) -> Key:
    """A sort key of any text, ignoring case."""
    parts: list[tuple[int, int]] = []
    for word, digits in re.findall(r"([a-z]+)?([0-9]*)", version.lower().split("+")[0]):
        number = int(digits[:18] or "0")
        if word in _RANKS:
            parts.append((_RANKS[word], number))
        elif digits:
            parts.append((_NUMBER, number))
    return (*parts, _END)


def in_series(version: str, series: str) -> bool:
    """Whether a version belongs to a series or its patches: 24.1.rc3.7 is of 24.1.RC3, 24.1.rc3.alpha1 is not."""
    key, wanted = version_key(version), version_key(series)[:-1]
    return key[: len(wanted)] == wanted and key[len(wanted)] >= _END
