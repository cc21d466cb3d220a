"""What a recipe needs at least, in bytes: only what follows from the model's size. Pure.

Activations and the packed data come on top; how large they become is not guessed here.
"""

from __future__ import annotations

from openpangu_sft.checkpoint.layout import parameter_count
from openpangu_sft.mindspeed.run_directory import checkpoint_bytes
from openpangu_sft.mindspeed.stage import MOST_AT_FIRST
from openpangu_sft.recipe import Recipe

OPTIMIZER_BYTES = 12
"""Of a parameter: its fp32 value and Adam's two moments, as in checkpoint_bytes."""


def weight_bytes(recipe: Recipe) -> int:
    """Size of the weights in the precision that training writes."""
    return parameter_count(recipe.model) * (2 if recipe.train.precision == "bf16" else 4)


def memory_bytes(recipe: Recipe) -> int:
    """Main memory of one machine when training starts and saves.

    The portable engine has fp32 weights, gradients and moments in each process, on CPU all in main memory; on a GPU
    the weights pass through it. MindSpeed-LLM reads each process's weights to the CPU (torch.load with
    map_location='cpu' in Megatron's checkpointing.py) and gathers the optimizer there once to save it
    (get_parameter_state in distrib_optimizer.py).
    """
    parallel, parameters = recipe.parallel, parameter_count(recipe.model)
    if recipe.train.engine == "transformers":
        each = 4 if recipe.train.device == "cuda" else 4 + OPTIMIZER_BYTES
        return parameters * each * parallel.devices_per_node
    split = parallel.tensor * parallel.pipeline
    return weight_bytes(recipe) * parallel.devices_per_node // split + parameters * OPTIMIZER_BYTES


def largest_file(recipe: Recipe) -> int:
    """The optimizer's file of one part of the model."""
    return parameter_count(recipe.model) * OPTIMIZER_BYTES // (recipe.parallel.tensor * recipe.parallel.pipeline)


def disk_bytes(recipe: Recipe) -> dict[str, int]:
    """Room for what is still to be written, by the name of its path: conversions, and as many checkpoints as
    stage sft asks for before it starts. What depends on the data is not in it.
    """
    train = recipe.train
    kept = train.keep_checkpoints or max(1, train.iterations // train.save_interval)
    needed = {"run": checkpoint_bytes(recipe) * (min(kept, MOST_AT_FIRST) + 1)}
    for name in ("mcore", "export"):
        if not recipe.path(name).exists():
            needed[name] = weight_bytes(recipe)
    return needed
