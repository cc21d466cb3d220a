"""The real MindSpeed-LLM 1.0.0 for tests: its sources with this project's patches, run without an NPU.

There where MEGATRON_LM_URL, MINDSPEED_URL and MINDSPEED_LLM_URL name git repositories that have the commits of
patches/upstream.toml, and the packages that it imports are there (on PYTHONPATH, say). A stand-in for torch_npu beside
the repository takes the NPU's place.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import ROOT, SHARED, upstreams

STAND_IN = SHARED / "npu_standin"
URLS = {"megatron-lm": "MEGATRON_LM_URL", "mindspeed": "MINDSPEED_URL", "mindspeed-llm": "MINDSPEED_LLM_URL"}

IMPORTED = ["einops", "peft", "scipy"]

TIMEOUT = 300
"""Seconds. A rank that waits for one that has gone would wait for half an hour."""


def checkout(directory: Path) -> Path:
    """MindSpeed-LLM with Megatron's folder in it, as its installation guide has it, and all patches applied."""
    missing = [name for name in URLS.values() if not os.environ.get(name)]
    if missing:
        pytest.skip(f"the upstream sources are not at hand: {', '.join(missing)} not set")
    if lacking := [name for name in IMPORTED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"MindSpeed-LLM imports packages that are not there: {', '.join(lacking)}")
    if not STAND_IN.is_dir():
        pytest.skip("no stand-in for torch_npu beside the repository (shared/npu_standin)")
    for name, variable in URLS.items():
        upstream = upstreams()[name]
        git = ["git", "-C", str(directory / name)]
        subprocess.run(["git", "init", "--quiet", str(directory / name)], check=True)
        subprocess.run([*git, "fetch", "--quiet", "--depth=1", os.environ[variable], upstream["commit"]], check=True)
        subprocess.run([*git, "checkout", "--quiet", "FETCH_HEAD"], check=True)
        for patch in upstream["patches"]:
            subprocess.run([*git, "apply", str(ROOT / "patches" / patch)], check=True)
    shutil.copytree(directory / "megatron-lm/megatron", directory / "mindspeed-llm/megatron")
    return directory


def run_upstream(upstream: Path, *arguments: str, refused: bool = False) -> str:
    """Runs Python in MindSpeed-LLM's folder.

    Args:
        upstream: what checkout made.
        arguments: of Python.
        refused: whether it has to fail rather than to succeed.

    Returns:
        What it wrote, errors included.
    """
    own = [STAND_IN, upstream / "mindspeed", upstream / "mindspeed-llm"]
    paths = [*own, *filter(None, [os.environ.get("PYTHONPATH")])]
    own_environment = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # as the published script has it; training asks for it
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
    """What upstream or we have saved, without our own reader; dicts and tensors as torch.load gives them."""
    reader = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="pickle")
    return torch.load(path, map_location="cpu", pickle_module=reader)
