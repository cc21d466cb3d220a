"""What the system's own files say, in fields. Pure: any text gives an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Optional


def memory_available(meminfo: str) -> Optional[int]:
    """Bytes that a new program may take without swapping: MemAvailable of /proc/meminfo, see proc(5)."""
    match = re.search(r"^MemAvailable:\s+([0-9]{1,15}) kB$", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def inactive_file(stat: Optional[str]) -> int:
    """Bytes of cached files that a control group gives back when asked: of its memory.stat, in both versions."""
    match = re.search(r"^(?:total_)?inactive_file ([0-9]{1,18})$", stat or "", re.MULTILINE)
    return int(match[1]) if match else 0


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
