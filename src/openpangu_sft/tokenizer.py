"""Pieces of text to token ids, exactly as the checkpoint's own Hugging Face tokenizer gives them.

Always the slow class: fast and slow ones may disagree, and preprocessing, training and chat must use the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from openpangu_sft.artefact import sha256_of
from openpangu_sft.chat_format import END, START, Piece
from openpangu_sft.errors import UserError

IGNORED = -100
"""Label of a token that is not a target (PyTorch's cross_entropy default, and MindSpeed-LLM's)."""

FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a sample and their labels: the id itself where it is a target, else -100.

    Args:
        input_ids: int32 [tokens].
        labels: int32 [tokens].
    """

    input_ids: Ids
    labels: Ids


class Tokenizer:
    """The tokenizer of a Hugging Face checkpoint.

    Args:
        directory: holds the tokenizer's files.
        trust_remote_code: whether Python files beside it may be run.

    Raises:
        UserError: files are missing or unfit, or openPangu's special tokens are not single tokens in it.
    """

    def __init__(self, directory: Path, trust_remote_code: bool) -> None:
        if not (directory / "tokenizer_config.json").is_file():
            raise UserError("no tokenizer here (tokenizer_config.json)", where=directory, remedy="check paths.hf")
        self.directory = directory
        self.hf = _load(directory, trust_remote_code)
        self._short: dict[Piece, list[int]] = {}
        self.start_id, self.end_id = self._single(START), self._single(END)
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else 0
        self._added: dict[int, str] = {number: token.content for number, token in self.hf.added_tokens_decoder.items()}
        self._special = set(self.hf.all_special_ids)
        control = sorted({*self._added.values(), START, END} - {""}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)))

    def __len__(self) -> int:
        return len(self.hf)

    def _single(self, text: str) -> int:
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.hf.unk_token_id:
            what = f"{text} is not one token here but {ids}"
            raise UserError(what, where=self.directory, remedy="check paths.hf: is it openPangu's?")
        return ids[0]

    def control_token(self, text: str) -> Optional[str]:
        """The first control token in a user's text: encoded as it stands it could forge a turn."""
        found = self._control.search(text)
        return found.group() if found else None

    def piece_ids(self, piece: Piece) -> list[int]:
        """Token ids of one piece, encoded by itself."""
        ids = self._short.get(piece)
        if ids is None:
            ids = self.hf.encode(piece.text, add_special_tokens=piece.opens)
            if len(piece.text) < 16 and len(self._short) < 1000:  # headers come again in every message
                self._short[piece] = ids
        return ids

    def encode(self, pieces: Iterable[Piece]) -> Encoded:
        """Token ids and labels of pieces in a row."""
        input_ids: list[int] = []
        labels: list[int] = []
        for piece in pieces:
            ids = self.piece_ids(piece)
            input_ids += ids
            labels += ids if piece.trained else [IGNORED] * len(ids)
        return Encoded(np.array(input_ids, np.int32), np.array(labels, np.int32))

    def decode_reply(self, header: Sequence[int], reply: Sequence[int]) -> str:
        """Text of generated tokens that follow a header.

        Stretches between control tokens are decoded one by one and each together with the header, because SentencePiece
        classes change or drop the first character of whatever they decode. End tokens and the like are left out.
        """
        before = self._decode(header)
        text = ""
        for control, stretch in groupby(reply, key=self._added.__contains__):
            if control:
                text += "".join(self._added[number] for number in stretch if number not in self._special)
            else:
                text += self._decode([*header, *stretch])[len(before) :]
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        # a clean-up would take the space out of " ." or " n't" wherever the model wrote one
        return str(self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's own files in a checkpoint directory, remote code included."""
    return [directory / name for name in FILES if (directory / name).is_file()] + sorted(
        directory.glob("tokenization_*.py")
    )


def tokenizer_digest(directory: Path) -> str:
    """sha256 over the tokenizer's files: recorded in manifests, so that two stages cannot use different ones."""
    digest = hashlib.sha256()
    for path in tokenizer_files(directory):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _load(directory: Path, trust_remote_code: bool) -> Any:
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer  # slow to import, and not every stage needs it

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(directory), use_fast=False, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if loaded is False:  # what transformers gives where SentencePiece cannot read its model
            SentencePieceProcessor(model_file=str(directory / FILES[0]))  # says why
            raise ValueError("transformers gives no reason")
        return loaded
    except Exception as error:  # its files decide what it raises, and with trust_remote_code their code does
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        model = directory / FILES[0]
        remedy = "check its files"
        if "trust_remote_code" in str(error):
            remedy = "read its tokenization_*.py, then set tokenizer.trust_remote_code=true"
        elif not model.is_file():
            remedy = f"put its {model.name} there"
        elif model.read_bytes()[:8] == b"version ":
            remedy = f"its {model.name} is only a Git LFS pointer: get the file itself (git lfs pull)"
        raise UserError(f"the tokenizer does not load: {first_line}", where=directory, remedy=remedy) from None
