"""Parses the output of `npu-smi`. Pure; any text is accepted and may give an empty result.

Formats as in the recordings of tests/npu_smi, which names their origin. Fields: Huawei's npu-smi command reference,
https://www.hiascend.com/document/detail/zh/Atlas%20200I%20A2/24.1.RC3/re/npu/npusmi_028.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional, Union

_CHIP = re.compile(
    r"^\|[ ]*(\d{1,6})[ ]+([^|\s][^|\n]*)\|([^|:\n]*)\|[^|\n]*\|\s*"  # NPU, name, health
    r"(?:\|[ ]*(\d{1,6})(?:[ ]+(\d{1,6}))?[ ]*\|[ ]*(?:NA|[0-9A-F]+:)[^|\n]*\|([^|\n]*)\|\s*)?$",  # chip, Phy-ID; HBM
    re.MULTILINE | re.ASCII | re.IGNORECASE,
)
_PROCESS = re.compile(
    r"^\|[ ]*(\d{1,6})(?:[ ]+(\d{1,6}))?[ ]*\|[ ]*(\d{1,12})[ ]*\|([^|\n]*)\|[ ]*(\d{0,12})", re.MULTILINE | re.ASCII
)

REMEDIES = {
    "-8020": "end the other container that has these NPUs, or give this one others (make: NPUS=0,1)",
    "shared libraries": "mount the driver's folder /usr/local/Ascend/driver/lib64 too, as make does",
    "dcmi": "as root, see dmesg; reboot after an update of driver or firmware, or install both again",
    "DrvMng": "as root, see dmesg; reboot after an update of driver or firmware, or install both again",
    "": "run npu-smi info yourself; is the driver installed and loaded (lsmod | grep drv_)?",
}
"""By a part of npu-smi's output. DCMI's codes: -8020 a device in use, -8005 a driver that does not answer."""


@dataclass(frozen=True)
class Chip:
    """Two rows of the first table. A 910B card has one chip; other cards may have two."""

    npu: int  # number of the card (NPU ID)
    name: str  # 910B1, 310P3…
    health: str  # OK, Warning, Alarm, Critical or UNKNOWN (missing or not started)
    chip: int = 0  # number on its card
    used: Optional[int] = None  # MB, of the HBM where there is one
    total: Optional[int] = None  # likewise
    phy: Optional[int] = None  # column Phy-ID or Device; None for the 910B, whose table has none

    @property
    def device(self) -> int:
        """N of /dev/davinciN, which NPUS= of make and `hccn_tool -i` take too."""
        return self.npu if self.phy is None else self.phy


@dataclass(frozen=True)
class Process:
    """A process on an NPU; its memory there in MB. In a container the name may be empty."""

    npu: int
    pid: int
    name: str
    memory: int
    chip: int = 0


@dataclass(frozen=True)
class Listing:
    """`npu-smi info`: the driver's version and both tables; or why it lists nothing, and the remedy."""

    driver: str = ""
    chips: tuple[Chip, ...] = ()
    processes: Optional[tuple[Process, ...]] = None  # None where the second table is missing
    problem: str = ""
    remedy: str = ""

    def name(self, one: Union[Chip, Process]) -> str:
        """NPU 3, or NPU 3 chip 1 where cards have several."""
        return f"NPU {one.npu} chip {one.chip}" if any(chip.chip for chip in self.chips) else f"NPU {one.npu}"


def parse_info(text: str) -> Listing:
    header = re.search(r"npu-smi\s+\S+\s+Version:\s*([^\s|]+)", text)
    above, second, below = text.partition("| Process id")
    chips = tuple(_chip(*match.groups()) for match in _CHIP.finditer(above))
    if not chips:
        said = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
        remedy = next(remedy for part, remedy in REMEDIES.items() if part in text)
        return Listing(problem=f"npu-smi info: {said}", remedy=remedy)
    processes = tuple(
        Process(int(npu), int(pid), name.strip(), int(memory or 0), int(chip or 0))
        for npu, chip, pid, name, memory in _PROCESS.findall(below)
    )
    return Listing(header[1] if header else "", chips, processes if second else None)


def _chip(npu: str, name: str, health: str, chip: Optional[str], phy: Optional[str], memory: Optional[str]) -> Chip:
    pairs = re.findall(r"(\d{1,12})\s*/\s*(\d{1,12})", memory or "", re.ASCII)
    used, total = next((map(int, pair) for pair in reversed(pairs) if int(pair[1])), (None, None))
    return Chip(int(npu), name.strip(), health.strip(), int(chip or 0), used, total, int(phy) if phy else None)


def parse_fields(text: str) -> dict[str, str]:
    """Lines `name : value` of `npu-smi info -t board -i N` and hccn_tool."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}
