"""What MindSpeed-LLM's training is told: the published script's flags, but for a short list."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from conftest import ROOT, MakeRecipe
from openpangu_sft.cli.main import app
from openpangu_sft.plan.choose import choose
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.flags import as_arguments, training_flags
from parameter_ids import named_by
from refusals import refusal_of

PUBLISHED = """
--finetune --stage sft --use-mcore-models --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
--context-parallel-size 2 --expert-model-parallel-size 1 --sequence-parallel --seed 1234 --num-layers 26
--hidden-size 1536 --ffn-hidden-size 6144 --num-attention-heads 12 --group-query-attention --num-query-groups 6
--kv-channels 128 --tokenizer-type PretrainedFromHF --tokenizer-not-use-fast
--tokenizer-name-or-path /cache/ckpts/pangu_model/ --seq-length 32768 --max-position-embeddings 32768
--micro-batch-size 1 --global-batch-size 128 --transformer-impl local --distributed-timeout-minutes 120
--make-vocab-size-divisible-by 16 --padded-vocab-size 153376 --lr-decay-style cosine --lr 2e-5 --min-lr 2e-6
--lr-warmup-iters 200 --override-opt_param-scheduler --disable-bias-linear --add-qkv-bias --add-dense-bias
--attention-dropout 0.0 --init-method-std 0.01 --hidden-dropout 0.0 --position-embedding-type rope
--use-rotary-position-embeddings --rotary-base 4000000 --normalization RMSNorm --swiglu --no-masked-softmax-fusion
--no-gradient-accumulation-fusion --use-fused-rmsnorm --use-fused-swiglu --use-flash-attn --use-fused-rotary-pos-emb
--attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --optimizer adam --weight-decay 0.1 --clip-grad 1.0
--loss-scale 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --initial-loss-scale 4096 --no-load-optim --no-load-rng --bf16
--reset-attention-mask --reset-position-ids --eod-mask-loss --is-instruction-dataset --train-iters 600
--recompute-granularity full --recompute-method block --recompute-num-layers 26 --overlap-param-gather
--overlap-grad-reduce --use-distributed-optimizer --manual-gc --manual-gc-interval 100
--data-path /cache/finetune_data/merge_demo_data --split 100,0,0 --log-interval 1 --save-interval 100
--eval-interval 100 --eval-iters 0 --distributed-backend nccl --load /cache/ckpt/pangu_model_mcore
--save /cache/sft_ouputs/
"""
"""Flags and values of the published script, without its stray backslash."""

LEFT_OUT = {"sequence-parallel", "reset-attention-mask", "eod-mask-loss"}
ADDED = {"context-parallel-algo": "ulysses_cp_algo", "norm-epsilon": "1e-05", "adam-eps": "1e-08"}
ADDED |= {
    "exit-signal-handler": "",
    "calculate-per-token-loss": "",
}
OTHER_PLACES = {"tokenizer-name-or-path", "data-path", "load", "save"}


def parsed(words: list[str]) -> dict[str, str]:
    """Flag to value, or to nothing."""
    flags: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            assert name not in flags
            flags[name] = ""
        else:
            flags[name] = word
    return flags


def published(name: str = "openpangu-1b") -> Recipe:
    return load_recipe(ROOT / f"recipes/{name}.yaml", choose=choose)


def flags_of(recipe: Recipe, resumed: bool = False) -> dict[str, str]:
    return parsed(training_flags(recipe, recipe.path("run") / "data/data", resumed))


def test_the_published_recipe_gives_the_published_flags() -> None:
    ours, theirs = flags_of(published()), parsed(PUBLISHED.split())
    assert theirs.keys() - ours.keys() == LEFT_OUT
    assert {name: value for name, value in ours.items() if name not in theirs} == ADDED
    for name in theirs.keys() & ours.keys() - OTHER_PLACES - {"eval-interval"}:  # which does nothing with eval-iters 0
        assert (ours[name] == theirs[name]) or float(ours[name]) == float(theirs[name]), name


def test_the_7b_differs_from_the_1b_in_its_sizes_and_layout_alone() -> None:
    ours, theirs = flags_of(published("openpangu-7b")), flags_of(published())
    differing = {name: value for name, value in ours.items() if theirs.get(name) != value}
    assert {name: value for name, value in differing.items() if name not in OTHER_PLACES} == {
        "num-layers": "34",
        "hidden-size": "4096",
        "ffn-hidden-size": "12800",
        "num-attention-heads": "32",
        "num-query-groups": "8",
        "rotary-base": "16000000.0",
        "untie-embeddings-and-output-weights": "",
        "tensor-model-parallel-size": "4",
        "sequence-parallel": "",
        "make-vocab-size-divisible-by": "4",
    }
    recompute = {"recompute-granularity", "recompute-method", "recompute-num-layers"}
    assert theirs.keys() - ours.keys() == recompute
    assert ours["padded-vocab-size"] == "153376"


def test_the_documentation_names_every_difference() -> None:
    text = (ROOT / "docs/sft.md").read_text("utf-8")
    for name in {*LEFT_OUT, *ADDED, *OTHER_PLACES}:
        assert f"`--{name}`" in text


def test_a_resumed_run_takes_everything_from_its_own_checkpoint() -> None:
    beginning, resumed = flags_of(published()), flags_of(published(), resumed=True)
    assert beginning.keys() - resumed.keys() == {"finetune", "no-load-optim", "no-load-rng"}


@pytest.mark.parametrize(
    ("settings", "wanted", "unwanted"),
    [
        (["parallel.tensor=2"], {"sequence-parallel": "", "padded-vocab-size": "1536"}, ["context-parallel-algo"]),
        (["parallel.pipeline=2", "parallel.num_layer_list=[1,1]"], {"num-layer-list": "1,1"}, ["sequence-parallel"]),
        (["parallel.num_layer_list=[2]"], {}, ["num-layer-list"]),
        (["model.tie_word_embeddings=false"], {"untie-embeddings-and-output-weights": ""}, []),
        (["train.precision=bf16"], {"bf16": ""}, ["recompute-granularity"]),
        (["model.add_dense_bias=false"], {}, ["add-dense-bias", "bf16"]),
        (
            ["model.vocab_size=1510", "parallel.tensor=2"],
            {"padded-vocab-size": "1536", "make-vocab-size-divisible-by": "16"},
            [],
        ),
        (["parallel.context=2"], {}, ["kv-head-repeat-before-uly-alltoall", "recompute-activation-function"]),
        (["parallel.context=2", "model.num_query_groups=1"], {"kv-head-repeat-before-uly-alltoall": ""}, []),
        (["train.recompute.activation=true"], {"recompute-activation-function": ""}, ["recompute-num-layers"]),
        (["train.lr=3.3e-5", "train.min_lr=1e-7"], {"lr": "3.3e-05", "min-lr": "1e-07"}, []),
    ],
)
def test_settings(make_recipe: MakeRecipe, settings: list[str], wanted: dict[str, str], unwanted: list[str]) -> None:
    devices = ["parallel.devices_per_node=2", "train.engine=mindspeed", "train.precision=fp32"]
    flags = flags_of(make_recipe(*devices, *settings))
    assert {name: flags.get(name) for name in wanted} == wanted
    assert not flags.keys() & set(unwanted)


def test_lora(make_recipe: MakeRecipe) -> None:
    lora = ["train.lora.rank=8", "train.lora.targets=[q_proj, k_proj, v_proj, down_proj]"]
    words = training_flags(make_recipe("train.engine=mindspeed", *lora), Path("/data"), resumed=False)
    expected = ["--lora-r", "8", "--lora-alpha", "32", "--lora-target-modules", "linear_qkv", "linear_fc2"]
    begin = words.index("--lora-r")
    assert words[begin : begin + len(expected) + 1] == [*expected, "--tokenizer-name-or-path"]
    assert not [
        word for word in training_flags(make_recipe(), Path("/data"), resumed=False) if word.startswith("--lora")
    ]


def test_further_flags_stand_behind_ours(make_recipe: MakeRecipe) -> None:
    more = ["--log-throughput", "--num-workers", "4"]
    recipe = make_recipe("train.engine=mindspeed", "train.upstream_flags=[--log-throughput, --num-workers, '4']")
    assert training_flags(recipe, recipe.path("dataset"), resumed=False)[-3:] == more


@pytest.mark.parametrize(
    ("flag", "complaint"),
    named_by(
        0,
        ("--lr, '1'", "train.upstream_flags --lr: is set by the recipe -> set train.lr instead"),
        ("--lr=1", "train.upstream_flags --lr: is set by the recipe -> set train.lr instead"),
        (
            "--lora-target-modules, linear_qkv, linear_proj",
            "train.upstream_flags --lora-target-modules: is set by the recipe -> set train.lora.targets instead",
        ),
        (
            "--lora-fusion",
            "train.upstream_flags --lora-fusion: does not wait for adapters that --overlap-param-gather is still "
            "gathering -> leave it out",
        ),
        (
            "--lora-modules-to-save, embed",
            "train.upstream_flags --lora-modules-to-save: is never read by MindSpeed-LLM 1.0.0 -> leave it out",
        ),
        ("--swiglu", "train.upstream_flags --swiglu: is fixed by openPangu's architecture -> leave it out"),
        (
            "--context-parallel-algo, megatron_cp_algo",
            "train.upstream_flags --context-parallel-algo: is set by the recipe -> set parallel.context "
            "(ulysses_cp_algo, which keeps attention within a sample) instead",
        ),
        (
            "--cp-attention-mask-type, causal",
            "train.upstream_flags --cp-attention-mask-type: ring attention with a causal mask ignores sample "
            "boundaries -> leave it out",
        ),
        (
            "--use-checkpoint-args",
            "train.upstream_flags --use-checkpoint-args: makes MindSpeed-LLM 1.0.0 crash -> leave it out",
        ),
        (
            "--output-logit-softcapping=30",
            "train.upstream_flags --output-logit-softcapping: is not for openPangu, and the patched loss would ignore "
            "it -> leave it out",
        ),
    ),
)
def test_flags_that_are_refused(make_recipe: MakeRecipe, flag: str, complaint: str) -> None:
    recipe = make_recipe("train.engine=mindspeed", f"train.upstream_flags=[{flag}]")
    assert refusal_of(training_flags, recipe, recipe.path("dataset"), resumed=False) == complaint


def test_values_are_written_in_full() -> None:
    values = {"a": 1e-8, "b": 0.1, "c": 3, "d": True, "e": False, "f": None, "g": Path("/x y")}
    assert as_arguments(values) == ["--a", "1e-08", "--b", "0.1", "--c", "3", "--d", "--g", "/x y"]


def test_dry_run_prints_what_a_shell_can_run() -> None:
    recipe = ["--recipe", str(ROOT / "recipes/openpangu-1b.yaml")]
    shown = CliRunner().invoke(app, ["sft", "--dry-run", *recipe, "--set", "paths.cache=/ca che"])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("mkdir"))
    environment, folder, command = lines[:head], lines[head], "\n".join(lines[head + 1 :])
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in environment
    assert folder == "mkdir -p '/ca che/sft_outputs/work' && cd '/ca che/sft_outputs/work'"
    assert f"{ROOT}/.sources/mindspeed-llm/posttrain_gpt.py" in command
    assert "    --lr 2e-05 \\" in lines  # one flag a line
    words = shlex.split(command)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc_per_node=8" in words
    assert words[words.index("--save") + 1] == "/ca che/sft_outputs"


def test_dry_run_is_for_the_mindspeed_engine(make_recipe: MakeRecipe) -> None:
    command = ["sft", "--dry-run", "--recipe", str(ROOT / "recipes/demo.yaml")]
    assert "trains in this process" in refusal_of(CliRunner().invoke, app, command, catch_exceptions=False)
