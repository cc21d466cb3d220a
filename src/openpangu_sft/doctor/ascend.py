"""Which driver, firmware and CANN go together, from what their own files say. Pure: fields to findings.

A driver names in compatible_version of its version.info the series of CANN that it serves (V100R001C19 is that of
8.0.RC3, whose own innerversion begins with it), and in compatible_version_fw the range of firmware; so it says by
itself whether an older CANN is still served. CANN names in compatible_version of its ascend_toolkit_install.info the
series of drivers that it takes, single ones and ranges; which series a driver is of, its Innerversion begins with. That
the fields mean this is read from such files, and from no specification. ascend_files.py reads them.
"""

from __future__ import annotations

import re
from typing import Optional

from openpangu_sft.doctor.finding import Finding, failed, ok, warning

CANN = "8.0.RC3"
"""What torch_npu 2.1.0.post8 pairs with."""
DRIVER = "24.1.RC3"
"""The Ascend HDK of CANN 8.0.RC3."""
FIRMWARE = "7.5.0.1.129"
"""The firmware in that HDK."""
CANN_SERIES = "V100R001C19"
"""How the driver's file calls CANN 8.0.RC3."""

INSTALL = f"install the HDK {DRIVER} (firmware, then driver) on the host, and reboot"


def serves(driver: dict[str, str], series: str = CANN_SERIES) -> Optional[bool]:
    """Whether a driver names a series of CANN as one that it serves; None where it names none at all."""
    named = re.findall(r"\[([^\]]*)\]", driver.get("compatible_version", ""))
    return series in named if named else None


def takes(cann: dict[str, str], driver: dict[str, str]) -> Optional[bool]:
    """Whether CANN names a driver's series as one that it takes, itself or in a range; None where that is not said."""
    own = _series(driver.get("innerversion", ""))
    named = re.findall(r"\[([^\],]*)(?:,([^\]]*))?\]", cann.get("compatible_version", ""))
    if not own or not named:
        return None
    return any(_series(low) <= own <= _series(high or low) for low, high in named)


def _series(version: str) -> tuple[int, ...]:
    """V100R001C18SPC001B233 is of the series 100, 1, 18; empty where it is none."""
    match = re.match(r"V([0-9]{1,9})R([0-9]{1,9})C([0-9]{1,9})", version.strip(), re.IGNORECASE)
    return tuple(map(int, match.groups())) if match else ()


def judge_driver(driver: dict[str, str], cann: dict[str, str], seen: str = "") -> Finding:
    """The driver against CANN 8.0.RC3.

    Args:
        driver: its version.info; may be empty.
        cann: its ascend_toolkit_install.info; may be empty.
        seen: the version that npu-smi says.
    """
    version = driver.get("version") or seen
    if not version:
        return warning("not known: neither driver/version.info nor npu-smi says it", INSTALL, DRIVER)
    if in_series(version, DRIVER):
        return ok(version)
    served = serves(driver)
    if version_key(version) < version_key(DRIVER):
        return _judge_older(version, served, takes(cann, driver))
    if served:
        return ok(f"{version}, newer; its version.info names {CANN_SERIES}, which is CANN {CANN}")
    said = "does not say whether" if served is None else "does not say that"
    return warning(f"{version}, newer; its version.info {said} it serves CANN {CANN}", INSTALL, DRIVER)


def _judge_older(version: str, served: Optional[bool], taken: Optional[bool]) -> Finding:
    """A driver older than Huawei's pair: what counts is whether either of the two files names the other side."""
    if taken or served:
        by = "CANN's own file takes it" if taken else f"its version.info names {CANN_SERIES}"
        remedy = f"try it; if it fails, {INSTALL}"
        return warning(f"{version}, older than the one that Huawei pairs with CANN {CANN}; {by}", remedy, DRIVER)
    if served is None or taken is None:
        return warning(f"{version}, older; the files here do not say whether CANN takes it", INSTALL, DRIVER)
    return failed(f"{version}, older; neither its version.info nor CANN's own file names the other", INSTALL, DRIVER)


def judge_firmware(version: str, compatibility: str, driver: dict[str, str]) -> Finding:
    """The firmware against its driver and against that of the HDK.

    Args:
        version: 7.5.0.1.129, of npu-smi or of firmware/version.info.
        compatibility: what npu-smi says of driver and firmware: OK, NOK, UNKNOWN, NOT SUPPORT, or nothing.
        driver: its version.info; may be empty.
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
    """CANN against torch_npu; `remedy` is how this machine gets the right one."""
    if not version:
        return warning("its ascend_toolkit_install.info names no version", remedy, CANN)
    if in_series(version, CANN):
        return ok(version)
    if version_key(version) < version_key(CANN):
        return failed(f"{version}, older than torch_npu wants", remedy, CANN)
    return warning(f"{version}, newer than torch_npu was made for", remedy, CANN)


Key = tuple[tuple[int, int], ...]

_RANKS = {"alpha": -3, "beta": -2, "rc": -1, "post": 2}
"""Of words: what comes before the release that it stands in, and what comes after. Other words do not count."""
_END, _NUMBER = (0, 0), 1


def version_key(version: str) -> Key:
    """Sorts versions; takes any text. Case does not count."""
    parts: list[tuple[int, int]] = []
    for word, digits in re.findall(r"([a-z]+)?([0-9]*)", version.lower().split("+")[0]):
        number = int(digits[:18] or "0")
        if word in _RANKS:
            parts.append((_RANKS[word], number))
        elif digits:
            parts.append((_NUMBER, number))
    return (*parts, _END)


def in_series(version: str, series: str) -> bool:
    """Whether a version is one of a series or of its patches: 24.1.rc3.7 is of 24.1.RC3, 24.1.rc3.alpha1 is not."""
    key, wanted = version_key(version), version_key(series)[:-1]
    return key[: len(wanted)] == wanted and key[len(wanted)] >= _END
