"""Upstream's own estimate of memory, megatron/training/theoretical_memory_usage.py, beside make plan's."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from conftest import ROOT
from openpangu_sft.checkpoint.sharding import layout_of, parameter_count
from openpangu_sft.plan.memory import total
from openpangu_sft.plan.mindspeed_memory import mindspeed_memory, rank_parameters, shape_of, shards
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.sources import SOURCES


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """Upstream's module, which imports nothing but math."""
    path = SOURCES / "megatron-lm/megatron/training/theoretical_memory_usage.py"
    if not path.is_file():
        pytest.skip("the upstream sources are not at hand: no make sources here")
    spec = importlib.util.spec_from_file_location("theoretical_memory_usage", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(recipe: Recipe) -> Namespace:
    """What Megatron-LM makes of the recipe's flags, as far as the estimate reads it."""
    model, parallel = recipe.model, recipe.parallel
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        group_query_attention=True,
        num_experts=None,
        swiglu=True,
        padded_vocab_size=layout_of(model, parallel).padded_vocab_size,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        use_distributed_optimizer=True,
        data_parallel_size=parallel.data,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=None,
        seq_length=recipe.data.seq_length,
        micro_batch_size=recipe.train.micro_batch_size,
    )


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(Path(ROOT / "recipes/openpangu-1b.yaml"), overrides)


def what_it_leaves_out(recipe: Recipe) -> int:
    """Parameters of the model that its formula does not know: biases; and norms that it counts twice.

    It has 2 h in each layer and h at the end for norms, twice, as if each had a bias, which an RMSNorm has not.
    """
    model = recipe.model
    heads, groups = (number * model.kv_channels for number in (model.num_attention_heads, model.num_query_groups))
    biases = model.num_layers * (heads + 2 * groups + model.hidden_size)
    return biases - (2 * model.num_layers + 1) * model.hidden_size


def their_parameters(theirs: ModuleType, recipe: Recipe) -> float:
    """Of the fullest device, from 18 bytes a parameter without a distributed optimizer."""
    args = arguments(recipe)
    args.use_distributed_optimizer = False
    return float(theirs.compute_weight_and_optimizer_memory(args)) / 18


def test_parameters_but_for_biases_and_norms(theirs: ModuleType) -> None:
    recipe = recipe_with()
    found = their_parameters(theirs, recipe)
    assert found == pytest.approx(1_155_873_792)
    assert found + what_it_leaves_out(recipe) == parameter_count(recipe.model) == 1_155_912_192


def test_weights_and_optimizer_are_the_same_without_context_parallel(theirs: ModuleType) -> None:
    recipe = recipe_with("parallel.context=1")
    memory = mindspeed_memory(recipe)
    ours = total([part for part in memory.static if part.name in ("weights", "gradients", "optimizer state")])
    each = 6 + 12 / shards(recipe)
    assert shards(recipe) == recipe.parallel.data == 8
    found = theirs.compute_weight_and_optimizer_memory(arguments(recipe))
    assert found + what_it_leaves_out(recipe) * each == pytest.approx(ours, abs=12)


def test_it_spreads_the_optimizer_over_too_few_devices_with_context_parallel(theirs: ModuleType) -> None:
    """Over DP 4, where Megatron-LM itself (and the run that is measured in test_plan_upstream) takes DP x CP, 8."""
    recipe = recipe_with()
    found = theirs.compute_weight_and_optimizer_memory(arguments(recipe))
    assert found == pytest.approx(their_parameters(theirs, recipe) * (6 + 12 / 4))
    memory = mindspeed_memory(recipe)
    ours = total([part for part in memory.static if part.name in ("weights", "gradients", "optimizer state")])
    assert found - ours == pytest.approx(12 * 1_155_912_192 / 8, rel=1e-3)


def test_with_tensor_and_pipeline_parallel(theirs: ModuleType) -> None:
    """It takes everything to be cut, norms and the output projection's bias too: they are small."""
    recipe = recipe_with("parallel.tensor=2", "parallel.context=1", "parallel.pipeline=2")
    assert their_parameters(theirs, recipe) == pytest.approx(rank_parameters(recipe), rel=2e-3)


def test_logits_in_fp32_once_and_no_context_parallel(theirs: ModuleType) -> None:
    """Its activations: all of a layer but attention's scores, nothing recomputed, and 4 bytes a logit where 10 live."""
    recipe = recipe_with()
    args = arguments(recipe)
    tokens, model = args.seq_length, recipe.model
    with_logits = theirs.compute_activation_memory(args, None)
    args.padded_vocab_size = 0
    logits = with_logits - theirs.compute_activation_memory(args, None)
    assert logits == 4 * tokens * model.vocab_size
    (loss,) = (phase for phase in mindspeed_memory(recipe, published=True).phases if phase.name == "loss")
    (ours,) = (part.size for part in loss.parts if part.name == "logits")
    assert ours == 10 * shape_of(recipe).tokens * model.vocab_size == logits * 10 / 4 / recipe.parallel.context
    layer = args.seq_length * args.hidden_size * (18 + 4 * args.ffn_hidden_size / args.hidden_size)
    assert with_logits == pytest.approx(
        layer * model.num_layers + tokens * (8 + args.hidden_size) + 4 * tokens * (args.hidden_size + model.vocab_size)
    )


def test_it_reports_nothing_for_our_flags(theirs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """It is made for sequence parallelism and selective recompute, and says nothing of anything else."""
    args = Namespace(**vars(arguments(recipe_with())), sequence_parallel=False, recompute_granularity="full")
    theirs.report_theoretical_memory(args)
    assert capsys.readouterr().out == ""
