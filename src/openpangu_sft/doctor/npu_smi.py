"""What `npu-smi` prints, in fields. Everything here is pure: any text gives an answer, be it an empty one.

Formats as in the recordings of tests/npu_smi, which says where they are from. Meaning of the fields: Huawei's npu-smi
command reference, https://www.hiascend.com/document/detail/zh/Atlas%20200I%20A2/24.1.RC3/re/npu/npusmi_028.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePath, PurePosixPath
from typing import Optional, Union

_HEADER = re.compile(r"npu-smi\s+\S+\s+Version:\s*([^\s|]+)")
_BUS = re.compile(r"[0-9A-Fa-f]+:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]|NA")
_PAIR = re.compile(r"(\d{1,12})\s*/\s*(\d{1,12})")


@dataclass(frozen=True)
class Chip:
    """One chip: two rows of the first table. A 910B card has one chip; other cards may have two.

    Args:
        npu: number of the card (NPU ID).
        name: 910B1, 310P3…
        health: OK, Warning, Alarm, Critical or UNKNOWN (not there, or not started).
        power: in watts; None where it is not told.
        temperature: in degrees Celsius.
        chip: number of the chip on its card.
        bus: PCI address.
        aicore: percent of the cores in use.
        used, total: memory in MB; that of the HBM where there is one.
        phy: column Phy-ID or Device; None where the table has none, as that of the 910B, whose cards have one chip.
    """

    npu: int
    name: str
    health: str
    power: Optional[float] = None
    temperature: Optional[int] = None
    chip: int = 0
    bus: str = ""
    aicore: Optional[int] = None
    used: Optional[int] = None
    total: Optional[int] = None
    phy: Optional[int] = None

    @property
    def device(self) -> int:
        """N of /dev/davinciN, which NPUS= of make and `hccn_tool -i` take too."""
        return self.npu if self.phy is None else self.phy


@dataclass(frozen=True)
class Process:
    """A process that holds an NPU; its memory there in MB. In a container some have no name."""

    npu: int
    pid: int
    name: str
    memory: int
    chip: int = 0


@dataclass(frozen=True)
class Listing:
    """`npu-smi info`: the driver's version and both tables.

    Args:
        processes: None where the second table is missing, so that nothing is known of them.
    """

    driver: str
    chips: tuple[Chip, ...]
    processes: Optional[tuple[Process, ...]]

    def name(self, one: Union[Chip, Process]) -> str:
        """NPU 3, or NPU 3 chip 1 where cards have several."""
        return f"NPU {one.npu} chip {one.chip}" if any(chip.chip for chip in self.chips) else f"NPU {one.npu}"


def parse_info(text: str) -> Listing:
    """Reads `npu-smi info`."""
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
    """The first row of a chip has its health in the middle, the second one its bus."""
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
    """Lines `name : value`, as of `npu-smi info -t board -i N` and of hccn_tool."""
    fields = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields[name.strip()] = value.strip()
    return fields


def reason(text: str) -> tuple[str, str]:
    """Why npu-smi gives no list, and what to do; from what it says then.

    -8020 and -8005 are DCMI's codes for a device in use and a driver that does not answer.
    """
    said = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
    if "-8020" in text:
        return said, "end the other container that has these NPUs, or give this one others (make: NPUS=0,1)"
    if "shared libraries" in text:
        return said, "mount the driver's folder /usr/local/Ascend/driver/lib64 too, as make does"
    if "dcmi" in text or "DrvMng" in text:
        return said, "as root, see dmesg; reboot after an update of driver or firmware, or install both again"
    return said, "run npu-smi info yourself; is the driver installed and loaded (lsmod | grep drv_)?"


def memory_available(meminfo: str) -> Optional[int]:
    """Bytes that a new program may take without swapping: MemAvailable of /proc/meminfo, see proc(5)."""
    match = re.search(r"^MemAvailable:\s+([0-9]{1,15}) kB$", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def control_groups(cgroup: Optional[str], controller: str) -> list[str]:
    """Control groups whose limits a process is under: its own one and all above it, as paths below their mount.

    Args:
        cgroup: /proc/self/cgroup, see cgroups(7): lines of hierarchy:controllers:path.
        controller: memory for that hierarchy of v1; empty for v2, which has one for all.

    Returns:
        The deepest first, `/` last. Only `/` where the path leads out of the mount (/../x), as in a container whose
        namespace begins lower: what is mounted there is then all that is to be seen.
    """
    group = PurePosixPath("/")
    for line in (cgroup or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/") and controller in controllers.split(","):
            group = PurePosixPath("/" + path.lstrip("/"))
    if ".." in group.parts:
        group = PurePosixPath("/")
    return [str(each) for each in (group, *group.parents)]


def inactive_file(stat: Optional[str]) -> int:
    """Bytes of cached files that a control group gives back when asked, those of the groups below it among them.

    Of its memory.stat: v1 counts the group by itself in inactive_file, and with all below it in total_inactive_file;
    v2 has inactive_file only, with all below it.
    """
    found = dict(re.findall(r"^((?:total_)?inactive_file) ([0-9]{1,18})$", stat or "", re.MULTILINE))
    return int(found.get("total_inactive_file") or found.get("inactive_file") or 0)


def limit(text: Optional[str]) -> Optional[int]:
    """A number of bytes of a control group; None for max, for no file, and for v1's “as much as there is”."""
    number = (text or "").strip()
    if not re.fullmatch(r"[0-9]{1,20}", number) or int(number) >= 1 << 60:
        return None
    return int(number)


@dataclass(frozen=True)
class Mount:
    """A mounted file system: where, and of which kind."""

    point: str
    kind: str


def mount_of(path: PurePath, mountinfo: str) -> Optional[Mount]:
    """The mount that a path lies in, by /proc/self/mountinfo, see proc(5): the deepest one, the last of equal ones."""
    found: Optional[Mount] = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or not kinds[0]:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        if PurePath(point) in (path, *path.parents) and (found is None or len(point) >= len(found.point)):
            found = Mount(point, kinds[0])
    return found


def port_ranges(text: Optional[str]) -> list[range]:
    """Ports of ip_local_reserved_ports (60000-60015,61000) or ip_local_port_range (32768 60999)."""
    ranges = []
    for first, last in re.findall(r"([0-9]{1,5})(?:[-\s]+([0-9]{1,5}))?", text or ""):
        ranges.append(range(int(first), int(last or first) + 1))
    return ranges
