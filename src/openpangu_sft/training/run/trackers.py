"""Trackers of a run: TensorBoard, SwanLab, Weights & Biases. Each is imported only where train.trackers names it.

SwanLab and Weights & Biases take their keys, projects and modes from their own environment variables. Without a key, or
where their server does not answer, they record offline, below the run's directory.
"""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Callable

from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.run.metrics import Row
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError

Log = Callable[[Mapping[str, float], int], object]
"""Records values of an iteration."""
PROJECT = "openpangu-sft"
SERVERS = {"swanlab": "https://api.swanlab.cn", "wandb": "https://api.wandb.ai"}
_PACKAGES = {"tensorboard": "tensorboardX"}


def require_trackers(recipe: Recipe) -> None:
    """Raises `UserError` where a tracker's package is not installed, or it shall go online without a key."""
    for tracker in recipe.train.trackers:
        package = _PACKAGES.get(tracker, tracker)
        if not find_spec(package):
            remedy = f"install it (pip install {package}), or take it out of train.trackers"
            raise UserError(f"{package} is not installed", where=f"train.trackers {tracker}", remedy=remedy)
        mode, key = f"{tracker.upper()}_MODE", f"{tracker.upper()}_API_KEY"
        if os.environ.get(mode) in ("online", "cloud") and not os.environ.get(key):  # they would ask for it
            raise UserError(f"{mode}={os.environ[mode]} without {key}", remedy=f"export {key}, or unset {mode}")


@contextlib.contextmanager
def tracked(recipe: Recipe, begun: int) -> Iterator[Callable[[Row], None]]:
    """A function that sends iterations to the run's trackers; `begun` is the iteration that it resumes after."""
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(_TRACKERS[name](recipe, begun)) for name in recipe.train.trackers]

        def send(row: Row) -> None:
            values = {"train/loss": row.loss, "train/lr": row.lr, "train/grad_norm": row.grad_norm}
            values["train/tokens_per_second"] = row.tokens / row.seconds
            if row.validation is not None:
                values["validation/loss"] = row.validation
            for log in logs:
                log(values, row.iteration)

        yield send


@contextlib.contextmanager
def _tensorboard(recipe: Recipe, begun: int) -> Iterator[Log]:
    folder, suffix = str(recipe.path("run") / "tensorboard"), f".{begun}"
    with import_module("tensorboardX").SummaryWriter(folder, purge_step=begun + 1, filename_suffix=suffix) as writer:

        def log(values: Mapping[str, float], iteration: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)

        yield log


@contextlib.contextmanager
def _service(tracker: str, recipe: Recipe, begun: int) -> Iterator[Log]:
    """SwanLab or Weights & Biases: their packages differ in settings only."""
    package, run = import_module(tracker), recipe.path("run")
    if tracker == "swanlab":
        settings = package.Settings(interactive=False, terminal={"proxy_type": "none"})
        given: dict[str, Any] = {"log_dir": str(run / "swanlab"), "settings": settings}
        server, project = "SWANLAB_API_HOST", "SWANLAB_PROJ_NAME"
    else:
        given = {"dir": run, "settings": package.Settings(console="off", silent=True)}
        server, project = "WANDB_BASE_URL", "WANDB_PROJECT"
    given |= {"mode": _mode(tracker, os.environ.get(server, SERVERS[tracker])), "name": run.name}
    config = recipe.model_dump(mode="json", include={"model", "data", "parallel", "train"})
    package.init(project=os.environ.get(project, PROJECT), config=config, **given)
    try:
        yield lambda values, iteration: package.log(dict(values), step=iteration)
    finally:
        package.finish()


_TRACKERS: dict[str, Callable[[Recipe, int], contextlib.AbstractContextManager[Log]]] = {"tensorboard": _tensorboard}
_TRACKERS |= {name: partial(_service, name) for name in SERVERS}


def _mode(tracker: str, server: str) -> str:
    """As the environment says; else online where it has a key and the server answers, which they would wait for."""
    prefix = tracker.upper()
    if mode := os.environ.get(f"{prefix}_MODE"):
        return mode
    if not os.environ.get(f"{prefix}_API_KEY"):
        return "offline"
    try:
        urllib.request.urlopen(server, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        say(f"{tracker} records offline: {server} does not answer ({error})")
        return "offline"
    return "online"
