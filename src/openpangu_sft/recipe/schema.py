"""The recipe: one typed YAML file with every setting of a run, checked before any work, also for combinations that
cannot work. Any key can be overridden on the command line: `--set train.lr=1e-5`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import permutations
from math import prod
from operator import attrgetter
from pathlib import Path

from pydantic import Field, model_validator

from openpangu_sft.recipe.data import Data
from openpangu_sft.recipe.lora import LINEARS
from openpangu_sft.recipe.section import Conflict, Section
from openpangu_sft.recipe.sections import Chat, Model, Parallel, Paths, Tokenizer, Train
from openpangu_sft.util.errors import SizesUnknown

SPLIT = ("parallel.tensor", "parallel.pipeline", "parallel.context")
WORLD = ("parallel.nodes", "parallel.devices_per_node")
OTHER_SIDE = {
    "linear_qkv": ("model.num_query_groups", "model.kv_channels"),  # of keys and values, the smallest part
    "linear_proj": ("model.num_attention_heads", "model.kv_channels"),
    "linear_fc1": ("model.ffn_hidden_size",),
    "linear_fc2": ("model.ffn_hidden_size",),
}
"""The dimension of an adapted matrix beside model.hidden_size."""
INSTEAD = {"train.epochs": "train.iterations", "train.lr_warmup_ratio": "train.lr_warmup_iterations"}
"""Keys of which a recipe has one or the other."""
REPLICAS = "parallel.data"
"""Not a key: `Parallel.data`, the number of data-parallel replicas, follows from SPLIT and WORLD."""


class Recipe(Section):
    """Every setting of a run."""

    paths: Paths = Paths()
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    parallel: Parallel
    train: Train
    chat: Chat = Chat()

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        for conflict in complaints(self):
            raise conflict
        return self

    def path(self, name: str) -> Path:
        """The absolute path of an entry of `paths`."""
        return self.paths.under_cache(getattr(self.paths, name))


class ChosenRecipe(Recipe):
    """A recipe whose `auto` values have been chosen."""

    chosen: str = Field(exclude=True)
    """What was chosen, and why."""


def complaints(recipe: Recipe) -> list[Conflict]:
    """The conflicts, most basic first."""
    with suppress(SizesUnknown):  # without a checkpoint the sizes are checked later
        return [*_sizes(recipe), *_others(recipe)]
    return [*_others(recipe)]


def _sizes(recipe: Recipe) -> Iterator[Conflict]:
    """Conflicts with the model's sizes."""
    for size in ("model.num_query_groups", "model.ffn_hidden_size"):
        yield from _indivisible(recipe, (size,), ("parallel.tensor",))
    yield from _stages(recipe)
    yield from _indivisible(recipe, ("model.num_attention_heads",), ("parallel.tensor", "parallel.context"))
    yield from _above(recipe, "data.seq_length", "model.max_position_embeddings")
    yield from _above(recipe, "train.recompute.num_layers", "model.num_layers")
    if adapter := recipe.train.lora.adapter:
        for limit in dict.fromkeys([("model.hidden_size",), *(OTHER_SIDE[linear] for linear in adapter.linears)]):
            yield from _above(recipe, "train.lora.rank", *limit)


def _others(recipe: Recipe) -> Iterator[Conflict]:
    parallel, train = recipe.parallel, recipe.train
    yield from _above(recipe, "train.min_lr", "train.lr")
    for one, other in INSTEAD.items():
        values = [attrgetter(key)(recipe) for key in (one, other)]
        if all(values):
            yield Conflict(f"{one} {values[0]:g} and {other} {values[1]:g} exclude each other", "give one", one, other)
    if not train.iterations and not train.epochs:
        yield Conflict("train.iterations and train.epochs are 0", "give one", "train.iterations", "train.epochs")
    decay = train.lr_wsd_decay_ratio * train.iterations if train.lr_decay_style == "WSD" else 0
    if 0 < train.iterations <= train.warmup or 0 < train.iterations < train.warmup + decay:
        what = f"a warm-up of {train.warmup} iterations leaves too few of train.iterations {train.iterations}"
        what += f" for the decay of train.lr_wsd_decay_ratio {train.lr_wsd_decay_ratio:g}" if decay else ""
        keys = ("train.lr_warmup_iterations", "train.lr_warmup_ratio", "train.iterations", "train.lr_wsd_decay_ratio")
        yield Conflict(what, "lower the warm-up", *keys)
    if (train.keep_best or train.early_stop.patience) and not train.eval_interval:
        wanted = ("train.keep_best", "train.early_stop.patience", "train.eval_interval")
        yield Conflict("train.keep_best and train.early_stop need evaluations", f"set {wanted[2]}", *wanted)
    if train.iterations:
        yield from _above(recipe, "train.eval_interval", "train.iterations")
    if train.keep_best and train.eval_interval:
        yield from _indivisible(recipe, ("train.save_interval",), ("train.eval_interval",))
    yield from _indivisible(recipe, WORLD, SPLIT)
    yield from _indivisible(recipe, ("data.seq_length",), ("parallel.context",))
    yield from _indivisible(recipe, ("train.global_batch_size",), ("train.micro_batch_size", REPLICAS))
    if train.recompute.granularity == "full" and not train.recompute.num_layers:
        granularity, layers = "train.recompute.granularity", "train.recompute.num_layers"
        remedy = f"set {layers} to the number of layers, or {granularity}=none"
        yield Conflict(f"{granularity} full with {layers} 0 recomputes nothing", remedy, granularity, layers)
    if train.engine == "transformers" and parallel.world != parallel.data:
        sizes = ", ".join(f"{key} {attrgetter(key)(recipe)}" for key in SPLIT)
        what = f"{sizes}: train.engine transformers is data parallel only"
        yield Conflict(what, "set all three to 1", *SPLIT, "train.engine")
    if train.engine == "transformers" and train.recompute.activation:
        key = "train.recompute.activation"
        yield Conflict(f"{key} is for train.engine mindspeed", "set it to false", key, "train.engine")
    if adapter := train.lora.adapter:
        for names in LINEARS.values():
            if 0 < len({*names} & {*adapter.targets}) < len(names):
                what = f"train.lora.targets has only a part of {', '.join(names)}, which are one matrix in Megatron"
                yield Conflict(what, "name all of them, or none", "train.lora.targets")
    for name, default in {"data.source_format": "auto", "data.columns": {}}.items():
        if recipe.data.sources and attrgetter(name)(recipe) != default:
            yield Conflict(f"{name} is not used with data.sources", "set it in each source", name, "data.sources")
    for number, source in enumerate(recipe.data.sources):
        token = re.search(r"\[unused\d+\]|</?s>", source.system or "")  # openPangu's; preprocess finds any others
        if token and recipe.data.control_tokens == "refuse":
            what = f"data.sources[{number}].system holds the control token {token.group()}"
            yield Conflict(what, "take it out, or set data.control_tokens=escape", "data.sources")
    yield from _overlap(recipe.paths)


def _above(recipe: Recipe, key: str, *limit: str) -> Iterator[Conflict]:
    """The value of `key` may at most be the product of those of `limit`."""
    value, most = attrgetter(key)(recipe), prod(attrgetter(name)(recipe) for name in limit)
    if value > most:
        yield Conflict(f"{key} {value} is above {_named(limit)} {most}", f"lower {key}", key, *limit)


def _indivisible(recipe: Recipe, keys: tuple[str, ...], divisors: tuple[str, ...]) -> Iterator[Conflict]:
    """The product of the values of `keys` must be a multiple of that of `divisors`."""
    whole, divisor = (prod(attrgetter(key)(recipe) for key in product) for product in (keys, divisors))
    if whole % max(divisor, 1):
        what = f"{_named(keys)} {whole} is not a multiple of {_named(divisors)} {divisor}"
        named = [key for key in (*keys, *divisors) if key != REPLICAS]
        yield Conflict(what, "change one of them", *named, *((*WORLD, *SPLIT) if REPLICAS in divisors else ()))


def _named(keys: tuple[str, ...]) -> str:
    return " x ".join(keys).replace(REPLICAS, "data-parallel replicas")


def _stages(recipe: Recipe) -> Iterator[Conflict]:
    """Every pipeline stage needs layers, and every layer a stage."""
    layers, stages, given = recipe.model.num_layers, recipe.parallel.pipeline, recipe.parallel.num_layer_list
    keys = ("model.num_layers", "parallel.pipeline")
    if given is None and layers % stages:
        what = f"model.num_layers {layers} is not a multiple of parallel.pipeline {stages}"
        yield Conflict(what, "change one of them, or give parallel.num_layer_list", *keys)
    if given is not None and (len(given) != stages or sum(given) != layers or min(given, default=0) < 1):
        key = "parallel.num_layer_list"
        what = f"{key} {given} does not spread model.num_layers {layers} over parallel.pipeline {stages}"
        yield Conflict(what, f"give {stages} numbers above 0 that add up to {layers}", key, *keys)


def _overlap(paths: Paths) -> Iterator[Conflict]:
    """Stages replace whole directories, so none may contain another's. `paths.raw` may: with samples it is not used."""
    directories = {name: Path(os.path.normpath(paths.under_cache(value))) for name, value in paths}
    del directories["cache"], directories["raw"]
    for (outer, above), (inner, below) in permutations(directories.items(), 2):
        if above == below or above in below.parents:
            relation = "is" if above == below else "lies in"
            what = f"paths.{inner} {below} {relation} paths.{outer} {above}: making one would remove the other"
            yield Conflict(what, f"give paths.{inner} a directory of its own", f"paths.{inner}", f"paths.{outer}")
