"""Where the Ascend driver and CANN write down their versions: for doctor, and for the record of a run.

Formats as in the files beside the recordings of tests/npu_smi: driver/version.info and ascend_toolkit_install.info,
lines `name=value`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

ASCEND = "/usr/local/Ascend"


def parse_info(text: Optional[str]) -> dict[str, str]:
    """Lines `name=value`; without case in the names, as the driver's file says Version and CANN's version."""
    fields = {}
    for line in (text or "").splitlines():
        name, sign, value = line.partition("=")
        if sign:
            fields[name.strip().lower()] = value.strip()
    return fields


def toolkit_home(environment: Mapping[str, str]) -> str:
    """CANN's folder, as its set_env.sh has set it; empty where it was not sourced."""
    return environment.get("ASCEND_TOOLKIT_HOME") or environment.get("ASCEND_HOME_PATH") or ""


def install_info(home: Path) -> Optional[str]:
    """The text of ascend_toolkit_install.info, which lies in a folder named by the machine, as aarch64-linux."""
    return next((_text(file) for file in sorted(home.glob("*-linux/ascend_toolkit_install.info"))), None)


def _text(file: Path) -> Optional[str]:
    """None where it is not there, or not for this user to read."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return None


def versions(environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """Versions of the driver and of CANN, as far as their files are there.

    Args:
        environment: of the process.
        root: what stands for /.
    """
    driver, home = root / f"{ASCEND}/driver/version.info".lstrip("/"), toolkit_home(environment)
    texts = {
        "Ascend driver": _text(driver),
        "CANN": install_info(root / home.lstrip("/")) if home else None,
    }
    found = {name: parse_info(text).get("version", "") for name, text in texts.items()}
    return {name: version for name, version in found.items() if version}


VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"


def visible(environment: Mapping[str, str], count: int) -> list[int]:
    """Places of the NPUs that a process sees, of `count` that there are; it counts them anew, from 0.

    None where the numbers do not ascend or the variable is set, but empty.
    """
    text = environment.get(VARIABLE)
    if text is None:
        return list(range(count))
    given: list[int] = []
    for word in text.split(","):
        digits = word[: len(word) - len(word.lstrip("0123456789"))][:9]
        if not digits or int(digits) >= count:
            break
        given.append(int(digits))
        if digits != word:
            break
    return given if given == sorted(set(given)) else []
