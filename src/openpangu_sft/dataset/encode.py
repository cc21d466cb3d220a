"""Samples to tokens on several cores, in the order of the input, each one encoded or rejected with a reason."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Union

import numpy as np

from openpangu_sft.chat_format import END, START, sample_pieces
from openpangu_sft.dataset.workers import ordered_map
from openpangu_sft.sample import BadSample, Sample, parse_sample
from openpangu_sft.sources.reader import RawRecord
from openpangu_sft.tokenizer import Encoded, Tokenizer

BATCH = 128


class Rejected(NamedTuple):
    """A sample that is not trained on: its place in the file (":12" is a line), why, and the record or its text."""

    place: str
    reason: str
    record: Any


Outcome = Union[Encoded, Rejected]


def encode_sample(sample: Sample, tokenizer: Tokenizer, seq_length: int) -> Encoded:
    """Tokens and labels of one sample.

    Raises:
        BadSample: a control token in its content, or longer than a pack.
    """
    texts = [("meta_prompt", text) for text in sample.meta_prompt]
    texts += [(f"message {number}", message.content) for number, message in enumerate(sample.data, 1)]
    for name, text in texts:
        if token := tokenizer.control_token(text):
            raise BadSample(f"{name} holds the control token {token}, which could forge a turn: take it out")
    encoded = tokenizer.encode(sample_pieces(sample))
    ends = len(sample.meta_prompt) + len(sample.data)
    for name, number in ((START, tokenizer.start_id), (END, tokenizer.end_id)):
        if np.count_nonzero(encoded.input_ids == number) != ends:  # say, from full-width letters, by normalisation
            raise BadSample(f"the tokenizer makes {name} of some text in it, which could forge a turn: take it out")
    if len(encoded.input_ids) > seq_length:
        raise BadSample(f"{len(encoded.input_ids)} tokens, above data.seq_length {seq_length}: shorten it")
    return encoded


def encode_all(
    records: Iterable[RawRecord], tokenizer: Tokenizer, seq_length: int, workers: int
) -> Generator[tuple[int, Outcome], None, None]:
    """Encodes records in their order; yields how far into the file each ends, in bytes, and what became of it.

    Raises:
        UserError: a worker process died.
    """
    iterator = iter(records)
    batches: Iterator[list[RawRecord]] = iter(lambda: list(islice(iterator, BATCH)), [])
    encode = partial(_encode_batch, tokenizer=tokenizer, seq_length=seq_length)
    if workers == 1:
        for batch in batches:
            yield from encode(batch)
        return
    with contextlib.closing(ordered_map(encode, batches, workers)) as encoded:
        for outcomes in encoded:
            yield from outcomes


def _encode_batch(batch: list[RawRecord], tokenizer: Tokenizer, seq_length: int) -> list[tuple[int, Outcome]]:
    outcomes: list[tuple[int, Outcome]] = []
    for raw in batch:
        outcome: Outcome
        try:
            if raw.unreadable:
                raise BadSample(raw.unreadable)
            outcome = encode_sample(parse_sample(raw.content), tokenizer, seq_length)
        except BadSample as error:
            outcome = Rejected(raw.place, str(error), raw.text or raw.content)
        outcomes.append((raw.position, outcome))
    return outcomes
