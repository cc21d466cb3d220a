"""`make sft` with the mindspeed engine: the real MindSpeed-LLM started, stopped, killed and resumed on a CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from conftest import PATIENCE, ROOT, MakeRecipe, conversation, write_samples
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.dataset.index_file import field_path
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.recipe.model_config import TRACKER
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.process import Command, Training
from openpangu_sft.training.run.metrics import DeviceMemory, read_metrics
from openpangu_sft.training.run.retention import iterations
from refusals import refusal_of
from upstream import require_compiler
from upstream_log import FULL_DEVICE, ITERATION

PROGRAM = """
import sys
from pathlib import Path
from openpangu_sft.training.mindspeed import start
start.SOURCES = Path(sys.argv.pop(1))
from openpangu_sft.cli.main import main
main()
"""
"""The command line, with the tests' own copy of the sources."""

SETTINGS = ["train.engine=mindspeed", "train.device=cpu", "train.iterations=6", "train.save_interval=2"]
SETTINGS += [
    "train.precision=fp32",
    "parallel.devices_per_node=2",
    "train.global_batch_size=2",
    "train.lr_warmup_iterations=1",
]


class Case:
    """A recipe with its data and checkpoint, and ways to train with it."""

    def __init__(self, recipe: Recipe, sources: Path, directory: Path) -> None:
        self.recipe, self.sources = recipe, sources
        self.file = directory / "case.yaml"
        self.file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        self.run = recipe.path("run")

    def command(self, *settings: str) -> list[str]:
        options = [f"--set={setting}" for setting in settings]
        return [sys.executable, "-c", PROGRAM, str(self.sources), "sft", "--recipe", str(self.file), *options]

    def start(self, *settings: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*before, *self.command(*settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment},
        )

    def train(self, *settings: str) -> tuple[int, str]:
        """Exit code and what was said."""
        process = self.start(*settings)
        said, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, said

    def losses(self, run: str = "") -> list[float]:
        return [row["loss"] for row in read_metrics(self.run.with_name(run) if run else self.run)]

    def until(self, iteration: int, process: subprocess.Popen[str]) -> None:
        """Waits for an iteration."""
        deadline = time.monotonic() + PATIENCE  # a busy machine takes minutes to import all of upstream twice
        while time.monotonic() < deadline:
            if any(row["iteration"] >= iteration for row in read_metrics(self.run)):
                return
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        raise AssertionError("training did not come this far")


@pytest.fixture
def case(upstream: Path, make_recipe: MakeRecipe, tmp_path: Path) -> Case:
    require_compiler()
    recipe = make_recipe(*SETTINGS)
    records = [conversation(f"问题 {number}", f"答案 {number} " * (number % 5 + 1)) for number in range(40)]
    write_samples(recipe.path("samples") / "a.jsonl", records)
    run_preprocess(recipe)
    run_merge(recipe)
    run_convert(recipe)
    return Case(recipe, upstream, tmp_path)


def train_with(recipe: Recipe, printed: str, code: int = 0) -> None:
    """Supervises a program that prints what upstream would on an NPU."""
    recipe.path("run").mkdir()
    dataset = Manifest("dataset", settings={}, inputs={}, counts={"tokens": 1, "packs": 1})
    program = f"print({printed!r}); raise SystemExit({code})"
    folder = recipe.path("run") / "work"
    Training(recipe, dataset, 0, planned=45 << 30).start(Command([sys.executable, "-c", program], folder, {}))


def test_the_device_memory_is_shown_and_recorded(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe("train.engine=mindspeed", "train.iterations=3", "train.lr_warmup_iterations=1")
    memory = DeviceMemory(peak=41 << 30, left=1 << 30, total=61 << 30)
    lines = [ITERATION.replace("12/", f"{number}/") for number in (1, 2, 3)]
    report = f'openpangu-sft reports {{"memory": {memory.model_dump_json()}}}\n'
    train_with(recipe, "".join([lines[0], report, *lines[1:]]))
    said = capsys.readouterr().err
    assert "device memory: peak 41.0 GiB of tensors measured, 1.0 of 61.0 GiB left; planned: 45.0 GiB\n" in said
    assert "a later iteration may run out of memory -> recompute more (train.recompute)" in said
    recorded = {row["iteration"]: row["memory"] for row in read_metrics(recipe.path("run")) if "memory" in row}
    assert recorded == {2: memory.model_dump()}


def test_a_full_device_is_said_with_what_to_do(make_recipe: MakeRecipe) -> None:
    said = refusal_of(
        train_with, make_recipe("train.engine=mindspeed"), f"RuntimeError: HCCL\n[rank3]: {FULL_DEVICE}", 1
    )
    assert "training ended with exit code 1: RuntimeError: NPU out of memory. Tried to allocate 5.03 GiB" in said
    assert said.endswith(
        "-> recompute more (train.recompute), split the model further (parallel) or lower "
        "data.seq_length; see make plan"
    )


def training_processes(case: Case) -> list[str]:
    """Of this case; others may be training here."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "posttrain_gpt.py" in line and str(case.run) in line]


def test_stopped_and_resumed_as_without_interruption(case: Case) -> None:
    code, said = case.train("paths.run=whole")
    assert code == 0, said
    whole = case.losses("whole")
    assert len(whole) == 6
    assert (case.run.with_name("whole") / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((case.run.with_name("whole") / "tensorboard").iterdir())
    (log,) = (case.run.with_name("whole") / "logs").iterdir()
    assert log.read_text("utf-8").count('reports {"memory": {"peak": 0, "left":') == 1  # the stand-in counts none

    # stopped after the first iteration, perhaps only when all are done; the schedule is the same
    endless = ["train.iterations=6", "train.keep_checkpoints=1"]
    process = case.start(*endless)
    case.until(1, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE)
    stopped_at = len(case.losses())
    if stopped_at < 6:
        assert process.returncode == 128 + signal.SIGTERM, said
        assert f"stopped by SIGTERM after iteration {stopped_at}, which is saved: run make sft again" in said
    assert iterations(case.run) == [stopped_at]
    code, said = case.train(*endless)
    assert code == 0, said
    assert case.losses() == pytest.approx(whole, rel=1e-6)
    assert iterations(case.run) == [6]
    code, said = case.train(*endless)
    assert (code, "has 6 iterations already" in said) == (0, True)


def test_killed_it_leaves_no_process_and_resumes(case: Case) -> None:
    process = case.start("train.iterations=500", "train.save_interval=2")
    case.until(5, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + PATIENCE
    while training_processes(case) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert training_processes(case) == []
    newest = int((case.run / TRACKER).read_text())
    code, said = case.train(f"train.iterations={newest + 1}")
    assert code == 0, said
    assert f"resuming after iteration {newest}" in said
    iterations = [row["iteration"] for row in read_metrics(case.run)]
    # what the training processes did after their parent was killed has not been read by anyone
    assert iterations == sorted(set(iterations))
    assert {*range(1, 6), newest + 1} <= set(iterations)


def test_a_checkpoint_that_upstream_does_not_load_is_no_start(case: Case) -> None:
    """It would train from random weights, and end with 0."""
    (case.recipe.path("mcore") / TRACKER).write_text("2")
    code, said = case.train()
    assert code == 1
    assert "MindSpeed-LLM did not load the checkpoint and would train from random weights" in said
    assert case.losses() == []
    assert training_processes(case) == []


def test_failure_is_said_with_its_reason_and_its_log(case: Case) -> None:
    """Packs without one trained token make the loss 0/0."""
    path = field_path(case.recipe.path("dataset"), "data", "labels", "bin")
    np.full(path.stat().st_size // 4, -100, "<i4").tofile(path)
    code, said = case.train()
    assert code == 1
    (log,) = (case.run / "logs").iterdir()
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"openpangu-sft: {log}: training ended with exit code 1: ValueError")
    assert "rank " in last  # two ranks may write into one line: “ValueErrorValueError: : rank 0 …”
    assert "found NaN in the loss" in last
    assert last.endswith("-> see this log")


def test_sources_that_are_not_there(case: Case, tmp_path: Path) -> None:
    case.sources = tmp_path / "nothing"
    code, said = case.train()
    assert code == 1
    assert f"openpangu-sft: {tmp_path}/nothing: the upstream sources are not there -> run make sources" in said


@pytest.fixture
def two_machines() -> Iterator[dict[str, tuple[str, ...]]]:
    """Two network namespaces with a cable between them: what to put before a command to run it on each."""
    names = {"first": "10.77.0.1", "second": "10.77.0.2"}
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces want root and iproute2")
    mine = f"opg{os.getpid()}"
    commands = [["ip", "netns", "add", f"{mine}-{name}"] for name in names]
    made = subprocess.run(commands[0], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no right to make network namespaces: {made.stderr.strip()}")
    one, other = (f"{mine}-{name}" for name in names)
    setup = [
        commands[1],
        ["ip", "link", "add", "cable0", "netns", one, "type", "veth", "peer", "cable1", "netns", other],
    ]
    for namespace, device, address in ((one, "cable0", "10.77.0.1"), (other, "cable1", "10.77.0.2")):
        setup.append(["ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", device])
        setup += [["ip", "-n", namespace, "link", "set", link, "up"] for link in ("lo", device)]
    try:
        for command in setup:
            subprocess.run(command, check=True, capture_output=True)
        yield {name: ("ip", "netns", "exec", f"{mine}-{name}") for name in names}
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", f"{mine}-{name}"], capture_output=True)


def test_one_of_two_nodes_is_lost_and_both_resume(
    case: Case, two_machines: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    def start(number: int, *settings: str) -> subprocess.Popen[str]:
        before = list(two_machines.values())[number]
        environment = {"MASTER_ADDR": "10.77.0.1", "NODE_RANK": str(number), "GLOO_SOCKET_IFNAME": f"cable{number}"}
        sizes = ["parallel.nodes=2", "parallel.devices_per_node=1", *settings]
        return case.start(*sizes, before=before, **environment)

    endless = ["train.iterations=500", "train.save_interval=2"]
    machines = [start(number, *endless) for number in (0, 1)]
    case.until(4, machines[1])
    # lost with all that runs on it
    for pid in subprocess.run(
        ["ip", "netns", "pids", two_machines["second"][-1]], capture_output=True, text=True, check=True
    ).stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    said, _ = machines[0].communicate(timeout=PATIENCE)
    machines[1].communicate(timeout=PATIENCE)
    assert machines[0].returncode == 1
    assert "training ended with exit code" in said.strip().splitlines()[-1]
    newest = int((case.run / TRACKER).read_text())
    assert newest >= 2

    machines = [start(number, f"train.iterations={newest + 2}") for number in (0, 1)]
    for machine in machines:
        said, _ = machine.communicate(timeout=PATIENCE)
        assert machine.returncode == 0, said
        assert f"resuming after iteration {newest}" in said
    assert [row["iteration"] for row in read_metrics(case.run)] == list(range(1, newest + 3))
