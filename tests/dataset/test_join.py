"""Shards joined to one dataset: full packs as they are, underfilled ones packed again, and no segment is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import ROOT, write_packs
from openpangu_sft.dataset.index_file import FIELDS, PREFIX, field_path, read_roles, read_rows, roles_path
from openpangu_sft.dataset.merge import join_shards
from openpangu_sft.dataset.segments import misnumbered, segment_runs
from openpangu_sft.recipe.data import Data
from openpangu_sft.recipe.load import load_recipe
from refusals import refusal_of

Shards = list[list[list[int]]]  # lengths of segments, by pack and shard
PAD = 7
SEQ_LENGTHS = (8, 300)
"""Of the first, one token of padding is underfilled; of the second, three are."""


@lru_cache
def data(seq_length: int, workers: int = 1) -> Data:
    overrides = [f"data.seq_length={seq_length}", f"data.workers={workers}"]
    return load_recipe(ROOT / "recipes/demo.yaml", overrides).data


def write_shards(directory: Path, shards: Shards, seq_length: int) -> list[Path]:
    """Segments of tokens that occur once each; every third is trained, and roles follow from the token."""
    tokens, paths = count(10), []
    for number, packs in enumerate(shards):
        paths.append(directory / f"shard {number}")
        paths[-1].mkdir()
        drawn = [[np.array([next(tokens) for _ in range(length)], np.int32) for length in pack] for pack in packs]
        segments = [[(ids, np.where(ids % 3, np.int32(-100), ids)) for ids in pack] for pack in drawn]
        rows = write_packs(paths[-1], segments, seq_length, PAD)
        roles = np.where(rows["attention_mask"] > 0, rows["input_ids"] % 5 + 1, 0).astype(np.uint8)
        roles_path(paths[-1], PREFIX).write_bytes(roles.tobytes())
    return paths


def fields(directory: Path, seq_length: int) -> dict[str, np.ndarray]:
    """All rows; none for a shard without."""
    if not field_path(directory, PREFIX, "labels", "bin").stat().st_size:
        empty = np.empty((0, seq_length), np.int32)
        return {**dict.fromkeys(FIELDS, empty), "roles": empty.astype(np.uint8)}
    rows = {name: np.array(read_rows(directory, PREFIX, name, seq_length)) for name in FIELDS}
    roles = read_roles(directory, PREFIX, len(rows["labels"]), seq_length)
    assert roles is not None
    return {**rows, "roles": np.array(roles)}


def segments_of(rows: dict[str, np.ndarray]) -> Iterator[tuple[bytes, ...]]:
    for row, begin, end in zip(*segment_runs(rows["attention_mask"])):
        yield tuple(rows[name][row, begin:end].tobytes() for name in ("input_ids", "labels", "roles"))


def joined(directory: Path, shards: list[Path], seq_length: int, workers: int = 1) -> dict[str, int]:
    directory.mkdir()
    packs = sum(len(fields(shard, seq_length)["labels"]) for shard in shards)
    return join_shards(shards, directory, PREFIX, packs, data(seq_length, workers))


def check(directory: Path, shards: Shards, seq_length: int) -> dict[str, int]:
    """Joins shards and checks what must hold for any; returns the counts."""
    paths = write_shards(directory, shards, seq_length)
    counts = joined(directory / "dataset", paths, seq_length)
    before = [fields(path, seq_length) for path in paths]
    one_after_another = {name: np.concatenate([rows[name] for rows in before]) for name in before[0]}
    after = fields(directory / "dataset", seq_length)
    assert Counter(segments_of(after)) == Counter(segments_of(one_after_another))
    assert counts["packs_in_shards"] == len(one_after_another["labels"])
    assert counts["packs"] == len(after["labels"])
    assert (counts["packs"] < counts["packs_in_shards"]) == (counts["packed_again"] > 0)
    kept = counts["packs_in_shards"] - counts["packed_again"]
    full = np.ones(len(one_after_another["labels"]), bool)
    if counts["packed_again"]:
        full = (one_after_another["attention_mask"] == 0).sum(axis=1) < max(1, seq_length // 100)
    for name, rows in after.items():
        assert (rows[:kept] == one_after_another[name][full]).all()
    padding = after["attention_mask"] == 0
    assert (after["input_ids"][padding] == PAD).all()
    assert (after["labels"][padding] == -100).all()
    assert not after["roles"][padding].any()
    assert after["attention_mask"][:, 0].all()
    assert not np.any(misnumbered(after["attention_mask"]))
    return counts


@st.composite
def any_shards(draw: st.DrawFn) -> tuple[int, Shards]:
    """Packs that no planner has made: full, nearly full or nearly empty."""
    seq_length = draw(st.sampled_from(SEQ_LENGTHS))
    lengths = st.lists(st.integers(1, seq_length), min_size=1, max_size=4)

    def fitting(pack: list[int]) -> list[int]:
        kept = [length for place, length in enumerate(pack) if sum(pack[: place + 1]) <= seq_length]
        return [*kept, seq_length - sum(kept)] if draw(st.booleans()) and sum(kept) < seq_length else kept

    packs = st.lists(lengths.map(fitting), max_size=5)
    shards = draw(st.lists(packs, min_size=1, max_size=4).filter(any))
    return seq_length, shards


@given(any_shards())
@settings(deadline=None)
@example((8, [[[8], [3]], [], [[2, 3]]]))
@example((8, [[[5]], [[5]]]))  # nothing fits together
@example((300, [[[298]], [[299]], [[2]]]))  # one is full by the rule
def test_any_shards(drawn: tuple[int, Shards]) -> None:
    seq_length, shards = drawn
    with TemporaryDirectory() as directory:
        counts = check(Path(directory), shards, seq_length)
    if len(shards) == 1:
        assert not counts["packed_again"]


@pytest.mark.parametrize(
    ("shards", "packs", "again"),
    [
        ([[[8], [3]], [[8], [2, 3]]], 3, 2),
        ([[[3]], [[3]], [[2]]], 1, 3),
        ([[[3], [3]]], 2, 0),  # one shard was planned as a whole
        ([[[5]], [[5]]], 2, 0),
        ([[], [[8]], [[4], [8]], [[4]]], 3, 2),
    ],
)
def test_underfilled_packs_share_packs(tmp_path: Path, shards: Shards, packs: int, again: int) -> None:
    counts = check(tmp_path, shards, 8)
    assert (counts["packs"], counts["packed_again"]) == (packs, again)


def test_workers_and_blocks_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.RandomState(1)
    shards = [[random.randint(1, 100, 3).tolist() for _ in range(40)] for _ in range(3)]
    paths = write_shards(tmp_path, shards, 300)
    assert joined(tmp_path / "one", paths, 300)["packed_again"] > 100
    monkeypatch.setattr("openpangu_sft.dataset.segments.VALUES_AT_ONCE", 1000)
    joined(tmp_path / "two", paths, 300, workers=2)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_label_that_is_no_token_of_its_place(tmp_path: Path) -> None:
    """Only taken apart are rows read as tokens, and what the spool cannot hold must not be changed."""
    paths = write_shards(tmp_path, [[[3]], [[3]]], 8)
    file = field_path(paths[1], PREFIX, "labels", "bin")
    for wrong in (5, -5):
        file.write_bytes(np.array([wrong], "<i4").tobytes() + file.read_bytes()[4:])
        said = refusal_of(joined, tmp_path / f"dataset{wrong}", paths, 8)
        expected = f"{file}: has a label that is neither its token nor -100 -> run make preprocess and make merge again"
        assert said == expected
