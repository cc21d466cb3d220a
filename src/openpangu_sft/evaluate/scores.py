"""Whether the text of an answer is right: the rules that docs/evaluate.md states."""

from __future__ import annotations

import re
import unicodedata
from typing import Callable, Literal

Score = Literal["exact", "contains", "choice"]

_PUNCTUATION = " ,;:!?'\"*`()[]。、“”‘’「」『』《》〈〉【】"  # not what is part of a value: - + % # $
_LETTER = r"\b([A-Z])\b(?!(?<=I)['’ ][a-z])"  # alone, beside Chinese too (re.ASCII), and not the pronoun
_ALONE = re.compile(_LETTER + r"(?!(?<=A) (?!(?:is|and|or)\b)[a-z])", re.ASCII)  # nor the article
_CHOSEN = r"(?<!不)(?<!不[应该能可])选(?!项)|不是[A-Z],?而是"
_MARK = rf"答案|正确的?选项|{_CHOSEN}|(?i:answer|choose|correct (?:option|choice))|boxed"
_BETWEEN = r"(?:[\s:=()\[\]{*\"'`“‘「【】$\\是为应该的选择项-]|(?i:is|be|would|should|option|choice|text|boxed)){0,30}"
_LIST = r"(?!\s*(?:(?:[和与或]|and|or)\s*[A-Z]\b|[、,/]\s*[A-Z]\s*(?:[.,。、\n]|$)))"  # of letters: no decision
_DECIDED = re.compile(f"(?:{_MARK}){_BETWEEN}{_LETTER}{_LIST}", re.ASCII)


def normalised(text: str) -> str:
    """NFKC, case folded, one blank between words, no thousands separators, no punctuation at the ends."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text).replace("\N{MINUS SIGN}", "-")
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.lstrip(_PUNCTUATION).rstrip(f"{_PUNCTUATION}.")  # .5 is not 5


def exact(expected: str, answer: str) -> bool:
    """Whether both are the same after normalisation, and not nothing."""
    return normalised(expected) == normalised(answer) != ""


def contains(expected: str, answer: str) -> bool:
    """Whether an answer has what is expected, a number or an ASCII word as a whole: 12 is not in 112, 1.12 or -12."""
    wanted = normalised(expected)
    before = r"(?<![a-z0-9_])" if re.match(r"[-.]?[a-z0-9]", wanted) else ""
    before += r"(?<![0-9]\.)(?<![^a-z0-9_]-)" if re.match("[0-9]", wanted) else ""
    after = r"(?![a-z0-9_])" if re.search("[a-z]$", wanted) else r"(?!\.?[0-9])" if re.search("[0-9]$", wanted) else ""
    return bool(wanted and re.search(before + re.escape(wanted) + after, f" {normalised(answer)}"))


def choice(expected: str, answer: str) -> bool:
    """Whether an answer decides for the expected letter: the last after a mark, else the only one, else all of it."""
    text = unicodedata.normalize("NFKC", answer)
    found = _DECIDED.findall(text)[-1:] or {*_ALONE.findall(text)} or re.findall("^[a-z]$", normalised(text))
    return "".join(found).upper() == normalised(expected).upper()


RULES: dict[Score, Callable[[str, str], bool]] = {"exact": exact, "contains": contains, "choice": choice}
