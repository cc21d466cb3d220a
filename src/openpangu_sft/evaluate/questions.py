"""What the models are asked: the user's prompt file, or else some of the held-out samples."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from openpangu_sft.conversations.conversation import BadSample, Message, Sample
from openpangu_sft.conversations.format import convert_record
from openpangu_sft.conversations.readers import READERS, read_records
from openpangu_sft.dataset.index_file import VALIDATION, Ids, read_rows
from openpangu_sft.dataset.turns import Pieces
from openpangu_sft.evaluate.record import Question
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.template import END, HEADERS, START, prompt_spans
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from openpangu_sft.util.errors import UserError, printable

ASKED = 4
"""Held-out samples that are asked where the user has no prompt file."""

LONGEST = 2048
"""Tokens of a held-out prompt at most: generation's attention takes memory by their square, and nobody reads more."""


def questions_in(path: Path, recipe: Recipe, tokenizer: Tokenizer) -> list[Question]:
    """The questions of a prompt file.

    Args:
        path: .txt with one question on each line; or conversations in any format that `make format` takes, of which
            the last answer is the reference and all before it is the prompt.

    Raises:
        UserError: it cannot be read, holds none, or one is no question or leaves no room for an answer: says which.
    """
    if path.is_dir():
        raise UserError("is a directory", where=path, remedy="give a prompt file: PROMPTS=…")
    if not path.is_file():
        raise UserError("no such file", where=path, remedy="give a prompt file: PROMPTS=…")
    if path.suffix.lower() != ".txt" and path.suffix.lower() not in READERS:
        known = ", ".join([".txt", *READERS])
        raise UserError(f"unknown kind of file {path.suffix or '(no suffix)'}", where=path, remedy=f"known: {known}")
    read = _lines(path) if path.suffix.lower() == ".txt" else _conversations(path, recipe)
    room = recipe.model.max_position_embeddings
    found = [
        _question(f"{printable(path.name)}{place}", sample, tokenizer, room, f"{path}{place}") for place, sample in read
    ]
    if not found:
        raise UserError("holds no questions", where=path, remedy="write one on each line")
    return found


def _lines(path: Path) -> Iterator[tuple[str, Sample]]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: byte {error.start + 1}", where=path, remedy="save it as UTF-8") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f":{number}", Sample(("",), (Message("user", line.strip()), Message("assistant", "")))


def _conversations(path: Path, recipe: Recipe) -> Iterator[tuple[str, Sample]]:
    for record in read_records(path):
        try:
            if record.unreadable:
                raise BadSample(record.unreadable)
            yield record.place, convert_record(record.content, recipe.data.source_format)
        except BadSample as error:
            raise UserError(str(error), where=f"{path}{record.place}", remedy="mend it") from None


def _question(source: str, sample: Sample, tokenizer: Tokenizer, room: int, where: str) -> Question:
    *asked, answer = sample.data
    for text in (*sample.meta_prompt, *(message.content for message in asked)):
        if token := tokenizer.control_token(text):
            raise UserError(f"holds the control token {token.group()}", where=where, remedy="take it out")
    pieces = prompt_spans(sample.meta_prompt, tuple(asked), reply=True)
    prompt = [number for piece in pieces for number in tokenizer.span_ids(piece)]
    if len(prompt) >= room:
        what = f"has {len(prompt):,} tokens, and the model holds {room:,}, the answer's among them"
        raise UserError(what, where=where, remedy="shorten it")
    turns = [["system", text] for text in sample.meta_prompt if text]
    turns += [[message.role, message.content] for message in asked]
    return Question(source, turns, answer.content, prompt)


def held_out_questions(recipe: Recipe, tokenizer: Tokenizer) -> list[Question]:
    """The first few held-out samples whose last prompt is not long: their own token ids, as training would see them."""
    return list(islice(_held_out(recipe, tokenizer), ASKED))


def _held_out(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Question]:
    directory, length = recipe.path("dataset"), recipe.data.seq_length
    rows = [read_rows(directory, VALIDATION, field, length) for field in ("input_ids", "labels", "attention_mask")]
    pieces, sample = Pieces(tokenizer), 0
    for input_ids, labels, numbers in zip(*rows):
        for number in range(1, int(numbers.max()) + 1):
            sample += 1
            inside = numbers == number
            ids, trained = input_ids[inside], labels[inside] != IGNORED
            # the last answer is the last stretch of trained tokens
            ends = np.flatnonzero(np.diff(trained.astype(np.int8), append=0) == -1)
            begins = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0) == 1)
            begin, end = int(begins[-1]), int(ends[-1]) + 1
            if begin <= LONGEST:
                turns = _turns(ids[:begin], tokenizer.start_id, pieces)
                reference = _text(ids[begin:end], pieces)
                yield Question(f"held-out sample {sample}", turns, reference, ids[:begin].tolist())


def _turns(prompt: Ids, start_id: int, pieces: Pieces) -> list[list[str]]:
    """Roles and contents of a prompt, the assistant's header at its end left out."""
    starts = np.flatnonzero(prompt == start_id)
    found = []
    for begin, end in zip(starts, [*starts[1:], len(prompt)]):
        text = _text(prompt[begin:end], pieces)
        role = next((role for role, header in HEADERS.items() if text.startswith(header)), "unknown")
        found.append([role, text[len(HEADERS.get(role, "")) :]])
    return [turn for turn in found[:-1] if turn[1] or turn[0] != "system"]


def _text(ids: Ids, pieces: Pieces) -> str:
    """What ids stand for, without the tokens around a turn and the space that SentencePiece may put in front."""
    content = b"".join(pieces.content(number) for number in ids.tolist() if pieces[number] not in (START, END))
    return content.decode("utf-8", "replace").removeprefix(" ")
