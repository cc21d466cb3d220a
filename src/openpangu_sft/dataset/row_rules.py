"""The rules for the rows of a packed dataset: how many rows break each, and the first of them, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.segments import Flags, misnumbered, numbers_before
from openpangu_sft.tokenizer.tokenizer import IGNORED

Values = npt.NDArray[Any]  # integers, one for each token of a block, row after row


@dataclass
class Breach:
    """The rows that break one rule."""

    field: str  # the file that is wrong
    rows: int = 0
    first: str = ""  # number of the first such row, column where there is one, and what is wrong there


@dataclass(frozen=True)
class Block:
    """Some rows of a dataset."""

    starts: npt.NDArray[np.int64]  # [rows], where each row begins in the arrays; no row is empty
    numbers: npt.NDArray[np.int64]  # [rows], each row's number in the dataset
    input_ids: Values
    mask: Values
    labels: Values

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """int64 [rows], where each row ends."""
        return np.append(self.starts[1:], len(self.mask))

    def any(self, flags: Flags) -> Flags:
        """bool [rows], whether a row has a flag, from bool [tokens]."""
        found: Flags = np.logical_or.reduceat(flags, self.starts)
        return found

    def spread(self, per_row: Values) -> Values:
        """One value for each token from one for each row."""
        return np.repeat(per_row, self.ends - self.starts)


class PackedRules:
    """Counts tokens and breaches; feed it block after block, then `finish`.

    Row by row, `attention_mask` is taken as segment numbers. A row without them may hold token ids instead, as the
    published handler writes; then its padding is what repeats the row's last id and is not trained. In a `trusted`
    dataset 1 everywhere means one segment in every row; else it means that there are no segment numbers.
    """

    def __init__(self, vocab_size: int, trusted: bool) -> None:
        self._vocab_size, self._trusted = vocab_size, trusted
        self.rows = self.tokens = self.trained = self.segments = self.longest = 0
        self.numbered = 0  # rows that have segment numbers, or at least no token ids in their place
        self._ones = self._padding_of_ones = self._highest = 0
        self._mixed = Breach("attention_mask")
        self.breaches = {
            "vocabulary": Breach("input_ids"),
            "label": Breach("labels"),
            "unnumbered": Breach("attention_mask"),
            "order": Breach("attention_mask"),
            "gap": Breach("attention_mask"),
            "padding": Breach("input_ids"),
            "trained_padding": Breach("labels"),
            "no_target": Breach("labels"),
        }

    def add(
        self, first_row: int, lengths: npt.NDArray[np.int32], input_ids: Values, mask: Values, labels: Values
    ) -> None:
        """Counts a block: rows of these lengths, and their tokens."""
        self.rows += len(lengths)
        numbers = np.flatnonzero(lengths)
        if not numbers.size:
            return
        starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[numbers]
        block = Block(starts, first_row + numbers, input_ids, mask, labels)
        trained = labels != IGNORED
        self.trained += int(trained.sum())
        self._note(
            "vocabulary",
            block,
            (input_ids < 0) | (input_ids >= self._vocab_size),
            lambda at: f"token id {input_ids[at]} is outside the vocabulary of {self._vocab_size}",
        )
        self._note(
            "label",
            block,
            trained & (labels != input_ids),
            lambda at: f"label {labels[at]} is neither the token id there ({input_ids[at]}) nor {IGNORED}",
        )
        target = trained.copy()
        target[starts] = False  # the first column is no target: no token before it predicts it
        _note_rows(self.breaches["no_target"], block, ~block.any(target), ": no trained token")
        self._count_segments(block, trained)

    def finish(self) -> None:
        """Decides whether the dataset has no segment numbers: 1 on every token, or on all but padding."""
        if self._trusted or self._highest != 1 or self.breaches["unnumbered"].rows:
            return
        if self._ones == self.numbered:
            self.tokens -= self._padding_of_ones
            self.breaches["unnumbered"] = Breach("attention_mask", self._ones, "holds 1 everywhere")
        elif self._mixed.rows:
            self.breaches["unnumbered"] = self._mixed
        else:
            return
        self.numbered = self.segments = self.longest = 0

    def _count_segments(self, block: Block, trained: Flags) -> None:
        mask = block.mask
        begins = np.zeros(len(mask), bool)
        begins[block.starts] = True
        before = numbers_before(mask, begins)
        padding = mask == 0
        gap, order = misnumbered(mask, begins)

        broken = block.any(gap | order)
        ones = ~block.any(mask != 1)
        unnumbered = np.zeros(len(block.starts), bool)
        if broken.any() or ones.any():
            ends = _content_ends(block, trained)
            unnumbered = broken & _holds_ids(block, ends)
            self._ones += int(ones.sum())
            self._padding_of_ones += int((block.ends - ends)[ones].sum())
            self.tokens += int((ends - block.starts)[unnumbered].sum())
            _note_rows(self.breaches["unnumbered"], block, unnumbered, ": holds token ids")
        numbered = block.spread(~unnumbered)
        self.numbered += int((~unnumbered).sum())
        padding &= numbered
        self.tokens += int((~padding & numbered).sum())
        self._note("gap", block, gap & numbered, lambda at: f"segment number {mask[at]} after padding (0)")
        self._note("order", block, order & numbered, lambda at: _out_of_order(mask[at], before[at], begins[at]))
        self._note("trained_padding", block, padding & trained, lambda _: "padding is trained")
        last_ids = block.spread(block.input_ids[block.ends - 1])
        self._note(
            "padding",
            block,
            padding & (block.input_ids != last_ids),
            lambda at: f"token id {block.input_ids[at]} in padding, which ends with {last_ids[at]}",
        )

        cuts = np.flatnonzero(begins | (mask != before))
        lengths = np.diff(cuts, append=len(mask))
        real = (numbered & ~padding)[cuts]
        self.segments += int(real.sum())
        self.longest = max(self.longest, int(lengths[real].max(initial=0)))
        self._highest = max(self._highest, int(mask[numbered].max(initial=0)))
        if self._highest == 1 and not self._trusted:
            self._count_mixed(block, begins, padding)

    def _count_mixed(self, block: Block, begins: Flags, padding: Flags) -> None:
        """Rows of one segment in which the first token, bos, comes again: several samples under one number."""
        first_ids = block.spread(block.input_ids[block.starts])
        again = (block.input_ids == first_ids) & ~begins & ~padding
        what = ": holds 1 throughout, though the row's first token comes again"
        _note_rows(self._mixed, block, block.any(again), what)

    def _note(self, rule: str, block: Block, wrong: Flags, describe: Callable[[Any], str]) -> None:
        """Counts the rows with a wrong token; describes the first one, given its position in the block."""
        if wrong.any():
            rows, first = block.any(wrong), int(wrong.argmax())
            column = first - block.starts[rows.argmax()]
            _note_rows(self.breaches[rule], block, rows, f", column {column}: {describe(first)}")


def _note_rows(breach: Breach, block: Block, wrong: Flags, what: str) -> None:
    """Counts wrong rows, bool [rows]; `what` is about the first of them."""
    if wrong.any() and not breach.rows:
        breach.first = f"first row {block.numbers[wrong.argmax()]}{what}"
    breach.rows += int(wrong.sum())


def _content_ends(block: Block, trained: Flags) -> npt.NDArray[np.int64]:
    """int64 [rows], where the padding of each row begins if `attention_mask` does not say: its last id, untrained."""
    last = block.ends - 1
    last_ids = block.spread(block.input_ids[last])
    places = np.arange(1, len(block.mask) + 1)
    content = np.where((block.input_ids != last_ids) | trained, places, 0)
    ends: npt.NDArray[np.int64] = np.maximum(np.maximum.reduceat(content, block.starts), block.starts)
    # one such token with its own id in attention_mask is content: a full row ends untrained
    return np.where((ends == last) & (block.mask[last] == block.input_ids[last]), last + 1, ends)


def _holds_ids(block: Block, ends: npt.NDArray[np.int64]) -> Flags:
    """bool [rows], whether `attention_mask` repeats the token ids; in padding 1 or 0 also count."""
    inside = np.arange(len(block.mask)) < block.spread(ends)
    fits = (block.mask == block.input_ids) | (~inside & ((block.mask == 1) | (block.mask == 0)))
    holds: Flags = np.logical_and.reduceat(fits, block.starts) & (ends > block.starts)
    return holds


def _out_of_order(number: int, before: int, begins: bool) -> str:
    return f"begins with segment number {number}, not 1" if begins else f"segment number {number} after {before}"
