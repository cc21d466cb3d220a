"""Launches MindSpeed-LLM's posttrain_gpt.py for tests, with the published flags, in fp32, as a recipe sets them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openpangu_sft.dataset.index_file import PREFIX
from openpangu_sft.recipe.schema import Recipe
from upstream import require_compiler, run_upstream

RECOMPUTE = "--recompute-granularity full --recompute-method block --recompute-num-layers 3"
"""As published: what is computed again must be cut where its own batch is, not the one that came since."""

RECOMPUTE_ONE = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"
ACTIVATION = "--recompute-activation-function"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather --accumulate-allreduce-grads-in-fp32"


def several(processes: int, *overrides: str) -> list[str]:
    """Overrides for so many processes."""
    return ["train.engine=mindspeed", f"parallel.devices_per_node={processes}", *overrides]


def copy_dataset(recipe: Recipe, directory: Path) -> Path:
    """What --data-path is, with a dataset beside which upstream may write its index."""
    shutil.copytree(recipe.path("dataset"), directory / "copy")
    return directory / "copy" / PREFIX


def posttrain(upstream: Path, recipe: Recipe, data: Path, *flags: str, refused: bool = False) -> str:
    """Trains from the recipe's mcore checkpoint, on as many processes as it has devices.

    Args:
        upstream: the patched sources.
        data: for --data-path; an index is written beside it.
        flags: added; --bf16 for instance, without which all is fp32.
        refused: whether training has to fail.

    Returns:
        Its output.
    """
    require_compiler()
    model, train, parallel, seq_length = recipe.model, recipe.train, recipe.parallel, recipe.data.seq_length
    command = f"""
        -m torch.distributed.run --standalone --local_addr 127.0.0.1 --nproc_per_node {parallel.world} posttrain_gpt.py
        --finetune --stage sft --use-mcore-models --seed {train.seed}
        --tensor-model-parallel-size {parallel.tensor} --pipeline-model-parallel-size {parallel.pipeline}
        --context-parallel-size {parallel.context} --sequence-parallel --use-distributed-optimizer
        --num-layers {model.num_layers} --hidden-size {model.hidden_size} --ffn-hidden-size {model.ffn_hidden_size}
        --num-attention-heads {model.num_attention_heads} --kv-channels {model.kv_channels}
        --group-query-attention --num-query-groups {model.num_query_groups}
        --disable-bias-linear --add-qkv-bias --add-dense-bias --swiglu --normalization RMSNorm
        --position-embedding-type rope --use-rotary-position-embeddings --rotary-base {model.rotary_base:.0f}
        --make-vocab-size-divisible-by 16 --padded-vocab-size {model.vocab_size}
        --tokenizer-type PretrainedFromHF --tokenizer-not-use-fast --transformer-impl local
        --seq-length {seq_length} --max-position-embeddings {seq_length}
        --micro-batch-size {train.micro_batch_size} --global-batch-size {train.global_batch_size}
        --train-iters {train.iterations} --lr-warmup-iters {train.lr_warmup_iterations}
        --optimizer adam --lr {train.lr} --min-lr {train.min_lr} --lr-decay-style cosine
        --weight-decay {train.weight_decay} --clip-grad {train.clip_grad}
        --adam-beta1 {train.adam_beta1} --adam-beta2 {train.adam_beta2}
        --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.01 --attention-softmax-in-fp32
        --no-masked-softmax-fusion --no-gradient-accumulation-fusion --use-fused-rmsnorm --use-fused-swiglu
        --use-flash-attn --use-fused-rotary-pos-emb --reset-position-ids --is-instruction-dataset
        --no-load-optim --no-load-rng --no-save-optim --no-save-rng --split 100,0,0 --distributed-backend nccl
        --log-interval 1 --eval-interval 100 --eval-iters 0
    """.split()
    if train.loss == "token":
        command.append("--calculate-per-token-loss")
    if adapter := train.lora.adapter:
        command += ["--lora-r", str(adapter.rank), "--lora-alpha", str(adapter.alpha)]
        command += ["--lora-target-modules", *adapter.linears]
    places = {"tokenizer-name-or-path": recipe.path("hf"), "load": recipe.path("mcore"), "data-path": data}
    places["tensorboard-dir"] = recipe.path("run") / "tensorboard"
    for flag, path in places.items():
        command += [f"--{flag}", str(path)]
    return run_upstream(upstream, *command, *layout_flags(recipe), *flags, refused=refused)


def layout_flags(recipe: Recipe) -> list[str]:
    """The option of upstream's commands for uneven pipeline stages."""
    layers = recipe.parallel.num_layer_list
    return ["--num-layer-list", ",".join(map(str, layers))] if layers else []


def losses(output: str) -> list[float]:
    """The loss of each iteration."""
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]


def figures(recipe: Recipe, *names: str) -> list[list[float]]:
    """What the run of `posttrain` wrote of each iteration, in fp32: "lm loss", "grad-norm"."""
    events = EventAccumulator(str(recipe.path("run") / "tensorboard")).Reload()
    return [[event.value for event in events.Scalars(name)] for name in names]
