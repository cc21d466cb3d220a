"""The arguments of MindSpeed-LLM's posttrain_gpt.py that a recipe means. Pure.

Every flag of the published script is here with its meaning, but for what docs/sft.md lists: what is changed, added or
left out, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional, Union

from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError

Value = Union[str, int, float, Path, bool, None]

NPU_BACKEND = "nccl"
"""As the published script names it; torch_npu's transfer_to_npu makes hccl of it."""


class Places(NamedTuple):
    """Where training reads and writes."""

    data: Path
    """Prefix of the packed dataset; upstream writes its shuffle index beside it."""
    load: Path
    save: Path
    tensorboard: Optional[Path]


def training_flags(recipe: Recipe, places: Places, resumed: bool) -> list[str]:
    """The command line of posttrain_gpt.py, the program left out.

    Args:
        recipe: a checked one.
        places: directories, absolute.
        resumed: whether `places.load` is a checkpoint of this run: optimizer, schedule, random state and data order
            are then its own.

    Raises:
        UserError: train.upstream_flags names what the recipe has a key for, or what trains wrongly.
    """
    sections = [_model(recipe), _parallel(recipe), _data(recipe, places), _schedule(recipe), _run(recipe, places)]
    flags = {name: value for section in sections for name, value in section.items()}
    if not resumed:
        flags.update({"finetune": True, "no-load-optim": True, "no-load-rng": True})
    more = recipe.train.upstream_flags
    require_free(more, flags)
    return [*as_arguments(flags), *more]


def as_arguments(flags: dict[str, Value]) -> list[str]:
    """True is a flag by itself, False and None are none; floats are written so that nothing of them is lost."""
    arguments = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{name}")
        if value is not True:
            arguments.append(repr(value) if isinstance(value, float) else str(value))
    return arguments


def _model(recipe: Recipe) -> dict[str, Value]:
    model = recipe.model
    return {
        "use-mcore-models": True,
        "transformer-impl": "local",
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": model.ffn_hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "group-query-attention": True,
        "num-query-groups": model.num_query_groups,
        "kv-channels": model.kv_channels,
        "max-position-embeddings": model.max_position_embeddings,
        # taken as it is: training does not round it up itself
        "padded-vocab-size": layout_of(model, recipe.parallel).padded_vocab_size,
        "make-vocab-size-divisible-by": recipe.parallel.make_vocab_size_divisible_by,
        "position-embedding-type": "rope",
        "use-rotary-position-embeddings": True,
        "rotary-base": model.rotary_base,
        "normalization": model.normalization,
        "norm-epsilon": model.norm_epsilon,
        "swiglu": True,
        "disable-bias-linear": True,
        "add-qkv-bias": model.add_qkv_bias,
        "add-dense-bias": model.add_dense_bias,
        "untie-embeddings-and-output-weights": not model.tie_word_embeddings,
        "init-method-std": 0.01,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "attention-softmax-in-fp32": True,
        "no-masked-softmax-fusion": True,
        "no-gradient-accumulation-fusion": True,
        "use-flash-attn": True,
        "use-fused-rmsnorm": True,
        "use-fused-swiglu": True,
        "use-fused-rotary-pos-emb": True,
    }


def _parallel(recipe: Recipe) -> dict[str, Value]:
    parallel, layers = recipe.parallel, recipe.parallel.num_layer_list
    return {
        "tensor-model-parallel-size": parallel.tensor,
        "pipeline-model-parallel-size": parallel.pipeline,
        # upstream takes a list for one stage as a mistake
        "num-layer-list": ",".join(map(str, layers)) if layers and parallel.pipeline > 1 else None,
        "context-parallel-size": parallel.context,
        "context-parallel-algo": "ulysses_cp_algo" if parallel.context > 1 else None,
        "expert-model-parallel-size": 1,
        "sequence-parallel": parallel.tensor > 1,
        "use-distributed-optimizer": True,
        "overlap-grad-reduce": True,
        "overlap-param-gather": True,
        "accumulate-allreduce-grads-in-fp32": True,
        "distributed-backend": NPU_BACKEND,
        "distributed-timeout-minutes": 120,
    }


def _data(recipe: Recipe, places: Places) -> dict[str, Value]:
    return {
        "data-path": places.data,
        "split": "100,0,0",
        "is-instruction-dataset": True,
        "reset-position-ids": True,
        "seq-length": recipe.data.seq_length,
        "tokenizer-type": "PretrainedFromHF",
        "tokenizer-name-or-path": recipe.path("hf"),
        "tokenizer-not-use-fast": True,
    }


def _schedule(recipe: Recipe) -> dict[str, Value]:
    train = recipe.train
    return {
        "stage": "sft",
        "micro-batch-size": train.micro_batch_size,
        "global-batch-size": train.global_batch_size,
        "train-iters": train.iterations,
        "optimizer": "adam",
        "lr": train.lr,
        "min-lr": train.min_lr,
        "lr-decay-style": train.lr_decay_style,
        "lr-warmup-iters": train.lr_warmup_iterations,
        "override-opt_param-scheduler": True,
        "weight-decay": train.weight_decay,
        "clip-grad": train.clip_grad,
        "adam-beta1": train.adam_beta1,
        "adam-beta2": train.adam_beta2,
        "adam-eps": train.adam_eps,
        "seed": train.seed,
        "bf16": train.precision == "bf16",
        "loss-scale": 1.0,
        "initial-loss-scale": 4096,
        **_recompute(recipe),
    }


def _recompute(recipe: Recipe) -> dict[str, Value]:
    recompute = recipe.train.recompute
    if recompute.granularity == "none":
        return {}
    names = ("granularity", "method", "num_layers")
    return {f"recompute-{name.replace('_', '-')}": getattr(recompute, name) for name in names}


def _run(recipe: Recipe, places: Places) -> dict[str, Value]:
    return {
        "load": places.load,
        "save": places.save,
        "save-interval": recipe.train.save_interval,
        "log-interval": 1,
        "eval-interval": 100,
        "eval-iters": 0,
        "manual-gc": True,
        "manual-gc-interval": 100,
        "exit-signal-handler": True,
        "tensorboard-dir": places.tensorboard,
    }


def require_free(more: Sequence[str], ours: dict[str, Value]) -> None:
    """Refuses further flags that would change what the recipe says or what the data needs.

    Raises:
        UserError: names the flag, and what to use in its place.
    """
    for number, word in enumerate(more):
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        name = name.replace("_", "-") if name.replace("_", "-") in ours else name
        following = value or (more[number + 1] if number + 1 < len(more) else "")
        where = f"train.upstream_flags --{name}"
        if name == "cp-attention-mask-type" and following == "general":
            continue
        if name in HARMFUL:
            raise UserError(HARMFUL[name], where=where, remedy="leave it out")
        if name in ours or name in CHOSEN:
            raise UserError("is set by the recipe", where=where, remedy=f"set {KEYS.get(name, 'its key')} instead")


CHOSEN = {"context-parallel-algo", "finetune", "no-load-optim", "no-load-rng", "exit-on-missing-checkpoint"}
HARMFUL = {
    "use-checkpoint-args": "makes MindSpeed-LLM 1.0.0 crash",
    "cp-attention-mask-type": "ring attention with a causal mask ignores where a sample ends",
    "reset-attention-mask": "does nothing for these packs but to build a mask of seq_length x seq_length",
    "eod-mask-loss": "does nothing in fine-tuning",
    "variable-seq-lengths": "packs have one length",
    "use-dist-ckpt": "the checkpoint could not be exported",
    "no-save-optim": "training could not go on from its checkpoints",
}
KEYS = {
    "context-parallel-algo": "parallel.context (ulysses_cp_algo, the one that respects where a sample ends)",
    "lr": "train.lr",
    "min-lr": "train.min_lr",
    "train-iters": "train.iterations",
    "save-interval": "train.save_interval",
    "micro-batch-size": "train.micro_batch_size",
    "global-batch-size": "train.global_batch_size",
    "seq-length": "data.seq_length",
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "context-parallel-size": "parallel.context",
    "load": "paths.mcore",
    "save": "paths.run",
    "data-path": "paths.dataset",
    "seed": "train.seed",
}
