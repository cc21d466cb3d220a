"""Doctor's checks of the stack on the NPUs, of Python's packages, of torch and of the upstream sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from doctor_machines import RECORDED, TOOLKIT, FakeMachine, MakeContext, context, fake, recorded
from openpangu_sft.doctor import ascend, machine, packages, tensors
from openpangu_sft.doctor.machine import Finding, Ran, State, guarded, ok
from openpangu_sft.training.mindspeed.sources import make_sources
from openpangu_sft.util.ascend import versions
from small_upstream import SmallUpstream

__all__ = ["context", "fake"]


def test_the_whole_stack(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("healthy.txt")
    fake.add_stack()
    assert (ascend.driver(context()).state, ascend.cann(context()).state) == (State.OK, State.OK)


@pytest.mark.parametrize(
    ("recording", "said"), [("other_driver.txt", "23.0.7, older than "), ("newer_driver.txt", "25.3.rc1, newer than ")]
)
def test_another_driver_is_known_by_npu_smi_too(
    fake: FakeMachine, context: MakeContext, recording: str, said: str
) -> None:
    fake.add_npus(recording)
    finding = ascend.driver(context())
    assert (finding.state, finding.found.startswith(said)) == (State.WARNING, True)


def test_firmware_of_each_npu(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("healthy.txt")
    assert ascend.firmware(context()) == ok("7.1.0.7.220 (NPU 0, 1, 2, 3, 4, 5, 6, 7)")
    script, board = fake.programs / "npu-smi", RECORDED / "board.txt"
    odd = f'[ "$5" != 6 ] || exec sed "s/7.1.0.7.220/9.9.9/; s/: OK/: NOK/" {board}'
    script.write_text(script.read_text().replace("case", f"{odd}\ncase", 1))
    finding = ascend.firmware(context())
    assert (finding.state, finding.remedy) == (State.FAILED, ascend.INSTALL)
    assert finding.found.splitlines() == ["7.1.0.7.220 (NPU 0, 1, 2, 3, 4, 5, 7)", "9.9.9 (NPU 6)"]
    assert ascend.firmware(context("parallel.devices_per_node=4")).state == State.OK


def test_an_npu_smi_that_hangs_is_asked_once(
    fake: FakeMachine, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_npus("healthy.txt")
    script, asked = fake.programs / "npu-smi", fake.root / "asked"
    script.write_text(
        script.read_text().replace("case", f'[ "$2" != -t ] || {{ echo $5 >>{asked}; sleep 60; }}\ncase', 1)
    )
    one = context()
    assert len(one.used) == 8
    monkeypatch.setattr(machine, "NPU_SMI_SECONDS", 1.0)
    assert ascend.firmware(one).state == State.SKIPPED
    assert asked.read_text().split() == ["0"]


def test_firmware_where_a_user_may_not_ask(fake: FakeMachine, context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "board.txt").write_text("        Firmware Version               : NA\n")
    fake.add_npus("healthy.txt", board=str(tmp_path / "board.txt"))
    assert ascend.firmware(context()).state == State.SKIPPED


def test_cann_step_by_step(fake: FakeMachine, context: MakeContext) -> None:
    assert ascend.cann(context()).found == "not installed"
    fake.add_stack()
    unset = ascend.cann(context(ASCEND_TOOLKIT_HOME=""))
    assert (unset.state, "set_env.sh" in unset.remedy) == (State.FAILED, True)
    assert "no ascend_toolkit_install.info" in ascend.cann(context(ASCEND_TOOLKIT_HOME="/elsewhere")).found
    other = recorded("cann_8.0.RC3.info").replace("8.0.RC3", "7.0.0")
    fake.write(f"{TOOLKIT}/aarch64-linux/ascend_toolkit_install.info", other)
    assert ascend.cann(context()).state == State.FAILED


def test_packages_as_pinned(context: MakeContext) -> None:
    one = context("train.engine=transformers")
    finding = packages.packages(one)
    assert (finding.state, "torch 2.1.0" in finding.found) == (State.OK, True)


def test_packages_of_other_versions(context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"numpy": "2.0.1", "transformers": ""}
    real = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: others.get(name, real(name)))
    finding = packages.packages(context("train.engine=transformers"))
    assert (finding.state, finding.found) == (State.FAILED, "numpy 2.0.1\ntransformers is not installed")
    assert finding.expected == "numpy<2, transformers==4.53.2"


@pytest.mark.parametrize(("version", "state"), [("2.1.0.post8", State.OK), ("2.1.0.post10", State.FAILED)])
def test_torch_npu(context: MakeContext, monkeypatch: pytest.MonkeyPatch, version: str, state: State) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: version)
    finding = packages.torch_npu(context())
    assert (finding.state, finding.found) == (state, version)


def test_torch_npu_of_an_image_without_npus(fake: FakeMachine, context: MakeContext) -> None:
    assert packages.torch_npu(context()).found == "not installed"
    fake.write("/opt/openpangu/versions.json")
    assert "as no NPU is visible" in packages.torch_npu(context()).found


@pytest.mark.parametrize(
    ("text", "problem", "said"),
    [
        ("", "ended by SIGSEGV", "ended by SIGSEGV"),
        ("", "no answer within 240 s; killed", "no answer within 240 s"),
        ("Traceback\nMemoryError", "exit code 1", "exit code 1 MemoryError"),
        ("a warning of torch_npu", "", "no answer a warning of torch_npu"),
        ('probe:{"step": "import torch", "error": "ImportError: x"}', "", "import torch: ImportError: x"),
    ],
    ids=["crash", "time limit", "exception", "no answer", "failed step"],
)
def test_a_probe_that_fails(text: str, problem: str, said: str) -> None:
    finding = tensors.judge(Ran(text, problem), "npu", 8)
    assert finding.state == State.FAILED
    assert finding.found.startswith(said)
    assert finding.remedy


LIBRARY = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("kind", "step", "error", "remedy"),
    [
        ("npu", "import torch_npu", f"ImportError: libhccl.so: {LIBRARY}", "CANN's environment"),
        ("npu", "import torch_npu", f"ImportError: libascend_hal.so: {LIBRARY}", "on LD_LIBRARY_PATH; see driver"),
        ("npu", "import torch_npu", "ModuleNotFoundError: No module named 'torch_npu'", "see torch_npu"),
        ("npu", "import torch", "ModuleNotFoundError: No module named 'torch'", "make setup on a host"),
        ("npu", "import torch", f"ImportError: libcudart.so.12: {LIBRARY}", "one for CUDA"),
        ("npu", "add two tensors on npu:3", "RuntimeError: aclrtSetDevice, error code is 507033", "see NPU health"),
        (
            "npu",
            "add two tensors on npu:0",
            "RuntimeError: Expected one of cpu, cuda, ipu device type",
            "see NPU health",
        ),
        ("cuda", "add two tensors on cuda:1", "RuntimeError: CUDA error: invalid device ordinal", "train.device=cpu"),
        (
            "cuda",
            "add two tensors on cuda:0",
            "RuntimeError: Found no NVIDIA driver on your system",
            "train.device=cpu",
        ),
        ("cuda", "import torch", f"ImportError: libcudnn.so.8: {LIBRARY}", "one for CUDA"),
        ("standin", "import torch", f"ImportError: libcublas.so.12: {LIBRARY}", "one for CUDA"),
        ("cpu", "import torch", f"OSError: libgomp.so.1: {LIBRARY}", "make setup installs"),
    ],
    ids=[
        "hccl",
        "hal",
        "torch_npu",
        "torch",
        "npu cudart",
        "npu:3",
        "npu:0",
        "ordinal",
        "nvidia",
        "cudnn",
        "cublas",
        "gomp",
    ],
)
def test_remedies_of_a_probe(kind: str, step: str, error: str, remedy: str) -> None:
    assert remedy in tensors.judge(Ran(f'probe:{{"step": "{step}", "error": "{error}"}}'), kind, 1).remedy


def test_tensors_are_added_on_the_cpu_and_on_the_stand_in(context: MakeContext) -> None:
    assert tensors.adds(context("train.engine=transformers", "train.device=cpu")).found.endswith("1 + 3 = 4 on cpu")
    finding = tensors.adds(context("train.device=cpu"))
    assert (finding.state, "torch_npu" in finding.found) == (State.OK, True)


def test_a_gpu_that_is_not_there(context: MakeContext) -> None:
    finding = tensors.adds(context("train.engine=transformers", "train.device=cuda", CUDA_VISIBLE_DEVICES=""))
    assert finding.state == State.FAILED
    assert finding.found.startswith("add two tensors on cuda:0: ")
    assert "train.device=cpu" in finding.remedy


def test_sources_and_patches(small: SmallUpstream, context: MakeContext) -> None:
    def look() -> Finding:
        return guarded("patches", lambda: packages.sources(context(), small.target, small.patches))

    assert look().remedy == "run make sources"
    make_sources(small.target, small.patches)
    assert look().state == State.OK or "g++ is not installed" in look().found
    changed = small.target / "mindspeed/mindspeed/__init__.py"
    changed.write_text("x = 1\n")
    assert "mindspeed/mindspeed/__init__.py" in look().found
    assert changed.read_text() == "x = 1\n"  # looked at, and nothing else
    changed.unlink()
    assert look().state == State.FAILED
    make_sources(small.target, small.patches)
    small.add_patch("mindspeed-llm", "0002.patch", "import megatron", "import megatron as m")
    assert "other pins" in look().found


def test_a_run_notes_driver_and_cann(fake: FakeMachine) -> None:
    assert versions(fake.environment, fake.root) == {}
    fake.add_stack()
    assert versions(fake.environment, fake.root) == {"Ascend driver": "24.1.rc3", "CANN": "8.0.RC3"}
    file = fake.root / "usr/local/Ascend/driver/version.info"
    file.unlink()
    file.mkdir()  # stands for one that this user may not read: root may read all
    assert versions(fake.environment, fake.root) == {"CANN": "8.0.RC3"}
