"""Input of the data benchmark: real conversations, sampled and joined to the requested size, and a real tokenizer."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.convert import Converter
from openpangu_sft.conversations.files import read_records
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.template import END
from openpangu_sft.util.errors import UserError

FILES = ("alpaca_en_demo.json", "alpaca_zh_demo.json", "glaive_toolcall_zh_demo.json", "identity.json")
MODEL = "internlm_v7_sft.model"
UNUSED = "<TOKENS_UNUSED_"
CONTROL_TOKENS = [f"[unused{number}]" for number in range(34)]
PARTS = 4
MOST_JOINED = 4

MESSAGE_ROOM = 8
"""Upper bound of the tokens that the template adds to a text, including its header."""
NUMBER_ROOM = 16
"""Upper bound of the tokens of the number after a question."""


class Corpus(NamedTuple):
    """Size of the written samples."""

    conversations: int
    jsonl_bytes: int
    text_bytes: int


class Drawn(NamedTuple):
    """A real conversation and an upper bound of its tokens."""

    sample: Sample
    tokens: int


def require_data(directory: Path) -> None:
    """Raises `UserError` unless the conversations and the SentencePiece model are there."""
    for name in (*FILES, MODEL):
        if not (directory / name).is_file():
            remedy = "set DATA_DIR to a directory that contains it: see docs/benchmarks.md for its source"
            raise UserError("no such file", where=directory / name, remedy=remedy)


def texts_of(record: dict[str, Any]) -> list[str]:
    """Every system prompt and message content of a record in a samples file."""
    return [*record["meta_prompt"], *(message["content"] for message in record["data"])]


def write_tokenizer(model: Path, directory: Path) -> None:
    """Writes a tokenizer like openPangu's, whose special tokens have ids inside the SentencePiece vocabulary.

    It uses the pieces left unused by the model's authors, which no text encodes to: otherwise the engine would see a
    forged turn and reject the conversation.

    Raises:
        UserError: the model has too few unused pieces.
    """
    processor = SentencePieceProcessor(model_file=str(model))
    free = [number for number in range(len(processor)) if processor.id_to_piece(number).startswith(UNUSED)]
    if len(free) < len(CONTROL_TOKENS):
        what = f"has {len(free)} unused pieces {UNUSED}…>, {len(CONTROL_TOKENS)} are needed"
        raise UserError(what, where=model, remedy=f"use {MODEL}")
    added = {0: "<unk>", 1: "<s>", 2: "</s>", **dict(zip(free, CONTROL_TOKENS))}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(number): {"content": token, **plain} for number, token in added.items()},
        "bos_token": "<s>",
        "eos_token": END,
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
    }
    directory.mkdir(parents=True)
    shutil.copyfile(model, directory / "tokenizer.model")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def write_samples(source: Path, directory: Path, size: int, seq_length: int, seed: int) -> Corpus:
    """Writes `size` bytes of jsonl into samples files; equal arguments give equal files.

    Each line joins 1 to 4 real conversations under the system prompts of the first, as far as they fit into a pack. The
    questions are numbered, so that no two lines are equal.
    """
    known = _real_conversations(source, seq_length)
    draw = random.Random(seed)
    conversations = jsonl_bytes = text_bytes = asked = 0
    directory.mkdir(parents=True)
    for part in range(1, PARTS + 1):
        with (directory / f"part-{part}.jsonl").open("wb") as stream:
            while jsonl_bytes < size * part // PARTS:
                joined, room = [], seq_length
                for drawn in draw.choices(known, k=draw.randint(1, MOST_JOINED)):
                    room -= drawn.tokens
                    if room >= 0:
                        joined.append(drawn.sample)
                sample, asked = _join(joined, asked)
                record = sample.to_json()
                jsonl_bytes += stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                text_bytes += sum(len(text.encode()) for text in texts_of(record))
                conversations += 1
    return Corpus(conversations, jsonl_bytes, text_bytes)


def _real_conversations(source: Path, seq_length: int) -> list[Drawn]:
    """The conversations that fit into a pack. All are valid, otherwise the converters would raise."""
    processor = SentencePieceProcessor(model_file=str(source / MODEL))
    known: list[Drawn] = []
    convert = Converter(Data(seq_length=seq_length, seed=1, workers=1))
    for name in FILES:
        for raw in read_records(source / name):
            sample = _plain(convert(raw.content))
            texts = texts_of(sample.to_json())
            tokens = sum(map(len, processor.encode(texts))) + MESSAGE_ROOM * len(texts)
            tokens += NUMBER_ROOM * sum(message.role == "user" for message in sample.data)
            if tokens <= seq_length:
                known.append(Drawn(sample, tokens))
    if not known:
        raise UserError(f"no conversation fits into {seq_length} tokens", where=source, remedy="raise --seq-length")
    return known


def _plain(sample: Sample) -> Sample:
    """The sample as version 0.5.0 writes it, which is measured on the same data: calls and tools are texts."""
    messages = tuple(Message(message.role, message.calls or message.content) for message in sample.data)
    return Sample(tuple(filter(None, (*sample.meta_prompt, sample.tools))) or ("",), messages)


def _join(samples: list[Sample], asked: int) -> tuple[Sample, int]:
    """Joins conversations, numbering questions from `asked` + 1; also returns the last number."""
    messages: list[Message] = []
    for message in (message for sample in samples for message in sample.data):
        content = message.content
        if message.role == "user":
            asked += 1
            content += f" ({asked})"
        messages.append(Message(message.role, content))
    return Sample(samples[0].meta_prompt, tuple(messages)), asked
