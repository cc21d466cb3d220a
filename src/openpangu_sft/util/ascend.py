"""Version files of the Ascend driver and CANN, and the NPUs that CANN makes visible.

Formats as in tests/npu_smi: driver/version.info and ascend_toolkit_install.info, lines `name=value`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

ASCEND = "/usr/local/Ascend"
VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"


def parse_info(text: Optional[str]) -> dict[str, str]:
    """Lines `name=value`, names in lower case: the driver's file has Version, CANN's version."""
    fields = {}
    for line in (text or "").splitlines():
        name, sign, value = line.partition("=")
        if sign:
            fields[name.strip().lower()] = value.strip()
    return fields


def toolkit_home(environment: Mapping[str, str]) -> str:
    """CANN's folder as set by its set_env.sh; empty where that was not sourced."""
    return environment.get("ASCEND_TOOLKIT_HOME") or environment.get("ASCEND_HOME_PATH") or ""


def install_info(home: Path) -> Optional[str]:
    """The text of ascend_toolkit_install.info, which lies in a folder named by the machine, such as aarch64-linux."""
    return next((text_of(file) for file in sorted(home.glob("*-linux/ascend_toolkit_install.info"))), None)


def text_of(file: Path) -> Optional[str]:
    """A file's text; None where the file is missing or not readable by this user."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return None


def versions(environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """Versions of the driver and CANN, as far as their files exist below `root`."""
    driver, home = root / f"{ASCEND}/driver/version.info".lstrip("/"), toolkit_home(environment)
    texts = {"Ascend driver": text_of(driver), "CANN": install_info(root / home.lstrip("/")) if home else None}
    found = {name: parse_info(text).get("version", "") for name, text in texts.items()}
    return {name: version for name, version in found.items() if version}


def visible(environment: Mapping[str, str], count: int) -> list[int]:
    """Indices of the NPUs that a process sees, of `count`; the process itself numbers them from 0.

    Empty where the numbers do not ascend or the variable is set but empty.
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
