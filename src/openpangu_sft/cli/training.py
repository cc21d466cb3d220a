"""Commands of training and its result: sft, chat, serve, demo."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import click

from openpangu_sft.cli.options import iteration_in, iteration_option, option, recipe_arguments, show_chosen, stage
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.launch import worker_rank
from openpangu_sft.util.console import print_table, say, stdout
from openpangu_sft.util.errors import UserError, printable


@stage("sft", "--set train.lr=1e-5 --set train.iterations=1000")
@option("--dry-run", is_flag=True, help="only print the environment and command (engine mindspeed)")
@option("--resume", type=click.Choice(["changed"]), help="go on with another learning rate or schedule")
def sft_command(recipe: Recipe, dry_run: bool, resume: Optional[str]) -> None:
    """Fine-tune; rerun to resume."""
    from openpangu_sft.cli.header import show_header
    from openpangu_sft.plan.estimate import memory_of
    from openpangu_sft.training.stage import run_manifest, run_sft

    first = worker_rank() is None  # workers repeat this command
    if first:
        show_chosen(recipe)
    if dry_run:
        from openpangu_sft.training.mindspeed.start import dry_run as command_of

        if recipe.train.engine != "mindspeed":
            what = "train.engine transformers trains in this process: there is no command"
            raise UserError(what, remedy="run make sft")
        print(command_of(recipe))
        return
    if first:
        show_header(recipe, run_manifest(recipe).counts)
    arguments = ["sft", *recipe_arguments(), *(["--resume", resume] if resume else [])]
    run_sft(recipe, arguments, memory_of(recipe).peak, changed=bool(resume))
    if not worker_rank():
        _show_run(recipe)


@stage("chat", "--model /cache/ckpts/pangu_model --prompt 你好")
@option("-p", "--prompt", help="one question; by default, a dialogue")
@option("--system", default="", help="system prompt")
@option("--tools", type=Path, metavar="FILE", help="definitions of tools, a JSON list")
@option(
    "-m", "--model", type=Path, help="checkpoint or adapter  [default: paths.export, else paths.run, else paths.hf]"
)
@iteration_option
def chat_command(
    recipe: Recipe,
    prompt: Optional[str],
    system: str,
    tools: Optional[Path],
    model: Optional[Path],
    iteration: Optional[str],
) -> None:
    """Chat with a checkpoint.

    Thinking goes to stderr, the answer and its tool calls to stdout.
    """
    from openpangu_sft.cli.answers import AnswerPrinter, read_tools
    from openpangu_sft.model.chat import Chat, Dialogue, default_checkpoint

    definitions = read_tools(tools) if tools else ""
    checkpoint = model.absolute() if model else recipe.path("run") if iteration else default_checkpoint(recipe)
    talker = Chat(recipe, checkpoint, iteration_in(checkpoint, iteration))
    note = f", iteration {talker.iteration}" if talker.iteration is not None else ""
    if not model and checkpoint == recipe.path("hf"):
        note = ", the base model: paths.export and paths.run hold no checkpoint"
    print(printable(f"model: {checkpoint}{note}"), file=sys.stderr, flush=True)
    stdout()  # a model may write what the locale does not have
    dialogue, printer, typed = Dialogue(talker, system, definitions), AnswerPrinter(), sys.stdin.isatty()
    if prompt is not None:
        printer.end(dialogue.ask(prompt, printer))
        return
    if typed:
        say("/reset begins anew, /save FILE keeps it; Ctrl-C ends an answer, Ctrl-D quits.")
    for line in map(str.strip, _typed_lines()):
        try:
            if line == "/reset":
                dialogue.messages = ()
            elif line.partition(" ")[0] == "/save":
                dialogue.save(Path(line.partition(" ")[2].strip()))
            elif line:
                printer.end(dialogue.ask(line, printer, breaks=typed))
        except UserError as error:
            say(str(error))


@stage("serve", "--model /cache/export --listen 127.0.0.1:8000")
@option("-m", "--model", type=Path, help="checkpoint or adapter  [default: as for chat]")
@iteration_option
@option("--listen", default="127.0.0.1:8000", show_default=True, metavar="ADDRESS:PORT", help="where to listen")
def serve_command(recipe: Recipe, model: Optional[Path], iteration: Optional[str], listen: str) -> None:
    """Serve a checkpoint to OpenAI clients.

    On any machine, for trying it out; docs/serving.md has vLLM on NPUs. Beyond this machine it listens only with a key
    (OPENPANGU_API_KEY).
    """
    key = os.environ.get("OPENPANGU_API_KEY", "")
    if not key.isascii() or key != key.strip():
        remedy = "take letters and digits"
        raise UserError("no client can send this key", where="OPENPANGU_API_KEY", remedy=remedy)
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"{listen!r} is no ADDRESS:PORT", where="LISTEN", remedy="give one, say, 127.0.0.1:8000")
    host = host.strip("[]")
    if host not in ("127.0.0.1", "::1", "localhost") and not key:
        what = f"{host} without a key: anybody who reaches it could ask"
        raise UserError(what, where="LISTEN", remedy="export OPENPANGU_API_KEY=…")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, int(port)), family=family)
    except OSError as error:
        what = f"{listen}: {str(error.strerror).partition(' (')[0]}"  # Python adds the address
        raise UserError(what, where="LISTEN", remedy="give another address or port") from None
    from openpangu_sft.model.chat import Chat, default_checkpoint
    from openpangu_sft.serve.app import Endpoint, Server

    with listening:
        checkpoint = model.absolute() if model else recipe.path("run") if iteration else default_checkpoint(recipe)
        chat = Chat(recipe, checkpoint, iteration_in(checkpoint, iteration))
        name = printable(checkpoint.name)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
        say(f"serving {name} at {address}; Ctrl-C to stop")
        with contextlib.suppress(KeyboardInterrupt):  # raised again when all connections are closed
            Server(Endpoint(chat, name, key)).run([listening])
    say("stopped")


@stage("demo", "--set paths.cache=/tmp/demo", default_recipe="recipes/demo.yaml")
def demo_command(recipe: Recipe) -> None:
    """Run every stage with a small model."""
    from openpangu_sft.demo.run import run_demo

    run_demo(recipe, recipe_arguments())


def _typed_lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt as stop:
            if not sys.stdin.isatty() or signal.SIGTERM in stop.args:
                raise
            print()  # a Ctrl-C that came after the answer's end


def _show_run(recipe: Recipe) -> None:
    from openpangu_sft.training.run.metrics import CURVE, read_metrics

    run = recipe.path("run")
    metrics = read_metrics(run)
    if not metrics:  # with several machines, only the last one has them
        return
    rows = {
        "iterations": f"{metrics[-1]['iteration']:,}",
        "loss": f"{metrics[0]['loss']:.4f} -> {metrics[-1]['loss']:.4f}",
        "seconds": f"{sum(row['seconds'] for row in metrics):,.1f}",
        "loss curve": str(run / CURVE),
    }
    print_table(f"run: {run}", rows)
