"""The real MindSpeed-LLM 1.0.0 for tests: its sources with this project's patches, run without an NPU.

Available after `make sources`, or where MEGATRON_LM_URL, MINDSPEED_URL and MINDSPEED_LLM_URL name git repositories with
the commits of patches/upstream.toml. src/npu_standin replaces torch_npu.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import PATIENCE, ROOT
from openpangu_sft.training.mindspeed.sources import PATCHES, SOURCES, VARIABLES, find_sources, make_sources
from openpangu_sft.util.git import git

STAND_IN = ROOT / "src/npu_standin"

IMPORTED = ["einops", "peft", "pybind11", "scipy"]

TIMEOUT = PATIENCE
"""Seconds: a rank would wait half an hour for one that has died."""


def checkout(directory: Path) -> Path:
    """A copy of the sources: running them writes there."""
    missing = [name for name in VARIABLES.values() if not os.environ.get(name)]
    if missing and not find_sources():
        pytest.skip(f"the upstream sources are not at hand: no make sources here, and {', '.join(missing)} not set")
    if lacking := [name for name in IMPORTED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"MindSpeed-LLM imports packages that are not there: {', '.join(lacking)}")
    if missing:
        shutil.copytree(SOURCES, directory / "sources")
    else:
        make_sources(directory / "sources")
    tools = directory / "tools"  # Megatron's helper is compiled with the first python3 on PATH
    tools.mkdir()
    for name, answer in {
        "python3": f'exec {shlex.quote(sys.executable)} "$@"',
        "python3-config": f"echo {sysconfig.get_config_var('EXT_SUFFIX')}",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tools / name).chmod(0o755)
    return directory / "sources"


def without_patch(upstream: Path, directory: Path, patch: str) -> Path:
    """A copy of the checkout with one patch of MindSpeed-LLM reverted."""
    shutil.copytree(upstream.parent, directory)
    git("apply", "--reverse", str(PATCHES / patch), folder=directory / upstream.name / "mindspeed-llm")
    return directory / upstream.name


def require_compiler() -> None:
    """Skips the test where Megatron's helper, which training needs, cannot be compiled."""
    if not shutil.which("g++"):
        pytest.skip("Megatron-LM compiles a helper when training begins, and g++ is not installed")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Megatron-LM compiles a helper when training begins, and there is no Python.h (python3-dev)")


def run_upstream(upstream: Path, *arguments: str, refused: bool = False) -> str:
    """Runs Python with these arguments in MindSpeed-LLM's folder; returns stdout and stderr.

    Args:
        upstream: the checkout.
        refused: whether it has to fail.
    """
    own = [STAND_IN, upstream / "mindspeed", upstream / "mindspeed-llm", ROOT / "src"]  # ours, as the image has it
    paths = [*own, *filter(None, [os.environ.get("PYTHONPATH")])]
    own_environment = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PATH": f"{upstream.parent / 'tools'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # the host name may not resolve
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # as in the published script; training requires it
    }
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=upstream / "mindspeed-llm",
        env={**os.environ, **own_environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun ends its ranks
        output, _ = process.communicate()
        pytest.fail(f"not done in {TIMEOUT} s: {output[-4000:]}")
    assert (process.returncode != 0) == refused, output[-4000:]
    return output


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """An enum of Megatron's among the saved arguments becomes None: Megatron is not there."""
        return (lambda *_: None) if module.startswith("megatron.") else super().find_class(module, name)


def load_upstream(path: Path) -> Any:
    """A file saved by upstream or by us, read without our own reader; dicts and tensors as from torch.load."""
    reader = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="pickle")
    return torch.load(path, map_location="cpu", pickle_module=reader)
