"""The command line: one command per stage, each reading one recipe.

Run as: openpangu-sft sft --recipe recipes/demo.yaml --set train.iterations=100
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from typing import NoReturn

import click

from openpangu_sft.cli import checkpoints, cluster, data, reports, training
from openpangu_sft.cli.options import PREFIX, app
from openpangu_sft.training.run.launch import worker_rank
from openpangu_sft.util.errors import Interrupted, UserError, explain_os_error

__all__ = ["app", "checkpoints", "cluster", "data", "main", "reports", "training"]


def main() -> NoReturn:
    """Entry point: an error that the user can fix is one line on stderr and exit code 1."""
    # Busy-waiting threads take cores from the threads they wait for: several times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    if worker_rank() is None:
        sys.exit(_run())
    try:
        code = _run()
    except BaseException:
        traceback.print_exc()
        code = 1
    # Skips destructors: torch 2.1 joins gloo's threads while holding the GIL, and sometimes deadlocks.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> int:
    try:
        code = app(prog_name="openpangu-sft", standalone_mode=False)  # an exit code from --help or --version
    except UserError as error:
        return _say(str(error), 1)
    except OSError as error:
        return _say(str(explain_os_error(error)), 1)
    except Interrupted as stop:
        code = 128 + stop.signal_number
        return code if worker_rank() else _say(str(stop), code)  # one line for all processes of a run
    except (KeyboardInterrupt, click.Abort) as stop:  # Abort: click's, of a KeyboardInterrupt
        number = next(iter((stop.__cause__ or stop).args), None)  # of an EOFError a text
        number = number if isinstance(number, int) else signal.SIGINT
        return _say("interrupted; nothing half-written is left", 128 + number)
    except click.ClickException as error:
        return _say(_explain(error), error.exit_code)
    except SystemExit as request:  # of torchrun's agent
        return request.code if isinstance(request.code, int) else 1
    return code if isinstance(code, int) else 0


def _explain(error: click.ClickException) -> str:
    """One line for a wrong argument."""
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "openpangu-sft"
    what, remedy = error.format_message(), f"{command} --help shows what there is"
    if isinstance(error, click.NoSuchOption):  # or command
        what = error.message
        if error.possibilities:
            remedy = f"did you mean {' or '.join(error.possibilities)}?"
    if isinstance(error, click.BadParameter) and error.param:
        what = f"{_named(error.param)}: {error.message}"
    if isinstance(error, click.MissingParameter) and error.param:
        what = f"{_named(error.param)} is missing"
    what = re.sub("a valid integer( range)?", "a whole number", what)
    where = command.partition(" ")[2] or None  # without openpangu-sft
    return str(UserError(" ".join(what.split()).rstrip("."), where=where, remedy=remedy))


def _named(parameter: click.Parameter) -> str:
    """An option, and the Make variable behind it."""
    option, variable = max(parameter.opts, key=len), parameter.envvar
    if not isinstance(variable, str):
        return option
    name = variable[len(PREFIX) :]  # ONLY is --manifest or --tensors
    return f"{option} (make: {name})" if parameter.name != "only" else name


def _say(message: str, code: int) -> int:
    print(f"openpangu-sft: {message}", file=sys.stderr)
    return code
