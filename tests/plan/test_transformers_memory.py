"""make plan's numbers for the portable engine, and what torch really allocates for the demo's model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from checkpoint_files import hf_sizes
from conftest import ROOT, MakeRecipe, conversation, write_samples
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.mcore import iteration_directory
from openpangu_sft.checkpoint.sharding import hf_shapes
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.model.batches import Batch
from openpangu_sft.model.llama import SEGMENTS, PackLoss, build_model
from openpangu_sft.plan.memory import Phase
from openpangu_sft.plan.transformers_memory import layer_activations, transformers_memory
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.portable.lora import build_lora
from openpangu_sft.training.portable.schedule import parameter_groups
from openpangu_sft.training.run.retention import checkpoint_bytes
from openpangu_sft.training.stage import run_sft
from parameter_ids import named_by

LORA = "train.lora.rank=8"
MLP = "train.lora.targets=[o_proj,gate_proj,up_proj]"
ATTENTION = "train.lora.targets=[q_proj,k_proj,v_proj]"
FULL = ("train.recompute.granularity=full", "train.recompute.num_layers=3")


def demo(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/demo.yaml", ["train.device=cpu", *overrides])


class Small:
    """A model with random weights, and an optimizer, as sft/engine.py makes them."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe = recipe
        config = {"model_type": "llama", "attention_bias": True, **hf_sizes(recipe.model)}
        (directory / "config.json").write_text(json.dumps(config))
        adapter, cpu = recipe.train.lora.adapter, torch.device("cpu")
        tensors = {name: torch.randn(shape) * 0.02 for name, shape in hf_shapes(recipe.model, adapter).items()}
        if adapter:
            there = recipe.model_copy(update={"paths": recipe.paths.model_copy(update={"hf": directory})})
            self.model: LlamaForCausalLM = build_lora(there, tensors, cpu).train()
        else:
            self.model = build_model(directory, tensors, SEGMENTS, cpu).train()
        if recipe.train.recompute.granularity == "full":
            for layer in self.model.model.layers[: recipe.train.recompute.num_layers]:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1))

    @property
    def tokens(self) -> int:
        return self.recipe.train.micro_batch_size * self.recipe.data.seq_length

    def micro_batch(self) -> None:
        """Forward and backward pass over packs of two segments, all of whose tokens are trained."""
        packs, tokens = self.recipe.train.micro_batch_size, self.recipe.data.seq_length
        ids = np.random.default_rng(0).integers(self.recipe.model.vocab_size, size=(packs, tokens))
        cut = tokens // 3
        batch = Batch.of(ids, ids, [[(0, cut), (cut, tokens)]] * packs, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            loss = PackLoss(self.model)(batch)
        loss.backward()


def peak(action: Any) -> int:
    """Most bytes that torch allocates at once in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    kineto = record.profiler
    assert kineto is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    assert events
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_us()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def phases(recipe: Recipe) -> dict[str, Phase]:
    return {phase.name: phase for phase in transformers_memory(recipe).phases}


@pytest.mark.parametrize(
    "overrides", named_by(0, ((),), ((LORA,),), ((LORA, "model.tie_word_embeddings=false", "train.precision=fp32"),))
)
def test_weights_gradients_and_state_to_the_byte(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = demo("train.precision=bf16", "data.seq_length=16", *overrides)
    small = Small(recipe, tmp_path)
    small.micro_batch()
    small.optimizer.step()
    parameters = list(small.model.parameters())
    state = [value for entry in small.optimizer.state.values() for value in entry.values() if value.dim()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    measured = [sum(tensor.nbytes for tensor in tensors) for tensors in (parameters, gradients, state)]
    planned = {part.name: part.size for part in transformers_memory(recipe).static}
    assert planned == dict(zip(["weights", "gradients", "optimizer state"], measured))


LORA_CASES = [
    (),
    FULL,
    (*FULL, "model.vocab_size=300"),
    ("train.precision=bf16",),
    ("train.precision=bf16", *FULL),
    ("train.micro_batch_size=2", "data.seq_length=128"),
    ("model.tie_word_embeddings=false", "train.precision=bf16"),
    (ATTENTION,),
    ("model.vocab_size=20000", "data.seq_length=48", "train.precision=bf16"),
]
CASES = [
    (),
    FULL,
    ("train.recompute.granularity=full", "train.recompute.num_layers=1"),
    ("train.precision=bf16",),
    ("train.precision=bf16", *FULL),
    ("train.micro_batch_size=2", "data.seq_length=128"),
    ("model.num_query_groups=6", "data.seq_length=256"),
    ("model.tie_word_embeddings=false",),
]


@pytest.mark.parametrize("overrides", named_by(0, *zip(CASES)))
def test_most_that_a_micro_batch_allocates(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = demo(*overrides)
    small = Small(recipe, tmp_path)
    small.micro_batch()  # gradients are there from now on
    planned = phases(recipe)
    most = max(phase.size for name, phase in planned.items() if name != "optimizer step")
    assert peak(small.micro_batch) == pytest.approx(most, rel=0.01)


@pytest.mark.parametrize("overrides", named_by(0, *zip(LORA_CASES)))
def test_most_that_a_micro_batch_with_adapters_allocates(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The plan counts one norm's input too many: beside frozen embeddings the first layer's takes no gradient."""
    recipe = demo(LORA, *overrides)
    small = Small(recipe, tmp_path)
    small.micro_batch()
    most = max(phase.size for name, phase in phases(recipe).items() if name != "optimizer step")
    recomputed = recipe.train.recompute.granularity == "full"
    norm = 0 if recomputed else small.tokens * (recipe.model.hidden_size * 4 + 4)
    assert peak(small.micro_batch) == pytest.approx(most - norm, rel=0.005)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_the_vocabulary_is_large_the_loss_takes_most(tmp_path: Path, precision: str) -> None:
    recipe = demo("model.vocab_size=20000", "data.seq_length=48", f"train.precision={precision}")
    small = Small(recipe, tmp_path)
    small.micro_batch()
    planned = max(phases(recipe).values(), key=lambda phase: phase.size if phase.name != "optimizer step" else 0)
    assert planned.name == "loss"
    assert peak(small.micro_batch) == pytest.approx(planned.size, rel=0.01)


def test_most_that_the_optimizer_allocates(tmp_path: Path) -> None:
    recipe = demo("data.seq_length=16")
    small = Small(recipe, tmp_path)
    small.micro_batch()
    small.optimizer.step()
    assert peak(small.optimizer.step) == pytest.approx(phases(recipe)["optimizer step"].size, rel=0.001)


@pytest.mark.parametrize("overrides", named_by(0, ((),), ((LORA,),), ((LORA, ATTENTION),), ((LORA, MLP),)))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_layer_keeps(tmp_path: Path, precision: str, overrides: tuple[str, ...]) -> None:
    recipe = demo(f"train.precision={precision}", "data.seq_length=256", *overrides)
    small = Small(recipe, tmp_path)
    weights = {parameter.untyped_storage().data_ptr() for parameter in small.model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        copy_of_weights = tensor.dim() == 2 and tensor.shape[0] != recipe.data.seq_length and precision == "bf16"
        angles = tensor.dim() == 3 and tensor.shape[-1] == recipe.model.kv_channels  # one for all layers
        if tensor.dim() and storage.data_ptr() not in weights and not copy_of_weights and not angles:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    layer = small.model.model.layers[1]
    before = layer.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return before(*arguments, **options)

    layer.forward = forward
    small.micro_batch()
    assert sum(sizes.values()) == layer_activations(recipe)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_on_disk(make_recipe: MakeRecipe, precision: str, rank: int) -> None:
    recipe = make_recipe(f"train.precision={precision}", "train.iterations=3", f"train.lora.rank={rank}")
    write_samples(recipe.path("samples") / "a.jsonl", [conversation(f"问 {n}", f"答 {n}") for n in range(20)])
    run_preprocess(recipe)
    run_merge(recipe)
    run_convert(recipe)
    run_sft(recipe, [])
    directory = iteration_directory(recipe.path("run"), 3)
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    names_and_settings = written - checkpoint_bytes(recipe)
    assert 0 < names_and_settings < 60_000
