"""Conversations with thinking, calls and tools as tokens: what is trained, and that no text in them forges any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations_drawn import PLAIN, TOKENS, samples
from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.dataset.encode import Encoded, encode_samples, input_ids_of, training_views
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.template import TextSpan
from openpangu_sft.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_hf: Path) -> Tokenizer:
    opened = Tokenizer(tiny_hf, trust_remote_code=False)
    assert opened.go_direct([]) == ""
    return opened


def data(**chosen: Any) -> Data:
    return Data(seed=1, workers=1, seq_length=9999, **chosen)


def encode(tokenizer: Tokenizer, sample: Sample, **chosen: Any) -> Union[Encoded, BadSample]:
    [outcome] = encode_samples([sample], tokenizer, data(**chosen))
    return outcome


def rendered(answer: Message) -> str:
    """An answer as the vendor writes it."""
    thinking = "" if answer.thinking is None else f"[unused16]{answer.thinking}[unused17]"
    calls = f"[unused11]{answer.calls}[unused12]" if answer.calls else ""
    return f"{thinking}{answer.content}{calls}[unused10]"


def control_tokens(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    found: list[str] = tokenizer.hf.convert_ids_to_tokens([number for number in ids if tokenizer.is_control[number]])
    return found


def expected_control_tokens(sample: Sample, tool_prompt: list[str]) -> list[str]:
    """Those of a conversation's frame, in their order."""
    found = ["<s>"]
    own = [prompt for prompt in sample.meta_prompt if prompt or not sample.tools]
    for prompt in [[]] * len(own) + [tool_prompt] * bool(sample.tools):
        found += ["[unused9]", *prompt, "[unused10]"]
    for message in sample.data:
        thinking = [] if message.thinking is None else ["[unused16]", "[unused17]"]
        calls = ["[unused11]", "[unused12]"] if message.calls else []
        found += ["[unused9]", *thinking, *calls, "[unused10]"]
    return found


TEMPLATES = {
    None: ["[unused11]", "[unused12]"] * 2,
    "[unused20]{% for tool in tools %}{% for key in tool %}[{{ key }}]{{ tool[key] }}{% endfor %}{% endfor %}": [
        "[unused20]"
    ],
}


@settings(deadline=None)
@given(samples(PLAIN))
def test_what_is_trained_is_every_answer_once_as_it_is_rendered(tokenizer: Tokenizer, sample: Sample) -> None:
    trained: list[int] = []
    for view in training_views(sample, data()):
        outcome = encode(tokenizer, view)
        assert isinstance(outcome, Encoded)
        trained += outcome.marked[outcome.marked >= 0].tolist()
    answers = [message for message in sample.data if message.role == "assistant" and message.trained]
    assert trained == [
        number for answer in answers for number in tokenizer.span_ids(TextSpan(rendered(answer), trained=True))
    ]


@settings(deadline=None)
@given(samples([*PLAIN, *TOKENS]), st.sampled_from(list(TEMPLATES)))
def test_escaped_texts_hold_no_control_token(tokenizer: Tokenizer, sample: Sample, template: Any) -> None:
    outcome = encode(tokenizer, sample, control_tokens="escape", tool_prompt=template)
    assert isinstance(outcome, Encoded)
    ids = input_ids_of(outcome.marked).tolist()
    assert control_tokens(tokenizer, ids) == expected_control_tokens(sample, TEMPLATES[template])
    ends = [number for number in outcome.marked.tolist() if number == tokenizer.end_id]
    assert len(ends) == sum(message.trained for message in sample.data if message.role == "assistant")


def all_texts(sample: Sample) -> list[str]:
    """Every text that its author wrote."""
    messages = [text for each in sample.data for text in (each.content, each.thinking or "", each.calls)]
    return [*sample.meta_prompt, sample.tools, *messages]


@settings(deadline=None)
@given(samples([*PLAIN, "好[unused9]"]))
def test_a_control_token_anywhere_is_refused(tokenizer: Tokenizer, sample: Sample) -> None:
    outcome = encode(tokenizer, sample)
    if any("[unused9]" in text for text in all_texts(sample)):
        assert "holds the control token [unused9], which could forge a turn" in str(outcome)
    else:
        assert isinstance(outcome, Encoded)


@pytest.mark.parametrize(
    ("place", "sample"),
    [
        ("meta_prompt", Sample(("[unused9]",), (Message("user", "a"), Message("assistant", "b")))),
        ("tools", Sample(("",), (Message("user", "a"), Message("assistant", "b")), '[{"name":"[unused9]"}]')),
        ("message 1", Sample(("",), (Message("user", "[unused9]"), Message("assistant", "b")))),
        ("message 2", Sample(("",), (Message("user", "a"), Message("assistant", "[unused9]")))),
        ("thinking of message 2", Sample(("",), (Message("user", "a"), Message("assistant", "b", "[unused9]")))),
        ("a call in message 2", Sample(("",), (Message("user", "a"), Message("assistant", "b", None, "[unused9]")))),
    ],
)
def test_the_refusal_says_where(tokenizer: Tokenizer, place: str, sample: Sample) -> None:
    assert str(encode(tokenizer, sample)).startswith(f"{place} holds the control token [unused9]")


def test_a_template_of_the_recipe_cannot_put_one_together(tokenizer: Tokenizer) -> None:
    sample = Sample(("",), (Message("user", "a"), Message("assistant", "b")), '[{"name":"unused9"}]')
    template = "[{{ tools[0].name }}]"
    refused = encode(tokenizer, sample, tool_prompt=template)
    assert str(refused).startswith("tools rendered by data.tool_prompt hold a control token, which could forge a turn")
    escaped = encode(tokenizer, sample, tool_prompt=template, control_tokens="escape")
    allowed = encode(tokenizer, sample, tool_prompt=template, control_tokens="allow")
    assert isinstance(escaped, Encoded)
    assert isinstance(allowed, Encoded)
    begins = [input_ids_of(each.marked).tolist().count(tokenizer.start_id) for each in (escaped, allowed)]
    assert begins == [3, 4]


def test_a_template_that_fails_is_the_sample_s_reason(tokenizer: Tokenizer) -> None:
    sample = Sample(("",), (Message("user", "a"), Message("assistant", "b")), '[{"name":"f"}]')
    assert "data.tool_prompt cannot render its tools" in str(encode(tokenizer, sample, tool_prompt="{{ tools.a.b }}"))


def test_thinking_and_calls_need_their_tokens(tiny_hf: Path, tmp_path: Path) -> None:
    """Without them they would be trained as plain text."""
    files = tmp_path / "hf"
    shutil.copytree(tiny_hf, files)
    config = json.loads((files / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {key: each for key, each in added.items() if each["content"] != "[unused17]"}
    (files / "tokenizer_config.json").write_text(json.dumps(config))
    opened = Tokenizer(files, trust_remote_code=False)
    calls = '[{"name":"f","arguments":{}}]'
    answers = [Message("assistant", "b", calls=calls), Message("assistant", "b", thinking="t")]
    called, thought = (encode(opened, Sample(("",), (Message("user", "a"), answer))) for answer in answers)
    assert isinstance(called, Encoded)
    assert isinstance(thought, BadSample)
    assert "[unused17] is no token of this tokenizer" in str(thought)
