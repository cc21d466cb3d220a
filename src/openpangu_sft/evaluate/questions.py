"""What the models are asked: the user's prompt file, or some of the validation samples."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np

from openpangu_sft.conversations.conversation import Message, Rules, Sample
from openpangu_sft.conversations.convert import Converter
from openpangu_sft.conversations.files import SUFFIXES, read_records, suffix_of
from openpangu_sft.conversations.keys import EMPTY, BadSample
from openpangu_sft.dataset.index_file import BEGINS, UNKNOWN, VALIDATION, Roles, Rows, role_of
from openpangu_sft.dataset.segments import segment_runs
from openpangu_sft.evaluate.record import Question
from openpangu_sft.evaluate.scores import RULES, Score
from openpangu_sft.model.chat import prompt_ids
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.template import HEADERS
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from openpangu_sft.tokenizer.tool_prompt import ToolPrompt
from openpangu_sft.util.console import console
from openpangu_sft.util.errors import UserError, printable, read_utf8

ASKED = 4  # validation samples that are asked without a prompt file

LONGEST = 2048  # most tokens of a validation prompt: the memory of generation's attention grows with their square


def questions_in(path: Path, recipe: Recipe, tokenizer: Tokenizer) -> list[Question]:
    """The questions of a prompt file: .txt with one on each line; or conversations in any format that `make format`
    takes, of which the last answer is the reference and all before it is the prompt; the key "score" is ours.

    Raises `UserError` where it cannot be read, holds none, or one is no question, cannot be scored or is too long.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise UserError(what, where=path, remedy="give a prompt file: PROMPTS=…")
    if path.suffix.lower() != ".txt" and not suffix_of(path):
        known = ", ".join([".txt", *SUFFIXES])
        raise UserError(f"unknown kind of file {path.suffix or '(no suffix)'}", where=path, remedy=f"known: {known}")
    read = _lines(path) if path.suffix.lower() == ".txt" else _conversations(path, recipe)
    found = [
        replace(_question(f"{printable(path.name)}{place}", sample, recipe, tokenizer, f"{path}{place}"), score=score)
        for place, sample, score in read
    ]
    if not found:
        raise UserError("holds no questions", where=path, remedy="write one on each line")
    return found


def _lines(path: Path) -> Iterator[tuple[str, Sample, None]]:
    for number, line in enumerate(read_utf8(path).splitlines(), 1):
        if line.strip():
            yield f":{number}", Sample(("",), (Message("user", line.strip()), Message("assistant", ""))), None


def _conversations(path: Path, recipe: Recipe) -> Iterator[tuple[str, Sample, Optional[Score]]]:
    convert = Converter(recipe.data, Rules(recipe.data, trains=False))
    for record in read_records(path, recipe.data.encoding):
        try:
            if record.unreadable:
                raise BadSample(record.unreadable)
            keys: Any = {} if "score" in recipe.data.ignore_keys else record.content
            score = keys.pop("score", None) if isinstance(keys, dict) else None  # a key of prompt files only
            if score not in (*EMPTY, *RULES):
                raise BadSample(f"score is {reprlib.repr(score)}, expected {', '.join(RULES)}")
            sample = convert(record.content)
            text, calls = sample.data[-1].content, sample.data[-1].calls
            if score and (calls or not RULES[score](text, text)):
                raise BadSample(f"score {score} expects a text as the last answer, for choice one letter, and no calls")
            yield record.place, sample, score or None
        except BadSample as error:
            raise UserError(str(error), where=f"{path}{record.place}", remedy="fix it") from None


def _question(source: str, sample: Sample, recipe: Recipe, tokenizer: Tokenizer, where: str) -> Question:
    """The question that ends with a sample's last answer."""
    *asked, answer = sample.data
    try:
        prompt = prompt_ids(tokenizer, recipe.data, sample.meta_prompt, asked, sample.tools)
    except UserError as error:
        raise UserError(error.what, where=where, remedy=error.remedy) from None
    tools = ToolPrompt(recipe.data.tool_prompt)(sample.tools, tokenizer.control_token)
    room = recipe.model.max_position_embeddings
    if len(prompt) >= room:
        what = f"has {len(prompt):,} tokens, and the model holds {room:,}, the answer's among them"
        raise UserError(what, where=where, remedy="shorten it")
    turns = [["system", text] for text in (*sample.meta_prompt, "".join(tools)) if text]
    turns += [[message.role, message.content + message.calls] for message in asked]
    return Question(source, turns, answer.content + answer.calls, prompt)


def validation_questions(recipe: Recipe, tokenizer: Tokenizer) -> list[Question]:
    """The first few validation samples whose last prompt is short: their token ids as training sees them."""
    found: list[Question] = []
    rows = Rows(recipe.path("dataset"), recipe.data.seq_length, VALIDATION)
    if rows.roles is None:
        console.print(f"roles of the validation samples are {UNKNOWN}", soft_wrap=True)
    segments = (
        (row, slice(begin, end))
        for row in range(len(rows))
        for _, begin, end in zip(*segment_runs(rows.segments[row : row + 1]))
    )
    for sample, (row, inside) in enumerate(segments, 1):
        if len(found) == ASKED:
            break
        ids = rows.input_ids[row, inside].tolist()
        trained = np.flatnonzero(rows.labels[row, inside] != IGNORED)
        begin = int(trained[np.flatnonzero(np.diff(trained, prepend=-1) > 1)[-1]])  # of the last answer
        if begin > LONGEST:
            continue
        prompt, answer = ids[:begin], ids[begin : trained[-1] + 1]
        turns = [["prompt", tokenizer.decode(prompt)]]
        if rows.roles is not None:
            turns = _turns(prompt, rows.roles[row, inside][:begin], tokenizer)
        reference = tokenizer.decode_reply(_without_end(answer, tokenizer))
        found.append(Question(f"validation sample {sample}", turns, reference, prompt))
    return found


def _turns(prompt: list[int], roles: Roles, tokenizer: Tokenizer) -> list[list[str]]:
    """Roles and contents of a prompt, without the assistant's header at its end and empty system prompts."""
    starts = np.flatnonzero(roles >= BEGINS).tolist()
    found = []
    for begin, end in zip(starts, starts[1:]):
        role = role_of(int(roles[begin]))
        text = tokenizer.decode_reply(_without_end(prompt[begin + 1 : end], tokenizer))
        found.append([role, text.lstrip(" ").removeprefix(HEADERS[role])])
    return [turn for turn in found if turn[1] or turn[0] != "system"]


def _without_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[:-1] if ids[-1:] == [tokenizer.end_id] else ids
