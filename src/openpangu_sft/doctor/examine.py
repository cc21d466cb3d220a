"""All checks, in the order in which they are shown."""

from __future__ import annotations

from functools import partial
from typing import Callable

from openpangu_sft.doctor import clock, fit, network, npus, packages, patches, place, resources, stack, tensors
from openpangu_sft.doctor.finding import Finding, guarded
from openpangu_sft.doctor.subject import Subject

CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "image": place.docker,
    "NPUs": npus.seen,
    "NPU health": npus.healthy,
    "NPUs free": npus.free,
    "NPU memory": fit.npu_memory,
    "device files": npus.device_files,
    "driver": stack.driver,
    "firmware": stack.firmware,
    "CANN": stack.cann,
    "Python": packages.python,
    "packages": packages.packages,
    "torch_npu": packages.torch_npu,
    "tensors": tensors.adds,
    "patches": patches.sources,
    "memory": resources.memory,
    "shm": resources.shared_memory,
    "disk": resources.disk,
    "ulimits": resources.limits,
    "clock": clock.clock,
    "inputs": resources.inputs,
    "checkpoint": resources.published,
    "ports": network.ports,
    "interfaces": network.interfaces,
    "NPU links": network.links,
    "other nodes": network.nodes,
}


def examine(subject: Subject, begin: Callable[[str], object] = lambda name: None) -> list[Finding]:
    """Runs every check; `begin` is told the name of each before it runs."""
    findings = []
    for name, check in CHECKS.items():
        begin(name)
        findings.append(guarded(name, partial(check, subject)))
    return findings
