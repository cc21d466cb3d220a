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
from typing import Any, Callable, Optional

from sentencepiece import SentencePieceProcessor

from openpangu_sft.tokenizer.template import END, HEADERS, START, TextSpan

_Layout = list[Optional[list[int]]]


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
        self._start, self._end = [self._added.get(START, 0)], [self._added.get(END, 0)]
        self._before, self._behind = _affixes(hf)
        frames = [START + HEADERS["assistant"], START + HEADERS["system"] + END]  # every answer has the one
        self._known = {text: list(hf.encode(text, add_special_tokens=False)) for text in frames}
        self._longest_known = max(map(len, frames))

    def __call__(self, pieces: Sequence[TextSpan]) -> list[list[int]]:
        """Token ids of each piece, encoded by itself."""
        stretches: list[str] = []
        layouts = [self._layout(piece, stretches) for piece in pieces]
        encoded = self._model.encode(stretches, out_type=int, num_threads=1) if stretches else []
        unknown = self._model.unk_id()
        for number, ids in enumerate(encoded):
            if unknown in ids:
                encoded[number] = self._by_the_class(stretches[number])
        next_encoded = iter(encoded).__next__
        return [self._fill(layout, next_encoded) for layout in layouts]

    def _layout(self, piece: TextSpan, stretches: list[str]) -> _Layout:
        """The ids of the added tokens in a piece, and None for each stretch between them, which goes into a list."""
        text = piece.text
        if known := self._known.get(text) if len(text) <= self._longest_known else None:
            return [self._before, known, self._behind] if piece.opens else [known]
        inner_begin = len(START) if text.startswith(START) else 0
        inner_end = len(text) - len(END) if text.endswith(END) else len(text)
        inner = text[inner_begin:inner_end]
        layout: _Layout = [self._before] if piece.opens else []
        if self._simple and inner_begin <= inner_end and not has_any(inner, self._marks):
            if inner_begin:
                layout.append(self._start)
            if inner:
                stretches.append(inner)
                layout.append(None)
            if inner_end < len(text):
                layout.append(self._end)
        else:
            for part in filter(None, self._split(text)):
                number = self._added.get(part)
                layout.append(None if number is None else [number])
                if number is None:
                    stretches.append(part)
        if piece.opens:
            layout.append(self._behind)
        return layout

    @staticmethod
    def _fill(layout: _Layout, next_encoded: Callable[[], list[int]]) -> list[int]:
        ids: list[int] = []
        for part in layout:
            ids += next_encoded() if part is None else part
        return ids

    def _by_the_class(self, stretch: str) -> list[int]:
        ids: list[int] = self._hf.convert_tokens_to_ids(self._hf._tokenize(stretch))
        return ids


def has_any(text: str, marks: Iterable[str]) -> bool:
    """Whether one of some short texts is in a text: a few times as fast as a search by a regular expression."""
    for mark in marks:  # noqa: SIM110 (any() takes several times as long)
        if mark in text:
            return True
    return False


def _affixes(hf: Any) -> tuple[list[int], list[int]]:
    """What add_special_tokens puts before and behind a text: bos, as a rule, and nothing."""
    bare = hf.encode(START, add_special_tokens=False)
    full = hf.encode(START, add_special_tokens=True)
    for place in range(len(full) - len(bare) + 1):
        if full[place : place + len(bare)] == bare:
            return full[:place], full[place + len(bare) :]
    raise Unfit("its special tokens change the text between them")
