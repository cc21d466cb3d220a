"""What the mindspeed engine is made of: three repositories at their pinned commits, patched, side by side in a folder.

`patches/upstream.toml` says which. The commit decides: wherever it comes from, and whenever, the folder is the same to
the last bit, modes and times included. Megatron-LM's package lies in MindSpeed-LLM's folder too, as that wants it, so
`mindspeed` and `mindspeed-llm` on PYTHONPATH are all that is needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Callable, Optional

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from rich.markup import escape

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, parse_manifest, sha256_of, staged_directory
from openpangu_sft.util.console import console
from openpangu_sft.util.errors import UserError, first_complaint
from openpangu_sft.util.git import GitFailed, apply_patch, fetch, git, nobody_there, require_git, without_password

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[4]
PATCHES = ROOT / "patches"
PINS = "upstream.toml"
SOURCES = ROOT / ".sources"
KIND = "sources"

VARIABLES = {"megatron-lm": "MEGATRON_LM_URL", "mindspeed": "MINDSPEED_URL", "mindspeed-llm": "MINDSPEED_LLM_URL"}
"""The repositories, and the environment variable that names another place for each."""

PACKAGE = "megatron"
"""Megatron-LM's folder that MindSpeed-LLM wants in its own."""

COMPILED = f"mindspeed-llm/{PACKAGE}/core/datasets/helpers.*.so"
"""Megatron-LM's helper, which is compiled there before the first run."""

Text = Annotated[str, StringConstraints(min_length=1)]


class Pin(BaseModel):
    """One repository of upstream.toml: where it is, which commit, and what is patched there, in this order."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: Text
    mirrors: list[Text]
    branch: Text
    commit: Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
    patches: list[Text]


def read_pins(patches: Path = PATCHES) -> dict[str, Pin]:
    """Reads upstream.toml.

    Args:
        patches: the folder with it and with the patches that it names.

    Raises:
        UserError: it is not there or not as it has to be, or a patch is missing.
    """
    file = patches / PINS
    if not file.is_file():
        raise UserError("no such file", where=file, remedy="run from a clone of this project")
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"not TOML: {error}", where=file, remedy="mend it") from None
    if content.keys() != VARIABLES.keys():
        what = f"has {', '.join(content) or 'nothing'}, expected {', '.join(VARIABLES)}"
        raise UserError(what, where=file, remedy="mend it")
    pins = {}
    for name in VARIABLES:
        try:
            pins[name] = Pin.model_validate(content[name])
        except ValidationError as error:
            raise UserError(first_complaint(error, name), where=file, remedy="mend it") from None
        for patch in pins[name].patches:
            if not (patches / patch).is_file():
                raise UserError("no such patch", where=patches / patch, remedy=f"see {name}.patches in {file}")
    return pins


def make_sources(target: Path = SOURCES, patches: Path = PATCHES) -> tuple[Manifest, bool]:
    """Fetches what upstream.toml pins and applies the patches, unless that has been done already.

    A place in VARIABLES' environment variable is asked in the place of `url` and `mirrors`: nothing else is then.

    Args:
        target: the folder to put in place, whole or not at all.
        patches: the folder with upstream.toml and the patches.

    Returns:
        Its manifest, and whether it was made now.

    Raises:
        UserError: a commit cannot be had, a patch does not fit, git is not installed, or the target has been changed.
    """
    if found := find_sources(target, patches):
        return found, False
    pins, wanted, target = read_pins(patches), wanted_manifest(patches), target.absolute()
    require_git("fetches and patches the sources")
    times: dict[str, int] = {}
    with staged_directory(target, wanted) as staging:
        for name, pin in pins.items():
            with tempfile.TemporaryDirectory(dir=staging, prefix=".git-") as repository:
                times[name] = _check_out(staging / name, Path(repository), name, pin)
            for patch in pin.patches:
                remedy = f"make the patch anew for commit {pin.commit}"
                apply_patch(staging / name, patches / patch, name, remedy)
        _add_megatron(staging)
        _require_plain(staging)
        wanted.files = _described(staging)
        for name, seconds in times.items():
            files = sum(_owner(path) == name for path in wanted.files)
            wanted.counts[name] = {"files": files, "committed": seconds}
        _settle(staging, wanted)
    _settle(target, wanted)  # the manifest, and the folder that it was put in, were written after all else
    return wanted, True


def find_sources(target: Path = SOURCES, patches: Path = PATCHES) -> Optional[Manifest]:
    """The manifest of what make_sources has put there, where that is what upstream.toml pins now, to the byte.

    Raises:
        UserError: somebody has worked in there, and would lose it when it is made anew, now or later.
    """
    wanted = wanted_manifest(patches)
    if not (target / MANIFEST).is_file():
        return None
    found = parse_manifest(target / MANIFEST, "remove this folder, and run make sources again")
    if found.kind != KIND:
        return None  # staged_directory will not replace it, and says so
    for cache in list(target.rglob("__pycache__")):
        shutil.rmtree(cache)  # Python was run in there; nobody wrote these
    for helper in target.glob(COMPILED):
        helper.unlink()
    files = _described(target)
    for name, entry in files.items():
        if name not in found.files or entry["sha256"] != found.files[name]["sha256"]:
            what = "has been changed" if name in found.files else "was not made by make sources"
            raise UserError(
                f"{what}, and would be lost when the sources are made anew",
                where=target / name,
                remedy=f"keep it as a patch in {PATCHES.name}/, or not; remove {target}, and run make sources again",
            )
    same = (found.version, found.settings, found.inputs) == (wanted.version, wanted.settings, wanted.inputs)
    if not same or files.keys() != found.files.keys() or any(_empty_folders(target)):
        return None
    _settle(target, found)
    return found


def wanted_manifest(patches: Path) -> Manifest:
    """What the manifest says before anything is fetched."""
    pins = read_pins(patches)
    names = [patch for pin in pins.values() for patch in pin.patches]
    return Manifest(
        KIND,
        settings={name: {"commit": pin.commit, "patches": pin.patches} for name, pin in pins.items()},
        inputs={f"patches/{patch}": sha256_of(patches / patch) for patch in names},
    )


def _check_out(folder: Path, repository: Path, name: str, pin: Pin) -> int:
    """Puts the pinned commit's files in a folder that is not there yet; returns when it was committed.

    Raises:
        UserError: the commit cannot be had.
    """
    folder.mkdir()
    try:
        git("init", "--quiet", "--bare", "--template=", str(repository), folder=folder)
        _fetch(repository, name, pin)
        git("checkout", "--quiet", "--force", "--detach", pin.commit, folder=folder, repository=repository)
        if (head := git("rev-parse", "HEAD", folder=folder, repository=repository)) != pin.commit:
            raise GitFailed(f"{pin.commit} is no commit, but a name for {head}")
        return int(git("show", "--no-patch", "--format=%ct", "HEAD", folder=folder, repository=repository))
    except GitFailed as failure:
        raise UserError(f"{name}, commit {pin.commit}: {failure}", remedy=_elsewhere(name)) from None


def _fetch(repository: Path, name: str, pin: Pin) -> None:
    """Fetches a commit, and no more than that, from the first place that gives it.

    Some servers give by its id only what a branch points to now: they are asked for the branch, when all others have
    been asked for the commit.

    Raises:
        GitFailed: no place has it; with what each one said.
    """
    variable = os.environ.get(VARIABLES[name])
    places = [variable] if variable else [pin.url, *pin.mirrors]
    failures: dict[str, str] = {}
    for by_id in (True, False):
        wanted = ["--depth=1", pin.commit] if by_id else [f"refs/heads/{pin.branch}"]
        for place in places:
            if not by_id and nobody_there(failures[place]):
                continue
            what = pin.commit[:12] if by_id else f"branch {pin.branch}, to look for it there,"
            console.print(f"{name}: fetching {what} from {without_password(place)}", markup=False, soft_wrap=True)
            try:
                with _status(name) as note:
                    fetch(repository, place, *wanted, note=note)
                git("cat-file", "-e", f"{pin.commit}^{{commit}}", folder=repository, repository=repository)
                return
            except GitFailed as failure:
                failures[place] = str(failure) if by_id else f"{failures[place]}; branch {pin.branch}: {failure}"
    raise GitFailed("; ".join(f"{without_password(place)}: {failure}" for place, failure in failures.items()))


@contextlib.contextmanager
def _status(name: str) -> Iterator[Callable[[str], object]]:
    """Yields a function that shows on a terminal, and only there, what git says it is doing."""
    if not console.is_terminal:
        yield lambda line: None
        return
    with console.status(name) as status:
        yield lambda line: status.update(f"{name}: {escape(line)}")


def _elsewhere(name: str) -> str:
    return f"check the network; or name a repository that has this commit: make sources {VARIABLES[name]}=…"


def _add_megatron(sources: Path) -> None:
    """Copies Megatron-LM's package to where MindSpeed-LLM's installation guide wants it."""
    package, place = sources / "megatron-lm" / PACKAGE, sources / "mindspeed-llm" / PACKAGE
    if not package.is_dir() or place.exists():
        what = "mindspeed-llm has one already" if place.exists() else "megatron-lm has none"
        raise UserError(f"the folder {PACKAGE}: {what}", where=PATCHES / PINS, remedy="pin versions that fit together")
    shutil.copytree(package, place)


def _require_plain(sources: Path) -> None:
    """Refuses symbolic links and submodules, which upstream does not have, as nothing here takes care of them."""
    links = [path for path in sources.rglob("*") if path.is_symlink()]
    for path in [*links, *_empty_folders(sources)]:
        what = "is a symbolic link" if path.is_symlink() else "is an empty folder: a submodule?"
        raise UserError(what, where=path.relative_to(sources), remedy="pin a commit without: none is taken care of")


def _empty_folders(sources: Path) -> Iterator[Path]:
    return (path for path in sources.rglob("*") if path.is_dir() and not any(path.iterdir()))


def _described(sources: Path) -> dict[str, dict[str, Any]]:
    """Size, sum and mode of every file but the manifest, by name; a symbolic link has no sum."""
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
    """Gives every file and folder its mode, whatever the umask, and its commit's time, whatever time it is."""
    times = {name: counts["committed"] for name, counts in manifest.counts.items()}
    for path in [*sources.rglob("*"), sources]:
        name = path.relative_to(sources).as_posix()
        entry = manifest.files.get(name, {"mode": "755" if path.is_dir() else "644"})
        mode, seconds = int(entry["mode"], 8), times.get(_owner(name), max(times.values()))
        found = path.stat()
        if found.st_mode & 0o7777 != mode:  # not needlessly: another user may have made them
            path.chmod(mode)
        if found.st_mtime_ns != seconds * 10**9:
            os.utime(path, (seconds, seconds))


def _owner(name: str) -> str:
    """Of which repository a file or folder is."""
    return "megatron-lm" if f"{name}/".startswith(f"mindspeed-llm/{PACKAGE}/") else name.split("/")[0]


HELPERS = f"mindspeed-llm/{PACKAGE}/core/datasets"


def require_ready(target: Path = SOURCES, patches: Path = PATCHES) -> Path:
    """The sources, to be run: those that upstream.toml pins now, with Megatron-LM's helper compiled.

    Upstream compiles that when training begins, asking whatever python3-config is on PATH; the image has it compiled.

    Raises:
        UserError: they are not there or of other pins, or there is no compiler.
    """
    require_pinned(target, patches)
    helper = compiled_helper(target)
    if not helper.is_file():
        _compile(helper)
    return target


def require_pinned(target: Path = SOURCES, patches: Path = PATCHES) -> None:
    """Refuses sources that are not there, or of other pins and patches than upstream.toml's.

    Raises:
        UserError: says which of both.
    """
    if not (target / MANIFEST).is_file():
        raise UserError("the upstream sources are not there", where=target, remedy="run make sources")
    found, wanted = parse_manifest(target / MANIFEST, "run make sources"), wanted_manifest(patches)
    if (found.kind, found.settings, found.inputs) != (KIND, wanted.settings, wanted.inputs):
        raise UserError(f"were made of other pins than {PINS}'s", where=target, remedy="run make sources")


def compiled_helper(target: Path) -> Path:
    """Where Megatron-LM's helper is when it has been compiled for this Python."""
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
