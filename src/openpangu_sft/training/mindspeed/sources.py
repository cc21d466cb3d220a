"""The sources of the mindspeed engine: three repositories at pinned commits, patched, side by side in one folder.

`patches/upstream.toml` pins them. The folder depends on the commits and patches alone and is reproducible bit by bit,
file modes and times included. Megatron-LM's package is copied into MindSpeed-LLM's folder as well, so that
`mindspeed` and `mindspeed-llm` on PYTHONPATH are enough.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, parse_manifest, sha256_of, staged_directory
from openpangu_sft.util.errors import UserError, first_complaint
from openpangu_sft.util.git import apply_patch, check_out, require_git

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[4]
STAND_IN = ROOT / "src/npu_standin"
"""torch_npu, apex and acl for machines without an NPU; on PYTHONPATH only where upstream runs without one."""
PATCHES = ROOT / "patches"
PINS = "upstream.toml"
SOURCES = ROOT / ".sources"
KIND = "sources"

VARIABLES = {"megatron-lm": "MEGATRON_LM_URL", "mindspeed": "MINDSPEED_URL", "mindspeed-llm": "MINDSPEED_LLM_URL"}
"""The repositories, and the environment variable that replaces each one's URL and mirrors."""

PACKAGE = "megatron"  # Megatron-LM's package, which MindSpeed-LLM expects in its own folder

HELPERS = f"mindspeed-llm/{PACKAGE}/core/datasets"  # here Megatron-LM's helper is compiled before the first run

Text = Annotated[str, StringConstraints(min_length=1)]


class Pin(BaseModel):
    """One repository of upstream.toml; its patches are applied in their order."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: Text
    mirrors: list[Text]
    branch: Text
    commit: Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
    patches: list[Text]


def read_pins(patches: Path = PATCHES) -> dict[str, Pin]:
    """Reads upstream.toml in the folder of the patches; `UserError` where it is missing or invalid."""
    file = patches / PINS
    if not file.is_file():
        raise UserError("no such file", where=file, remedy="run from a clone of this project")
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"not TOML: {error}", where=file, remedy="fix it") from None
    if content.keys() != VARIABLES.keys():
        what = f"has {', '.join(content) or 'nothing'}, expected {', '.join(VARIABLES)}"
        raise UserError(what, where=file, remedy="fix it")
    try:
        return TypeAdapter(dict[str, Pin]).validate_python({name: content[name] for name in VARIABLES})
    except ValidationError as error:
        raise UserError(first_complaint(error), where=file, remedy="fix it") from None


def make_sources(target: Path = SOURCES, patches: Path = PATCHES) -> tuple[Manifest, bool]:
    """Fetches what upstream.toml pins and applies the patches, unless `target` is up to date.

    Returns the manifest of the sources, and whether they were made now. Raises `UserError` where a commit cannot be
    fetched, a patch does not apply, git is not installed, or `target` was changed.
    """
    if found := find_sources(target, patches):
        return found, False
    pins, wanted, target = read_pins(patches), wanted_manifest(patches), target.absolute()
    require_git("fetches and patches the sources")
    with staged_directory(target, wanted) as staging:
        for name, pin in pins.items():
            variable = VARIABLES[name]
            urls = [os.environ[variable]] if os.environ.get(variable) else [pin.url, *pin.mirrors]
            remedy = f"check the network; or name a repository that has this commit: make sources {variable}=…"
            with tempfile.TemporaryDirectory(dir=staging, prefix=".git-") as repository:
                time = check_out(staging / name, Path(repository), urls, pin.commit, pin.branch, remedy)
            wanted.counts[name] = {"files": 0, "committed": time}
            for patch in pin.patches:
                apply_patch(staging / name, patches / patch, name, f"rebase the patch onto commit {pin.commit}")
        # as MindSpeed-LLM's installation guide does
        shutil.copytree(staging / "megatron-lm" / PACKAGE, staging / "mindspeed-llm" / PACKAGE)
        wanted.files = _described(staging)
        for name, counts in wanted.counts.items():
            counts["files"] = sum(_owner(path) == name for path in wanted.files)
        _settle(staging, wanted)
    _settle(target, wanted)  # the manifest and the folder itself were written last
    return wanted, True


def find_sources(target: Path = SOURCES, patches: Path = PATCHES) -> Optional[Manifest]:
    """The manifest of the sources in `target` if they are exactly what upstream.toml pins now, else None.

    Raises `UserError` where a file was changed or added by hand and would be lost.
    """
    wanted = wanted_manifest(patches)
    if not (target / MANIFEST).is_file():
        return None
    found = parse_manifest(target / MANIFEST, "remove this folder, and run make sources again")
    if found.kind != KIND:
        return None  # staged_directory refuses to replace it
    for cache in list(target.rglob("__pycache__")):
        shutil.rmtree(cache)  # left by Python, not by a user
    for helper in target.glob(f"{HELPERS}/helpers.*.so"):
        helper.unlink()
    files = _described(target)
    for name, entry in files.items():
        if name not in found.files or entry["sha256"] != found.files[name]["sha256"]:
            what = "has been changed" if name in found.files else "was not made by make sources"
            remedy = f"keep it as a patch in {PATCHES.name}/, or not; remove {target}, and run make sources again"
            what += ", and would be lost when the sources are made again"
            raise UserError(what, where=target / name, remedy=remedy)
    same = (found.version, found.settings, found.inputs) == (wanted.version, wanted.settings, wanted.inputs)
    if not same or files.keys() != found.files.keys():
        return None
    _settle(target, found)
    return found


def wanted_manifest(patches: Path) -> Manifest:
    """The manifest's pins and checksums of the patches, before anything is fetched."""
    pins = read_pins(patches)
    names = [patch for pin in pins.values() for patch in pin.patches]
    settings = {name: {"commit": pin.commit, "patches": pin.patches} for name, pin in pins.items()}
    return Manifest(KIND, settings, {f"patches/{patch}": sha256_of(patches / patch) for patch in names})


def _described(sources: Path) -> dict[str, dict[str, Any]]:
    """Size, sha256 and mode of every file but the manifest, by name; sha256 is empty for a symbolic link."""
    found = {}
    for path in sorted(sources.rglob("*")):
        name = path.relative_to(sources).as_posix()
        if path.is_symlink():
            found[name] = {"bytes": 0, "sha256": ""}
        elif path.is_file() and name != MANIFEST:
            mode = "755" if path.stat().st_mode & 0o100 else "644"
            found[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "mode": mode}
    return found


def _settle(sources: Path, manifest: Manifest) -> None:
    """Sets mode and time of every file and folder: modes independent of the umask, times those of the commit."""
    times = {name: counts["committed"] for name, counts in manifest.counts.items()}
    for path in [*sources.rglob("*"), sources]:
        name = path.relative_to(sources).as_posix()
        entry = manifest.files.get(name, {"mode": "755" if path.is_dir() else "644"})
        mode, seconds = int(entry["mode"], 8), times.get(_owner(name), max(times.values()))
        found = path.stat()
        if found.st_mode & 0o7777 != mode:  # only if needed: another user may own it
            path.chmod(mode)
        if found.st_mtime_ns != seconds * 10**9:
            os.utime(path, (seconds, seconds))


def _owner(name: str) -> str:
    """The repository that a file or folder comes from."""
    return "megatron-lm" if f"{name}/".startswith(f"mindspeed-llm/{PACKAGE}/") else name.split("/")[0]


def require_ready(target: Path = SOURCES, patches: Path = PATCHES) -> Path:
    """Checks that the sources can run: as pinned in upstream.toml, with Megatron-LM's helper compiled.

    Upstream itself compiles the helper when training begins, with whatever python3-config is on PATH; the image
    contains it compiled. Raises `UserError` where the sources are missing or outdated, or there is no compiler.
    """
    require_pinned(target, patches)
    helper = compiled_helper(target)
    if not helper.is_file():
        _compile(helper)
    return target


def require_pinned(target: Path = SOURCES, patches: Path = PATCHES) -> None:
    """Raises `UserError` where the sources are missing, or made from other pins or patches than upstream.toml's."""
    if not (target / MANIFEST).is_file():
        raise UserError("the upstream sources are not there", where=target, remedy="run make sources")
    found, wanted = parse_manifest(target / MANIFEST, "run make sources"), wanted_manifest(patches)
    if (found.kind, found.settings, found.inputs) != (KIND, wanted.settings, wanted.inputs):
        raise UserError(f"were made of other pins than {PINS}'s", where=target, remedy="run make sources")


def compiled_helper(target: Path) -> Path:
    """The file of Megatron-LM's helper as compiled for this Python."""
    return target / HELPERS / f"helpers{sysconfig.get_config_var('EXT_SUFFIX')}"


def _compile(helper: Path) -> None:
    import pybind11

    folder, made = helper.parent, helper.with_name(f".{helper.name}.{os.getpid()}")
    command = ["g++", "-O3", "-shared", "-std=c++11", "-fPIC", f"-I{sysconfig.get_path('include')}"]
    command += [f"-I{pybind11.get_include()}", str(folder / "helpers.cpp"), "-o", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("g++ is not installed: it compiles Megatron-LM's helper", remedy="install g++") from None
    if done.returncode:
        made.unlink(missing_ok=True)
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise UserError(f"Megatron-LM's helper does not compile: {first}", remedy="install python3-dev and g++")
    made.replace(helper)
