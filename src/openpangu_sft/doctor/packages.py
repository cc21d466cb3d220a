"""Python and its packages against the pins of pyproject.toml, by their metadata: nothing is imported."""

from __future__ import annotations

import contextlib
import getpass
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import MANIFEST, parse_manifest, sha256_of
from openpangu_sft.doctor.finding import Finding, failed, ok, skipped, warning
from openpangu_sft.doctor.machine import IMAGE, Context
from openpangu_sft.training.mindspeed.sources import PATCHES, ROOT, SOURCES, compiled_helper, require_pinned
from openpangu_sft.util.ascend import parse_info

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMED = ("torch", "transformers", "numpy")
"""The ones whose version is shown also where all is well."""
TORCH_NPU = "torch-npu"
INSTALL = "make setup on a host; in a container take the image as it is"


def read_project() -> dict[str, Any]:
    """pyproject.toml, beside the code: in a clone and in the image."""
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return content


def pins(project: dict[str, Any], group: str = "") -> Iterator[Requirement]:
    """The requirements of the project, or of one of its dependency groups, that count on this machine."""
    for entry in project["dependency-groups"][group] if group else project["project"]["dependencies"]:
        if isinstance(entry, dict):
            yield from pins(project, entry["include-group"])
            continue
        requirement = Requirement(entry)
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def python(subject: Context) -> Finding:
    """The interpreter's version."""
    wanted = SpecifierSet(read_project()["project"]["requires-python"])
    found = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if not wanted.contains(platform.python_version(), prereleases=True):
        return failed(found, "make setup PYTHON=/path/to/python3.11", str(wanted))
    return ok(found)


def packages(subject: Context) -> Finding:
    """What the engine imports, but for torch_npu."""
    project, group = read_project(), "upstream" if subject.recipe.train.engine == "mindspeed" else ""
    wanted = [*pins(project), *(pins(project, group) if group else ())]
    wrong = [(one, version) for one in wanted if not _fits(one, version := installed(one.name))]
    if wrong:
        found = "\n".join(f"{one.name} {version or 'is not installed'}" for one, version in wrong)
        return failed(found, INSTALL, ", ".join(f"{one.name}{one.specifier}" for one, _ in wrong))
    named = ", ".join(f"{name} {installed(name)}" for name in NAMED)
    return ok(f"{named}; all {len(wanted)} as pinned")


def torch_npu(subject: Context) -> Finding:
    """torch_npu, which only the image installs."""
    if not subject.wants_npus:
        return skipped(subject.no_npus)
    (wanted,) = [one for one in pins(read_project(), "npu") if one.name == TORCH_NPU]
    version, expected = installed(TORCH_NPU), str(wanted.specifier)
    if not version and subject.machine.path(f"{IMAGE}/torch_npu").is_dir():
        return failed("in the image, but off Python's path, as no NPU is to be seen", "see device files", expected)
    if not version:
        return failed("not installed", "run in the image, which has it (make image or make load)", expected)
    return ok(version) if _fits(wanted, version) else failed(version, "take the image as it is", expected)


def installed(name: str) -> str:
    """Version of a package; empty where it is not installed."""
    for spelled in (name, canonicalize_name(name)):  # Python 3.9 does not find ruamel_yaml under ruamel.yaml
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(spelled)
    return ""


def _fits(requirement: Requirement, version: str) -> bool:
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def sources(subject: Context, target: Path = SOURCES, patches: Path = PATCHES) -> Finding:
    """MindSpeed-LLM and what it needs, for the mindspeed engine.

    Raises:
        UserError: they are not there, or of other pins.
    """
    if subject.recipe.train.engine != "mindspeed":
        return skipped(f"not needed: train.engine={subject.recipe.train.engine}")
    require_pinned(target, patches)
    manifest = parse_manifest(target / MANIFEST, "run make sources")
    changed = [name for name, entry in manifest.files.items() if not _same(target / name, entry["sha256"])]
    if changed:
        found = f"{changed[0]} in {target} is missing or has been changed" + _more(len(changed) - 1)
        return failed(found, f"remove {target}, and run make sources", "as make sources has left it")
    if not compiled_helper(target).is_file() and not shutil.which("g++", path=subject.machine.environment.get("PATH")):
        return failed("Megatron-LM's helper is not compiled, and g++ is not installed", "install g++")
    patched = ", ".join(f"{name} {len(chosen['patches'])}" for name, chosen in manifest.settings.items())
    return ok(f"{len(manifest.files):,} files as made; patches: {patched}")


def _same(file: Path, digest: str) -> bool:
    try:
        return sha256_of(file) == digest
    except OSError:
        return False


def _more(count: int) -> str:
    return f", and {count} more" if count else ""


NAME = "openpangu-sft"
"""The image's, as in scripts/image/names.sh."""
SECONDS = 15.0


def where(subject: Context) -> dict[str, str]:
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


def _where(subject: Context) -> str:
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


def docker(subject: Context) -> Finding:
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
