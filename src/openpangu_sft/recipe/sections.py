"""The sections of a recipe: keys, types, defaults and ranges.

Field names follow Megatron-LM's arguments where it has one. docs/recipe.md is generated from the docstrings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import Field, ValidationInfo, field_validator, model_validator

from openpangu_sft.recipe.lora import Lora
from openpangu_sft.recipe.section import Conflict, NotNegative, Positive, Section, Seed, UpTo1000, usable_path
from openpangu_sft.util.errors import SizesUnknown


class Paths(Section):
    """Where each stage reads and writes. Relative paths are below `cache`."""

    cache: str = "/cache"
    """Base of the relative paths below."""
    raw: str = "raw"
    """Raw conversations: a directory of .json, .jsonl, .csv, .parquet and .arrow files, or one file."""
    samples: str = "dataset"
    """Samples, written by format and read by preprocess; or your own .jsonl samples."""
    shards: str = "finetune_dataset/shards"
    """Shards, written by preprocess: one directory per samples file."""
    dataset: str = "finetune_dataset/merged"
    """Packed dataset, written by merge and read by sft; Megatron's --data-path is `data` in it."""
    hf: str = "ckpts/pangu_model"
    """Base Hugging Face checkpoint, with its tokenizer."""
    mcore: str = "ckpts/pangu_model_mcore"
    """Base Megatron-core checkpoint, written by convert and read by sft."""
    run: str = "sft_outputs"
    """Run directory, written by sft: checkpoints, metrics.jsonl, loss.png."""
    export: str = "export"
    """Hugging Face checkpoint, written by export."""

    @field_validator("*")
    @classmethod
    def _usable(cls, value: str, info: ValidationInfo) -> str:
        return usable_path(value, f"paths.{info.field_name}")

    def under_cache(self, path: str) -> Path:
        """The absolute path that is meant by one below `cache` or an absolute one; `~` is expanded."""
        return Path(self.cache).expanduser().absolute() / Path(path).expanduser()


class Model(Section):
    """Sizes of the model. Keys that are left out are read from config.json in `paths.hf`; the others must equal it."""

    num_layers: int = UpTo1000
    """Transformer layers."""
    hidden_size: int = Positive
    """Hidden size."""
    ffn_hidden_size: int = Positive
    """Intermediate size of the MLP."""
    num_attention_heads: int = UpTo1000
    """Attention (query) heads."""
    num_query_groups: int = Positive
    """Key-value heads (grouped-query attention)."""
    kv_channels: int = Positive
    """Head dimension."""
    vocab_size: int = Positive
    """Vocabulary size: rows of the embedding."""
    max_position_embeddings: int = Positive
    """Maximum context length in tokens."""
    rotary_base: float = Positive
    """Base of the rotary position embedding (rope_theta)."""
    norm_epsilon: float = Positive
    """Epsilon of RMSNorm."""
    normalization: Literal["RMSNorm"] = "RMSNorm"
    """Normalization layers."""
    activation: Literal["swiglu"] = "swiglu"
    """Activation of the MLP."""
    add_qkv_bias: bool
    """Bias in the query, key and value projections."""
    add_dense_bias: bool
    """Bias in the attention output projection."""
    tie_word_embeddings: bool
    """Share the embedding with the output layer."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Model:
        if isinstance(self, UnknownModel):
            return self
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads % groups:
            keys = ("model.num_attention_heads", "model.num_query_groups")
            raise Conflict(f"{keys[0]} {heads} is not a multiple of {keys[1]} {groups}", "change one of them", *keys)
        if self.kv_channels % 2:
            key = "model.kv_channels"
            raise Conflict(f"{key} {self.kv_channels} is odd: rotary embeddings need pairs", "change it", key)
        return self


class UnknownModel(Model):
    """Sizes left to a config.json that does not give them: reading one raises `SizesUnknown`."""

    reason: Any
    """The `UserError` that says why."""

    def __getattr__(self, name: str) -> Any:
        if name not in Model.model_fields:
            raise AttributeError(name)
        raise SizesUnknown(self.reason.what, where=self.reason.where, remedy=self.reason.remedy)


class Tokenizer(Section):
    """Loading the tokenizer in `paths.hf`."""

    trust_remote_code: Union[bool, dict[str, str]] = False
    """Run the Python files of the tokenizer, which come with the weights: true asks first; or their sha256 by name."""


class Recompute(Section):
    """Activation recomputation (gradient checkpointing)."""

    granularity: Literal["none", "full"] = "none"
    """full recomputes whole layers in the backward pass. `train.recompute: auto` recomputes as few as memory allows."""
    method: Literal["block"] = "block"
    """Which layers; block: the first ones."""
    num_layers: int = Field(default=0, ge=0)
    """Number of layers to recompute."""
    activation: bool = False
    """Recompute the MLP's activation function in the other layers, at almost no cost (engine mindspeed)."""


class Parallel(Section):
    """Parallelism, in Megatron's terms. `parallel: auto` chooses tensor, pipeline and context; see plan.md."""

    nodes: int = Field(default=1, gt=0, le=1000)
    """Number of machines; with several, export MASTER_ADDR and NODE_RANK on each."""
    devices_per_node: int = UpTo1000
    """Devices per machine, one process each."""
    tensor: int = Field(default=1, gt=0)
    """Tensor parallel size (TP); or auto."""
    pipeline: int = Field(default=1, gt=0)
    """Pipeline parallel size (PP); or auto."""
    num_layer_list: Optional[list[int]] = None
    """Layers per pipeline stage, for an uneven split: [14, 12]."""
    make_vocab_size_divisible_by: int = Field(default=16, gt=0, le=100_000)
    """The vocabulary is padded to a multiple of this times `tensor`."""
    context: int = Field(default=1, gt=0)
    """Context parallel size (CP); or auto."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.nodes * self.devices_per_node

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world // (self.tensor * self.pipeline * self.context)


class EarlyStop(Section):
    """Ending training when the validation loss no longer falls."""

    patience: int = Field(default=0, ge=0)
    """Evaluations without a new lowest loss after which training ends; 0: it goes on."""


class Train(Section):
    """Supervised fine-tuning."""

    engine: Literal["mindspeed", "transformers"]
    """Training engine: mindspeed (MindSpeed-LLM on NPUs) or transformers (Hugging Face on CPU or CUDA)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: NPUs for mindspeed; CUDA, else CPU for transformers. mindspeed on cpu uses the NPU stand-in."""
    loss: Literal["token", "micro_batch"] = "token"
    """token: every trained token of a global batch counts the same. micro_batch: every micro-batch, as published."""
    precision: Literal["fp32", "bf16"]
    """Precision of forward and backward pass and of saved weights; optimizer states and master weights are fp32."""
    micro_batch_size: int = UpTo1000
    """Packs per device and micro-batch."""
    global_batch_size: int = Positive
    """Packs per iteration, over all devices."""
    iterations: int = Field(default=0, ge=0)
    """Training iterations (optimizer steps); or give train.epochs."""
    epochs: float = Field(default=0.0, ge=0, le=100_000)
    """Passes over the dataset, instead of train.iterations, which follow from its packs; the last one is rounded up."""
    lr: float = Positive
    """Peak learning rate."""
    min_lr: float = NotNegative
    """Final learning rate."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """After warm-up. constant: no decay. WSD (warm-up, stable, decay): decays linearly, at the end only."""
    lr_wsd_decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of the iterations, the last ones, in which WSD decays."""
    lr_warmup_iterations: int = Field(default=0, ge=0)
    """Linear warm-up iterations; or give train.lr_warmup_ratio."""
    lr_warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Linear warm-up as a share of the iterations."""
    weight_decay: float = NotNegative
    """Weight decay of matrices; biases and norms have none."""
    clip_grad: float = Positive
    """Gradient clipping threshold (global L2 norm)."""
    adam_beta1: float = Field(ge=0, lt=1)
    """Adam beta1."""
    adam_beta2: float = Field(ge=0, lt=1)
    """Adam beta2."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Adam epsilon."""
    seed: int = Seed
    """Seed of the order of packs."""
    save_interval: int = Positive
    """Iterations between checkpoints."""
    keep_checkpoints: Optional[int] = Field(default=None, gt=0)
    """Number of checkpoints to keep, the newest ones; none keeps all."""
    eval_interval: int = Field(default=0, ge=0)
    """Iterations between evaluations on the validation split during training, the last one included; 0: none."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss too; ITERATION=best selects it."""
    early_stop: EarlyStop = EarlyStop()
    trackers: list[Literal["tensorboard", "swanlab", "wandb"]] = ["tensorboard"]
    """Where losses go beside metrics.jsonl: [tensorboard, swanlab, wandb]; the last two offline without an API key."""
    device_tflops: float = Field(default=313.0, ge=0.001, le=1_000_000)
    """Peak TFLOP/s per device; used only for MFU."""
    device_memory: float = Field(default=64.0, ge=0.1, le=100_000)
    """Memory per device in GiB; used only by auto in `parallel` and `recompute`."""
    upstream_flags: list[str] = []
    """Extra arguments for MindSpeed-LLM (engine mindspeed): [--log-throughput]."""
    recompute: Recompute = Recompute()
    lora: Lora = Lora()

    @property
    def warmup(self) -> int:
        """Linear warm-up iterations."""
        return self.lr_warmup_iterations or int(self.lr_warmup_ratio * self.iterations + 1e-6)


class Chat(Section):
    """Text generation."""

    max_new_tokens: int = Field(default=512, gt=0)
    """Maximum length of an answer in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling probability, with a temperature above 0."""
