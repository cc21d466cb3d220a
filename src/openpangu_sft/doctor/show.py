"""The findings for people, as a table, and for machines, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openpangu_sft.doctor.finding import Finding, State
from openpangu_sft.doctor.npu_smi import Chip

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
