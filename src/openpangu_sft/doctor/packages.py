"""Software that stages run on: the image, Python, its packages (by metadata, without importing) and patched sources."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import MANIFEST, parse_manifest, sha256_of
from openpangu_sft.doctor.machine import Context, Finding, failed, ok, skipped, warning
from openpangu_sft.training.mindspeed.sources import PATCHES, ROOT, SOURCES, compiled_helper, require_pinned

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "openpangu-sft"  # the image's, as in scripts/image/names.sh
NAMED = ("torch", "transformers", "numpy")  # packages whose versions are always shown
INSTALL = "make setup on a host; in a container take the image as it is"


def pins(group: str = "") -> Iterator[Requirement]:
    """Requirements in pyproject.toml (of the clone or the image), or in one of its groups, whose markers hold here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for entry in project["dependency-groups"][group] if group else project["project"]["dependencies"]:
        if isinstance(entry, str):  # not a group that this one includes
            requirement = Requirement(entry)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def packages(context: Context) -> Finding:
    """What the engine imports, except torch_npu."""
    wanted = [*pins(), *(pins("upstream") if context.recipe.train.engine == "mindspeed" else ())]
    wrong = [(one, version) for one in wanted if not _fits(one, version := installed(one.name))]
    if wrong:
        found = "\n".join(f"{one.name} {version or 'is not installed'}" for one, version in wrong)
        return failed(found, INSTALL, ", ".join(f"{one.name}{one.specifier}" for one, _ in wrong))
    named = ", ".join(f"{name} {installed(name)}" for name in NAMED)
    return ok(f"{named}; all {len(wanted)} as pinned, in {sys.executable}")


def torch_npu(context: Context) -> Finding:
    (wanted,) = [one for one in pins("npu") if one.name == "torch-npu"]
    version = installed(wanted.name)
    if not version and context.in_image:
        return failed("not on Python's path, as no NPU is visible", "see device files", str(wanted.specifier))
    if not _fits(wanted, version):
        remedy = "run in the image as it is, which has it (make image or make load)"
        return failed(version or "not installed", remedy, str(wanted.specifier))
    return ok(version)


def installed(name: str) -> str:
    """Version of a package; empty where it is not installed."""
    for spelled in (name, canonicalize_name(name)):  # Python 3.9 does not find ruamel_yaml under ruamel.yaml
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(spelled)
    return ""


def _fits(requirement: Requirement, version: str) -> bool:
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def sources(context: Context, target: Path = SOURCES, patches: Path = PATCHES) -> Finding:
    """MindSpeed-LLM and its dependencies, for the mindspeed engine; raises `UserError` unless they are as pinned."""
    if context.recipe.train.engine != "mindspeed":
        return skipped(f"not needed: train.engine={context.recipe.train.engine}")
    require_pinned(target, patches)
    manifest = parse_manifest(target / MANIFEST, "run make sources")
    sums = {name: sha256_of(target / name) for name in manifest.files if (target / name).is_file()}
    if changed := [name for name, entry in manifest.files.items() if sums.get(name) != entry["sha256"]]:
        found = f"missing or changed in {target}: {', '.join(changed)}"
        return failed(found, f"remove {target}, and run make sources", "as make sources left it")
    if not compiled_helper(target).is_file() and not shutil.which("g++", path=context.machine.environment.get("PATH")):
        return failed("Megatron-LM's helper is not compiled, and g++ is not installed", "install g++")
    patched = ", ".join(f"{name} {len(chosen['patches'])}" for name, chosen in manifest.settings.items())
    return ok(f"{len(manifest.files):,} files as made; patches: {patched}")


def docker(context: Context) -> Finding:
    """Whether a Docker engine answers and has this version's image."""
    if context.in_image:
        return skipped("not needed: this is the image")
    target = "npu" if context.wants_npus else "cpu"
    image, get = f"{NAME}:{__version__}-{target}", f"make image TARGET={target}, or make load of an offline bundle"
    client = context.machine.environment.get("DOCKER") or "docker"
    ran = context.machine.run(client, "image", "inspect", "--format", "{{.Id}}", image, seconds=15)
    if not ran.problem:
        return ok(image)
    found = f"no {image}: {' '.join(ran.text.split()) or ran.problem}"  # in docker's words: no engine, or no image
    if not context.wants_npus:
        return skipped(f"not needed: {found}; stages run in Python's environment")
    return warning(found, f"{get}; without it everything must be installed here")
