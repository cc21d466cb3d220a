"""Driver, firmware and CANN: which versions are here, and whether the driver serves this CANN, by its file.

A driver names in compatible_version of its version.info the series of CANN that it serves (V100R001C19 is that of
8.0.RC3, whose own innerversion begins with it); so it says by itself whether an older CANN is still served. This is
inferred from such files, not taken from a specification. util/ascend.py reads them; npu-smi says whether the firmware
goes with the driver.
"""

from __future__ import annotations

import re

from packaging.version import Version

from openpangu_sft.doctor.machine import Context, Finding, failed, ok, skipped, warning
from openpangu_sft.doctor.npu_smi import parse_fields
from openpangu_sft.util.ascend import ASCEND, cann_info, driver_info, toolkit_home

CANN = "8.0.RC3"  # what torch_npu 2.1.0.post8 pairs with
DRIVER = "24.1.RC3"  # the Ascend HDK of CANN 8.0.RC3
CANN_SERIES = "V100R001C19"  # CANN 8.0.RC3 in the driver's file
TOOLKIT = f"{ASCEND}/ascend-toolkit"
INSTALL = f"install the HDK {DRIVER} (firmware, then driver) on the host, and reboot"


def driver(context: Context) -> Finding:
    info = driver_info(context.machine.root)
    if not info and context.npus.problem:
        return failed(f"no {ASCEND}/driver/version.info", INSTALL, DRIVER)
    return judge_driver(info, context.npus.driver)


def firmware(context: Context) -> Finding:
    """Whether npu-smi says that the firmware of each used NPU goes with the driver."""
    found: dict[str, list[str]] = {}
    wrong = False
    for npu in dict.fromkeys(chip.npu for chip in context.used):
        ran = context.ask_npu_smi("info", "-t", "board", "-i", str(npu))
        if ran.problem:  # it would hang again for each
            break
        fields = parse_fields(ran.text)
        if (version := fields.get("Firmware Version", ""))[:1].isdigit():  # NA without the permission to ask
            found.setdefault(version, []).append(str(npu))
            wrong |= fields.get("Compatibility", "").upper() == "NOK"
    if not found:
        return skipped("not known: npu-smi does not say it here")
    shown = "\n".join(f"{version} (NPU {', '.join(npus)})" for version, npus in found.items())
    return failed(shown, INSTALL, "one that npu-smi finds compatible with the driver") if wrong else ok(shown)


def cann(context: Context) -> Finding:
    """CANN's version, and whether its environment is set; the check tensors finds libraries that are not found."""
    machine, remedy = context.machine, "run in the image, which has it (make image or make load)"
    home = toolkit_home(machine.environment)
    if not home:
        if not machine.path(f"{TOOLKIT}/set_env.sh").is_file():
            return failed("not installed", f"{remedy}, or install CANN {CANN}", CANN)
        entrypoint = "start it through the image's entrypoint, which does so: docker run without --entrypoint"
        remedy = entrypoint if context.in_image else f"source {TOOLKIT}/set_env.sh, then run it again"
        return failed("installed, but its environment is not set (ASCEND_TOOLKIT_HOME)", remedy, CANN)
    info = cann_info(machine.environment, machine.root)
    if not info:
        return failed(f"no ascend_toolkit_install.info in {home}", f"fix ASCEND_TOOLKIT_HOME, or {remedy}", CANN)
    return judge_cann(info.get("version", ""), remedy)


def judge_driver(driver: dict[str, str], seen: str = "") -> Finding:
    """The driver against CANN 8.0.RC3: fields of its file, which may be empty, and the version that npu-smi says."""
    version = driver.get("version") or seen
    if not version:
        return warning("not known: neither driver/version.info nor npu-smi says it", INSTALL, DRIVER)
    if in_series(version, DRIVER):
        return ok(version)
    older, served = is_older(version, DRIVER), CANN_SERIES in driver.get("compatible_version", "")
    if served and not older:
        return ok(f"{version}, newer; its version.info names {CANN_SERIES}, which is CANN {CANN}")
    found = f"{version}, {'older' if older else 'newer'} than the one that Huawei pairs with CANN {CANN}"
    return warning(found, f"try it; if it fails, {INSTALL}", DRIVER)


def judge_cann(version: str, remedy: str) -> Finding:
    if not version:
        return warning("its ascend_toolkit_install.info names no version", remedy, CANN)
    if in_series(version, CANN):
        return ok(version)
    if is_older(version, CANN):
        return failed(f"{version}, older than torch_npu wants", remedy, CANN)
    return warning(f"{version}, newer than torch_npu was made for", remedy, CANN)


def in_series(version: str, series: str) -> bool:
    """Whether a version belongs to a series or its patches: 24.1.rc3.7 is of 24.1.RC3, 24.1.rc3.alpha1 is not."""
    return bool(re.fullmatch(rf"V?{re.escape(series)}([._-](?!alpha|beta|rc)\w+)*", version, re.IGNORECASE))


def is_older(version: str, series: str) -> bool:
    """Whether a version that is not in a series is older: by its release and rc, so 24.1.rc3.alpha1 is."""
    match = re.match(r"V?[0-9]{1,9}(\.[0-9]{1,9})*(\.?rc[0-9]{1,9})?", version, re.IGNORECASE | re.ASCII)
    return match is None or Version(match[0]) <= Version(series)
