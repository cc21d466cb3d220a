"""The recipe: one typed YAML file with every setting of a run, checked before any work.

Field names follow Megatron-LM's arguments where it has one. Values that cannot work together are refused with the key,
the value and what to change. Any key can be overridden on the command line: `--set train.lr=1e-5`.
"""

from __future__ import annotations

import os
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Field(gt=0)
NotNegative = Field(ge=0)
Seed = Field(ge=0, lt=2**32)
"""What numpy's generator takes, which shuffles samples and packs."""


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and a number is not taken for a flag or a text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Paths(Section):
    """Where each stage reads and writes. Relative paths are below `cache`."""

    cache: str = "/cache"
    raw: str = "raw"
    samples: str = "dataset"
    shards: str = "finetune_dataset/shards"
    dataset: str = "finetune_dataset/merged"
    hf: str = "ckpts/pangu_model"
    mcore: str = "ckpts/pangu_model_mcore"
    run: str = "sft_outputs"
    export: str = "export"

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
    """Sizes of the model; checked against the checkpoint's config.json."""

    num_layers: int = Positive
    hidden_size: int = Positive
    ffn_hidden_size: int = Positive
    num_attention_heads: int = Positive
    num_query_groups: int = Positive
    kv_channels: int = Positive
    vocab_size: int = Positive
    max_position_embeddings: int = Positive
    rotary_base: float = Positive
    norm_epsilon: float = Positive
    normalization: Literal["RMSNorm"] = "RMSNorm"
    activation: Literal["swiglu"] = "swiglu"
    add_qkv_bias: bool
    add_dense_bias: bool
    tie_word_embeddings: bool

    @model_validator(mode="after")
    def _heads_fit(self) -> Model:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups {self.num_query_groups} -> change one of them"
            )
        if self.kv_channels % 2:
            raise ValueError(f"model.kv_channels {self.kv_channels} is odd: rotary embeddings need pairs -> change it")
        return self


class Tokenizer(Section):
    """How the tokenizer in `paths.hf` is loaded."""

    trust_remote_code: bool = False
    """openPangu's tokenizer is Python code beside its weights; true runs that code."""


class Data(Section):
    """From raw conversations to packs."""

    source_format: Literal["auto", "alpaca", "sharegpt", "openai", "samples"] = "auto"
    seq_length: int = Field(ge=8)
    """Tokens in one pack. Preprocess and sft read this one value, so they cannot disagree."""
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    seed: int = Seed
    """Order of the samples in the packs, and of the packs in a shard."""
    workers: int = Positive


class Recompute(Section):
    """Activations that are computed again in the backward pass instead of being kept."""

    granularity: Literal["none", "full"] = "none"
    method: Literal["block"] = "block"
    num_layers: int = Field(default=0, ge=0)


class Parallel(Section):
    """How the work is spread over devices, in Megatron's terms."""

    nodes: int = Field(default=1, gt=0)
    devices_per_node: int = Positive
    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    context: int = Field(default=1, gt=0)

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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For the transformers engine."""
    precision: Literal["fp32", "bf16"]
    micro_batch_size: int = Positive
    global_batch_size: int = Positive
    iterations: int = Positive
    lr: float = Positive
    min_lr: float = NotNegative
    lr_decay_style: Literal["cosine"] = "cosine"
    lr_warmup_iterations: int = NotNegative
    weight_decay: float = NotNegative
    clip_grad: float = Positive
    adam_beta1: float = Field(ge=0, lt=1)
    adam_beta2: float = Field(ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    seed: int = Seed
    save_interval: int = Positive
    log_interval: int = Field(default=1, gt=0)
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
    temperature: float = Field(default=0.0, ge=0)
    """0 always takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0, le=1)


class Recipe(Section):
    """Every setting of a run."""

    paths: Paths = Paths()
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    parallel: Parallel
    train: Train
    chat: Chat = Chat()

    @field_validator("*", mode="before")
    @classmethod
    def _no_empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        for complaint in _complaints(self):
            raise ValueError(complaint)
        return self

    def path(self, name: str) -> Path:
        """The absolute path of an entry of `paths`."""
        return self.paths[name]


def _complaints(recipe: Recipe) -> list[str]:
    """What cannot work together across sections, most basic first."""
    model, data, parallel, train = recipe.model, recipe.data, recipe.parallel, recipe.train
    found: list[Optional[str]] = [
        _divides("parallel.tensor", parallel.tensor, "model.num_query_groups", model.num_query_groups),
        _divides("parallel.tensor", parallel.tensor, "model.vocab_size", model.vocab_size),
        _divides("parallel.tensor", parallel.tensor, "model.ffn_hidden_size", model.ffn_hidden_size),
        _divides("parallel.pipeline", parallel.pipeline, "model.num_layers", model.num_layers),
        _divides(
            "parallel.tensor x parallel.pipeline x parallel.context",
            parallel.tensor * parallel.pipeline * parallel.context,
            "parallel.nodes x parallel.devices_per_node",
            parallel.world,
        ),
        _divides("parallel.context", parallel.context, "data.seq_length", data.seq_length),
        _divides(
            "parallel.tensor x parallel.context",
            parallel.tensor * parallel.context,
            "model.num_attention_heads",
            model.num_attention_heads,
        ),
        _divides(
            "train.micro_batch_size x data-parallel replicas",
            train.micro_batch_size * max(parallel.data, 1),
            "train.global_batch_size",
            train.global_batch_size,
        ),
    ]
    if data.seq_length > model.max_position_embeddings:
        found.append(
            f"data.seq_length {data.seq_length} is above model.max_position_embeddings "
            f"{model.max_position_embeddings} -> lower data.seq_length"
        )
    if train.recompute.num_layers > model.num_layers:
        found.append(
            f"train.recompute.num_layers {train.recompute.num_layers} is above model.num_layers {model.num_layers} "
            "-> lower it"
        )
    if train.recompute.granularity == "full" and not train.recompute.num_layers:
        found.append(
            "train.recompute.granularity full with train.recompute.num_layers 0 recomputes nothing "
            f"-> set train.recompute.num_layers to 1..{model.num_layers}, or train.recompute.granularity=none"
        )
    if train.engine == "mindspeed" and train.micro_batch_size > 1:
        found.append(
            f"train.micro_batch_size {train.micro_batch_size} with packing trains on wrong attention in MindSpeed-LLM "
            "1.0.0 -> set train.micro_batch_size=1"
        )
    if train.engine == "transformers" and parallel.world != parallel.data:
        found.append(
            f"parallel.tensor {parallel.tensor}, parallel.pipeline {parallel.pipeline}, parallel.context "
            f"{parallel.context}: train.engine transformers is data parallel only -> set all three to 1"
        )
    found.append(_overlap(recipe.paths))
    return [complaint for complaint in found if complaint]


def _divides(small_key: str, small: int, large_key: str, large: int) -> Optional[str]:
    if large % small == 0:
        return None
    return f"{large_key} {large} is not a multiple of {small_key} {small} -> change one of them"


def _overlap(paths: Paths) -> Optional[str]:
    """Two stages that would write over each other: a stage replaces its directory as a whole.

    `paths.raw` may be any of them: whoever has samples already does not need it. What lies in `paths.hf` is safe.
    """
    places = {name: Path(os.path.normpath(paths[name])) for name in type(paths).model_fields}
    del places["cache"], places["raw"]
    for outer, inner in permutations(places, 2):
        if places[outer] == places[inner] or (outer != "hf" and places[outer] in places[inner].parents):
            relation = "is" if places[outer] == places[inner] else "lies in"
            return (
                f"paths.{inner} {places[inner]} {relation} paths.{outer} {places[outer]}: making one would remove the "
                f"other -> give paths.{inner} a directory of its own"
            )
    return None
