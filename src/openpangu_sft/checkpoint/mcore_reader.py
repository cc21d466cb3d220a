"""Opens Megatron-core checkpoints of any layout, as conversion or training leaves them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, parse_manifest, require_files
from openpangu_sft.checkpoint.files.arrays import Array
from openpangu_sft.checkpoint.files.torch_read import is_whole, load_checkpoint_file
from openpangu_sft.checkpoint.lora import Merged
from openpangu_sft.checkpoint.mcore import MODEL_FILE, OPTIMIZER_FILE, RELEASE, iteration_directory, rank_file
from openpangu_sft.checkpoint.sharding import Block, Layout, mcore_tensors
from openpangu_sft.checkpoint.weights import Part, Weights, require_tensors
from openpangu_sft.recipe.lora import LINEARS, Adapter
from openpangu_sft.recipe.model_config import ADAPTER_CONFIG, CONFIG, TRACKER
from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.errors import UserError

Contents = Mapping[tuple[int, int], Mapping[str, Any]]  # what the ranks' files hold, by (tensor rank, pipeline rank)

_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_RECIPE = "was it made with the model of this recipe?"
_EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_ADAPTED = re.compile(r"\.lora_A\.default\.weight$")
_DESCRIBED = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels rotary_base
    norm_epsilon rotary_seq_len_interpolation_factor"""
"""Saved arguments that must be the recipe's: neither shapes nor values of the weights show some of them."""


class McoreCheckpoint(NamedTuple):
    directory: Path  # of the iteration
    iteration: int
    layout: Layout
    weights: Weights  # by Hugging Face name, without the padding of the vocabulary; adapters merged
    manifest: Optional[Manifest]  # None where another tool made it

    @property
    def files(self) -> list[Path]:
        return [self.directory / rank_file(*rank, self.layout.pipeline) for rank in self.layout.ranks()]


def latest_iteration(root: Path, remedy: str = "check the path") -> int:
    """The iteration that the tracker file in `root` names; raises `UserError` without one, with this remedy."""
    path = root / TRACKER
    if not path.is_file():
        what = f"no checkpoint here ({TRACKER})"
        if (root / CONFIG).is_file():
            what, remedy = "is a Hugging Face checkpoint; a Megatron-core one is needed", f"make convert FROM={root}"
        elif (root / ADAPTER_CONFIG).is_file():
            what, remedy = "is a LoRA adapter; a Megatron-core checkpoint is needed", f"make convert FROM={root}"
        elif any(root.glob("mp_rank_*")):
            what, remedy = "is one iteration of a checkpoint", f"give the directory that contains it: {root.parent}"
        raise UserError(what, where=root, remedy=remedy)
    text = path.read_text("utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,12}", text):
        what = f"names iteration {text[:40]!r}, not a number"
        raise UserError(what, where=path, remedy="write the number of an iter_ directory")
    return int(text)


def open_mcore(
    root: Path, model: Model, iteration: Optional[int] = None, remedy: str = "check the path"
) -> McoreCheckpoint:
    """Opens the newest checkpoint below a directory, or that of an iteration. Values are read on use.

    Raises `UserError` where there is none, it is half-written or damaged, its tensors are not the model's, or ranks
    disagree on a tensor that several hold.
    """
    tracker = root / TRACKER  # Megatron's own converters name the directory `release`: iteration 0
    release = tracker.is_file() and tracker.read_bytes()[:80].strip() == RELEASE.encode()
    newest = 0 if release else latest_iteration(root, remedy)
    number = newest if iteration is None else iteration
    directory = root / RELEASE if release and number == 0 else iteration_directory(root, number)
    others = [int(path.name[5:]) for path in root.glob("iter_*") if path != directory and path.name[5:].isdecimal()]
    other = f"take another one: ITERATION={max(others)}" if others else "there is no other one here: make it again"
    if not directory.is_dir():
        raise UserError(f"iteration {number} is not there", where=directory, remedy=other)
    if number > newest:
        raise UserError(f"is not finished: {TRACKER} names iteration {newest}", where=directory, remedy=other)
    manifest = _manifest(root, directory, other)
    contents = _read_ranks(directory, other)
    layout = _layout(contents, model, directory)
    adapter = _adapter(contents, directory)
    parts: list[Part] = []
    for (tp, pp), content in sorted(contents.items()):
        where = directory / rank_file(tp, pp, layout.pipeline)
        tensors = {name: value for name, value in content["model"].items() if isinstance(value, np.ndarray)}
        table = mcore_tensors(model, layout, tp, pp, adapter)
        require_tensors(tensors, {t.name: t.shape for t in table}, where, _RECIPE)
        for tensor in table:
            parts.extend(parts_of(tensor.blocks, tensors[tensor.name], where))
    weights = Weights(parts, adapter)
    return McoreCheckpoint(directory, number, layout, Merged(weights) if adapter else weights, manifest)


def _adapter(contents: Contents, directory: Path) -> Optional[Adapter]:
    """The shape of the adapters that MindSpeed-LLM's LoRA has left; None where there are none."""
    found = {str(name): len(value) for name, value in contents[0, 0]["model"].items() if _ADAPTED.search(str(name))}
    if not found:
        return None
    ranks, alpha = sorted({*found.values()}), getattr(contents[0, 0].get("args"), "lora_alpha", None)
    if len(ranks) > 1 or not isinstance(alpha, (int, float)) or not alpha > 0:
        what = f"has LoRA adapters of rank {', '.join(map(str, ranks))}, alpha {alpha}"
        raise UserError(what, where=directory, remedy="one rank, and lora_alpha among the saved arguments, are needed")
    linears = {name.split(".")[-4] for name in found}
    return Adapter(ranks[0], float(alpha), tuple(n for linear in LINEARS if linear in linears for n in LINEARS[linear]))


def parts_of(blocks: Sequence[Block], array: Array, where: Path) -> list[Part]:
    parts, row = [], 0
    for block in blocks:
        if not block.padding:
            parts.append(Part(block, array[row : row + block.rows], where))
        row += block.rows
    return parts


def _manifest(root: Path, directory: Path, remedy: str) -> Optional[Manifest]:
    """That of the iteration (of a run), or of the whole checkpoint (a converted one); its files are checked."""
    for place in (directory, root):
        if (place / MANIFEST).is_file():
            manifest = parse_manifest(place / MANIFEST, remedy)
            if manifest.kind != "run":
                require_files(place, manifest, remedy)
                return manifest
    return None


def _read_ranks(directory: Path, remedy: str) -> Contents:
    """The content of every rank's file. They are complete: by TP and PP of the saved arguments, or else of the ranks
    that are there.
    """
    if (directory / "metadata.json").is_file():
        what = "is in Megatron's distributed format (--use-dist-ckpt)"
        raise UserError(what, where=directory, remedy="save it without that flag")
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(directory.glob("mp_rank_*")):
        if not (match := _RANK.fullmatch(path.name)):
            raise UserError("has expert parallelism, which this model lacks", where=path, remedy="check the path")
        found[int(match[1]), int(match[2] or 0)] = path
    if not found:
        raise UserError("holds no checkpoint (mp_rank_00)", where=directory, remedy=remedy)
    contents = {rank: _read_rank(path, remedy) for rank, path in found.items()}
    sizes, args = [], contents[min(contents)].get("args")
    for kind, last in zip(("tensor", "pipeline"), map(max, zip(*contents))):
        size = getattr(args, f"{kind}_model_parallel_size", None)
        sizes.append(size if isinstance(size, int) else last + 1)
    tensor, pipeline = sizes
    missing = ((tp, pp) for pp in range(pipeline) for tp in range(tensor) if (tp, pp) not in found)
    for tp, pp in missing:  # the first one: a file may claim any number
        what = f"is half-written: of TP {tensor}, PP {pipeline} this rank is missing"
        raise UserError(what, where=(directory / rank_file(tp, pp, pipeline)).parent, remedy=remedy)
    for tp, pp in sorted(found, reverse=True):
        if tp >= tensor or pp >= pipeline:
            what = f"belongs to no rank of TP {tensor}, PP {pipeline}"
            raise UserError(what, where=found[tp, pp], remedy="remove it")
    return contents


def _read_rank(path: Path, remedy: str) -> Mapping[str, Any]:
    file, optimizer = path / MODEL_FILE, path / OPTIMIZER_FILE
    for part in (file, optimizer) if optimizer.exists() else (file,):
        if not part.is_file() or not is_whole(part):
            state = "has no end" if part.is_file() else "is missing"
            raise UserError(f"is half-written: this file {state}", where=part, remedy=remedy)
    content: Mapping[str, Any] = load_checkpoint_file(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        what = "holds no model, or several parts of one (--num-layers-per-virtual-pipeline-stage)"
        raise UserError(what, where=file, remedy="give a Megatron-core checkpoint, saved without that flag")
    return content


def _layout(contents: Contents, model: Model, directory: Path) -> Layout:
    """The layout, from what the ranks hold; it is checked, and so are the model's sizes that no shape shows."""
    tensor, pipeline = (max(sizes) + 1 for sizes in zip(*contents))
    names = [map(str, contents[0, pp]["model"]) for pp in range(pipeline)]
    stages = [len({match[1] for match in map(_LAYER.match, stage) if match}) for stage in names]
    embedding = contents[0, 0]["model"].get(_EMBEDDING)
    rows = len(embedding) * tensor if isinstance(embedding, np.ndarray) and embedding.ndim == 2 else 0
    layout = Layout(tensor, tuple(stages), rows)
    for what in _differences(layout, contents[0, 0].get("args"), model):
        raise UserError(what, where=directory, remedy=_RECIPE)
    return layout


def _differences(layout: Layout, args: object, model: Model) -> Iterator[str]:
    for key, size in (("num_query_groups", model.num_query_groups), ("ffn_hidden_size", model.ffn_hidden_size)):
        if size % layout.tensor:
            yield f"has TP {layout.tensor}, which does not divide model.{key} {size}"
    sizes = [(key, getattr(args, key, None), getattr(model, key, None)) for key in _DESCRIBED.split()]
    wrong = [size for size in sizes if isinstance(size[1], (int, float)) and size[1] != size[2]]
    if wrong:
        yield "; ".join(f"has {key} {found}, the recipe says {wanted}" for key, found, wanted in wrong)
    if sum(layout.stages) != model.num_layers:
        yield f"has {sum(layout.stages)} layers, the recipe says model.num_layers {model.num_layers}"
    if (rows := layout.padded_vocab_size) < model.vocab_size:
        yield f"has {rows} rows in its embedding, the recipe says model.vocab_size {model.vocab_size}"
