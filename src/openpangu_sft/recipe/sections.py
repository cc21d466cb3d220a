"""The sections of a recipe: keys, types, defaults and ranges.

Field names follow Megatron-LM's arguments where it has one. docs/recipe.md is made from the docstrings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from openpangu_sft.util.errors import SizesUnknown

Positive = Field(gt=0)
NotNegative = Field(ge=0)
UpTo1000 = Field(gt=0, le=1000)
"""For what is counted one by one before a run: a slip of some zeros would cost hours and all memory."""
Seed = Field(ge=0, lt=2**32)
"""What numpy's generator takes, which shuffles samples and packs."""


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and a number is not taken for a flag or a text."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Paths(Section):
    """Where each stage reads and writes. Relative paths are below `cache`."""

    cache: str = "/cache"
    """What relative paths below are relative to."""
    raw: str = "raw"
    """Your conversations: a directory of .json, .jsonl and .parquet files, or one file."""
    samples: str = "dataset"
    """What format writes and preprocess reads; your own .jsonl samples can lie here instead."""
    shards: str = "finetune_dataset/shards"
    """What preprocess writes: one directory per samples file."""
    dataset: str = "finetune_dataset/merged"
    """What merge writes and sft reads; Megatron's --data-path is `data` in it."""
    hf: str = "ckpts/pangu_model"
    """The Hugging Face checkpoint to begin with, tokenizer included."""
    mcore: str = "ckpts/pangu_model_mcore"
    """What convert writes and sft begins with."""
    run: str = "sft_outputs"
    """What sft writes: checkpoints, metrics.jsonl, loss.png."""
    export: str = "export"
    """What export writes."""

    @field_validator("*")
    @classmethod
    def _usable(cls, value: str, info: ValidationInfo) -> str:
        key = f"paths.{info.field_name}"
        if not value.strip() or "\0" in value:
            raise ValueError(f"{key} {value!r} is not a path -> write one, or leave the key out for the default")
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ValueError(f"{key} {value!r} begins with the home directory of nobody -> write it out") from None
        return value

    def __getitem__(self, name: str) -> Path:
        """The absolute path of one entry; `~` is expanded."""
        return Path(self.cache).expanduser().absolute() / Path(getattr(self, name)).expanduser()


class Model(Section):
    """Sizes of the model. What is left out is read from config.json in `paths.hf`; what is stated must equal it."""

    num_layers: int = UpTo1000
    """Transformer layers."""
    hidden_size: int = Positive
    """Width of the residual stream."""
    ffn_hidden_size: int = Positive
    """Width of the MLP."""
    num_attention_heads: int = UpTo1000
    """Query heads."""
    num_query_groups: int = Positive
    """Key-value heads; each serves a group of query heads."""
    kv_channels: int = Positive
    """Size of a head."""
    vocab_size: int = Positive
    """Rows of the embedding."""
    max_position_embeddings: int = Positive
    """Longest context in tokens."""
    rotary_base: float = Positive
    """Base of the rotary position embedding."""
    norm_epsilon: float = Positive
    """Added to the variance in RMSNorm."""
    normalization: Literal["RMSNorm"] = "RMSNorm"
    """Kind of the norms."""
    activation: Literal["swiglu"] = "swiglu"
    """Kind of the MLP."""
    add_qkv_bias: bool
    """Whether query, key and value projections have a bias."""
    add_dense_bias: bool
    """Whether the attention's output projection has a bias."""
    tie_word_embeddings: bool
    """Whether the output layer is the embedding."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Model:
        if isinstance(self, UnknownModel):
            return self
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups {self.num_query_groups} -> change one of them"
            )
        if self.kv_channels % 2:
            raise ValueError(f"model.kv_channels {self.kv_channels} is odd: rotary embeddings need pairs -> change it")
        return self


class UnknownModel(Model):
    """Sizes that the recipe leaves to a config.json that does not give them: reading one raises `SizesUnknown`."""

    reason: Any
    """The `UserError` that says why."""

    def __getattr__(self, name: str) -> Any:
        if name not in Model.model_fields:
            raise AttributeError(name)
        raise SizesUnknown(self.reason.what, where=self.reason.where, remedy=self.reason.remedy)


class Tokenizer(Section):
    """How the tokenizer in `paths.hf` is loaded."""

    trust_remote_code: bool = False
    """openPangu's tokenizer is Python code beside its weights; true runs that code."""


class Data(Section):
    """From raw conversations to packs."""

    source_format: Literal["auto", "alpaca", "sharegpt", "openai", "samples"] = "auto"
    """Format of the raw conversations; auto goes by the keys of each record."""
    seq_length: int = Field(ge=8)
    """Tokens in one pack. Preprocess and sft read this one value, so they cannot disagree."""
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    """What a bad sample does: refuse stops the stage, skip counts it and writes it into a rejects file."""
    control_tokens: Literal["refuse", "escape", "allow"] = "refuse"
    """What a control token inside a content is: a bad sample, plain text, or a control token (it can forge a turn)."""
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    """What a sample above seq_length is: a bad sample, left out and counted, or cut behind an answer that fits."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the conversations that is kept out of training, for evaluate; 0.05 keeps about one in twenty."""
    seed: int = Seed
    """Order of the samples in the packs, and of the packs in a shard; and which samples are kept out of training."""
    workers: int = Positive
    """Processes that encode."""


class Recompute(Section):
    """Activations that are computed again in the backward pass instead of being kept."""

    granularity: Literal["none", "full"] = "none"
    """full recomputes whole layers."""
    method: Literal["block"] = "block"
    """Which layers: block takes the first ones."""
    num_layers: int = Field(default=0, ge=0)
    """How many."""


class Parallel(Section):
    """How the work is spread over devices, in Megatron's terms."""

    nodes: int = Field(default=1, gt=0, le=1000)
    """Machines; with several, export MASTER_ADDR and NODE_RANK on each."""
    devices_per_node: int = UpTo1000
    """Processes on each machine, one per device."""
    tensor: int = Field(default=1, gt=0)
    """Tensor parallel size (TP)."""
    pipeline: int = Field(default=1, gt=0)
    """Pipeline parallel size (PP)."""
    num_layer_list: Optional[list[int]] = None
    """Layers of each pipeline stage where they are not to be the same: [14, 12]."""
    make_vocab_size_divisible_by: int = Field(default=16, gt=0, le=100_000)
    """The embedding is filled up to a multiple of this times `tensor`."""
    context: int = Field(default=1, gt=0)
    """Context parallel size (CP)."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.nodes * self.devices_per_node

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world // (self.tensor * self.pipeline * self.context)


class Train(Section):
    """Supervised fine-tuning."""

    engine: Literal["mindspeed", "transformers"]
    """Who trains: mindspeed (MindSpeed-LLM on NPUs) or transformers (Hugging Face on CPU or CUDA)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes NPUs for mindspeed, CUDA or else CPU for transformers; mindspeed on cpu uses the stand-in for NPUs."""
    precision: Literal["fp32", "bf16"]
    """Of the forward and backward pass, and of the weights in checkpoints; optimizer and its weights are fp32."""
    micro_batch_size: int = UpTo1000
    """Packs that a device takes at once."""
    global_batch_size: int = Positive
    """Packs in an iteration, over all devices."""
    iterations: int = Positive
    """Optimizer steps."""
    lr: float = Positive
    """Highest learning rate."""
    min_lr: float = NotNegative
    """Learning rate at the end."""
    lr_decay_style: Literal["cosine"] = "cosine"
    """Shape of the way down."""
    lr_warmup_iterations: int = NotNegative
    """Iterations of the linear way up."""
    weight_decay: float = NotNegative
    """For matrices; biases and norms have none."""
    clip_grad: float = Positive
    """Largest norm of the gradient."""
    adam_beta1: float = Field(ge=0, lt=1)
    """Decay of Adam's mean."""
    adam_beta2: float = Field(ge=0, lt=1)
    """Decay of Adam's variance."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to Adam's denominator."""
    seed: int = Seed
    """Order of the packs."""
    save_interval: int = Positive
    """Iterations between checkpoints."""
    keep_checkpoints: Optional[int] = Field(default=None, gt=0)
    """How many of a run's checkpoints stay, the newest ones; all where it is not given."""
    device_tflops: float = Field(default=313.0, ge=0.001, le=1_000_000)
    """What a device can do at most, in 10^12 operations a second; only for the share of it that is shown (MFU)."""
    upstream_flags: list[str] = []
    """More arguments for MindSpeed-LLM's training, for the mindspeed engine: [--log-throughput]."""
    recompute: Recompute = Recompute()

    @field_validator("recompute", mode="before")
    @classmethod
    def _no_empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _schedule_fits(self) -> Train:
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr {self.min_lr} is above train.lr {self.lr} -> lower train.min_lr")
        if self.lr_warmup_iterations >= self.iterations:
            raise ValueError(
                f"train.lr_warmup_iterations {self.lr_warmup_iterations} leaves nothing of train.iterations "
                f"{self.iterations} -> lower the warm-up"
            )
        return self


class Chat(Section):
    """How answers are generated."""

    max_new_tokens: int = Field(default=512, gt=0)
    """Longest answer."""
    temperature: float = Field(default=0.0, ge=0)
    """0 always takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """With a temperature: the smallest set of tokens with this probability."""


class Sections(Section):
    """All sections together."""

    paths: Paths = Paths()
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    parallel: Parallel
    train: Train
    chat: Chat = Chat()
