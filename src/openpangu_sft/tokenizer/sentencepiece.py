"""SentencePiece without the Hugging Face class around it: the same ids, from batches of text, several times as fast.

A slow SentencePiece class (transformers 4.53.2, PreTrainedTokenizer.tokenize; `_tokenize` of openPangu's class and of
LlamaTokenizer with legacy=true) splits a text at added tokens, encodes each text between them by
`sp_model.encode(text, out_type=str)` and looks up the pieces by `piece_to_id`. `sp_model.encode(text, out_type=int)`
gives the same ids but for unknown characters, whose pieces are their own text: a text with one is left to the class.

Whether a class works this way cannot be seen from outside: `Tokenizer.go_direct` compares the ids before this is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor

from openpangu_sft.tokenizer.template import START, TextSpan
from openpangu_sft.util.errors import UserError


class DirectEncoder:
    """Encodes spans as a slow SentencePiece class of Hugging Face's does; `UserError` says what else this one does."""

    def __init__(self, hf: Any) -> None:
        if not isinstance(getattr(hf, "sp_model", None), SentencePieceProcessor):
            raise UserError("it has no sp_model of SentencePiece's")
        if getattr(hf, "do_lower_case", False):
            raise UserError("it makes letters small")
        for token in hf.added_tokens_decoder.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise UserError(f"its added token {token.content} takes spaces around it away, or wants them there")
        self._hf, self._model = hf, hf.sp_model
        self._added: dict[str, int] = dict(hf.added_tokens_encoder)
        longest_first = sorted(filter(None, self._added), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._before, self._after = _affixes(hf)

    def __call__(self, spans: Sequence[TextSpan]) -> list[list[int]]:
        """Token ids of each span, encoded by itself."""
        split = [self._split(span.text) for span in spans]  # text, added token, text, …, text
        encoded = iter(self._encode([text for parts in split for text in parts[::2] if text]))
        found = []
        for span, parts in zip(spans, split):
            ids = [*self._before] if span.opens else []
            for number, part in enumerate(parts):
                if number % 2:
                    ids.append(self._added[part])
                elif part:
                    ids += next(encoded)
            found.append([*ids, *self._after] if span.opens else ids)
        return found

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._model.encode(texts, out_type=int, num_threads=1) if texts else []
        unknown = self._model.unk_id()
        for number, ids in enumerate(encoded):
            if unknown in ids:
                encoded[number] = self._hf.convert_tokens_to_ids(self._hf._tokenize(texts[number]))
        return encoded


def _affixes(hf: Any) -> tuple[list[int], list[int]]:
    """What add_special_tokens puts before and after a text: bos, as a rule, and nothing."""
    bare, full = (hf.encode(START, add_special_tokens=special) for special in (False, True))
    for begin in range(len(full) - len(bare) + 1):
        if full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    raise UserError("its special tokens change the text between them")
