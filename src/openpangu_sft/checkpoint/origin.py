"""What a conversion begins with: a Hugging Face checkpoint, or a Megatron-core one of any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from openpangu_sft.artefact import Manifest, sha256_of
from openpangu_sft.checkpoint.hf import CONFIG, open_hf, require_model, weight_files
from openpangu_sft.checkpoint.mcore import TRACKER
from openpangu_sft.checkpoint.mcore_reader import McoreCheckpoint, open_mcore
from openpangu_sft.checkpoint.weights import Weights
from openpangu_sft.errors import UserError
from openpangu_sft.recipe import Recipe
from openpangu_sft.tokenizer import tokenizer_digest


class Origin(NamedTuple):
    """An open checkpoint.

    Args:
        weights: of the model.
        manifest: what made it, where this project did.
        iteration: of a Megatron-core checkpoint.
        title: what it is, for the user.
        digests: gives sha256 of what it consists of, by name; takes as long as reading it.
    """

    weights: Weights
    manifest: Optional[Manifest]
    iteration: Optional[int]
    title: str
    digests: Callable[[], dict[str, str]]

    def base(self, name: str) -> Optional[str]:
        """sha256 of the `weights`, `config` or `tokenizer` that training began with, where that is known."""
        inputs = self.manifest.inputs if self.manifest else {}
        return inputs.get(name) or inputs.get(f"hf.{name}")


def is_mcore(path: Path) -> bool:
    """Whether a directory is a Megatron-core checkpoint or a run."""
    return (path / TRACKER).is_file()


def open_origin(recipe: Recipe, path: Path, iteration: Optional[int] = None, remedy: str = "check the path") -> Origin:
    """Opens a checkpoint of either form.

    Args:
        path: a Hugging Face checkpoint, a Megatron-core one, or a run.
        iteration: of a Megatron-core checkpoint; without it, the newest.
        remedy: what to do where there is none.

    Raises:
        UserError: there is none, it is damaged, or it does not fit the recipe.
    """
    if not path.is_dir():
        raise UserError("no such directory", where=path, remedy=remedy)
    if is_mcore(path):
        opened = open_mcore(path, recipe.model, iteration, remedy)
        title = f"Megatron-core, {opened.layout}, iteration {opened.iteration}"
        return Origin(opened.weights, opened.manifest, opened.iteration, title, lambda: {"mcore": _digest(opened)})
    if iteration is not None:
        raise UserError(f"has no iterations, so none is {iteration}", where=path, remedy="leave ITERATION out")
    if not (path / CONFIG).is_file():
        what = f"neither a Hugging Face checkpoint ({CONFIG}) nor a Megatron-core one ({TRACKER})"
        raise UserError(what, where=path, remedy=remedy)
    require_model(path, recipe.model)
    weights = open_hf(path, recipe.model)
    return Origin(weights, None, None, "Hugging Face", lambda: hf_digests(path))


def hf_digests(directory: Path) -> dict[str, str]:
    """sha256 of what a Hugging Face checkpoint consists of: weights, configuration, tokenizer."""
    return {
        "weights": files_digest(weight_files(directory)),
        "config": sha256_of(directory / CONFIG),
        "tokenizer": tokenizer_digest(directory),
    }


def files_digest(files: Iterable[Path]) -> str:
    """sha256 over the sums of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _digest(opened: McoreCheckpoint) -> str:
    return opened.manifest.digest if opened.manifest else files_digest(opened.files)
