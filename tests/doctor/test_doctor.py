"""`openpangu-sft doctor` as users run it: on machines made of recordings, and on this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from conftest import ROOT, TINY
from doctor_machines import ON_NPUS, FakeMachine, checks, recorded, sets, states
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.doctor.checks import CHECKS, print_findings
from openpangu_sft.doctor.machine import Finding, State
from openpangu_sft.training.mindspeed.sources import SOURCES

NPU_RUN = sets(*TINY, *ON_NPUS, "train.device=auto")
OF_CLONE = set() if (SOURCES / MANIFEST).is_file() else {"patches"}
"""What is lacking in a clone where make sources has not run."""


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    """A server with all that the recipe wants; the stand-in is in the place of torch_npu."""
    machine = FakeMachine(tmp_path / "fake")
    machine.add_npus("healthy.txt")
    machine.add_stack()
    machine.add_torch_npu()
    return machine


def failed(found: dict[str, str]) -> set[str]:
    return {check for check, state in found.items() if state == "failed"} - OF_CLONE


def doctor(fake: FakeMachine, tmp_path: Path, *arguments: str) -> dict[str, str]:
    """States on a machine where nothing else than the NPUs' side can fail; the exit code goes with them."""
    finished = fake.doctor(*NPU_RUN, *sets(f"paths.cache={tmp_path}/cache"), "--json", *arguments)
    found = states(finished)
    assert finished.returncode == int("failed" in found.values()), finished.stderr
    assert list(found) == list(CHECKS)
    return found


def test_a_healthy_server(fake: FakeMachine, tmp_path: Path) -> None:
    found = doctor(fake, tmp_path)
    assert failed(found) == set()
    on_npus = ("NPUs", "NPU health", "NPUs free", "device files", "driver", "CANN", "torch_npu", "tensors")
    assert {found[check] for check in on_npus} == {"ok"}


@pytest.mark.parametrize(
    ("recording", "lacking"),
    [("faulty.txt", {"NPU health"}), ("busy.txt", {"NPUs free"}), ("some_npus.txt", {"NPUs", "NPUs free"})],
)
def test_npus_that_cannot_be_used(fake: FakeMachine, tmp_path: Path, recording: str, lacking: set[str]) -> None:
    fake.add_npus(recording)
    assert failed(doctor(fake, tmp_path)) == lacking


def test_another_driver(fake: FakeMachine, tmp_path: Path) -> None:
    fake.add_npus("other_driver.txt")
    older = recorded("driver_24.1.rc2.2.info").replace("24.1.rc2.2", "23.0.7")
    fake.write("/usr/local/Ascend/driver/version.info", older)
    found = doctor(fake, tmp_path)
    assert (failed(found), found["driver"]) == (set(), "warning")
    fake.add_npus("newer_driver.txt")
    fake.write("/usr/local/Ascend/driver/version.info", recorded("driver_25.3.rc1.info"))
    found = doctor(fake, tmp_path)
    assert (failed(found), found["driver"]) == (set(), "ok")


def test_nothing_of_the_stack_is_installed(tmp_path: Path) -> None:
    found = doctor(FakeMachine(tmp_path / "bare"), tmp_path)
    assert failed(found) == {"NPUs", "device files", "driver", "CANN", "torch_npu", "tensors"}
    assert found["NPU health"] == found["NPUs free"] == found["firmware"] == "skipped"


def test_an_npu_smi_that_hangs_is_killed_and_said(fake: FakeMachine, tmp_path: Path) -> None:
    fake.program("npu-smi", "exec sleep infinity")
    finished = fake.doctor(*NPU_RUN, *sets(f"paths.cache={tmp_path}/cache"), "--json")
    assert finished.returncode == 1
    (line,) = [entry for entry in checks(finished) if entry["check"] == "NPUs"]
    assert line["found"].startswith("npu-smi info: no answer within 20 s; killed")
    assert "hangs" in line["remedy"]
    assert failed(states(finished)) == {"NPUs"}


def test_json_for_machines(fake: FakeMachine, tmp_path: Path) -> None:
    finished = fake.doctor(*NPU_RUN, *sets(f"paths.cache={tmp_path}/cache"), "--json")
    content = json.loads(finished.stdout)
    assert list(content) == ["where", "checks", "npus", "summary"]
    assert content["where"]["recipe"] == "train.engine=mindspeed train.device=auto, 1 x 8 processes"
    assert content["npus"][0]["name"] == "910B1"
    assert sum(content["summary"].values()) == len(CHECKS)
    for entry in content["checks"]:
        assert {"check", "state", "found"} <= set(entry) <= {"check", "state", "found", "expected", "remedy"}
        assert entry["state"] in ("ok", "skipped") or entry["remedy"]


def test_the_table(fake: FakeMachine, tmp_path: Path) -> None:
    fake.add_npus("faulty.txt")
    finished = fake.doctor(*NPU_RUN, *sets(f"paths.cache={tmp_path}/cache"), COLUMNS="120")
    assert finished.returncode == 1
    assert finished.stdout.startswith("where:   on the host\nuser:    ")
    lines = finished.stdout.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("NPU health")]
    indent = lines[first].index("NPU 5")
    assert lines[first].split() == ["NPU", "health", "failed", "NPU", "5:", "Alarm"]
    assert lines[first + 1] == " " * indent + "expected: OK"
    remedy = "-> see npu-smi info -t health -i 5; take others: export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3"
    assert lines[first + 2].startswith(" " * indent + remedy)
    assert finished.stderr == ""


def test_a_narrow_terminal_loses_nothing(fake: FakeMachine, tmp_path: Path) -> None:
    finished = fake.doctor(*NPU_RUN, *sets(f"paths.cache={tmp_path}/cache"), COLUMNS="50")
    lines = finished.stdout.splitlines()
    assert [name for name in CHECKS if not any(line.startswith(f"{name} ") for line in lines)] == []
    assert "8 x 910B1; NPU 0, 1, 2, 3, 4, 5, 6, 7 will be used" in " ".join(finished.stdout.split())
    assert "…" not in finished.stdout


def test_words_are_wrapped_and_a_long_path_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"/cache/{'a' * 60}/{'b' * 60}"
    finding = Finding(State.FAILED, f"{path}: cannot be written\n{path} neither", "several words " * 20, check="disk")
    print_findings(Console(width=80), {"where": path}, [finding])
    shown = capsys.readouterr().out
    assert [line.strip() for line in shown.splitlines() if "/cache/" in line] == [
        f"where:   {path}",
        f"disk          failed   {path}:",
        path,
    ]
    assert max(len(line) for line in shown.splitlines() if path not in line) <= 80


def test_a_torch_that_does_not_import(fake: FakeMachine, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libtorch.so is not here')\n")
    finished = fake.doctor("--json", *sets(*TINY, f"paths.cache={tmp_path}"), PYTHONPATH=str(broken))
    (line,) = [entry for entry in checks(finished) if entry["check"] == "tensors"]
    assert (finished.returncode, line["state"]) == (1, "failed")
    assert line["found"] == "import torch: ImportError: libtorch.so is not here"


def test_a_torch_that_takes_the_process_with_it(fake: FakeMachine, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    finished = fake.doctor("--json", *sets(*TINY, f"paths.cache={tmp_path}"), PYTHONPATH=str(broken))
    (line,) = [entry for entry in checks(finished) if entry["check"] == "tensors"]
    assert (line["state"], line["found"]) == ("failed", "ended by SIGSEGV")


def test_the_demo_passes_on_this_machine(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "fake")
    finished = machine.doctor(*sets(f"paths.cache={tmp_path}/cache"), "--json", HOST_ROOT="/")
    assert (finished.returncode, finished.stderr) == (0, "")
    found = states(finished)
    assert {found[check] for check in ("packages", "tensors")} == {"ok"}
    assert {found[check] for check in ("NPUs", "driver", "CANN", "torch_npu", "patches")} == {"skipped"}
    assert not (tmp_path / "cache").exists()


def test_every_check_is_in_the_documentation() -> None:
    page = (ROOT / "docs/doctor.md").read_text("utf-8")
    assert [name for name in CHECKS if f"| {name} |" not in page] == []
