"""Runs MindSpeed-LLM's posttrain_gpt.py under torchrun, watches what it prints, and hands signals on.

The whole output goes into a log file of the run, iterations into metrics.jsonl and the progress. A signal is handed to
the training processes themselves, as SIGTERM, on which Megatron-LM saves a checkpoint and ends; torchrun would kill
them after 30 seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Optional

from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.model.flops import model_flops_utilisation
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed import log
from openpangu_sft.training.run import metrics
from openpangu_sft.training.run.retention import prune
from openpangu_sft.util.console import console, progress
from openpangu_sft.util.errors import Interrupted, UserError
from openpangu_sft.util.signals import on_signals

LOGS = "logs"
STALLED_SECONDS = 300.0
"""After which a step is said to take long; ten times the usual one where that is more."""


class Command:
    """What is started: program and arguments, the folder to start it in, and what its environment has beside ours."""

    def __init__(self, arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.arguments, self.folder, self.environment = list(arguments), folder, environment

    def __str__(self) -> str:
        """As a shell would take it."""
        variables = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        folder = shlex.quote(str(self.folder))
        return "\n".join([*variables, f"mkdir -p {folder} && cd {folder}", shlex.join(self.arguments)])


class Training:
    """One start of training, from the iteration that it goes on from to its end."""

    def __init__(self, recipe: Recipe, dataset: Manifest, done: int) -> None:
        self.recipe, self.run, self.iteration = recipe, recipe.path("run"), done
        # the data's mean, as upstream does not say how much of a pack is padding
        self.tokens = round(recipe.train.global_batch_size * dataset.counts["tokens"] / dataset.counts["packs"])
        self.losses = log.Losses()
        self.errors: list[str] = []
        self.durations: list[float] = []
        self.saved = done
        self.without_checkpoint = False

    def start(self, command: Command) -> None:
        """Runs the command to its end.

        Raises:
            Interrupted: a signal came, and training has saved and ended.
            UserError: it failed; with what its log says, and the exit code.
        """
        (self.run / LOGS).mkdir(exist_ok=True)
        command.folder.mkdir(exist_ok=True)
        node = f"-node{os.environ['NODE_RANK']}" if self.recipe.parallel.nodes > 1 else ""
        path = self.run / LOGS / time.strftime(f"%Y%m%d-%H%M%S{node}.log")
        if _is_last_node(self.recipe):
            metrics.keep_until(self.run, self.iteration)
        else:
            console.print(f"iterations are shown on the last machine; here: {path}", markup=False, soft_wrap=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{command}\n\n")
            file.flush()
            # A session of its own: Ctrl-C on a terminal reaches this process alone, which hands it on once.
            process = subprocess.Popen(
                command.arguments,
                cwd=command.folder,
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                preexec_fn=_ended_with_its_parent,
            )
            try:
                with _handed_on(process) as received:
                    self._watch(process, file)
                    code = process.wait()
            finally:
                _kill_session(process)
        if _is_last_node(self.recipe) and metrics.read_metrics(self.run):
            metrics.draw_curve(self.run)
        self._judge(code, received, path)

    def _watch(self, process: subprocess.Popen[str], file: IO[str]) -> None:
        assert process.stdout is not None
        lines: queue.Queue[Optional[str]] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        last, said = time.monotonic(), False
        with progress("training", self.recipe.train.iterations, self.iteration) as advance:
            while True:
                try:
                    line = lines.get(timeout=5)
                except queue.Empty:
                    waited = time.monotonic() - last
                    if not said and self.durations and waited > max(STALLED_SECONDS, 10 * median(self.durations)):
                        said = True
                        console.print(f"no iteration for {waited:.0f} s: see {file.name}", markup=False)
                    continue
                if line is None:
                    return
                file.write(line)
                file.flush()
                if iteration := log.iteration_of(line):
                    last, said = time.monotonic(), False
                    advance(1, self._note(iteration))
                elif (saved := log.saved_iteration(line)) is not None:
                    self.saved = saved
                    prune(self.run, self.recipe.train.keep_checkpoints, saved)
                elif log.starts_without_checkpoint(line):
                    self.without_checkpoint = True
                    _signal_workers(process, signal.SIGKILL)
                elif error := log.error_of(line):
                    self.errors.append(error)

    def _note(self, iteration: log.Iteration) -> str:
        """Records an iteration; returns what stands behind the bar."""
        self.iteration = iteration.number
        self.durations = [*self.durations[-49:], iteration.seconds]
        if warning := self.losses.warning(iteration):
            console.print(warning, style="yellow", markup=False)
        row = {"iteration": iteration.number, "loss": iteration.loss, "lr": iteration.lr}
        row |= {"grad_norm": iteration.grad_norm, "tokens": self.tokens, "seconds": round(iteration.seconds, 4)}
        metrics.append(self.run, row)
        rate = self.tokens / iteration.seconds
        share = model_flops_utilisation(self.recipe, rate)
        return f"loss {iteration.loss:.4f}, {rate:,.0f} tokens/s, MFU {share:.1%}"

    def _judge(self, code: int, received: list[int], path: Path) -> None:
        if self.without_checkpoint:
            raise UserError(
                "MindSpeed-LLM did not load the checkpoint and would train from random weights",
                where=path,
                remedy="is it of this recipe's TP and PP? run make convert again, or begin a new run (paths.run)",
            )
        if received and code == 0 and self.saved == self.iteration:
            raise Interrupted(
                received[0], f"after iteration {self.iteration}, which is saved: run make sft again to go on"
            )
        if received:
            state = f"before all was saved: run make sft again to go on after iteration {self.saved}"
            raise Interrupted(received[0], state)
        if code:
            what = f": {self.errors[0]}" if self.errors else ""
            exit_code = code if code > 0 else 128 - code
            raise UserError(f"training ended with exit code {exit_code}{what}", where=path, remedy="see this log")
        if self.iteration < self.recipe.train.iterations and _is_last_node(self.recipe):
            raise UserError(
                f"training ended after iteration {self.iteration} of {self.recipe.train.iterations}",
                where=path,
                remedy="see this log",
            )


def _is_last_node(recipe: Recipe) -> bool:
    """Upstream prints iterations on the last process alone."""
    return int(os.environ.get("NODE_RANK", "0")) == recipe.parallel.nodes - 1


def _read(stream: IO[str], lines: queue.Queue[Optional[str]]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


@contextlib.contextmanager
def _handed_on(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Hands SIGINT and SIGTERM to the training processes; the second one ends torchrun. Yields what has come."""
    received: list[int] = []

    def hand_on(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            console.print("stopping: training saves a checkpoint after this iteration (again: at once)", markup=False)
            _signal_workers(process, signal.SIGTERM)
        else:
            process.terminate()

    with on_signals(hand_on):
        yield received


def _ended_with_its_parent() -> None:
    """Runs in the new process: if this one is killed, training must not go on by itself and hold the NPUs."""
    pr_set_pdeathsig = 1  # prctl(2)
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _signal_workers(process: subprocess.Popen[str], number: int) -> None:
    """Signals the children of torchrun's agent: the training processes."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), number)


def _kill_session(process: subprocess.Popen[str]) -> None:
    """Leaves nothing behind, whatever has happened: a training process alone would hold its NPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
