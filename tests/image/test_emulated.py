"""Images for another architecture, emulated by qemu: make test-image ARCH=arm64. Otherwise not collected; slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from image.engine import NPU, ROOT, Engine, require_sources
from openpangu_sft import __version__
from openpangu_sft.training.mindspeed.sources import read_pins

ARCH = os.environ.get("ARCH", "")
MACHINE = {"arm64": "aarch64", "amd64": "x86_64"}[ARCH]
UPSTREAM = "/opt/openpangu/app/.sources"


@pytest.fixture(scope="module")
def bases(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if os.uname().machine == MACHINE:
        pytest.skip(f"this machine is {ARCH} itself: make test-image tests its images")
    handler = Path(f"/proc/sys/fs/binfmt_misc/qemu-{MACHINE}")
    registered = handler.read_text() if handler.exists() else ""
    if "enabled" not in registered or "F" not in registered.partition("flags:")[2].split("\n")[0]:
        pytest.skip(f"no qemu for {ARCH} that containers can use: install qemu-user-static and binfmt-support")
    try:
        return engine.bases(tmp_path_factory.mktemp("bases"), ARCH)
    except LookupError as reason:
        pytest.skip(str(reason))


def build(engine: Engine, target: str, base: str, build_base: str) -> str:
    started = time.monotonic()
    done = engine.make("image", f"TARGET={target}", f"ARCH={ARCH}", BASE=base, BUILD_BASE=build_base)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    print(f"{target}: built in {time.monotonic() - started:.0f} s")
    image = f"openpangu-sft:{__version__}-{target}-{ARCH}"
    assert engine.inspect(image)["Architecture"] == ARCH
    return image


@pytest.fixture(scope="module")
def cpu(engine: Engine, bases: dict[str, str]) -> str:
    return build(engine, "cpu", bases["CPU_BASE"], bases["BUILD_BASE"])


@pytest.fixture(scope="module")
def npu(engine: Engine, bases: dict[str, str]) -> str:
    require_sources()
    return build(engine, "npu", bases["BASE"], bases["BUILD_BASE"])


def said(engine: Engine, image: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    run = [engine.client, "run", "--rm", f"--platform=linux/{ARCH}", *options, image, *command]
    return subprocess.run(run, capture_output=True, text=True, check=False)


SHORT = ["openpangu-sft", "demo", "--set", "train.iterations=3", "--set", "train.lr_warmup_iterations=1"]
UNTAUGHT = "the tuned model does not give the trained answer"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_short_demo_in_cpu_has_the_losses_of_this_machine(engine: Engine, cpu: str, tmp_path: Path) -> None:
    """All stages, from raw conversations to an answer; 220 iterations would take hours."""
    native, emulated = tmp_path / "native", tmp_path / "emulated"
    for cache in (native, emulated):
        cache.mkdir()
    os.chown(emulated, 4711, 4712)
    here = subprocess.run(
        [Path(sys.executable).parent / SHORT[0], *SHORT[1:]], cwd=native, capture_output=True, text=True
    )
    assert UNTAUGHT in here.stderr
    started = time.monotonic()
    done = said(engine, cpu, *SHORT, options=("--volume", f"{emulated}:/cache", "--workdir", "/cache"))
    print(f"demo: {time.monotonic() - started:.0f} s")
    assert UNTAUGHT in done.stderr, done.stderr[-4000:]
    run = ".cache/demo/sft_outputs"
    assert losses(emulated / run) == pytest.approx(losses(native / run), rel=1e-4)
    assert len(losses(emulated / run)) == 3
    assert (emulated / run / "loss.png").stat().st_uid == 4711
    assert "OpenBLAS Warning" not in done.stderr


def test_cpu_describes_itself(engine: Engine, cpu: str) -> None:
    versions = json.loads(said(engine, cpu, "cat", "/opt/openpangu/versions.json").stdout)
    assert versions["machine"] == MACHINE
    assert versions["packages"]["torch"].startswith("2.1.0")
    beside = ROOT / f"dist/openpangu-sft-{__version__}-cpu-{ARCH}.versions.json"
    assert json.loads(beside.read_text("utf-8")) == versions


def test_a_bundle_loads_under_the_native_name(engine: Engine, cpu: str, place: Path) -> None:
    done = engine.make("save", "TARGET=cpu", f"ARCH={ARCH}", DIST=str(place), LEVEL="1")
    assert done.returncode == 0, done.stderr
    native = cpu.removesuffix(f"-{ARCH}")
    had = engine("inspect", "--format", "{{.Id}}", native) if engine.has(native) else ""
    try:
        done = engine.make("load", f"FROM={place}/openpangu-sft-{__version__}-cpu-{ARCH}.tar")
        assert done.returncode == 0, done.stderr
        assert f"load: {native} works" in done.stderr
        assert engine.inspect(native)["Architecture"] == ARCH
    finally:
        engine("tag", had, native) if had else engine("rmi", native)


def test_npu_starts_and_describes_itself(engine: Engine, npu: str) -> None:
    done = said(engine, npu, "openpangu-sft", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    assert done.stderr.startswith("openpangu-sft: no NPU is visible in this container")
    versions = json.loads(said(engine, npu, "cat", "/opt/openpangu/versions.json").stdout)
    assert (versions["machine"], versions["packages"]["torch-npu"]) == (MACHINE, "2.1.0.post8")
    pins = read_pins()
    assert versions["upstream"] == {name: {"commit": pin.commit, "patches": pin.patches} for name, pin in pins.items()}


def test_npu_imports_its_packages(engine: Engine, npu: str) -> None:
    program = "import platform, torch, transformers.generation, accelerate, peft, openpangu_sft.cli.main; "
    done = said(engine, npu, "python", "-c", program + "print(platform.machine(), torch.ones(3).sum().item())")
    assert (done.returncode, done.stdout) == (0, f"{MACHINE} 3.0\n"), done.stderr
    done = said(engine, npu, "true", options=("--device", "/dev/null:/dev/davinci_manager"))
    assert "torch_npu does not import: " in done.stderr
    assert "libhccl.so" in done.stderr


def test_npu_has_the_patched_sources_and_the_compiled_helper(engine: Engine, npu: str) -> None:
    config = f"{UPSTREAM}/mindspeed-llm/megatron/core/transformer/transformer_config.py"
    assert "add_dense_bias" in said(engine, npu, "cat", config).stdout
    program = "import helpers, numpy; print(helpers.__file__, helpers.build_sample_idx.__name__)"
    path = f"PYTHONPATH={UPSTREAM}/mindspeed-llm/megatron/core/datasets"
    done = said(engine, npu, "python", "-c", program, options=("--env", path))
    assert done.returncode == 0, done.stderr
    assert f"{MACHINE}-linux-gnu.so build_sample_idx" in done.stdout


def test_the_native_image_keeps_its_name(engine: Engine, npu: str) -> None:
    assert not engine.has(NPU) or engine.inspect(NPU)["Architecture"] != ARCH
