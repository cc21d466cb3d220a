"""Jobs for several nodes from a recipe: a Slurm script and a Kubernetes (Volcano) job.

Both run the same command on every node and take its rank and the first node's address from the scheduler. Both send
SIGTERM long before they kill, so that training can save a checkpoint, and restart after a failure: training resumes.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from openpangu_sft import __version__
from openpangu_sft.recipe.schema import Recipe

GRACE_SECONDS = 600  # between SIGTERM and SIGKILL: enough for an iteration and a checkpoint
PORT = 6000

SLURM = """\
#!/bin/bash
# Made by: openpangu-sft slurm. Add --partition, --account, --time and whatever else your cluster requires.
#SBATCH --job-name=openpangu-sft
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@{grace}
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT={port}
# With several networks, name the one for HCCL: export HCCL_SOCKET_IFNAME=eth0
cd {folder}
# On every node; if one fails, all end, and sbatch or --requeue resumes from the last checkpoint.
# shellcheck disable=SC2016 # each node has its own rank
srun --kill-on-bad-exit=1 --wait=60 bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' bash {command}
"""


def slurm(recipe: Recipe, command: Sequence[str], folder: Path) -> str:
    """A script for sbatch: runs `command` on every node, in `folder`, which all nodes share."""
    return SLURM.format(
        nodes=recipe.parallel.nodes,
        grace=GRACE_SECONDS,
        port=PORT,
        folder=shlex.quote(str(folder)),
        command=shlex.join(command),
    )


def volcano(recipe: Recipe, claim: str, image: str = f"openpangu-sft:{__version__}-npu") -> str:
    """A Volcano job and the ConfigMap with its recipe, as YAML documents.

    Fields as in batch.volcano.sh/v1alpha1; the env plugin sets each pod's rank in VC_TASK_INDEX, svc its host name.
    NPUs are requested as the resource of the Ascend device plugin, huawei.com/Ascend910.

    Args:
        recipe: with paths below /cache.
        claim: the PersistentVolumeClaim that is mounted at /cache in every pod.
        image: one that the cluster's nodes can pull.
    """
    name, parallel = "openpangu-sft", recipe.parallel
    npus = {"huawei.com/Ascend910": parallel.devices_per_node}
    first = {"MASTER_ADDR": f"{name}-node-0.{name}", "MASTER_PORT": str(PORT)}
    volumes: dict[str, tuple[str, dict[str, Any]]] = {
        "cache": ("/cache", {"persistentVolumeClaim": {"claimName": claim}}),
        "recipe": ("/recipe", {"configMap": {"name": f"{name}-recipe"}}),
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory"}}),
    }
    start = "NODE_RANK=$VC_TASK_INDEX exec openpangu-sft sft --recipe /recipe/recipe.yaml"
    container: dict[str, Any] = {
        "name": "sft",
        "image": image,
        "args": ["bash", "-c", start],  # run by the image's entrypoint, which sources CANN's environment
        "env": [{"name": key, "value": value} for key, value in first.items()],
        "resources": {"limits": npus, "requests": dict(npus)},
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, (path, _) in volumes.items()],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [{"name": volume, **source} for volume, (_, source) in volumes.items()],
    }
    task = {
        "name": "node",
        "replicas": parallel.nodes,
        "policies": [{"event": "TaskCompleted", "action": "CompleteJob"}],
        "template": {"spec": pod},
    }
    job = {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "schedulerName": "volcano",
            "minAvailable": parallel.nodes,
            "maxRetry": 3,
            "plugins": {"env": [], "svc": ["--publish-not-ready-addresses=true"]},
            "policies": [{"event": event, "action": "RestartJob"} for event in ("PodEvicted", "PodFailed")],
            "tasks": [task],
        },
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe"},
        "data": {"recipe.yaml": _yaml(recipe.model_dump(mode="json"))},
    }
    head = "# Made by: openpangu-sft kubernetes. Apply with: kubectl apply -f\n"
    return f"{head}{_yaml(config)}---\n{_yaml(job)}"


def _yaml(content: object) -> str:
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(content, text)
    return text.getvalue()
