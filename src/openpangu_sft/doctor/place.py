"""Where this runs: image, other container or host; and whether a Docker engine has the image."""

from __future__ import annotations

import getpass
import json
import platform
from typing import Any

from openpangu_sft import __version__
from openpangu_sft.ascend_files import parse_info
from openpangu_sft.doctor.finding import Finding, ok, skipped, warning
from openpangu_sft.doctor.subject import IMAGE, Subject

NAME = "openpangu-sft"
"""The image's, as in scripts/image/names.sh."""
SECONDS = 15.0


def where(subject: Subject) -> dict[str, str]:
    """What the table begins with."""
    system = parse_info(subject.machine.read("/etc/os-release")).get("pretty_name", "").strip('"')
    return {
        "where": _where(subject),
        "user": _user(),
        "machine": platform.node(),
        "system": f"{system or platform.system()}, kernel {platform.release()}, {platform.machine()}",
        "recipe": f"train.engine={subject.recipe.train.engine} train.device={subject.recipe.train.device}, "
        f"{subject.recipe.parallel.nodes} x {subject.recipe.parallel.devices_per_node} processes",
    }


def _where(subject: Subject) -> str:
    if subject.in_image:
        try:
            made: dict[str, Any] = json.loads(subject.machine.read(f"{IMAGE}/versions.json") or "")
            return f"in the image {NAME}:{__version__}-{made['target']}, commit {str(made['commit'])[:12]}"
        except (ValueError, KeyError, TypeError):
            return f"in the image {NAME}:{__version__}"
    return "in a container that is not of this project's image" if subject.in_container else "on the host"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without an entry in passwd
        return "without a name"


def docker(subject: Subject) -> Finding:
    """Whether an engine answers and has this version's image, where that is how stages would run."""
    if subject.in_image:
        return skipped("not needed: this is the image")
    target = "npu" if subject.wants_npus else "cpu"
    client = subject.machine.program(subject.machine.environment.get("DOCKER") or "docker")
    remedy = f"make image TARGET={target}, or make load of a hand-over"
    ran = subject.machine.run(client, "version", "--format", "{{.Server.Version}}", seconds=SECONDS) if client else None
    if client is None or ran is None or ran.problem:
        found = "docker is not installed" if client is None else "no Docker engine answers"
        if not subject.wants_npus:
            return skipped(f"not needed: {found}, so stages run in Python's environment")
        return warning(found, f"start one, then {remedy}; without it all must be installed here")
    image = f"{NAME}:{__version__}-{target}"
    if subject.machine.run(client, "image", "inspect", image, seconds=SECONDS).problem:
        if not subject.wants_npus:
            return skipped(f"not needed: the engine has no {image}, so stages run in Python's environment")
        return warning(f"the engine has no {image}", remedy)
    return ok(f"{image}, engine {ran.text.strip()}")
