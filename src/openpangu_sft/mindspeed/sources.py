"""The upstream sources, made ready to be run."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

from openpangu_sft.artefact import MANIFEST, parse_manifest
from openpangu_sft.errors import UserError
from openpangu_sft.upstream import KIND, PACKAGE, PATCHES, PINS, SOURCES, wanted_manifest

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
