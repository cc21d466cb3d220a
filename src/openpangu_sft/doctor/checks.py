"""All checks in the order shown, and their results as a table or JSON."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Callable

from rich.console import Console
from rich.text import Text

from openpangu_sft import __version__
from openpangu_sft.doctor import ascend, network, npus, packages, resources, tensors
from openpangu_sft.doctor.machine import IMAGE, Context, Finding, State, guarded, skipped
from openpangu_sft.doctor.npu_smi import Chip
from openpangu_sft.util.ascend import parse_info

Check = Callable[[Context], Finding]


def on_npus(check: Check, listed: bool = False) -> Check:
    """Skips a check where training uses no NPUs or, if it needs npu-smi's list, where that is missing."""

    def checked(context: Context) -> Finding:
        if not context.wants_npus:
            train = context.recipe.train
            device = " train.device=cpu" if train.engine == "mindspeed" else ""
            return skipped(f"not needed by train.engine={train.engine}{device}")
        return skipped("not known, see NPUs") if listed and context.npus.problem else check(context)

    return checked


CHECKS: dict[str, Check] = {
    "image": packages.docker,
    "NPUs": on_npus(npus.seen),
    "NPU health": on_npus(npus.healthy, listed=True),
    "NPUs free": on_npus(npus.free, listed=True),
    "NPU memory": on_npus(npus.npu_memory),
    "device files": on_npus(npus.device_files),
    "driver": on_npus(ascend.driver),
    "firmware": on_npus(ascend.firmware),
    "CANN": on_npus(ascend.cann),
    "packages": packages.packages,
    "torch_npu": on_npus(packages.torch_npu),
    "tensors": tensors.adds,
    "patches": packages.sources,
    "memory": resources.memory,
    "shm": resources.shared_memory,
    "disk": resources.disk,
    "inputs": resources.inputs,
    "checkpoint": resources.published,
    "ports": network.ports,
    "interfaces": network.interfaces,
    "NPU links": on_npus(network.links),
    "other nodes": network.nodes,
}


def run_checks(context: Context, begin: Callable[[str], object] = lambda name: None) -> list[Finding]:
    """Calls `begin` with the name of each check before it runs."""
    findings = []
    for name, check in CHECKS.items():
        begin(name)
        findings.append(guarded(name, partial(check, context)))
    return findings


def where(context: Context) -> dict[str, str]:
    system = parse_info(context.machine.read("/etc/os-release")).get("pretty_name", "").strip('"')
    place = "in a container that is not of this project's image" if context.in_container else "on the host"
    if context.in_image:
        made = json.loads(context.machine.read(f"{IMAGE}/versions.json") or "")
        place = f"in the image {packages.NAME}:{__version__}-{made['target']}, commit {made['commit'][:12]}"
    return {
        "where": place,
        "user": context.machine.environment.get("USER") or str(os.geteuid()),
        "machine": platform.node(),
        "system": f"{system or platform.system()}, kernel {platform.release()}, {platform.machine()}",
        "recipe": f"train.engine={context.recipe.train.engine} train.device={context.recipe.train.device}, "
        f"{context.recipe.parallel.nodes} x {context.recipe.parallel.devices_per_node} processes",
    }


STYLES = {State.OK: "green", State.WARNING: "yellow", State.FAILED: "bold red", State.SKIPPED: "dim"}


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    return {state.value: sum(finding.state == state for finding in findings) for state in State}


def print_findings(console: Console, where: dict[str, str], findings: Sequence[Finding]) -> None:
    """Columns without a frame: lines are wrapped between words, and a path longer than the console stays whole."""
    for name, value in where.items():
        console.print(Text(f"{name + ':':9}{value}"), soft_wrap=True)
    console.print()
    names, states = max(map(len, CHECKS)), max(len(state.value) for state in State)
    for finding in findings:
        state = finding.state
        left = Text.assemble(f"{finding.check:{names}}  ", (f"{state.value:{states}}", STYLES[state]), "  ")
        details = [(line, "dim" if state == State.SKIPPED else "") for line in finding.found.splitlines()]
        details += [(f"expected: {finding.expected}", "")] * bool(finding.expected)
        details += [(f"-> {finding.remedy}", "bold")] * bool(finding.remedy)
        width = max(console.width - len(left), 1)
        for detail, style in details:
            for line in textwrap.wrap(detail, width, break_long_words=False, break_on_hyphens=False):
                console.print(left + Text(line, style), soft_wrap=True)
                left = Text(" " * len(left))
    console.print()
    console.print(", ".join(f"{count} {state}" for state, count in counts(findings).items()))


def as_json(where: dict[str, str], findings: Sequence[Finding], chips: Sequence[Chip]) -> str:
    checks = [{"check": one.check, **{key: value for key, value in asdict(one).items() if value}} for one in findings]
    content = {"where": where, "checks": checks, "npus": [asdict(chip) for chip in chips], "summary": counts(findings)}
    return json.dumps(content, ensure_ascii=False, indent=1)
