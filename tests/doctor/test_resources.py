"""How doctor's checks run, and those of shared memory and image."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import PATIENCE, MakeRecipe
from doctor_machines import ON_NPUS, FakeMachine, MakeContext, context, fake
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.doctor import packages, resources
from openpangu_sft.doctor.checks import where
from openpangu_sft.doctor.machine import Finding, Machine, Ran, State, guarded
from openpangu_sft.doctor.resources import disk_bytes, memory_bytes
from openpangu_sft.recipe.lora import LINEARS, Adapter
from openpangu_sft.util.errors import UserError

ALL = tuple(name for names in LINEARS.values() for name in names)

__all__ = ["context", "fake"]


def test_an_exception_is_a_failed_line() -> None:
    def broken() -> Finding:
        raise ZeroDivisionError("of all things\x1b[2J")

    finding = guarded("a check", broken)
    assert (finding.check, finding.state) == ("a check", State.FAILED)
    assert "ZeroDivisionError: of all things\\x1b[2J" in finding.found
    assert finding.remedy


def test_a_refusal_is_a_failed_line_with_its_remedy() -> None:
    def refusing() -> Finding:
        raise UserError("is not there", where="/x", remedy="make it")

    assert guarded("it", refusing) == Finding(State.FAILED, "/x: is not there", "make it", check="it")


@pytest.mark.parametrize(
    ("number", "found", "remedy"),
    [
        (errno.EACCES, "/x: no permission", "check the owner and mode of this path"),
        (errno.EIO, "/x: Input/output error", "see dmesg"),
    ],
)
def test_an_error_of_the_system_is_explained(number: int, found: str, remedy: str) -> None:
    def failing() -> Finding:
        raise OSError(number, os.strerror(number), "/x")

    assert guarded("it", failing) == Finding(State.FAILED, found, remedy, check="it")


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    program = f"sleep infinity & echo $! >{tmp_path}/pid; wait"
    ran = Machine(tmp_path, dict(os.environ)).run("sh", "-c", program, seconds=3)
    assert ran == Ran("", "no answer within 3 s; killed")
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail("the child goes on")


def test_programs_that_end_badly(tmp_path: Path) -> None:
    machine = Machine(tmp_path, dict(os.environ))
    assert machine.run("sh", "-c", "echo a; echo b >&2; exit 3", seconds=9) == Ran("a\nb\n", "exit code 3")
    assert machine.run("sh", "-c", "kill -SEGV $$", seconds=9).problem == "ended by SIGSEGV"
    assert "does not start" in machine.run(str(tmp_path / "nothing"), seconds=9).problem


def test_needs_follow_from_the_models_size(make_recipe: MakeRecipe) -> None:
    model = ["model.num_layers=26", "model.hidden_size=1536", "model.ffn_hidden_size=6144", "model.vocab_size=153376"]
    model += ["model.num_attention_heads=12", "model.num_query_groups=6", "model.kv_channels=128"]
    recipe = make_recipe(*ON_NPUS, *model, "train.device=auto", "train.precision=bf16")
    parameters = 1_155_912_192
    assert memory_bytes(recipe) == parameters * (8 * 2 + 12)
    assert disk_bytes(recipe) == {"run": 3 * 14 * parameters, "mcore": 2 * parameters, "export": 2 * parameters}
    recipe.path("mcore").mkdir(parents=True)
    assert "mcore" not in disk_bytes(recipe)
    portable = make_recipe(*model, "parallel.devices_per_node=2")
    assert memory_bytes(portable) == parameters * 20 * 2


def test_needs_of_lora(make_recipe: MakeRecipe) -> None:
    """Optimizer state of adapters alone, weights of both."""
    recipe = make_recipe(*ON_NPUS, "train.device=auto", "train.precision=bf16", "train.lora.rank=4")
    weights, adapters = (parameter_count(recipe.model, Adapter(4, 32, ALL), trained) for trained in (False, True))
    assert 0 < adapters < weights
    assert memory_bytes(recipe) == weights * 8 * 2 + adapters * 12
    assert disk_bytes(recipe)["run"] == 3 * (2 * weights + 12 * adapters)
    portable = make_recipe("parallel.devices_per_node=2", "train.lora.rank=4")
    assert memory_bytes(portable) == (weights * 4 + adapters * 16) * 2


@pytest.mark.parametrize(("mb", "state"), [(64, State.WARNING), (2048, State.OK)])
def test_shared_memory(context: MakeContext, monkeypatch: pytest.MonkeyPatch, mb: int, state: State) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=mb << 20))
    assert resources.shared_memory(context()).state == state
    assert resources.shared_memory(context("parallel.devices_per_node=1")).state == State.SKIPPED


def test_docker(fake: FakeMachine, context: MakeContext) -> None:
    assert packages.docker(context()).state == State.WARNING
    assert packages.docker(context("train.engine=transformers")).state == State.SKIPPED
    fake.program("docker", 'echo "No such image"; exit 1')
    missing = packages.docker(context(DOCKER=""))
    assert (missing.state, "make image TARGET=npu" in missing.remedy) == (State.WARNING, True)
    assert missing.found.endswith("-npu: No such image")
    fake.program("docker", "echo sha256:0")
    assert packages.docker(context(DOCKER="")).found.endswith("-npu")


def test_where(fake: FakeMachine, context: MakeContext) -> None:
    assert where(context())["where"] == "on the host"
    fake.write("/.dockerenv")
    assert where(context())["where"] == "in a container that is not of this project's image"
    fake.write("/opt/openpangu/versions.json", '{"target": "npu", "commit": "0123456789abcdef"}')
    assert where(context())["where"].endswith("-npu, commit 0123456789ab")
    assert packages.docker(context()).state == State.SKIPPED
