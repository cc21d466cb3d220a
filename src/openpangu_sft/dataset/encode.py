"""Samples to tokens, each one encoded or refused with a reason.

Marked tokens: int32 [tokens]; the id of a token that is trained on, and ~id, which is below 0, of one that is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple, Union

import numpy as np
import numpy.typing as npt

from openpangu_sft.chat_format import END, START, Piece, sample_pieces, whole
from openpangu_sft.recipe import Recipe
from openpangu_sft.sample import BadSample, Sample
from openpangu_sft.tokenizer import IGNORED, Tokenizer

Marked = npt.NDArray[np.int32]


def input_ids_of(marked: Marked) -> npt.NDArray[np.int32]:
    """Token ids: int32, of the same shape."""
    return np.where(marked < 0, ~marked, marked)


def labels_of(marked: Marked) -> npt.NDArray[np.int32]:
    """The id where it is a target, else -100: int32, of the same shape. Not shifted."""
    return np.where(marked < 0, np.int32(IGNORED), marked)


@dataclass(frozen=True)
class Limits:
    """What becomes of samples that are not fit to be trained on as they are: see the recipe's section data."""

    seq_length: int
    control_tokens: str
    too_long: str

    @classmethod
    def of(cls, recipe: Recipe) -> Limits:
        """Those of a recipe."""
        return cls(recipe.data.seq_length, recipe.data.control_tokens, recipe.data.too_long)


class TooLong(BadSample):
    """A sample with more tokens than a pack."""


class Encoded(NamedTuple):
    """A sample's marked tokens, and whether messages at its end were cut off."""

    marked: Marked
    truncated: bool = False


def encode_samples(
    samples: Sequence[Union[Sample, BadSample]], tokenizer: Tokenizer, limits: Limits
) -> list[Union[Encoded, BadSample]]:
    """Encodes a batch of samples.

    Args:
        samples: those that are bad already are passed on.

    Returns:
        For each sample its tokens, or why it has none: a control token in its content, or longer than a pack.
    """
    batch: list[Union[list[Piece], BadSample]] = [
        sample if isinstance(sample, BadSample) else _pieces(sample, tokenizer, limits) for sample in samples
    ]
    pieces = [entry for entry in batch if not isinstance(entry, BadSample)]
    ids = iter(tokenizer.encode(list(chain.from_iterable(pieces))))
    return [
        entry if isinstance(entry, BadSample) else _encoded(entry, [next(ids) for _ in entry], tokenizer, limits)
        for entry in batch
    ]


def _pieces(sample: Sample, tokenizer: Tokenizer, limits: Limits) -> Union[list[Piece], BadSample]:
    if limits.control_tokens == "escape":
        return list(sample_pieces(sample, lambda content: _inside_control_tokens(content, tokenizer)))
    if limits.control_tokens == "refuse":
        texts = [("meta_prompt", text) for text in sample.meta_prompt]
        texts += [(f"message {number}", message.content) for number, message in enumerate(sample.data, 1)]
        for name, text in texts:
            if found := tokenizer.control_token(text):
                return BadSample(
                    f"{name} holds the control token {found.group()}, which could forge a turn: take it out, or set "
                    "data.control_tokens=escape"
                )
    return list(sample_pieces(sample, whole))


def _inside_control_tokens(content: str, tokenizer: Tokenizer) -> list[str]:
    """Cuts a content inside each of its control tokens: what is left are ordinary characters."""
    parts, begin = [], 0
    while found := tokenizer.control_token(content, begin):
        cut = found.start() + 1
        parts.append(content[begin:cut])
        begin = cut
    return [*parts, content[begin:]]


def _encoded(
    pieces: list[Piece], ids: list[list[int]], tokenizer: Tokenizer, limits: Limits
) -> Union[Encoded, BadSample]:
    lengths = list(map(len, ids))
    count, used = sum(lengths), len(pieces)
    if count > limits.seq_length:
        if limits.too_long != "truncate":
            return TooLong(
                f"{count} tokens, above data.seq_length {limits.seq_length}: shorten it, or set data.too_long"
            )
        used, count = _fitting(pieces, lengths, limits.seq_length)
        if not used:
            return TooLong(
                f"{count} tokens to the end of its first answer, above data.seq_length {limits.seq_length}: shorten it"
            )
    values = np.fromiter(chain.from_iterable(ids[:used]), np.int32, count)
    if limits.control_tokens != "allow" and (token := _forged(pieces[:used], values, tokenizer)):
        return BadSample(f"the tokenizer makes {token} of some text in it, which could forge a turn: take it out")
    ignored = np.repeat([not piece.trained for piece in pieces[:used]], lengths[:used])
    return Encoded(np.where(ignored, ~values, values), truncated=used < len(pieces))


def _forged(pieces: list[Piece], values: Marked, tokenizer: Tokenizer) -> str:
    """A control token that no piece's frame has and that came out nevertheless, say, of full-width letters."""
    control = values[tokenizer.is_control[values]]
    frame = Counter(tokenizer.opening if pieces[0].opens else ())
    for token, number in ((START, tokenizer.start_id), (END, tokenizer.end_id)):
        frame[number] += sum(piece.text.count(token) for piece in pieces)
    if len(control) == sum(frame.values()):
        return ""
    return str(tokenizer.hf.convert_ids_to_tokens(next((Counter(control.tolist()) - frame).elements())))


def _fitting(pieces: list[Piece], lengths: list[int], room: int) -> tuple[int, int]:
    """How many pieces to keep so that the last one is an answer and all fit, and their tokens.

    Returns:
        0 and the tokens up to the first answer's end, if not even that fits.
    """
    answers = [
        (number, tokens)
        for number, (piece, tokens) in enumerate(zip(pieces, accumulate(lengths)), 1)
        if piece.trained and piece.text.endswith(END)
    ]
    fitting = [answer for answer in answers if answer[1] <= room]
    return fitting[-1] if fitting else (0, answers[0][1])
