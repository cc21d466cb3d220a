"""The npu image on a base without CANN: everything testable without an NPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

from image.engine import ROOT, Engine
from openpangu_sft.training.mindspeed.sources import read_pins

STAND_IN = ROOT / "src/npu_standin"
UPSTREAM = "/opt/openpangu/app/.sources"


def said(engine: Engine, image: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [engine.client, "run", "--rm", *options, image, *command], capture_output=True, text=True, check=False
    )


def test_it_has_the_pinned_stack_and_the_patched_sources(engine: Engine, npu_image: str) -> None:
    versions = json.loads(engine("run", "--rm", npu_image, "cat", "/opt/openpangu/versions.json"))
    assert versions["packages"]["torch-npu"] == "2.1.0.post8"
    assert versions["packages"]["transformers"] == "4.53.2"
    assert versions["packages"]["numpy"].startswith("1.")
    pins = read_pins()
    assert versions["upstream"] == {name: {"commit": pin.commit, "patches": pin.patches} for name, pin in pins.items()}
    stack = engine.inspect(npu_image)["Config"]["Labels"]["openpangu-sft.stack"]
    assert "torch-npu 2.1.0.post8, transformers 4.53.2, megatron-lm cac60ce4c820, mindspeed 969686ff0115" in stack
    config = f"{UPSTREAM}/mindspeed-llm/megatron/core/transformer/transformer_config.py"
    assert "add_dense_bias" in engine("run", "--rm", npu_image, "cat", config)


def test_no_npu_is_reported_and_stages_work(engine: Engine, npu_image: str) -> None:
    done = said(
        engine, npu_image, "python", "-c", "import transformers.generation, accelerate, peft; print('imported')"
    )
    assert (done.returncode, done.stdout) == (0, "imported\n")
    assert done.stderr.startswith("openpangu-sft: no NPU is visible in this container")


def test_doctor_names_what_an_npu_image_lacks_here(engine: Engine, npu_image: str) -> None:
    done = said(engine, npu_image, "openpangu-sft", "doctor", "--json")
    assert done.returncode == 1
    checks = {entry["check"]: entry for entry in json.loads(done.stdout)["checks"]}
    for name in ("NPUs", "device files", "CANN", "tensors"):
        assert checks[name]["state"] == "failed", name
    for name in ("packages", "patches"):
        assert checks[name]["state"] == "ok", checks[name]
    assert checks["torch_npu"]["found"] == "not on Python's path, as no NPU is visible"


def test_a_failing_import_of_torch_npu_is_reported(engine: Engine, npu_image: str) -> None:
    """With devices and without CANN's libraries."""
    done = said(engine, npu_image, "true", options=("--device", "/dev/null:/dev/davinci_manager"))
    assert done.returncode == 0
    assert "torch_npu does not import: " in done.stderr
    assert "libhccl.so" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_datasets_helper_is_there_and_is_not_compiled_again(engine: Engine, npu_image: str) -> None:
    """The image has no compiler, and its code is read-only."""
    program = (
        "import torch_npu, shutil; from torch_npu.contrib import transfer_to_npu; "
        "import mindspeed_llm.tasks.megatron_adaptor; "
        "from megatron.core.datasets.utils import compile_helpers; compile_helpers(); "
        "from megatron.core.datasets import helpers; print(helpers.__file__, shutil.which('g++'), shutil.which('make'))"
    )
    path = f"PYTHONPATH=/stand_in:{UPSTREAM}/mindspeed:{UPSTREAM}/mindspeed-llm"
    options = (
        "--volume",
        f"{STAND_IN}:/stand_in:ro",
        "--env",
        path,
        "--env",
        "HOST_UID=4711",
        "--env",
        "HOST_GID=4711",
    )
    done = said(engine, npu_image, "python", "-W", "ignore", "-c", program, options=options)
    assert done.returncode == 0, done.stderr
    helper, *tools = done.stdout.split()[-3:]
    assert Path(helper).parent == Path(f"{UPSTREAM}/mindspeed-llm/megatron/core/datasets")
    assert tools == ["None", "None"]


def test_smoke_in_the_image(engine: Engine, npu_image: str, user: SimpleNamespace) -> None:
    """The real MindSpeed-LLM on the stand-in, as an ordinary user, using only the image."""
    user.environment["TARGET"] = "npu"
    done = user.run("make", "smoke")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"in {npu_image}" in done.stderr
    for what in (
        "convert, TP 1: their tensors",
        "convert, TP 4: their tensors",
        "context parallel",
        "micro batches of 2",
        "resume",
    ):
        assert what in done.stderr
