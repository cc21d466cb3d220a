"""The stand-in for torch_npu, apex and acl (src/npu_standin): nobody gets it unasked, and it calculates what it should.

Importing it changes torch, so what it calculates is checked by tests/npu_standin/, each file in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import PATIENCE, ROOT

STAND_IN = ROOT / "src/npu_standin"
CHECKS = sorted((ROOT / "tests/npu_standin").glob("check_*.py"))
NAMES = ["torch_npu", "apex", "acl", "torchair"]


def run_python(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the repository, with that PYTHONPATH and nothing of the pytest around it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.stem)
def test_it_calculates_what_it_should(check: Path) -> None:
    ran = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(check), path=f"{STAND_IN}:{ROOT / 'src'}")
    assert ran.returncode == 0, ran.stdout[-8000:]
    print(ran.stdout.splitlines()[-1])


def test_every_check_is_run() -> None:
    names = {"attention", "collectives", "devices", "operators", "without_transfer"}
    assert {check.stem for check in CHECKS} == {f"check_{name}" for name in names}


def test_the_project_never_gets_it_unasked() -> None:
    """src/ is on the path in development, and the stand-in's packages lie one level deeper."""
    program = (
        "import importlib.util, sys, openpangu_sft.cli.main; "
        f"print([name for name in {NAMES} if importlib.util.find_spec(name) and "
        f"'npu_standin' in str(importlib.util.find_spec(name).origin)], "
        "[name for name in sys.modules if 'npu_standin' in str(getattr(sys.modules[name], '__file__', ''))])"
    )
    ran = run_python("-c", program, path=str(ROOT / "src"))
    assert (ran.returncode, ran.stdout) == (0, "[] []\n")


def test_where_there_is_no_npu_torch_npu_does_not_import() -> None:
    if run_python("-c", "import importlib.metadata as m; m.version('torch-npu')", path="").returncode == 0:
        pytest.skip("the real torch_npu is installed here")
    ran = run_python("-c", "import torch_npu", path=str(ROOT / "src"))
    assert ran.stdout.splitlines()[-1] == "ModuleNotFoundError: No module named 'torch_npu'"


def test_it_is_not_installed_with_the_project(tmp_path: Path) -> None:
    """Builds a wheel of the tree as it is, and looks into it."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    program = "from setuptools import build_meta; build_meta.build_wheel('.')"
    ran = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    [wheel] = copy.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"openpangu_sft"}
