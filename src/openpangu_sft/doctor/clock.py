"""Whether the clock can be right: certificates, logs and jobs of several machines depend on it."""

from __future__ import annotations

import time
from pathlib import Path

from openpangu_sft.doctor.finding import Finding, failed, ok, warning
from openpangu_sft.doctor.subject import Subject

CODE = Path(__file__).parents[1]
SECONDS = 5.0
DAY = 86400.0


def clock(subject: Subject) -> Finding:
    """The time against that of this code's own files, and whether systemd says that it is kept by NTP."""
    now = time.time()
    newest = max(file.stat().st_mtime for file in CODE.rglob("*.py"))
    shown = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(now))
    if now < newest - DAY:
        made = time.strftime("%Y-%m-%d", time.localtime(newest))
        return failed(f"{shown}, and this code's files are of {made}", "set the clock", "a time after that")
    program = subject.machine.program("timedatectl")
    ran = subject.machine.run(program, "show", "-p", "NTPSynchronized", "--value", seconds=SECONDS) if program else None
    answer = ran.text.strip() if ran and not ran.problem else ""
    if answer == "no" and subject.recipe.parallel.nodes > 1:
        return warning(f"{shown}, not kept by NTP", "timedatectl set-ntp true, on every machine", "one time everywhere")
    kept = {"yes": "kept by NTP", "no": "not kept by NTP"}.get(answer, "whether NTP keeps it is not known here")
    return ok(f"{shown}; {kept}")
