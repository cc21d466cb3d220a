"""SentencePiece without the Hugging Face class around it: the same ids, from batches of text, several times as fast.

What a slow SentencePiece class does with a text (transformers 4.53.2, PreTrainedTokenizer.tokenize, and `_tokenize` of
openPangu's class and of LlamaTokenizer with legacy=true): it cuts the text at added tokens, gives each stretch between
them to `sp_model.encode(stretch, out_type=str)` and looks the pieces up with `piece_to_id`. That is what
`sp_model.encode(stretch, out_type=int)` gives, but for unknown characters, whose pieces are their own text: stretches
with any of those are left to the class.

Whether a class is of this kind cannot be seen from outside; `Tokenizer.go_direct` compares before this is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Optional, Union

from sentencepiece import SentencePieceProcessor

from openpangu_sft.chat_format import END, START, Piece


class Unfit(Exception):
    """This tokenizer does more than SentencePiece alone; the text says what."""


class DirectEncoder:
    """Encodes pieces as the slow class of a SentencePiece tokenizer does.

    Args:
        hf: the class's object.

    Raises:
        Unfit: it is known to do something else.
    """

    def __init__(self, hf: Any) -> None:
        if not isinstance(getattr(hf, "sp_model", None), SentencePieceProcessor):
            raise Unfit("it has no sp_model of SentencePiece's")
        if getattr(hf, "do_lower_case", False):
            raise Unfit("it makes letters small")
        for token in hf.added_tokens_decoder.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise Unfit(f"its added token {token.content} takes spaces around it away, or wants them there")
        self._hf, self._model = hf, hf.sp_model
        self._added: dict[str, int] = dict(hf.added_tokens_encoder)
        longest_first = sorted(filter(None, self._added), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._marks = {token[0] for token in longest_first}
        # with an added token like [unused9]x, what stands behind [unused9] decides what it is
        self._simple = {START, END} <= self._added.keys() and not any(
            token.startswith((START, END)) and token not in (START, END) for token in longest_first
        )
        self._before, self._behind = _affixes(hf)

    def __call__(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Token ids of each piece, encoded by itself."""
        stretches: list[str] = []
        layouts = [self._layout(piece.text, stretches) for piece in pieces]
        encoded = iter(zip(stretches, self._encode(stretches)))
        unknown = self._model.unk_id()
        found: list[list[int]] = []
        for piece, layout in zip(pieces, layouts):
            ids = list(self._before) if piece.opens else []
            for part in layout:
                if part is not None:
                    ids.append(part)
                    continue
                stretch, stretch_ids = next(encoded)
                ids += self._by_the_class(stretch) if unknown in stretch_ids else stretch_ids
            found.append(ids + self._behind if piece.opens else ids)
        return found

    def _encode(self, stretches: list[str]) -> Iterable[list[int]]:
        result: list[list[int]] = self._model.encode(stretches, out_type=int, num_threads=1) if stretches else []
        return result

    def _layout(self, text: str, stretches: list[str]) -> list[Optional[int]]:
        """The parts of a text: ids of added tokens, and None for each stretch between them, which goes into a list."""
        layout: list[Optional[int]] = []
        for part in self._parts(text):
            if isinstance(part, str):
                stretches.append(part)
                layout.append(None)
            else:
                layout.append(part)
        return layout

    def _parts(self, text: str) -> Iterable[Union[int, str]]:
        inner_begin = len(START) if text.startswith(START) else 0
        inner_end = len(text) - len(END) if text.endswith(END) else len(text)
        inner = text[inner_begin:inner_end]
        if self._simple and inner_begin <= inner_end and not any(mark in inner for mark in self._marks):
            parts: list[Union[int, str]] = [self._added[START]] if inner_begin else []
            if inner:
                parts.append(inner)
            if inner_end < len(text):
                parts.append(self._added[END])
            return parts
        return [self._added.get(part, part) for part in self._split(text) if part]

    def _by_the_class(self, stretch: str) -> list[int]:
        ids: list[int] = self._hf.convert_tokens_to_ids(self._hf._tokenize(stretch))
        return ids


def _affixes(hf: Any) -> tuple[list[int], list[int]]:
    """What add_special_tokens puts before and behind a text: bos, as a rule, and nothing."""
    bare = hf.encode(START, add_special_tokens=False)
    full = hf.encode(START, add_special_tokens=True)
    for place in range(len(full) - len(bare) + 1):
        if full[place : place + len(bare)] == bare:
            return full[:place], full[place + len(bare) :]
    raise Unfit("its special tokens change the text between them")
