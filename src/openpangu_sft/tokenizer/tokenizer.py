"""Text spans to token ids, exactly as the checkpoint's Hugging Face tokenizer gives them.

Always the slow class: fast and slow ones may disagree, and preprocessing, training and chat must use the same.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from sentencepiece import SentencePieceProcessor

from openpangu_sft.artifacts.artifact import files_digest
from openpangu_sft.conversations.calls import CALLS, THINKING
from openpangu_sft.tokenizer.remote_code import Trust, may_run
from openpangu_sft.tokenizer.template import END, HEADERS, START, TextSpan, cut_inside
from openpangu_sft.util.errors import UserError

IGNORED = -100  # label of a token that is not a target (PyTorch's cross_entropy default, and MindSpeed-LLM's)

UNDECODED, CHARACTER_BYTES = "\ufffd", 4
"""What decoders give for bytes that are no whole character, and how many bytes a character has at most."""

COMPARED_AT_ONCE = 1000  # tokens of the vocabulary in one text

FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")


class Tokenizer:
    """The tokenizer of a Hugging Face checkpoint; with `trust_remote_code` Python files in its directory are run.

    Raises `UserError` as `may_run`, and where files are missing or invalid, or openPangu's special tokens are not
    single tokens.
    """

    def __init__(self, directory: Path, trust_remote_code: Trust) -> None:
        _require_tokenizer(directory)
        self.directory = directory
        self.hf = load_hf(directory, may_run(directory, trust_remote_code))
        self._direct: Optional[DirectEncoder] = None
        self.start_id, self.end_id = self._single(START), self._single(END)
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else 0
        self._added: dict[int, str] = {number: token.content for number, token in self.hf.added_tokens_decoder.items()}
        parts = (*THINKING, *CALLS)
        self.unspoken = {number for number in self.hf.all_special_ids if self._added.get(number) not in parts}
        """Special tokens that are no part of an answer's text: bos, the end token, padding."""
        self.lacking = set(parts).difference(self._added.values())
        """Tokens of thinking and calls that are no added tokens here: they would be trained as plain text."""
        control = sorted({*self._added.values(), START, END} - {""}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)))
        self._control_marks = {token[0] for token in control}
        self.is_control = np.zeros(max(len(self.hf), *self._added) + 1, bool)
        """bool [ids]: which ids are control tokens. <unk> is none: any unknown character becomes one."""
        numbers = {*self._added, self.start_id, self.end_id} - {self.hf.unk_token_id}
        self.is_control[list(numbers)] = True
        self.header = self.span_ids(TextSpan(START + HEADERS["assistant"], trained=False))
        """The assistant's header: what comes before an answer."""
        opened = self.hf.encode(START, add_special_tokens=True)
        self.opening = [number for number in opened if self.is_control[number] and number != self.start_id]
        """Control tokens around the span that opens a sample: bos."""

    def __len__(self) -> int:
        return len(self.hf)

    def _single(self, text: str) -> int:
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.hf.unk_token_id:
            what = f"{text} is not one token here but {ids}"
            raise UserError(what, where=self.directory, remedy="check paths.hf: is it openPangu's?")
        return ids[0]

    def control_token(self, text: str, begin: int = 0) -> Optional[re.Match[str]]:
        """The first control token in a user's text, from `begin` on: encoded as one it could forge a turn."""
        for mark in self._control_marks:  # most texts have none, and `in` takes a fraction of a search
            if mark in text:
                return self._control.search(text, begin)
        return None

    def inside_control_tokens(self, text: str) -> list[str]:
        """Cuts a text inside each of its control tokens; a `Cut`."""
        return cut_inside(text, self.control_token)

    def control_ids(self, text: str) -> list[int]:
        """The ids of the control tokens that a text spells, in their order."""
        found: list[int] = self.hf.convert_tokens_to_ids(self._control.findall(text))
        return found

    def span_ids(self, span: TextSpan) -> list[int]:
        """Token ids of one span, encoded by itself."""
        ids: list[int] = self.hf.encode(span.text, add_special_tokens=span.opens)
        return ids

    def prompt_ids(self, spans: Iterable[TextSpan]) -> list[int]:
        """Token ids of spans one after another."""
        return [number for span in spans for number in self.span_ids(span)]

    def encode(self, spans: Sequence[TextSpan]) -> list[list[int]]:
        """Token ids of each span, encoded by itself; by SentencePiece directly after a successful `go_direct`."""
        return self._direct(spans) if self._direct else list(map(self.span_ids, spans))

    def go_direct(self, spans: Sequence[TextSpan]) -> str:
        """Makes `encode` use SentencePiece directly, if that gives these and some odd spans the same ids as the class.

        Returns why it does not; empty if it does.
        """
        try:
            direct = DirectEncoder(self.hf)
        except UserError as reason:
            return reason.what
        compared = [TextSpan(text, trained=False, opens=opens) for text in _odd_texts() for opens in (False, True)]
        compared += spans
        for span, ids in zip(compared, direct(compared)):
            if ids != self.span_ids(span):
                return f"it gives other ids than SentencePiece alone for {reprlib.repr(span.text)}"
        self._direct = direct
        return ""

    def first_disagreement(self, other: Any) -> str:
        """The first text, shortened, that another Hugging Face tokenizer encodes differently; empty if there is none.

        The texts are odd ones, then every token of the vocabulary: alone, and among its neighbours.
        """

        def differs(text: str, opens: bool = False) -> bool:
            mine, its = (hf.encode(text, add_special_tokens=opens) for hf in (self.hf, other))
            return bool(mine != its)

        for text in _odd_texts():
            if differs(text) or differs(text, opens=True):
                return reprlib.repr(text)
        vocabulary = sorted(self.hf.get_vocab().items(), key=lambda item: int(item[1]))
        texts = [token.replace("▁", " ") for token, _ in vocabulary]
        for begin in range(0, len(texts), COMPARED_AT_ONCE):
            some = texts[begin : begin + COMPARED_AT_ONCE]
            if differs(" ".join(some)):
                return reprlib.repr(next(filter(differs, some), " ".join(some)))
        return ""

    def decode_reply(self, reply: Sequence[int]) -> str:
        """Text of generated tokens, without end tokens and a character that is cut off; raises as `texts`."""
        return "".join(text for number, text in zip(reply, self.texts(reply)) if number not in self.unspoken)

    def texts(self, ids: Iterable[int]) -> Iterator[str]:
        """What each token adds to the text; nothing where it ends inside a character, which its last token adds.

        Each is decoded after what precedes it, or an "a", because SentencePiece classes change or drop the first
        character of whatever they decode. Raises `UserError` where an id is not in this tokenizer.
        """
        start: list[int] = self.hf.encode("a", add_special_tokens=False)
        context, pending = start, list[int]()
        for number in ids:
            if number not in self._added and not 0 <= number < len(self.hf):
                what = f"token id {number} is not in this tokenizer"
                remedy = "take the one that dataset or model were made with (make preprocess, make merge)"
                raise UserError(what, where=self.directory, remedy=remedy)
            pending.append(number)
            text = self._added.get(number) or self._decode([*context, *pending])[len(self._decode(context)) :]
            if text.endswith(UNDECODED) and len(pending) < CHARACTER_BYTES:
                yield ""
                continue
            yield text
            context, pending = start if number in self._added or text.endswith(UNDECODED) else pending, []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, control tokens included."""
        return "".join(self.texts(ids))

    def _decode(self, ids: Sequence[int]) -> str:
        # a clean-up would take the space out of " ." or " n't" wherever the model wrote one
        return str(self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _odd_texts() -> list[str]:
    """Texts that tokenizer classes are known to encode differently from SentencePiece."""
    inner = ["", " ", "a", " a", "a ", "  a  b", "\n\n a", "\t", "▁a", "▁", "好", " 好a", "A.b,c", "1 234"]
    inner += ["\u3000", "\0", "é", "e\u0301", "\U0001f600", "ﬁ①", "\u200b", "<0x41>", "[unused", "]"]
    inner += ["a" * 300, " " * 300, f"a{END} b {START}c"]
    return [before + text + after for text in inner for before, after in (("", ""), (START + HEADERS["user"], END))]


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files in a checkpoint directory, remote code included."""
    found = [directory / name for name in FILES if (directory / name).is_file()]
    return found + sorted(directory.glob("tokenization_*.py"))


def tokenizer_digest(directory: Path) -> str:
    """sha256 over the tokenizer's files, for manifests; raises `UserError` where there is no tokenizer."""
    _require_tokenizer(directory)
    return files_digest(tokenizer_files(directory))


def _require_tokenizer(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError("no such directory", where=directory, remedy="put the Hugging Face checkpoint there")
    if not (directory / "tokenizer_config.json").is_file():
        raise UserError("no tokenizer here (tokenizer_config.json)", where=directory, remedy="check paths.hf")


def load_hf(directory: Path, trust_remote_code: bool, use_fast: bool = False) -> Any:
    """Loads the Hugging Face tokenizer; `use_fast` as in AutoTokenizer; raises `UserError` if it does not load."""
    from transformers import AutoTokenizer  # slow to import, and not every stage needs it

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(directory), use_fast=use_fast, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if loaded is False:  # transformers' result where SentencePiece cannot read its model
            SentencePieceProcessor(model_file=str(directory / FILES[0]))  # says why
            raise ValueError("transformers gives no reason")
        return loaded
    except Exception as error:  # of any type, depending on its files and, with trust_remote_code, on their code
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


class DirectEncoder:
    """SentencePiece without Hugging Face's class: the same ids, from batches of text, several times as fast.

    A slow SentencePiece class (transformers 4.53.2, PreTrainedTokenizer.tokenize; `_tokenize` of openPangu's class and
    of LlamaTokenizer with legacy=true) splits a text at added tokens, encodes each text between them by
    `sp_model.encode(text, out_type=str)` and looks up the pieces by `piece_to_id`. `sp_model.encode(text,
    out_type=int)` gives the same ids but for unknown characters, whose pieces are their own text: a text with one is
    left to the class. Whether a class works this way cannot be seen from outside: `Tokenizer.go_direct` compares the
    ids before this is used. Raises `UserError`, which says what else this class does.
    """

    def __init__(self, hf: Any) -> None:
        if not isinstance(getattr(hf, "sp_model", None), SentencePieceProcessor):
            raise UserError("it has no sp_model of SentencePiece's")
        for token in hf.added_tokens_decoder.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise UserError(f"its added token {token.content} takes spaces around it away, or wants them there")
        self._hf, self._model = hf, hf.sp_model
        self._added: dict[str, int] = dict(hf.added_tokens_encoder)
        longest_first = sorted(filter(None, self._added), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split

    def __call__(self, spans: Sequence[TextSpan]) -> list[list[int]]:
        """Token ids of each span, encoded by itself."""
        split = [self._split(span.text) for span in spans]  # text, added token, text, …, text
        encoded = iter(self._encode([text for parts in split for text in parts[::2] if text]))
        found = []
        for span, parts in zip(spans, split):
            ids: list[int] = []
            for number, part in enumerate(parts):
                if number % 2:
                    ids.append(self._added[part])
                elif part:
                    ids += next(encoded)
            found.append(self._hf.build_inputs_with_special_tokens(ids) if span.opens else ids)
        return found

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._model.encode(texts, out_type=int, num_threads=1) if texts else []
        unknown = self._model.unk_id()
        for number, ids in enumerate(encoded):
            if unknown in ids:
                encoded[number] = self._hf.convert_tokens_to_ids(self._hf._tokenize(texts[number]))
        return encoded
