"""Damaged files, and the results of convert and export on them, each in its own process.

A crash on a mapped file ends only that process, and the test detects it.
"""

from __future__ import annotations

import os
import pickle
import shutil
import traceback
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conftest import ROOT, TINY
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.checkpoint.hf import WEIGHTS, open_hf
from openpangu_sft.checkpoint.mcore_reader import open_mcore, parts_of
from openpangu_sft.checkpoint.sharding import hf_shapes, mcore_tensors, single, whole
from openpangu_sft.checkpoint.weights import Weights
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.util.errors import UserError

Outcome = tuple[str, Any]
MODEL_FILE = "iter_0000001/mp_rank_00/model_optim_rng.pt"


def in_child(action: Callable[[], Any]) -> Outcome:
    """The outcome of an action in its own process: ("done", value), ("refused", message) or ("failed", why)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        outcome: Outcome
        try:
            try:
                outcome = ("done", action())
            except UserError as error:
                outcome = ("refused", str(error))
            except BaseException:
                outcome = ("failed", traceback.format_exc())
            with os.fdopen(write, "wb") as stream:
                pickle.dump(outcome, stream)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        content = stream.read()
    status = os.waitpid(child, 0)[1]
    return pickle.loads(content) if content else ("failed", f"the process ended with {status}")


class Place:
    """A directory in which mutated files are converted."""

    def __init__(self, directory: Path, tiny_hf: Path) -> None:
        self.directory, self.hf = directory, directory / "hf"
        shutil.copytree(tiny_hf, self.hf)
        overrides = [*TINY, f"paths.cache={directory}", f"paths.hf={self.hf}"]
        self.recipe: Recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides)
        run_convert(self.recipe)
        self.mcore, self.export = self.recipe.path("mcore"), self.recipe.path("export")
        (self.mcore / MANIFEST).unlink()  # as from upstream: nothing records how long the file should be
        self.whole = {path: path.read_bytes() for path in (self.hf / WEIGHTS, self.mcore / MODEL_FILE)}

    def bits(self, weights: Weights) -> dict[str, bytes]:
        """The bits of every tensor."""
        shapes = hf_shapes(self.recipe.model)
        return {name: weights.read(whole(name, shape)).tobytes() for name, shape in shapes.items()}

    def convert(self, content: bytes) -> Outcome:
        """The outcome of convert on a safetensors file: the bits of all tensors."""
        (self.hf / WEIGHTS).write_bytes(content)
        recipe = self.recipe.model_copy(update={"paths": self.recipe.paths.model_copy(update={"mcore": "out"})})
        outcome = in_child(
            lambda: (run_convert(recipe), self.bits(open_mcore(recipe.path("mcore"), recipe.model).weights))[1]
        )
        (self.hf / WEIGHTS).write_bytes(self.whole[self.hf / WEIGHTS])
        return self._checked(outcome, recipe.path("mcore"))

    def export_of(self, content: bytes) -> Outcome:
        """The outcome of export on a file of a rank."""
        (self.mcore / MODEL_FILE).write_bytes(content)
        recipe = self.recipe
        outcome = in_child(
            lambda: (run_export(recipe, self.mcore, form="openpangu"), self.bits(open_hf(self.export, recipe.model)))[1]
        )
        return self._checked(outcome, self.export)

    def bits_in_records(self, content: bytes) -> dict[str, bytes]:
        """The content of the records of a rank's file, by the tensor that each belongs to, read by zipfile."""
        whole = self.directory / "whole.pt"
        whole.write_bytes(self.whole[self.mcore / MODEL_FILE])
        arrays = {name: value for name, value in load_checkpoint_file(whole)["model"].items() if value is not None}
        found = {}
        with zipfile.ZipFile(BytesIO(content)) as archive:
            for key, (name, array) in enumerate(arrays.items()):
                with archive.open(f"archive/data/{key}") as record:
                    record._expected_crc = None  # type: ignore[attr-defined]  # torch ignores it too
                    found[name] = np.frombuffer(record.read(), array.dtype).reshape(array.shape)
        table = mcore_tensors(self.recipe.model, single(self.recipe.model), 0, 0)
        return self.bits(Weights(part for t in table for part in parts_of(t.blocks, found[t.name], whole)))

    def _checked(self, outcome: Outcome, target: Path) -> Outcome:
        kind, value = outcome
        assert kind != "failed", value
        assert target.exists() == (kind == "done")
        assert not list(self.directory.glob(".*.staging"))
        if kind == "refused":
            assert len(value.splitlines()) == 1
            assert value.isprintable()
            assert len(value) < 1500
        shutil.rmtree(target, ignore_errors=True)
        return outcome


# Bytes.


@st.composite
def edits(draw: st.DrawFn, size: int, interesting: list[int]) -> Callable[[bytes], bytes]:
    """Up to three changes of a file's bytes, most of them where its structure is."""
    near = st.one_of(
        st.sampled_from(interesting).flatmap(lambda at: st.integers(max(0, at - 40), at + 200)), st.integers(0, size)
    )
    kinds = st.sampled_from(["flip", "flip", "set", "cut", "extend", "insert", "remove", "zero", "swap"])
    planned = draw(
        st.lists(
            st.tuples(kinds, near, near, st.integers(1, 255), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3
        )
    )

    def edit(content: bytes) -> bytes:
        changed = bytearray(content)
        for kind, at, other, mask, some in planned:
            at, other = min(at, len(changed) - 1), min(other, len(changed) - 1)
            if kind == "flip":
                changed[at] ^= mask
            elif kind == "set":
                changed[at : at + len(some)] = some[: len(changed) - at]
            elif kind == "cut":
                del changed[at:]
            elif kind == "extend":
                changed += some * mask
            elif kind == "insert":
                changed[at:at] = some
            elif kind == "remove":
                del changed[at : at + mask]
            elif kind == "zero":
                changed[at : at + mask] = bytes(len(changed[at : at + mask]))
            else:
                changed[at : at + 8], changed[other : other + 8] = changed[other : other + 8], changed[at : at + 8]
            if not changed:
                break
        return bytes(changed)

    return edit
