"""Parses the output of `npu-smi`. Pure; any text is accepted and may give an empty result.

Formats as in the recordings of tests/npu_smi, which names their origin. Fields: Huawei's npu-smi command reference,
https://www.hiascend.com/document/detail/zh/Atlas%20200I%20A2/24.1.RC3/re/npu/npusmi_028.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Optional, Union

_HEADER = re.compile(r"npu-smi\s+\S+\s+Version:\s*([^\s|]+)")
_BUS = re.compile(r"[0-9A-Fa-f]+:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]|NA")
_PAIR = re.compile(r"(\d{1,12})\s*/\s*(\d{1,12})")


@dataclass(frozen=True)
class Chip:
    """Two rows of the first table. A 910B card has one chip; other cards may have two."""

    npu: int  # number of the card (NPU ID)
    name: str  # 910B1, 310P3…
    health: str  # OK, Warning, Alarm, Critical or UNKNOWN (missing or not started)
    power: Optional[float] = None  # watts
    temperature: Optional[int] = None  # degrees Celsius
    chip: int = 0  # number on its card
    bus: str = ""  # PCI address
    aicore: Optional[int] = None  # utilization in percent
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
    """`npu-smi info`: the driver's version and both tables."""

    driver: str = ""
    chips: tuple[Chip, ...] = ()
    processes: Optional[tuple[Process, ...]] = None  # None where the second table is missing

    def name(self, one: Union[Chip, Process]) -> str:
        """NPU 3, or NPU 3 chip 1 where cards have several."""
        return f"NPU {one.npu} chip {one.chip}" if any(chip.chip for chip in self.chips) else f"NPU {one.npu}"


def parse_info(text: str) -> Listing:
    header = _HEADER.search(text)
    chips: list[Chip] = []
    processes: Optional[list[Process]] = None
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) > 1 and cells[1].startswith("Process id"):
            processes = []
        elif processes is not None:
            if process := _process(cells):
                processes.append(process)
        elif len(cells) == 3:
            _add_row(chips, cells)
    return Listing(header[1] if header else "", tuple(chips), None if processes is None else tuple(processes))


def _add_row(chips: list[Chip], cells: list[str]) -> None:
    """A chip's first row has its health in the middle cell, the second its bus."""
    numbers = cells[2].split()
    if _BUS.fullmatch(cells[1]):
        if chips and not chips[-1].bus:
            pairs, ids = _PAIR.findall(cells[2]), cells[0].split()
            used, total = next((pair for pair in reversed(pairs) if int(pair[1])), (None, None))
            chips[-1] = replace(
                chips[-1],
                chip=_integer(ids[:1]) or 0,
                bus=cells[1],
                aicore=_integer(numbers[:1]),
                used=None if used is None else int(used),
                total=None if total is None else int(total),
                phy=_integer(ids[1:2]),
            )
    elif match := re.fullmatch(r"(\d{1,6})\s+(\S.*)", cells[0]):
        power = re.fullmatch(r"\d{1,6}(\.\d+)?", numbers[0]) if numbers else None
        watts = float(power[0]) if power else None
        chips.append(Chip(int(match[1]), match[2], cells[1], watts, _integer(numbers[1:2])))


def _process(cells: list[str]) -> Optional[Process]:
    ids, pid = cells[0].split(), _integer(cells[1:2])
    npu = _integer(ids[:1])
    if npu is None or pid is None:
        return None
    name, memory = cells[2] if len(cells) > 2 else "", _integer(cells[3:4]) or 0
    return Process(npu, pid, name, memory, _integer(ids[1:2]) or 0)


def _integer(words: list[str]) -> Optional[int]:
    return int(words[0]) if words and re.fullmatch(r"[0-9]{1,12}", words[0]) else None


def parse_fields(text: str) -> dict[str, str]:
    """Lines `name : value` of `npu-smi info -t board -i N` and hccn_tool."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def reason(text: str) -> tuple[str, str]:
    """Why npu-smi lists nothing, and the remedy, from its output.

    DCMI's codes: -8020 a device in use, -8005 a driver that does not answer.
    """
    said = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
    if "-8020" in text:
        return said, "end the other container that has these NPUs, or give this one others (make: NPUS=0,1)"
    if "shared libraries" in text:
        return said, "mount the driver's folder /usr/local/Ascend/driver/lib64 too, as make does"
    if "dcmi" in text or "DrvMng" in text:
        return said, "as root, see dmesg; reboot after an update of driver or firmware, or install both again"
    return said, "run npu-smi info yourself; is the driver installed and loaded (lsmod | grep drv_)?"
