"""Jobs for several nodes from a recipe: a Slurm script and a Kubernetes (Volcano) job.

Both run the same command on every node and take its rank and the first node's address from the scheduler. Both send
SIGTERM long before they kill, so that training can save a checkpoint, and restart after a failure: training resumes.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ruamel.yaml import YAML

from openpangu_sft import __version__
from openpangu_sft.recipe.schema import Recipe

GRACE_SECONDS = 600  # between SIGTERM and SIGKILL: enough for an iteration and a checkpoint
PORT = 6000


def slurm(recipe: Recipe, command: Sequence[str], folder: Path) -> str:
    """A script for sbatch: runs `command` on every node, in `folder`, which all nodes share."""
    return _render("slurm.sh.jinja", recipe, folder=shlex.quote(str(folder)), command=shlex.join(command))


def volcano(recipe: Recipe, claim: str, image: str = f"openpangu-sft:{__version__}-npu") -> str:
    """A Volcano job (batch.volcano.sh/v1alpha1) and the ConfigMap with its recipe, as YAML documents.

    The recipe's paths are below /cache, where every pod mounts `claim`, a PersistentVolumeClaim. Nodes pull `image`.
    """
    yaml, settings = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(recipe.model_dump(mode="json"), settings)
    values = {"settings": settings.getvalue(), "claim": json.dumps(claim), "image": json.dumps(image)}
    return _render("volcano.yaml.jinja", recipe, **values)


def _render(template: str, recipe: Recipe, **values: str) -> str:
    nodes, npus = recipe.parallel.nodes, recipe.parallel.devices_per_node
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(template).render(nodes=nodes, npus=npus, grace=GRACE_SECONDS, port=PORT, **values)
