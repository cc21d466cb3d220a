"""The rules for the rows of a packed dataset: how many rows break each, and the first of them, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import numpy.typing as npt

from openpangu_sft.dataset.segments import Flags, misnumbered, segment_runs
from openpangu_sft.tokenizer.tokenizer import IGNORED

Values = npt.NDArray[Any]  # integers [rows, seq_length]

FIELD_OF = {
    "vocabulary": "input_ids",
    "label": "labels",
    "unnumbered": "attention_mask",
    "order": "attention_mask",
    "gap": "attention_mask",
    "padding": "input_ids",
    "trained_padding": "labels",
    "no_target": "labels",
    "one_number": "attention_mask",
}
"""For each rule the file that is wrong where a row breaks it."""


@dataclass
class Breach:
    rows: int = 0
    first: str = ""  # number of the first such row, column where there is one, and what is wrong there


class PackedRules:
    """Counts tokens and breaches; feed it block after block, then `finish`.

    Row by row, `attention_mask` is taken as segment numbers. A row without them may hold token ids instead, as the
    published handler writes; its tokens are not counted. In a `trusted` dataset 1 everywhere means one segment in every
    row; else it means that there are no segment numbers.
    """

    def __init__(self, vocab_size: int, trusted: bool) -> None:
        self._vocab_size, self._trusted = vocab_size, trusted
        self.rows = self.tokens = self.trained = self.segments = 0
        self._ones = self._highest = self._first_row = 0
        self.breaches = {rule: Breach() for rule in FIELD_OF}

    def add(self, first_row: int, input_ids: Values, mask: Values, labels: Values) -> None:
        self.rows += len(mask)
        if not mask.size:
            return
        self._first_row = first_row
        trained = labels != IGNORED
        self.trained += int(trained.sum())
        size, other = self._vocab_size, trained & (labels != input_ids)
        outside = (input_ids < 0) | (input_ids >= size)
        self._note("vocabulary", outside, lambda at: f"token id {input_ids[at]} is outside the vocabulary of {size}")
        what = "is neither the token id there"
        self._note("label", other, lambda at: f"label {labels[at]} {what} ({input_ids[at]}) nor {IGNORED}")
        # the first column is no target: no token before it predicts it
        self._note("no_target", ~trained[:, 1:].any(axis=1), lambda _: "no trained token")

        gap, order = misnumbered(mask)
        holds_ids = (gap | order).any(axis=1) & (mask > 1).any(axis=1)
        holds_ids &= ((mask == input_ids) | (mask == 0) | (mask == 1)).all(axis=1)  # 0 and 1: their padding
        self._note("unnumbered", holds_ids, lambda _: "holds token ids")
        numbered = ~holds_ids[:, None]
        padding = (mask == 0) & numbered
        self._note("gap", gap & numbered, lambda at: f"segment number {mask[at]} after padding (0)")
        self._note("order", order & numbered, lambda at: _out_of_order(mask[at[0]], at[1]))
        self._note("trained_padding", padding & trained, lambda _: "padding is trained")
        last, mixed = input_ids[:, -1], padding & (input_ids != input_ids[:, -1:])
        what = "in padding, which ends with"
        self._note("padding", mixed, lambda at: f"token id {input_ids[at]} {what} {last[at[0]]}")

        numbers = mask[~holds_ids]
        _, begins, ends = segment_runs(numbers)
        self.segments += len(begins)
        self.tokens += int((ends - begins).sum())
        self._highest = max(self._highest, int(numbers.max(initial=0)))
        self._ones += int((mask == 1).all(axis=1).sum())
        if self._highest == 1 and not self._trusted:  # samples under one number show in their bos, which comes again
            again = ((input_ids == input_ids[:, :1]) & numbered & ~padding)[:, 1:].any(axis=1)
            self._note("one_number", again, lambda _: "holds 1 throughout, though the row's first token comes again")

    def finish(self) -> None:
        """Decides whether the dataset has no segment numbers: 1 on every token, or on all but padding."""
        one_number = self.breaches.pop("one_number")
        if self._trusted or self._highest != 1 or self.breaches["unnumbered"].rows:
            return
        if self._ones == self.rows:
            one_number = Breach(self.rows, "holds 1 everywhere")
        self.breaches["unnumbered"] = one_number

    def _note(self, rule: str, wrong: Flags, describe: Callable[[Any], str]) -> None:
        """Counts wrong rows, from bool [rows] or [rows, seq_length]; describes the first, given its place in it."""
        breach, count = self.breaches[rule], int(wrong.reshape(len(wrong), -1).any(axis=1).sum())
        if count and not breach.rows:
            at = tuple(map(int, np.unravel_index(wrong.argmax(), wrong.shape)))
            column = f", column {at[1]}" if len(at) > 1 else ""
            breach.first = f"first row {self._first_row + at[0]}{column}: {describe(at)}"
        breach.rows += count


def _out_of_order(numbers: Values, column: int) -> str:
    before = f"segment number {numbers[column]} after {numbers[column - 1]}"
    return before if column else f"begins with segment number {numbers[0]}, not 1"
