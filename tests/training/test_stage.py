"""Training for real: whole runs, stopped and resumed ones, several processes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_files import read_hf, read_mcore
from conftest import PATIENCE, ROOT
from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.portable import state
from openpangu_sft.training.run.metrics import read_metrics
from openpangu_sft.training.run.provenance import read_starts
from openpangu_sft.training.run.retention import iterations
from openpangu_sft.training.stage import run_sft
from refusals import refusal_of
from training.conftest import Options


def recipe_of(overrides: list[str]) -> Recipe:
    return load_recipe(ROOT / "recipes/demo.yaml", overrides)


def train(overrides: list[str]) -> Path:
    recipe = recipe_of(overrides)
    run_sft(recipe, [])
    return recipe.path("run")


def command(overrides: list[str], *stage: str) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return [
        sys.executable,
        "-m",
        "openpangu_sft",
        *(stage or ("sft",)),
        "--recipe",
        str(ROOT / "recipes/demo.yaml"),
        *sets,
    ]


def until(process: subprocess.Popen[str], words: str) -> str:
    """Reads what a process says until a line has these words."""
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


def start(overrides: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a run to end well; returns its output."""
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    return output


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def wait_for_iteration(run: Path, iteration: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    ended = False
    while len(read_metrics(run)) < iteration:
        assert not ended, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
        ended = process.poll() is not None  # then one more look: it may have come that far since


def test_a_run_leaves_checkpoints_metrics_and_a_curve(options: Options) -> None:
    run = train(options())
    rows = read_metrics(run)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["lr"] == 0.0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["tokens"] == 2 * 128
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000003", "iter_0000006"]
    manifest = read_manifest(run / "iter_0000006", "checkpoint", "")
    assert manifest.counts == {"iteration": 6, "loss": rows[-1]["loss"], "versions": state.VERSIONS}
    assert state.VERSIONS["torch"] == torch.__version__
    content = torch.load(run / "iter_0000006/mp_rank_00/model_optim_rng.pt")
    assert content["iteration"] == 6
    assert content["args"].consumed_train_samples == 12


def test_the_first_loss_is_that_of_the_converted_weights(options: Options, tiny_hf: Path) -> None:
    from openpangu_sft.model.batches import PackedDataset, micro_batches, training_order
    from openpangu_sft.model.llama import SEGMENTS, PackLoss, build_model

    recipe = recipe_of(options("train.micro_batch_size=2"))
    dataset = PackedDataset(recipe.path("dataset"), 128)
    packs = micro_batches(training_order(len(dataset), 12, recipe.train.seed), 1, 2, 2, 0, 1)[0]
    loss = PackLoss(build_model(tiny_hf, read_hf(tiny_hf, recipe.model), SEGMENTS, torch.device("cpu")))
    with torch.no_grad():
        batch = dataset.batch(packs, torch.device("cpu"))
        expected = (loss(batch) / len(batch.rows)).item()
    assert losses(train(options("train.micro_batch_size=2")))[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("extra", [[], ["train.precision=bf16"]])
def test_continued_after_a_checkpoint_it_gives_the_same_losses(
    options: Options, tmp_path: Path, extra: list[str]
) -> None:
    undisturbed = train(options(*extra))
    second = tmp_path / "second"
    shutil.copytree(undisturbed, second)
    shutil.rmtree(second / "iter_0000006")
    (second / "latest_checkpointed_iteration.txt").write_text("3")  # as if killed between two checkpoints
    run = train([*options(*extra), f"paths.run={second}"])
    assert losses(run) == losses(undisturbed)
    model = recipe_of(options(*extra)).model
    expected = read_mcore(undisturbed, model, 6)
    for name, tensor in read_mcore(run, model, 6).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_newest_checkpoint_that_is_cut_off_is_passed_over(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(options())
    undisturbed = losses(run)
    file = run / "iter_0000006/mp_rank_00/model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:1000])
    train(options())
    assert "iteration 6 is not complete" in capsys.readouterr().err
    assert losses(run) == undisturbed
    assert read_manifest(run / "iter_0000006", "checkpoint", "")


def test_a_lost_tracker_file_does_not_begin_the_run_anew(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(options())
    (run / "latest_checkpointed_iteration.txt").unlink()
    train(options("train.iterations=8"))
    assert "resuming from 6" in capsys.readouterr().err
    assert [row["iteration"] for row in read_metrics(run)] == list(range(1, 9))


def test_a_run_that_has_its_iterations_stays_as_it_is(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(options())
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for wanted in (6, 3):
        train(options(f"train.iterations={wanted}"))
        assert "has 6 iterations already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_only_the_newest_checkpoints_are_kept(options: Options, tmp_path: Path) -> None:
    train(options("train.iterations=6", "train.save_interval=2", "train.keep_checkpoints=2"))
    assert iterations(tmp_path / "run") == [4, 6]


def test_killed_at_any_moment_and_run_again_it_gives_the_same_losses(options: Options, tmp_path: Path) -> None:
    """All in processes of their own: another number of threads, as a test process may have, changes last digits."""
    many = ["train.iterations=40", "train.save_interval=5"]
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    finish(start([*options(*many), f"paths.run={undisturbed}"]))
    for iteration in (7, 18, 29):
        process = start(options(*many))
        wait_for_iteration(run, iteration, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(start(options(*many)))
    assert losses(run) == losses(undisturbed)
    assert not list(run.glob(".*.staging"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("tracker", ["tensorboard", "swanlab", "wandb"])
def test_a_signal_saves_and_says_so_in_one_line(
    options: Options, tmp_path: Path, number: signal.Signals, tracker: str
) -> None:
    long = ["train.iterations=3000", "train.save_interval=3000", f"train.trackers=[{tracker}]"]
    process = start(options(*long))
    wait_for_iteration(tmp_path / "run", 5, process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + number, output
    last = [line for line in output.splitlines() if line.startswith("openpangu-sft:")]
    assert len(last) == 1
    assert number.name in last[0]
    assert "Traceback" not in output
    stopped = int((tmp_path / "run/latest_checkpointed_iteration.txt").read_text())
    assert stopped >= 5
    shorter = [f"train.iterations={stopped + 1}", "train.save_interval=3000"]
    assert len(losses(train(options(*shorter)))) == stopped + 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_signal_stops_within_a_micro_batch(options: Options, tmp_path: Path, processes: int) -> None:
    long = ["train.iterations=9", "train.global_batch_size=40000", f"parallel.devices_per_node={processes}"]
    process = start(options(*long))
    said = until(process, "micro-batch")
    os.killpg(process.pid, signal.SIGINT)
    said += until(process, "stopping: saves after this step, in about")
    os.killpg(process.pid, signal.SIGINT)
    said += process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130, said
    assert "stopped by SIGINT at once: run make sft again to resume after the newest checkpoint" in said
    assert said.count("openpangu-sft: ") == 1
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("iter_*"))


def test_two_processes_give_the_losses_of_one(options: Options, tmp_path: Path) -> None:
    same = ["train.global_batch_size=4"]
    alone = losses(train([*options(*same), f"paths.run={tmp_path / 'alone'}"]))
    # as Kubernetes' operators set it: the number of the node
    process = start(options(*same, "parallel.devices_per_node=2"), RANK="0", WORLD_SIZE="1")
    finish(process)
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def test_two_processes_continue_where_they_were_interrupted(options: Options, tmp_path: Path) -> None:
    two = ["train.global_batch_size=4", "parallel.devices_per_node=2", "train.iterations=40", "train.save_interval=40"]
    process = start(options(*two))
    wait_for_iteration(tmp_path / "run", 3, process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130, output
    assert [line for line in output.splitlines() if "SIGINT" in line] == output.splitlines()[-1:]
    stopped = int((tmp_path / "run/latest_checkpointed_iteration.txt").read_text())
    assert 3 <= stopped < 40
    assert f"resuming after iteration {stopped}" in finish(start(options(*two)))
    alone = ["train.global_batch_size=4", "train.iterations=40", f"paths.run={tmp_path / 'alone'}"]
    assert losses(tmp_path / "run") == pytest.approx(losses(train(options(*alone))), rel=1e-4)


def test_it_goes_on_with_another_number_of_processes_and_micro_batch(options: Options, tmp_path: Path) -> None:
    same = ["train.global_batch_size=4", "train.lr_decay_style=constant", "train.lr_warmup_iterations=1"]
    whole = losses(train([*options(*same, "train.iterations=6"), f"paths.run={tmp_path / 'whole'}"]))
    changes = ([], ["parallel.devices_per_node=2"], ["train.micro_batch_size=2"])
    for done, more in enumerate(changes, 1):
        finish(start(options(*same, f"train.iterations={2 * done}", *more)))
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-6)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_that_is_killed_ends_the_run_in_words(options: Options, tmp_path: Path) -> None:
    process = start(options("parallel.devices_per_node=2", "train.iterations=3000", "train.save_interval=3000"))
    wait_for_iteration(tmp_path / "run", 2, process)
    (agent,) = children(process.pid)
    workers = children(agent)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode in (1, 128 + signal.SIGKILL), output  # whichever of the two ended first
    assert output.count("another process of this run is gone") == 1
    assert "Traceback" not in output


def test_a_third_signal_ends_workers_that_take_none(options: Options, tmp_path: Path) -> None:
    process = start(options("parallel.devices_per_node=2", "train.iterations=3000", "train.save_interval=3000"))
    wait_for_iteration(tmp_path / "run", 2, process)
    (agent,) = children(process.pid)
    workers = children(agent)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # as if they hung in a collective operation
    while any(map(lives, workers)):  # three signals at least: those that arrive together are one
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130, output
    assert output.count("stopped by SIGINT at once: run make sft again to resume") == 1


def test_recomputing_activations_changes_no_loss(options: Options, tmp_path: Path) -> None:
    plain = losses(train(options()))
    recompute = ["train.recompute.granularity=full", "train.recompute.num_layers=1", f"paths.run={tmp_path / 'again'}"]
    assert losses(train(options(*recompute))) == plain


def test_a_finished_run_is_left_as_it_is(options: Options) -> None:
    run = train(options())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.pt")}
    train(options())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.pt")} == before
    assert len(losses(train(options("train.iterations=8")))) == 8  # more iterations resume from there


def test_bf16_checkpoints_are_bf16_and_keep_the_fp32_weights_beside(options: Options) -> None:
    run = train(options("train.precision=bf16"))
    model = recipe_of(options()).model
    tensors = read_mcore(run, model, 6)
    weights = torch.load(run / "iter_0000006/mp_rank_00/transformers_engine.pt")["weights"]
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name].bfloat16(), tensor)


REFUSED = {
    "another seq_length": (["data.seq_length=64"], "data.seq_length = 128, the recipe says 64"),
    "another order": (["data.seed=5"], "data.seed = 1234, the recipe says 5"),
    "another size": (["model.num_layers=4"], "model.num_layers is 4 in the recipe, 2 in this checkpoint"),
    "no dataset": (["paths.dataset=nowhere"], "run make preprocess and make merge"),
    "no checkpoint": (["paths.mcore=nowhere"], "run make convert"),
    "no tokenizer": (["paths.hf=nowhere"], "no Hugging Face checkpoint"),
    "dataset is something else": (
        ["paths.dataset=ckpts/pangu_model_mcore", "paths.mcore=elsewhere"],
        "holds mcore, expected dataset",
    ),
    "no device": (["train.device=cuda"], "CUDA devices"),
    "nodes without an address": (["parallel.nodes=2"], "MASTER_ADDR is not set"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(options: Options, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "no device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    overrides, message = REFUSED[case]
    assert message in refusal_of(train, options(*overrides))
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_run_is_not_continued_with_other_settings(options: Options) -> None:
    train(options())
    said = refusal_of(train, options("train.lr=0.001"))
    assert "train.lr = 0.003, the recipe says 0.001 -> set these values to resume (RESUME=changed takes" in said


def test_another_learning_rate_only_when_asked(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    train(options("train.lr_decay_style=constant"))
    changed = recipe_of(options("train.lr_decay_style=constant", "train.lr=1e-4", "train.iterations=7"))
    assert "train.lr = 0.003, the recipe says 0.0001" in refusal_of(run_sft, changed, [])
    run_sft(changed, [], changed=True)
    assert "train.lr changes: 0.003 -> 0.0001" in capsys.readouterr().err
    assert [row["lr"] for row in read_metrics(changed.path("run"))][-2:] == [0.003, 0.0001]
    last = read_starts(changed.path("run"))[-1]
    assert last["changed"] == {"train.lr": "0.003 -> 0.0001", "train.iterations": "6 -> 7"}


def test_a_directory_with_other_files_is_not_taken_for_a_run(options: Options, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    assert "not empty and holds no run" in refusal_of(train, options())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_two_runs_at_once_on_one_directory_are_refused(options: Options, tmp_path: Path) -> None:
    process = start(options("train.iterations=3000", "train.save_interval=3000"))
    try:
        wait_for_iteration(tmp_path / "run", 1, process)
        second = start(options("train.iterations=3000", "train.save_interval=3000"))
        output = second.communicate(timeout=PATIENCE)[0]
        assert second.returncode == 1
        assert "another run is writing here" in output
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_loss_that_is_not_finite_stops_the_run(options: Options) -> None:
    assert "at iteration" in refusal_of(train, options("train.lr=1e38", "train.min_lr=1e37", "train.clip_grad=1e30"))


def test_checkpoints_none_of_which_is_whole_are_not_written_over(options: Options) -> None:
    run = train(options())
    for file in run.glob("iter_*/mp_rank_00/model_optim_rng.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    before = (run / "metrics.jsonl").read_bytes()
    assert "no checkpoint here is complete" in refusal_of(train, options("train.iterations=7"))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_metrics_are_one_json_object_a_line(options: Options) -> None:
    run = train(options())
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(set(row) == {"iteration", "loss", "lr", "grad_norm", "tokens", "seconds"} for row in rows)
