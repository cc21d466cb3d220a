"""Several processes: this one becomes torchrun's agent, and every worker runs the same command line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, Optional

from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import Interrupted, UserError
from openpangu_sft.util.signals import end_with_parent, on_signals, signal_children

AT_ONCE = "at once: run make sft again to resume after the newest checkpoint"


def worker_rank() -> Optional[int]:
    """Rank of this process, or None where torchrun did not start it: Kubernetes sets RANK alone, for a whole node."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def launch(recipe: Recipe, command_line: Sequence[str]) -> NoReturn:
    """Runs `openpangu_sft COMMAND_LINE` in parallel.devices_per_node processes on this node.

    Ends this process with 0, the exit code of the first worker that failed, or 128 + the signal received. Workers print
    their own messages. Raises `UserError` as `torchrun_options`, `Interrupted` after a third signal.
    """
    options = torchrun_options(recipe)
    os.environ.update(worker_environment(recipe))
    agent = os.fork()
    if not agent:
        os.setsid()  # Ctrl-C on a terminal reaches the parent alone, which passes it on once
        end_with_parent()
        _run_agent([*options, "-m", "openpangu_sft", *command_line])

    received: list[int] = []

    def forward(number: int) -> None:
        received.append(number)
        if len(received) > 2:  # workers that hang in a collective operation take no other signal
            number = signal.SIGKILL
        if not signal_children(agent, number):  # they have not been started
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, number)

    with on_signals(forward):  # torchrun would end the workers after 30 seconds
        code = os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1])
    if len(received) > 2:
        raise Interrupted(received[0], AT_ONCE)
    if code < 0:
        say(f"torchrun was ended by {signal.Signals(-code).name}, not by a stop of this run: is memory full?")
    sys.exit(code if code >= 0 else 128 - code)


def _run_agent(arguments: Sequence[str]) -> NoReturn:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # torchrun would repeat what its workers have printed
    try:
        torchrun.run(torchrun.parse_args(arguments))  # type: ignore[no-untyped-call]
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)  # killed by a signal: -9 becomes 137, as in a shell
    sys.exit(0)


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """Threads per process, and on a single node gloo's interface, unless the user has set them."""
    threads = max(1, (os.cpu_count() or 1) // recipe.parallel.devices_per_node)
    wanted = {"OMP_NUM_THREADS": str(threads)} | ({"GLOO_SOCKET_IFNAME": "lo"} if recipe.parallel.nodes == 1 else {})
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def torchrun_options(recipe: Recipe) -> list[str]:
    """Number of processes, and the rendezvous of several nodes; `UserError` if MASTER_ADDR or NODE_RANK is not set."""
    sizes = [f"--nnodes={recipe.parallel.nodes}", f"--nproc_per_node={recipe.parallel.devices_per_node}"]
    if recipe.parallel.nodes == 1:
        # Any free port on loopback: torchrun's default, the host name, may not resolve.
        return [*sizes, "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]
    for name in ("MASTER_ADDR", "NODE_RANK"):
        if name not in os.environ:
            what = f"parallel.nodes = {recipe.parallel.nodes}, but {name} is not set"
            raise UserError(what, remedy="export it on every node")
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "6000")
    return [*sizes, f"--node_rank={os.environ['NODE_RANK']}", f"--master_addr={address}", f"--master_port={port}"]
