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
    lines = (line.partition("=") for line in (text or "").splitlines())
    return {name.strip().lower(): value.strip() for name, sign, value in lines if sign}


def toolkit_home(environment: Mapping[str, str]) -> str:
    """CANN's folder as set by its set_env.sh; empty where that was not sourced."""
    return environment.get("ASCEND_TOOLKIT_HOME") or environment.get("ASCEND_HOME_PATH") or ""


def cann_info(environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """Fields of ascend_toolkit_install.info of the CANN whose environment is set; none where there is none.

    It lies in a folder named by the machine, such as aarch64-linux.
    """
    home = toolkit_home(environment)
    files = (root / home.lstrip("/")).glob("*-linux/ascend_toolkit_install.info") if home else ()
    return parse_info(next(map(text_of, sorted(files)), None))


def driver_info(root: Path = Path("/")) -> dict[str, str]:
    """Fields of the driver's version.info; none where it cannot be read."""
    return parse_info(text_of(root / f"{ASCEND}/driver/version.info".lstrip("/")))


def text_of(file: Path) -> Optional[str]:
    """A file's text; None where the file is missing or not readable by this user."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return None


def versions(environment: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """Versions of the driver and CANN, as far as their files exist below `root`."""
    found = {"Ascend driver": driver_info(root), "CANN": cann_info(environment, root)}
    return {name: info["version"] for name, info in found.items() if info.get("version")}


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
