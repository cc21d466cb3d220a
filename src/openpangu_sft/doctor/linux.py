"""What Linux says of memory, control groups, mounts and ports under /proc and /sys. Pure: text to values."""

from __future__ import annotations

import re
from pathlib import PurePath, PurePosixPath
from typing import NamedTuple, Optional


def memory_available(meminfo: str) -> Optional[int]:
    """Bytes available without swapping: MemAvailable of /proc/meminfo, see proc(5)."""
    match = re.search(r"^MemAvailable:\s+([0-9]{1,15}) kB$", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def control_groups(cgroup: Optional[str], controller: str) -> list[str]:
    """A process's control group and its ancestors, as paths below their mount, the deepest first.

    Only `/` where the path leads out of the mount (/../x), as in a container whose namespace begins lower. `cgroup` is
    /proc/self/cgroup, see cgroups(7): lines of hierarchy:controllers:path. The controller is empty for v2, which has
    one hierarchy for all.
    """
    group = PurePosixPath("/")
    for controllers, path in re.findall(r"^[^:\n]*:([^:\n]*):/+(.*)$", cgroup or "", re.MULTILINE):
        if controller in controllers.split(","):
            group = PurePosixPath("/", path)
    if ".." in group.parts:
        group = PurePosixPath("/")
    return [str(each) for each in (group, *group.parents)]


def inactive_file(stat: Optional[str]) -> int:
    """Bytes of cached files that a control group and its descendants can release, from its memory.stat.

    v1 counts descendants in total_inactive_file only; v2 has inactive_file, which includes them.
    """
    found = dict(re.findall(r"^((?:total_)?inactive_file) ([0-9]{1,18})$", stat or "", re.MULTILINE))
    return int(found.get("total_inactive_file") or found.get("inactive_file") or 0)


def limit(text: Optional[str]) -> Optional[int]:
    """Bytes of a control group's file; None for max, a missing file, and v1's value for “unlimited”."""
    number = (text or "").strip()
    if not re.fullmatch(r"[0-9]{1,20}", number) or int(number) >= 1 << 60:
        return None
    return int(number)


class Mount(NamedTuple):
    """Mount point and type of a file system."""

    point: str
    kind: str


def mount_of(path: PurePath, mountinfo: str) -> Optional[Mount]:
    """A path's mount by /proc/self/mountinfo, see proc(5): the deepest one, the last of equal ones."""
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
    found = re.findall(r"([0-9]{1,5})(?:[-\s]+([0-9]{1,5}))?", text or "")
    return [range(int(first), int(last or first) + 1) for first, last in found]
