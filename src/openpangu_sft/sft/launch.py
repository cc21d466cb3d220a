"""Several processes: this process becomes torchrun's agent, and each worker runs the same command line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Optional

from openpangu_sft.errors import UserError
from openpangu_sft.recipe import Recipe


def worker_rank() -> Optional[int]:
    """Number of this process among all workers, or None where torchrun did not start it.

    Not from RANK alone: Kubernetes' training operators set it for a whole node.
    """
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def launch(recipe: Recipe, command_line: Sequence[str]) -> NoReturn:
    """Runs `openpangu_sft COMMAND_LINE` in parallel.devices_per_node processes; on several nodes, this node's share.

    Ends the process: with 0, with the exit code of the first worker that failed, or with 128 + the signal that came.
    Workers print their own messages.

    Raises:
        UserError: several nodes, and MASTER_ADDR or NODE_RANK is not set.
    """
    per_node = recipe.parallel.devices_per_node
    options = [f"--nnodes={recipe.parallel.nodes}", f"--nproc_per_node={per_node}", *rendezvous(recipe)]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // per_node)))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # torchrun would report once more what its workers have said
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", "openpangu_sft", *command_line]))  # type: ignore[no-untyped-call]
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)  # killed by a signal: -9 becomes 137, as a shell says it
    sys.exit(0)


def rendezvous(recipe: Recipe) -> list[str]:
    """torchrun's options for where the processes of all nodes meet.

    Raises:
        UserError: several nodes, and MASTER_ADDR or NODE_RANK is not set.
    """
    if recipe.parallel.nodes == 1:
        return ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # a port of its own for every run
    for name in ("MASTER_ADDR", "NODE_RANK"):
        if name not in os.environ:
            raise UserError(
                f"parallel.nodes = {recipe.parallel.nodes}, but {name} is not set", remedy="export it on every node"
            )
    port = os.environ.get("MASTER_PORT", "6000")
    return [
        f"--node_rank={os.environ['NODE_RANK']}",
        f"--master_addr={os.environ['MASTER_ADDR']}",
        f"--master_port={port}",
    ]
