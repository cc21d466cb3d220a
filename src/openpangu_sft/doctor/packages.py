"""Python and its packages against the pins of pyproject.toml, by their metadata: nothing is imported."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from openpangu_sft.doctor.finding import Finding, failed, ok, skipped
from openpangu_sft.doctor.subject import IMAGE, Subject
from openpangu_sft.upstream import ROOT

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


def python(subject: Subject) -> Finding:
    """The interpreter's version."""
    wanted = SpecifierSet(read_project()["project"]["requires-python"])
    found = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if not wanted.contains(platform.python_version(), prereleases=True):
        return failed(found, "make setup PYTHON=/path/to/python3.11", str(wanted))
    return ok(found)


def packages(subject: Subject) -> Finding:
    """What the engine imports, but for torch_npu."""
    project, group = read_project(), "upstream" if subject.recipe.train.engine == "mindspeed" else ""
    wanted = [*pins(project), *(pins(project, group) if group else ())]
    wrong = [(one, version) for one in wanted if not _fits(one, version := installed(one.name))]
    if wrong:
        found = "\n".join(f"{one.name} {version or 'is not installed'}" for one, version in wrong)
        return failed(found, INSTALL, ", ".join(f"{one.name}{one.specifier}" for one, _ in wrong))
    named = ", ".join(f"{name} {installed(name)}" for name in NAMED)
    return ok(f"{named}; all {len(wanted)} as pinned")


def torch_npu(subject: Subject) -> Finding:
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
