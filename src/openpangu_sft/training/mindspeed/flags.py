"""The arguments of MindSpeed-LLM's posttrain_gpt.py that a recipe stands for. Pure.

One table says where each flag comes from: a recipe key as it is (SAME), computed from one (_computed), or fixed with
its reason (FIXED). Every flag of the published script is here; docs/sft.md lists what is changed, added or left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Union

from openpangu_sft.checkpoint.sharding import layout_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.errors import UserError

Value = Union[str, int, float, Path, bool, Sequence[str], None]

_MODEL = [name for name in Model.model_fields if name not in ("vocab_size", "activation", "tie_word_embeddings")]
_NAMED_ALIKE = """parallel.make_vocab_size_divisible_by data.seq_length train.micro_batch_size train.global_batch_size
    train.lr train.min_lr train.lr_decay_style train.weight_decay train.clip_grad train.adam_beta1 train.adam_beta2
    train.adam_eps train.seed train.save_interval"""
SAME = {
    **{name.replace("_", "-"): f"model.{name}" for name in _MODEL},
    **{key.partition(".")[2].replace("_", "-"): key for key in _NAMED_ALIKE.split()},
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "context-parallel-size": "parallel.context",
    "train-iters": "train.iterations",
}
"""Flag and the recipe key whose value it takes as it is."""

FIXED = {
    "by openPangu's architecture": """
        --use-mcore-models --transformer-impl local --group-query-attention --position-embedding-type rope
        --use-rotary-position-embeddings --swiglu --disable-bias-linear --init-method-std 0.01 --attention-dropout 0.0
        --hidden-dropout 0.0 --expert-model-parallel-size 1""",
    "by the packed dataset and its tokenizer": """
        --stage sft --split 100,0,0 --is-instruction-dataset --reset-position-ids --tokenizer-type PretrainedFromHF
        --tokenizer-not-use-fast""",
    # torch_npu's transfer_to_npu replaces nccl with hccl
    "as in the published script": """
        --attention-softmax-in-fp32 --no-masked-softmax-fusion --no-gradient-accumulation-fusion --use-flash-attn
        --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --use-distributed-optimizer
        --overlap-grad-reduce --overlap-param-gather --accumulate-allreduce-grads-in-fp32 --distributed-backend nccl
        --distributed-timeout-minutes 120 --optimizer adam --override-opt_param-scheduler --loss-scale 1.0
        --initial-loss-scale 4096 --log-interval 1 --eval-iters 0 --manual-gc --manual-gc-interval 100""",
    "so that SIGTERM saves a checkpoint": "--exit-signal-handler",
}
"""Arguments that no recipe changes, by the reason for their value."""

NEVER = 10**9
"""Iterations between evaluations where the recipe has none."""

AT_BEGINNING = ("finetune", "no-load-optim", "no-load-rng")
"""Only for a new run: a resumed one loads optimizer, schedule, random state and data order from its checkpoint."""

HARMFUL = {
    "use-checkpoint-args": "makes MindSpeed-LLM 1.0.0 crash",
    "cp-attention-mask-type": "ring attention with a causal mask ignores sample boundaries",
    "reset-attention-mask": "does nothing for these packs but to build a mask of seq_length x seq_length",
    "eod-mask-loss": "does nothing in fine-tuning",
    "variable-seq-lengths": "all packs have one length",
    "use-dist-ckpt": "the checkpoint could not be exported",
    "output-multiplier-scale": "is not for openPangu, and the patched loss would ignore it",
    "output-logit-softcapping": "is not for openPangu, and the patched loss would ignore it",
    "no-save-optim": "training could not resume from its checkpoints",
    "lora-fusion": "does not wait for adapters that --overlap-param-gather is still gathering",
    "lora-load": "is not needed: paths.mcore has the adapters",
    "lora-modules-to-save": "is never read by MindSpeed-LLM 1.0.0",
    "lora-register-forward-hook": "could leave adapters of recomputed layers untrained",
}


def training_flags(recipe: Recipe, data: Path, resumed: bool) -> list[str]:
    """The command line of posttrain_gpt.py, without the program, for a new run or one resumed from its checkpoint.

    `data` is the absolute prefix of the packed dataset; upstream writes its shuffle index next to it. Raises
    `UserError` for a flag in train.upstream_flags that the recipe sets, or that breaks training.
    """
    computed = _computed(recipe, data, resumed)
    _require_free(recipe.train.upstream_flags, {**SAME, **{flag: key for flag, (key, _) in computed.items()}})
    flags: dict[str, Value] = {flag: reduce(getattr, key.split("."), recipe) for flag, key in SAME.items()}  # type: ignore[misc]
    flags.update((flag, value) for flag, (_, value) in computed.items())
    if not resumed:
        flags.update(dict.fromkeys(AT_BEGINNING, True))
    return [*as_arguments(flags), *" ".join(FIXED.values()).split(), *recipe.train.upstream_flags]


def repeats_kv_heads(recipe: Recipe) -> bool:
    """Whether keys and values are repeated for every head before ulysses exchanges them.

    Needed where the KV heads of a tensor parallel rank cannot be divided among the context parallel ranks.
    """
    return recipe.model.num_query_groups // recipe.parallel.tensor % recipe.parallel.context > 0


def _computed(recipe: Recipe, data: Path, resumed: bool) -> dict[str, tuple[str, Value]]:
    """Flag, the recipe key that decides its value, and the value."""
    model, parallel, train, run = recipe.model, recipe.parallel, recipe.train, recipe.path("run")
    ulysses = "parallel.context (ulysses_cp_algo, which keeps attention within a sample)"
    # upstream refuses a list for a single stage
    layers = ",".join(map(str, parallel.num_layer_list or ())) if parallel.pipeline > 1 else None
    recompute = train.recompute.model_dump() if train.recompute.granularity != "none" else {}
    adapter, wsd = train.lora.adapter, train.lr_decay_style == "WSD"
    return {
        # training takes this number as it is, without rounding it up
        "padded-vocab-size": ("model.vocab_size", layout_of(model, parallel).padded_vocab_size),
        "untie-embeddings-and-output-weights": ("model.tie_word_embeddings", not model.tie_word_embeddings),
        "num-layer-list": ("parallel.num_layer_list", layers or None),
        "kv-head-repeat-before-uly-alltoall": ("parallel.context", repeats_kv_heads(recipe)),
        "context-parallel-algo": (ulysses, "ulysses_cp_algo" if parallel.context > 1 else None),
        "sequence-parallel": ("parallel.tensor", parallel.tensor > 1),
        # of hooks/iteration.py; upstream's own evaluation has eval-iters 0
        "eval-interval": ("train.eval_interval", train.eval_interval or NEVER),
        "lr-wsd-decay-ratio": ("train.lr_wsd_decay_ratio", train.lr_wsd_decay_ratio if wsd else None),
        "lr-warmup-iters": ("train.lr_warmup_iterations", train.warmup),
        "calculate-per-token-loss": ("train.loss", train.loss == "token"),
        "bf16": ("train.precision", train.precision == "bf16"),
        "recompute-granularity": ("train.recompute.granularity", recompute.get("granularity")),
        "recompute-method": ("train.recompute.method", recompute.get("method")),
        "recompute-num-layers": ("train.recompute.num_layers", recompute.get("num_layers")),
        "recompute-activation-function": ("train.recompute.activation", train.recompute.activation),
        "lora-r": ("train.lora.rank", adapter and adapter.rank),
        "lora-alpha": ("train.lora.alpha", adapter and adapter.alpha),
        "lora-target-modules": ("train.lora.targets", adapter and adapter.linears),
        "tokenizer-name-or-path": ("paths.hf", recipe.path("hf")),
        "data-path": ("paths.dataset", data),
        "load": ("paths.mcore", run if resumed else recipe.path("mcore")),
        "save": ("paths.run", run),
    }


def as_arguments(flags: dict[str, Value]) -> list[str]:
    """True is a flag without a value, False and None are no flag; a list is several words; floats in full precision."""
    arguments = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{name}")
        if isinstance(value, list):
            arguments += value
        elif value is not True:
            arguments.append(repr(value) if isinstance(value, float) else str(value))
    return arguments


def _require_free(more: Sequence[str], keys: Mapping[str, str]) -> None:
    """Refuses further flags that the recipe sets by one of its `keys`, or that break training."""
    flags = [(word, reason) for reason, words in FIXED.items() for word in words.split() if word.startswith("--")]
    fixed = {word[2:]: f"is fixed {reason}" for word, reason in flags}
    fixed |= dict.fromkeys(AT_BEGINNING, "depends on whether a run begins or resumes")
    fixed["exit-on-missing-checkpoint"] = "is not needed: a start without weights is refused"
    for word in more:
        if not word.startswith("--"):
            continue
        name = word[2:].partition("=")[0]
        dashed = name.replace("_", "-")
        name = dashed if dashed in keys or dashed in fixed else name
        where = f"train.upstream_flags --{name}"
        if name in keys:
            raise UserError("is set by the recipe", where=where, remedy=f"set {keys[name]} instead")
        if refusal := HARMFUL.get(name) or fixed.get(name):
            raise UserError(refusal, where=where, remedy="leave it out")
