"""Keys of raw data: understood, harmless, or refused by name, so that none that changes a sample's meaning vanishes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_HARMLESS = """_id annotations annotator author cache_control call_id categories category conv_id conversation_hash
    conversation_id conversation_index conversation_name create_time created created_at creator data_source dataset
    dataset_name date datetime dialog_id dialogue_id difficulty domain end_time finish_reason generator hash id ids idx
    index is_error key lang language license logprobs message_id meta metadata model model_name name num_turns object
    origin parallel_tool_calls prompt_id qid question_id reasoning_language row_id sample_id service_tier
    session_id signature source sources split start_time status stop_reason stop_sequence subject subset
    system_fingerprint tag tags task task_id task_name task_type thoughtSignature thought_signature time timestamp title
    tokens tool_call_id tool_use_id topic turn type update_time url usage user_id uuid version"""
HARMLESS = frozenset(_HARMLESS.split())  # keys that describe a sample or where it comes from

_MEDIA = """audio audios file fileData file_data files image image_url images inlineData inline_data input_audio
    input_file input_image video videos"""
MEDIA = frozenset(_MEDIA.split())

EMPTY: tuple[object, ...] = (None, "", [], {})  # values that hold nothing

_LIKE_WEIGHTS = frozenset(
    ("label", "loss", "loss_mask", "loss_scale", "loss_weight", "mask", "masked", "train", "train_detail", "trainable")
)


class BadSample(Exception):
    """A sample that must not be trained on as it is; the text says why, and the remedy."""


@contextlib.contextmanager
def naming_message(name: str) -> Iterator[None]:
    """Puts a message's name before what is wrong with its calls."""
    try:
        yield
    except BadSample as error:
        raise BadSample(f"{name}: {error}") from None


class Keys:
    """The rule for keys: those in data.ignore_keys are left out wherever they occur, even if their meaning is known."""

    def __init__(self, ignored: Collection[str] = ()) -> None:
        self._ignored = frozenset(ignored)
        self.counts: Counter[str] = Counter()  # how often each key was left out, ignored or harmless

    def known(
        self, name: str, record: Mapping[str, Any], known: Collection[str], required: bool = False
    ) -> Mapping[str, Any]:
        """The record without keys that are left out; raises `BadSample` for one that is neither known nor harmless.

        `name` is the record's in messages, empty for a whole record. `required`: known keys stay even if ignored, as
        samples, parts and calls make no sense without, and input or weight is the name of a record's column too.
        """
        if not self._ignored and record.keys() <= known:  # type: ignore[operator]
            return record
        kept = {}
        for key, value in record.items():
            if key in known and (required or key not in self._ignored):
                kept[key] = value
            elif value not in EMPTY:
                if key not in self._ignored and key not in HARMLESS:
                    raise BadSample(_unknown(name, key))
                self.counts[key] += 1
        return kept


def _unknown(name: str, key: object) -> str:
    text = repr(key).strip("'")[:80] or "''"
    where = f" of {name}" if name else ""
    if key in MEDIA:
        return f"key {text}{where}: images, audio, video and files cannot be trained, the model reads text only"
    if key in _LIKE_WEIGHTS:
        return f"unknown key {text}{where}: if it says what is trained, write weight, 0 or 1, into each message"
    return f"unknown key {text}{where}: if it does not change what is to be learnt, set data.ignore_keys=[{text}]"
