"""All checks, in the order in which they are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openpangu_sft.doctor import network, npus, packages, resources, stack, tensors
from openpangu_sft.doctor.finding import Finding, State, guarded
from openpangu_sft.doctor.machine import Context
from openpangu_sft.doctor.npu_smi import Chip

CHECKS: dict[str, Callable[[Context], Finding]] = {
    "image": packages.docker,
    "NPUs": npus.seen,
    "NPU health": npus.healthy,
    "NPUs free": npus.free,
    "NPU memory": npus.npu_memory,
    "device files": npus.device_files,
    "driver": stack.driver,
    "firmware": stack.firmware,
    "CANN": stack.cann,
    "Python": packages.python,
    "packages": packages.packages,
    "torch_npu": packages.torch_npu,
    "tensors": tensors.adds,
    "patches": packages.sources,
    "memory": resources.memory,
    "shm": resources.shared_memory,
    "disk": resources.disk,
    "ulimits": resources.limits,
    "clock": resources.clock,
    "inputs": resources.inputs,
    "checkpoint": resources.published,
    "ports": network.ports,
    "interfaces": network.interfaces,
    "NPU links": network.links,
    "other nodes": network.nodes,
}


def run_checks(subject: Context, begin: Callable[[str], object] = lambda name: None) -> list[Finding]:
    """Runs every check; `begin` is told the name of each before it runs."""
    findings = []
    for name, check in CHECKS.items():
        begin(name)
        findings.append(guarded(name, partial(check, subject)))
    return findings


STYLES = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red", State.SKIPPED: "dim"}


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many there are of each state."""
    return {state.value: sum(finding.state == state for finding in findings) for state in State}


def print_table(console: Console, where: dict[str, str], findings: Sequence[Finding]) -> None:
    """One row for each check. What to do stands below what was found, so that a narrow terminal has room for both."""
    for name, value in where.items():
        console.print(Text(f"{name + ':':9}{value}"), soft_wrap=True)
    table = Table(show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold", ratio=1)
    for finding in findings:
        style = STYLES[finding.state]
        cell = Text(finding.found, style="dim" if finding.state == State.SKIPPED else "")
        if finding.expected:
            cell.append(f"\nexpected: {finding.expected}")
        if finding.remedy:
            cell.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(finding.check), Text(finding.state.value, style=style), cell)
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts(findings).items()))


def as_json(where: dict[str, str], findings: Sequence[Finding], chips: Sequence[Chip]) -> str:
    """An object with `where`, `checks`, `npus` and `summary`; states are those of `State`."""
    checks = []
    for finding in findings:
        entry = {key: value for key, value in asdict(finding).items() if value}
        checks.append({"check": entry.pop("check"), **entry, "state": finding.state.value})
    content = {"where": where, "checks": checks, "npus": [asdict(chip) for chip in chips], "summary": counts(findings)}
    return json.dumps(content, ensure_ascii=False, indent=1)
