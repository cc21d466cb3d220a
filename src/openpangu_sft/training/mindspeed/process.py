"""Runs MindSpeed-LLM's posttrain_gpt.py under torchrun, reads its output and forwards signals.

The complete output goes to a log file of the run; iterations go to metrics.jsonl and the progress bar. A signal is
forwarded to the training processes themselves as SIGTERM, on which Megatron-LM saves a checkpoint and exits; torchrun
would kill them after 30 seconds.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import IO, Any, Callable, NamedTuple

from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.model.flops import highest_rate
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed import log
from openpangu_sft.training.run import metrics
from openpangu_sft.training.run.retention import prune, stops_early
from openpangu_sft.training.run.trackers import tracked
from openpangu_sft.util.console import console, progress, say
from openpangu_sft.util.errors import Interrupted, UserError
from openpangu_sft.util.signals import end_with_parent, on_signals, signal_children

LOGS = "logs"
STALLED_SECONDS = 300.0
"""An iteration is reported as slow after this time, or after ten times the usual one if that is longer."""


class Command(NamedTuple):
    """Program and arguments, the folder to start them in, and variables in addition to this process's environment."""

    arguments: list[str]
    folder: Path
    environment: dict[str, str]

    def __str__(self) -> str:
        """The same as shell commands, one flag a line."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        folder = shlex.quote(str(self.folder))
        words: list[list[str]] = [[]]
        for word in self.arguments:
            if word.startswith("--") or word.endswith(".py"):
                words.append([])
            words[-1].append(word)
        return "\n".join([*lines, f"mkdir -p {folder} && cd {folder}", " \\\n    ".join(map(shlex.join, words))])


class Training:
    """One start of training, from the iteration `done` to the end; `planned` bytes of tensors, or 0."""

    def __init__(self, recipe: Recipe, dataset: Manifest, done: int, planned: int = 0) -> None:
        self.recipe, self.run, self.iteration, self.planned = recipe, recipe.path("run"), done, planned
        self.measured: dict[str, Any] = {}  # since the last iteration: fields of its row
        self.losses = metrics.validation_losses(self.run, done)
        self.enough = ""  # why training ends early
        # the mean of the data: upstream does not report how much of a pack is padding
        self.tokens = round(recipe.train.global_batch_size * dataset.counts["tokens"] / dataset.counts["packs"])
        self.errors: list[str] = []
        self.recent: deque[metrics.Row] = deque(maxlen=50)
        self.received: list[int] = []
        self.step = metrics.Step()
        self.late = threading.Timer(0, say)
        self.track: Callable[[metrics.Row], None]
        self.saved = done
        self.without_checkpoint = False
        # upstream prints iterations in the last process only
        self.on_last_node = int(os.environ.get("NODE_RANK", "0")) == recipe.parallel.nodes - 1

    def start(self, command: Command) -> None:
        """Runs the command to its end.

        Raises `Interrupted` where a signal arrived and training has saved and exited, `UserError` with the first error
        of its log and the exit code where it failed.
        """
        (self.run / LOGS).mkdir(exist_ok=True)
        command.folder.mkdir(exist_ok=True)
        node = f"-node{os.environ['NODE_RANK']}" if self.recipe.parallel.nodes > 1 else ""
        path = self.run / LOGS / time.strftime(f"%Y%m%d-%H%M%S{node}.log")
        if self.on_last_node:
            metrics.keep_until(self.run, self.iteration)
        else:
            say(f"iterations are shown on the last node; log: {path}")
        with contextlib.ExitStack() as stack:
            if self.on_last_node:
                self.track = stack.enter_context(tracked(self.recipe, self.iteration))
            file = stack.enter_context(path.open("w", encoding="utf-8"))
            file.write(f"{command}\n\n")
            file.flush()
            # A session of its own: Ctrl-C on a terminal reaches this process alone, which forwards it once.
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
                preexec_fn=end_with_parent,  # it must not continue alone and occupy the NPUs
            )
            try:
                with on_signals(lambda number: self._forward(number, process)):
                    self._watch(process, file)
                    code = process.wait()
            finally:
                self.late.cancel()
                _kill_session(process)
                process.wait()
        if self.on_last_node and metrics.read_metrics(self.run):
            metrics.draw_curve(self.run)
        self._judge(code, path)

    def _forward(self, number: int, process: subprocess.Popen[str]) -> None:
        """Forwards a signal to the training processes; a second one ends them."""
        self.received.append(number)
        if len(self.received) == 1:
            say(self.step.stopping())
            signal_children(process.pid, signal.SIGTERM)
        else:
            _kill_session(process)

    def _watch(self, process: subprocess.Popen[str], file: IO[str]) -> None:
        assert process.stdout is not None
        with progress("training (iterations)", self.recipe.train.iterations, self.iteration) as advance:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if row := log.iteration_of(line, self.tokens):
                    note = self._note(row)
                    advance(1, note)
                    self.step.begin(note)
                    self._expect_iteration(file.name)
                    if not self.enough and (enough := stops_early(self.recipe, self.losses)):
                        self.enough = enough
                        signal_children(process.pid, signal.SIGTERM)
                elif report := log.report_of(line):
                    if micro_batches := report.pop("micro_batches", None):
                        advance(0, self.step.update(*micro_batches))
                    if (memory := report.pop("memory", None)) and memory["peak"]:  # the stand-in counts none
                        report["memory"] = metrics.DeviceMemory(**memory)
                        report["memory"].show(self.planned)
                    self.measured.update(report)
                elif saved := log.SAVED.search(line):
                    self.saved = int(saved[1])
                    train = self.recipe.train
                    prune(self.run, train.keep_checkpoints, self.saved, train.keep_best)
                elif log.NO_CHECKPOINT.search(line):
                    self.without_checkpoint = True
                    signal_children(process.pid, signal.SIGKILL)
                elif error := log.error_of(line):
                    self.errors.append(error)

    def _expect_iteration(self, path: str) -> None:
        """Says so where the next one takes ten times as long as usual, and five minutes at least."""
        seconds = max(STALLED_SECONDS, 10 * median(row.seconds for row in self.recent))
        self.late.cancel()
        self.late = threading.Timer(seconds, say, [f"no iteration for {seconds:.0f} s: see {path}"])
        self.late.daemon = True
        self.late.start()

    def _note(self, row: metrics.Row) -> str:
        """Records an iteration; returns the note for the progress bar."""
        row, self.iteration, self.measured = row.model_copy(update=self.measured), row.iteration, {}
        if row.validation is not None and math.isfinite(row.validation):
            self.losses[row.iteration] = row.validation
            metrics.show_validation(self.losses)
        if warning := log.warning(row, self.recent):
            console.print(warning, style="yellow")
        self.recent.append(row)
        metrics.append(self.run, row)
        self.track(row)
        return f"{row}, MFU {row.tokens / row.seconds / highest_rate(self.recipe):.1%}"

    def _judge(self, code: int, path: Path) -> None:
        if self.without_checkpoint:
            what = "MindSpeed-LLM did not load the checkpoint and would train from random weights"
            remedy = "does it match the recipe's TP and PP? run make convert again, or start a new run (paths.run)"
            raise UserError(what, where=path, remedy=remedy)
        if self.received:
            state = f"before all was saved: run make sft again to resume after iteration {self.saved}"
            if code == 0 and self.saved == self.iteration:
                state = f"after iteration {self.iteration}, which is saved: run make sft again to resume"
            raise Interrupted(self.received[0], state)
        if self.enough and not code and self.saved == self.iteration:
            say(self.enough)
            return
        what, full = "", next(filter(log.MEMORY_IS_FULL.search, self.errors), "")
        if code:
            what = f"training ended with exit code {code if code > 0 else 128 - code}"
            what += f": {full or self.errors[0]}" if self.errors else ""
        elif self.iteration < self.recipe.train.iterations and self.on_last_node:
            what = f"training ended after iteration {self.iteration} of {self.recipe.train.iterations}"
        if what:
            raise UserError(what, where=path, remedy=metrics.LESS_MEMORY if full else "see this log")


def _kill_session(process: subprocess.Popen[str]) -> None:
    """Leaves no process running: a training process left alone would occupy its NPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
