"""Doctor's checks of NPUs, of the stack on them, of Python's packages and of the upstream sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from doctor_machines import DRIVER, TOOLKIT, Examine, FakeMachine, MakeSubject, fake, recorded, subject
from openpangu_sft import ascend_files
from openpangu_sft.doctor import fit, network, npus, packages, patches, stack, tensors
from openpangu_sft.doctor.finding import Finding, State, guarded, ok
from openpangu_sft.doctor.machine import Ran
from openpangu_sft.upstream import make_sources
from small_upstream import SmallUpstream

__all__ = ["fake", "subject"]


@pytest.mark.parametrize("check", [npus.seen, npus.healthy, npus.free, npus.device_files])
def test_eight_healthy_npus(fake: FakeMachine, subject: MakeSubject, check: Examine) -> None:
    fake.add_npus("healthy.txt")
    assert check(subject()).state == State.OK


@pytest.mark.parametrize(
    "check",
    [
        npus.seen,
        npus.healthy,
        npus.free,
        fit.npu_memory,
        npus.device_files,
        stack.driver,
        stack.firmware,
        stack.cann,
        network.links,
    ],
)
@pytest.mark.parametrize("engine", [["train.engine=transformers"], ["train.device=cpu"]])
def test_nothing_of_an_npu_is_needed_without_one(subject: MakeSubject, check: Examine, engine: list[str]) -> None:
    finding = check(subject(*engine))
    assert finding.state == State.SKIPPED
    assert finding.found.startswith("not needed by train.engine=")


def test_no_npu_smi(subject: MakeSubject) -> None:
    one = subject()
    finding = npus.seen(one)
    assert (finding.state, finding.expected) == (State.FAILED, "8 x 910B (parallel.devices_per_node)")
    assert "npu-smi is not installed" in finding.found
    assert {check(one).state for check in (npus.healthy, npus.free)} == {State.SKIPPED}
    assert npus.device_files(one).state == stack.driver(one).state == stack.cann(one).state == State.FAILED


def test_npus_without_npu_smi_may_do(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.add_npus("healthy.txt")
    (fake.programs / "npu-smi").unlink()
    assert npus.seen(subject()).state == State.WARNING
    assert npus.device_files(subject()).state == State.OK


def test_npu_smi_off_the_path(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.add_npus("healthy.txt")
    place_of_it = fake.root / "usr/local/sbin/npu-smi"
    place_of_it.parent.mkdir(parents=True)
    (fake.programs / "npu-smi").rename(place_of_it)
    assert npus.seen(subject()).state == State.OK


def test_fewer_npus_than_processes(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.add_npus("some_npus.txt", count=2)
    finding = npus.seen(subject())
    assert (finding.state, finding.found) == (State.FAILED, "2 x 910B4 (NPU 3, 6)")


@pytest.mark.parametrize(("recording", "devices"), [("a3.txt", 8), ("310p.txt", 1)])
def test_other_chips_are_a_warning(fake: FakeMachine, subject: MakeSubject, recording: str, devices: int) -> None:
    fake.add_npus(recording)
    one = subject(f"parallel.devices_per_node={devices}")
    finding = npus.seen(one)
    assert finding.state == State.WARNING
    assert "is no 910B" in finding.found
    assert npus.healthy(one).state == npus.free(one).state == State.OK


def test_a_faulty_npu(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.add_npus("faulty.txt")
    finding = npus.healthy(subject())
    assert (finding.state, finding.found) == (State.FAILED, "NPU 5: Alarm")
    assert "NPUS=0,1,2,3,4,6,7" in finding.remedy
    unused = npus.healthy(subject("parallel.devices_per_node=4"))
    assert (unused.state, unused.found) == (State.WARNING, "NPU 5: Alarm")


@pytest.mark.parametrize(
    ("health", "state"),
    [("Warning", State.WARNING), ("Critical", State.FAILED), ("UNKNOWN", State.FAILED), ("??", State.FAILED)],
)
def test_degrees_of_illness(fake: FakeMachine, subject: MakeSubject, tmp_path: Path, health: str, state: State) -> None:
    table = recorded("faulty.txt").replace("| Alarm         |", f"| {health:<14}|")
    (tmp_path / "table.txt").write_text(table)
    fake.add_npus(str(tmp_path / "table.txt"))
    assert npus.healthy(subject()).state == state


def test_busy_npus(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.add_npus("busy.txt")
    finding = npus.free(subject())
    assert finding.state == State.FAILED
    assert finding.found == "NPU 0: python (919717), 3,969 MB\nNPU 1: python (920633), 3,969 MB"
    assert "NPUS=2,3,4,5,6,7" in finding.remedy


def test_memory_that_nobody_seen_here_has_taken(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.add_npus("busy_unseen.txt")
    finding = npus.free(subject())
    assert finding.state == State.WARNING
    assert finding.found == "NPU 4: 31,859 of 32,768 MB in use, by no process seen here"
    assert npus.free(subject("parallel.devices_per_node=4")).state == State.OK


@pytest.mark.parametrize("recording", ["device_used.txt", "no_driver.txt"])
def test_an_npu_smi_that_fails(fake: FakeMachine, subject: MakeSubject, recording: str) -> None:
    fake.add_npus(recording, code=1)
    one = subject()
    finding = npus.seen(one)
    assert finding.state == State.FAILED
    assert recorded(recording).splitlines()[-1] in finding.found
    assert npus.free(one).state == npus.healthy(one).state == State.SKIPPED


def test_device_files_that_are_missing_or_closed(
    fake: FakeMachine, subject: MakeSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_npus("healthy.txt")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "davinci3" not in str(path) and allowed(path, mode))
    finding = npus.device_files(subject())
    assert finding.state == State.FAILED
    assert finding.found.startswith("no permission: /dev/davinci3 of group ")
    assert "usermod -aG" in finding.remedy
    assert npus.device_files(subject("parallel.devices_per_node=2")).state == State.OK
    (fake.root / "dev/hisi_hdc").unlink()
    assert npus.device_files(subject()).found == "not there: /dev/hisi_hdc"


def test_the_whole_stack(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.add_npus("healthy.txt")
    fake.add_stack()
    assert (stack.driver(subject()).state, stack.cann(subject()).state) == (State.OK, State.OK)


@pytest.mark.parametrize(
    ("recording", "state"), [("other_driver.txt", State.FAILED), ("newer_driver.txt", State.WARNING)]
)
def test_another_driver_is_known_by_npu_smi_too(
    fake: FakeMachine, subject: MakeSubject, recording: str, state: State
) -> None:
    fake.add_npus(recording)
    assert stack.driver(subject()).state == state


def test_firmware_of_each_npu(fake: FakeMachine, subject: MakeSubject, tmp_path: Path) -> None:
    fake.add_npus("healthy.txt")
    fake.write(f"{DRIVER}/version.info", recorded("driver_24.1.rc3.info"))
    assert stack.firmware(subject()).state == State.WARNING  # the recorded board's is older
    newer = tmp_path / "board.txt"
    newer.write_text(recorded("board.txt").replace("7.1.0.7.220", "7.5.0.1.129"))
    fake.add_npus("healthy.txt", board=str(newer))
    assert stack.firmware(subject()).found.startswith("7.5.0.1.129; npu-smi says")
    script = fake.programs / "npu-smi"
    script.write_text(
        script.read_text().replace("case", f'[ "$5" != 6 ] || exec sed s/7.5.0.1.129/7.5.1/ {newer}\ncase', 1)
    )
    mixed = stack.firmware(subject())
    assert mixed.state == State.WARNING
    assert mixed.found.splitlines() == ["NPU 0, 1, 2, 3, 4, 5, 7: 7.5.0.1.129", "NPU 6: 7.5.1"]


def test_firmware_of_the_file_where_a_user_may_not_ask(fake: FakeMachine, subject: MakeSubject, tmp_path: Path) -> None:
    (tmp_path / "board.txt").write_text("        Firmware Version               : NA\n")
    fake.add_npus("healthy.txt", board=str(tmp_path / "board.txt"))
    assert stack.firmware(subject()).state == State.WARNING
    fake.add_stack()
    assert stack.firmware(subject()) == ok("7.5.0.1.129")


def test_cann_step_by_step(fake: FakeMachine, subject: MakeSubject) -> None:
    assert stack.cann(subject()).found == "not installed"
    fake.add_stack()
    unset = stack.cann(subject(ASCEND_TOOLKIT_HOME=""))
    assert (unset.state, "set_env.sh" in unset.remedy) == (State.FAILED, True)
    assert "no ascend_toolkit_install.info" in stack.cann(subject(ASCEND_TOOLKIT_HOME="/elsewhere")).found
    assert "libascend_hal.so is not on" in stack.cann(subject(LD_LIBRARY_PATH=f"{TOOLKIT}/lib64")).found
    assert "libhccl.so is not on" in stack.cann(subject(LD_LIBRARY_PATH="")).found
    other = recorded("cann_8.0.RC3.info").replace("8.0.RC3", "7.0.0")
    fake.write(f"{TOOLKIT}/aarch64-linux/ascend_toolkit_install.info", other)
    assert stack.cann(subject()).state == State.FAILED


def test_packages_as_pinned(subject: MakeSubject) -> None:
    one = subject("train.engine=transformers")
    assert packages.python(one).state == State.OK
    finding = packages.packages(one)
    assert (finding.state, "torch 2.1.0" in finding.found) == (State.OK, True)


def test_packages_of_other_versions(subject: MakeSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"numpy": "2.0.1", "transformers": ""}
    real = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: others.get(name, real(name)))
    finding = packages.packages(subject("train.engine=transformers"))
    assert (finding.state, finding.found) == (State.FAILED, "numpy 2.0.1\ntransformers is not installed")
    assert finding.expected == "numpy<2, transformers==4.53.2"


@pytest.mark.parametrize(("version", "state"), [("2.1.0.post8", State.OK), ("2.1.0.post10", State.FAILED)])
def test_torch_npu(subject: MakeSubject, monkeypatch: pytest.MonkeyPatch, version: str, state: State) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: version)
    finding = packages.torch_npu(subject())
    assert (finding.state, finding.found) == (state, version)


def test_torch_npu_of_an_image_without_npus(fake: FakeMachine, subject: MakeSubject) -> None:
    assert packages.torch_npu(subject()).found == "not installed"
    fake.write("/opt/openpangu/torch_npu/torch_npu/__init__.py")
    assert "as no NPU is to be seen" in packages.torch_npu(subject()).found


@pytest.mark.parametrize(
    ("text", "problem", "said"),
    [
        ("", "ended by SIGSEGV", "ended by SIGSEGV"),
        ("", "no answer within 240 s; killed", "no answer within 240 s"),
        ("Traceback\nMemoryError", "exit code 1", "exit code 1 MemoryError"),
        ("probe:{not json", "", "no answer probe:{not json"),
        ("probe:[1]", "", "no answer"),
        ('probe:{"step": "import torch", "error": "ImportError: x"}', "", "import torch: ImportError: x"),
    ],
)
def test_a_probe_that_fails(text: str, problem: str, said: str) -> None:
    finding = tensors.judge(Ran(text, problem), 8)
    assert finding.state == State.FAILED
    assert finding.found.startswith(said)
    assert finding.remedy


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("ImportError: libhccl.so: cannot open shared object file: No such file or directory", "CANN's environment"),
        ("ImportError: libascend_hal.so: cannot open shared object file", "driver"),
        ("ModuleNotFoundError: No module named 'torch_npu'", "see torch_npu"),
        ("ModuleNotFoundError: No module named 'torch'", "make setup"),
        ("RuntimeError: CUDA error: invalid device ordinal", "train.device=cpu"),
    ],
)
def test_remedies_of_a_probe(error: str, remedy: str) -> None:
    assert remedy in tensors.judge(Ran(f'probe:{{"step": "s", "error": "{error}"}}'), 1).remedy


def test_tensors_are_added_on_the_cpu_and_on_the_stand_in(subject: MakeSubject) -> None:
    assert tensors.adds(subject("train.engine=transformers", "train.device=cpu")).found.endswith("1 + 3 = 4 on cpu")
    finding = tensors.adds(subject("train.device=cpu"))
    assert (finding.state, "torch_npu" in finding.found) == (State.OK, True)


def test_a_gpu_that_is_not_there(subject: MakeSubject) -> None:
    finding = tensors.adds(subject("train.engine=transformers", "train.device=cuda", CUDA_VISIBLE_DEVICES=""))
    assert finding.state == State.FAILED
    assert finding.found.startswith("add two tensors on cuda:0: ")


def test_sources_and_patches(small: SmallUpstream, subject: MakeSubject) -> None:
    def look() -> Finding:
        return guarded("patches", lambda: patches.sources(subject(), small.target, small.patches))

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
    assert ascend_files.versions(fake.environment, fake.root) == {}
    fake.add_stack()
    assert ascend_files.versions(fake.environment, fake.root) == {"Ascend driver": "24.1.rc3", "CANN": "8.0.RC3"}
