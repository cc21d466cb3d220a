"""Doctor's checks of the NPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from doctor_machines import Check, FakeMachine, MakeContext, context, fake, recorded
from openpangu_sft.doctor import ascend, npus
from openpangu_sft.doctor.checks import CHECKS
from openpangu_sft.doctor.machine import State
from openpangu_sft.training.run.provenance import IMAGE
from openpangu_sft.util.ascend import VARIABLE

__all__ = ["context", "fake"]


@pytest.mark.parametrize("check", [npus.seen, npus.healthy, npus.free, npus.device_files])
def test_eight_healthy_npus(fake: FakeMachine, context: MakeContext, check: Check) -> None:
    fake.add_npus("healthy.txt")
    assert check(context()).state == State.OK


ON_NPUS = ["NPUs", "NPU health", "NPUs free", "NPU memory", "device files", "driver", "firmware", "CANN", "NPU links"]


@pytest.mark.parametrize("check", [*ON_NPUS, "torch_npu"])
@pytest.mark.parametrize("engine", ["train.engine=transformers", "train.device=cpu"])
def test_nothing_of_an_npu_is_needed_without_one(context: MakeContext, check: str, engine: str) -> None:
    finding = CHECKS[check](context(engine))
    assert finding.state == State.SKIPPED
    assert finding.found.startswith("not needed by train.engine=")


def test_no_npu_smi(context: MakeContext) -> None:
    one = context()
    finding = npus.seen(one)
    assert (finding.state, finding.expected) == (State.FAILED, "8 x 910B (parallel.devices_per_node)")
    assert "npu-smi is not installed" in finding.found
    assert {CHECKS[check](one).state for check in ("NPU health", "NPUs free")} == {State.SKIPPED}
    assert npus.device_files(one).state == ascend.driver(one).state == ascend.cann(one).state == State.FAILED


def test_npus_without_npu_smi_may_do(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("healthy.txt")
    (fake.programs / "npu-smi").unlink()
    assert npus.seen(context()).state == State.WARNING
    assert npus.device_files(context()).state == State.OK


def test_npu_smi_off_the_path(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("healthy.txt")
    place_of_it = fake.root / "usr/local/sbin/npu-smi"
    place_of_it.parent.mkdir(parents=True)
    (fake.programs / "npu-smi").rename(place_of_it)
    assert npus.seen(context()).state == State.OK


def test_fewer_npus_than_processes(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("some_npus.txt", count=2)
    finding = npus.seen(context())
    assert (finding.state, finding.found) == (State.FAILED, "2 x 910B4 (NPU 3, 6)")


@pytest.mark.parametrize(("recording", "devices"), [("a3.txt", 8), ("310p.txt", 1)])
def test_other_chips_are_a_warning(fake: FakeMachine, context: MakeContext, recording: str, devices: int) -> None:
    fake.add_npus(recording)
    one = context(f"parallel.devices_per_node={devices}")
    finding = npus.seen(one)
    assert finding.state == State.WARNING
    assert "is not a 910B" in finding.found
    assert npus.healthy(one).state == npus.free(one).state == State.OK


def test_a_faulty_npu(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("faulty.txt")
    finding = npus.healthy(context())
    assert (finding.state, finding.found) == (State.FAILED, "NPU 5: Alarm")
    # seven are well, and a batch of 8 is not divided by 7, 6 or 5
    assert f"take others: export {VARIABLE}=0,1,2,3 with SET=parallel.devices_per_node=4;" in finding.remedy
    unused = npus.healthy(context("parallel.devices_per_node=4"))
    assert (unused.state, unused.found) == (State.WARNING, "NPU 5: Alarm")


@pytest.mark.parametrize(
    ("health", "state"),
    [("Warning", State.WARNING), ("Critical", State.FAILED), ("UNKNOWN", State.FAILED), ("??", State.FAILED)],
)
def test_degrees_of_illness(fake: FakeMachine, context: MakeContext, tmp_path: Path, health: str, state: State) -> None:
    table = recorded("faulty.txt").replace("| Alarm         |", f"| {health:<14}|")
    (tmp_path / "table.txt").write_text(table)
    fake.add_npus(str(tmp_path / "table.txt"))
    assert npus.healthy(context()).state == state


def test_busy_npus(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("busy.txt")
    finding = npus.free(context())
    assert finding.state == State.FAILED
    assert finding.found == "NPU 0: python (919717), 3,969 MB\nNPU 1: python (920633), 3,969 MB"
    assert finding.remedy.endswith(f"take others: export {VARIABLE}=2,3,4,5 with SET=parallel.devices_per_node=4")
    undivided = context("parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2")
    assert npus.free(undivided).remedy == "wait for them or end them"


def test_others_in_a_container_of_make(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("busy.txt")
    finding = npus.free(context("parallel.devices_per_node=2", **{IMAGE: "openpangu-sft:0-npu sha256:0"}))
    assert finding.remedy.endswith("or take others: NPUS=2,3")
    pod = npus.free(context("parallel.devices_per_node=2", KUBERNETES_SERVICE_HOST="10.0.0.1"))
    assert pod.remedy.endswith(f"or take others: export {VARIABLE}=2,3")


def test_others_are_neither_ill_nor_full(fake: FakeMachine, context: MakeContext, tmp_path: Path) -> None:
    row = "| 3     910B1               | OK            |"
    full = "| 0                         | 0000:81:00.0  | 0           0    / 0          3379 / 65536         |"
    table = (
        recorded("busy.txt").replace(row, row.replace("OK   ", "Alarm")).replace(full, full.replace(" 3379", "40000"))
    )
    (tmp_path / "table.txt").write_text(table)
    fake.add_npus(str(tmp_path / "table.txt"))
    remedy = npus.free(context("parallel.devices_per_node=2")).remedy
    assert remedy.endswith(f"{VARIABLE}=2,5")


def test_npus_that_cann_is_told_to_take(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("busy.txt")
    others = context("parallel.devices_per_node=4", **{VARIABLE: "4,5,6,7"})
    assert npus.seen(others).found == "8 x 910B1; NPU 4, 5, 6, 7 will be used"
    assert npus.free(others).found == "no process on NPU 4, 5, 6, 7"
    assert npus.free(context("parallel.devices_per_node=4", **{VARIABLE: "1,5,6,7"})).state == State.FAILED


def test_fewer_npus_than_processes_are_to_be_seen(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("healthy.txt")
    finding = npus.seen(context("parallel.devices_per_node=4", **{VARIABLE: "4,5,9,6"}))
    assert (finding.state, finding.found) == (State.FAILED, f"8 x 910B1; {VARIABLE}=4,5,9,6 leaves 2 of them")
    assert finding.remedy == f"take others: export {VARIABLE}=0,1,2,3"
    assert npus.device_files(context("parallel.devices_per_node=4", **{VARIABLE: "4,5"})).state == State.FAILED


def test_a_container_numbers_its_npus_anew(fake: FakeMachine, context: MakeContext, tmp_path: Path) -> None:
    table = recorded("some_npus.txt").replace(
        "| 6       0                 | 14412 ", "| 3       0                 | 14412 "
    )
    (tmp_path / "table.txt").write_text(table)
    fake.add_npus(str(tmp_path / "table.txt"))
    assert npus.free(context("parallel.devices_per_node=1", **{VARIABLE: "1"})).found == "no process on NPU 6"
    busy = context("parallel.devices_per_node=1", KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert npus.free(busy).remedy.endswith(f"{VARIABLE}=1")
    of_make = context("parallel.devices_per_node=1", **{IMAGE: "x"})
    assert npus.free(of_make).remedy.endswith("NPUS=6")


def test_processes_on_npus_that_are_not_used(fake: FakeMachine, context: MakeContext, tmp_path: Path) -> None:
    process = "| 0       0                 | 919717 "
    (tmp_path / "table.txt").write_text(recorded("busy.txt").replace(process, process.replace("| 0", "| 7")))
    fake.add_npus(str(tmp_path / "table.txt"))
    assert npus.free(context("parallel.devices_per_node=1")).state == State.OK
    assert npus.free(context("parallel.devices_per_node=2")).found == "NPU 1: python (920633), 3,969 MB"


def test_chips_of_a_card_are_npus_of_their_own(fake: FakeMachine, context: MakeContext, tmp_path: Path) -> None:
    idle = "| No running processes found in NPU 0 "
    busy = "| 0       1                 | 77            | python                   | 5                       |\n"
    (tmp_path / "table.txt").write_text(recorded("a3.txt").replace(idle, busy + idle))
    fake.add_npus(str(tmp_path / "table.txt"), count=16)
    assert npus.free(context("parallel.devices_per_node=1")).found == "no process on NPU 0 chip 0"
    finding = npus.free(context(**{IMAGE: "x"}))
    assert finding.found == "NPU 0 chip 1: python (77), 5 MB"
    assert finding.remedy.endswith("NPUS=0,2,3,4,5,6,7,8")


@pytest.mark.parametrize(("megabytes", "state"), [(8192, State.OK), (8193, State.WARNING)])
def test_memory_above_that_of_an_idle_npu(
    fake: FakeMachine, context: MakeContext, tmp_path: Path, megabytes: int, state: State
) -> None:
    (tmp_path / "table.txt").write_text(recorded("busy_unseen.txt").replace("31859/", f"{megabytes}/"))
    fake.add_npus(str(tmp_path / "table.txt"))
    assert npus.free(context()).state == state


def test_memory_that_nobody_seen_here_has_taken(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("busy_unseen.txt")
    finding = npus.free(context())
    assert finding.state == State.WARNING
    assert finding.found == "NPU 4: 31,859 of 32,768 MB in use, by no process seen here"
    assert npus.free(context("parallel.devices_per_node=4")).state == State.OK


@pytest.mark.parametrize("recording", ["device_used.txt", "no_driver.txt"])
def test_an_npu_smi_that_fails(fake: FakeMachine, context: MakeContext, recording: str) -> None:
    fake.add_npus(recording, code=1)
    one = context()
    finding = npus.seen(one)
    assert finding.state == State.FAILED
    assert recorded(recording).splitlines()[-1] in finding.found
    assert {CHECKS[check](one).state for check in ("NPU health", "NPUs free")} == {State.SKIPPED}


def test_device_files_that_are_missing(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("healthy.txt", count=2)
    few = npus.device_files(context())
    assert (few.state, few.found) == (State.FAILED, "2 /dev/davinci* for 8 processes")
    assert npus.device_files(context("parallel.devices_per_node=2")).state == State.OK
    (fake.root / "dev/hisi_hdc").unlink()
    assert npus.device_files(context()).found == "not there: /dev/hisi_hdc"


@pytest.mark.parametrize(
    ("mode", "group", "user", "remedy"),
    [
        (0o660, 1, 1000, "usermod -aG "),
        (0o600, 1, 1000, "run this as root"),
        (0o640, 1, 1000, "run this as root"),
        (0o660, 0, 1000, "run this as root"),
        (0o600, 0, 1000, "run this as root"),
        (0o660, 1, 0, "give it the device"),
    ],
)
def test_device_files_that_are_closed(
    fake: FakeMachine,
    context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    group: int,
    user: int,
    remedy: str,
) -> None:
    fake.add_npus("healthy.txt")
    allowed, status = os.access, Path.stat
    closed = fake.root / "dev/davinci3"
    closed.chmod(mode)

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = status(path, **options)
        return os.stat_result([*found[:5], group, *found[6:]]) if path == closed else found

    monkeypatch.setattr(Path, "stat", stat)  # whoever runs this may not be able to give files away
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and allowed(path, mode))
    finding = npus.device_files(context())
    assert (finding.state, finding.found.splitlines()[1:]) == (State.FAILED, [])
    assert finding.found.startswith("no permission: /dev/davinci3 of group ")
    assert finding.found.endswith(f"mode {mode:04o}")
    assert remedy in finding.remedy
    assert ("usermod" in finding.remedy) == ("usermod" in remedy)
    assert npus.device_files(context("parallel.devices_per_node=2")).state == State.OK


def test_device_files_are_not_opened(fake: FakeMachine, context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add_npus("healthy.txt")
    one = context()
    monkeypatch.setattr(os, "open", lambda *arguments: pytest.fail("opened"))
    monkeypatch.setattr("builtins.open", lambda *arguments: pytest.fail("opened"))
    assert npus.device_files(one).state == State.OK
