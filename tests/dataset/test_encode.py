"""Samples to tokens under each policy: nothing is trained that is no answer, nothing is cut in the middle."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MakeRecipe, conversation, write_samples
from openpangu_sft.conversations.conversation import BadSample, Message, Sample, parse_sample
from openpangu_sft.dataset.encode import Encoded, TooLong, encode_samples, input_ids_of, labels_of
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.template import sample_spans
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from refusals import refusal_of


@pytest.fixture(scope="module")
def tokenizer(tiny_hf: Path) -> Tokenizer:
    opened = Tokenizer(tiny_hf, trust_remote_code=False)
    assert opened.go_direct([]) == ""
    return opened


def encode(
    tokenizer: Tokenizer, sample: Any, seq_length: int = 999, control: str = "refuse", long: str = "refuse"
) -> Any:
    [outcome] = encode_samples(
        [sample], tokenizer, Data(seed=1, workers=1, seq_length=seq_length, control_tokens=control, too_long=long)
    )
    return outcome


def test_marked_tokens() -> None:
    marked = np.array([[5, ~5, 0, ~0]], np.int32)
    assert input_ids_of(marked).tolist() == [[5, 5, 0, 0]]
    assert labels_of(marked).tolist() == [[5, IGNORED, 0, IGNORED]]


def test_a_batch_keeps_its_order_and_passes_bad_ones_on(tokenizer: Tokenizer) -> None:
    bad = BadSample("broken")
    samples = [parse_sample(conversation(f"问{number}", "答" * number)) for number in range(1, 4)]
    outcomes = encode_samples([samples[0], bad, *samples[1:]], tokenizer, Data(seed=1, workers=1, seq_length=999))
    assert outcomes[1] is bad
    alone = [encode(tokenizer, sample) for sample in samples]
    assert [outcomes[place].marked.tolist() for place in (0, 2, 3)] == [each.marked.tolist() for each in alone]
    assert encode_samples([], tokenizer, Data(seed=1, workers=1, seq_length=999)) == []


TURN = st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans())


@settings(max_examples=80, deadline=None)
@given(st.lists(TURN, min_size=1, max_size=5), st.integers(0, 12), st.integers(8, 150))
def test_truncation_keeps_whole_turns_and_an_answer(
    tokenizer: Tokenizer, turns: list[tuple[int, int, bool]], system: int, seq_length: int
) -> None:
    messages: list[Message] = []
    for asked, answered, tool in turns:
        messages += [Message("user", "问" * asked), Message("assistant", "a b " * answered)]
        messages += [Message("tool", "{}"), Message("assistant", "好")] if tool else []
    prompts = ("简短 " * system,)
    answers = [end for end, message in enumerate(messages, 1) if message.role == "assistant"]
    fitting = [end for end in answers if length(tokenizer, Sample(prompts, tuple(messages[:end]))) <= seq_length]
    outcome = encode(tokenizer, Sample(prompts, tuple(messages)), seq_length, long="truncate")
    if not fitting:
        assert isinstance(outcome, TooLong)
        first = length(tokenizer, Sample(prompts, tuple(messages[: answers[0]])))
        assert str(outcome).startswith(f"{first} tokens to the end of its first answer, above data.seq_length")
        return
    kept = encode(tokenizer, Sample(prompts, tuple(messages[: fitting[-1]])))
    assert outcome.marked.tolist() == kept.marked.tolist()
    assert outcome.truncated == (fitting[-1] < len(messages))
    assert outcome.marked[-1] == tokenizer.end_id  # trained


def length(tokenizer: Tokenizer, sample: Sample) -> int:
    return sum(map(len, tokenizer.encode(list(sample_spans(sample)))))


@pytest.mark.parametrize(("policy", "dropped", "rejected"), [("drop", 1, 0), ("refuse", 0, 1), ("truncate", 0, 1)])
def test_too_long_is_counted(make_recipe: MakeRecipe, policy: str, dropped: int, rejected: int) -> None:
    recipe = make_recipe(f"data.too_long={policy}", "data.on_bad_sample=skip")
    cut = conversation("问", "答", "再问", "长 " * 200)
    write_samples(recipe.path("samples") / "a.jsonl", [conversation("a", "b"), conversation("问 " * 200, "答"), cut])
    [(_, manifest, _)] = run_preprocess(recipe)
    counts = manifest.counts
    truncated = int(policy == "truncate")
    assert counts["read"] == 3 == counts["packed"] + counts["rejected"] + counts["dropped"]
    again = 0 if truncated else 2
    assert (counts["dropped"], counts["rejected"]) == (dropped * again, rejected * (again or 1))
    assert (counts["truncated"], counts["packed"]) == (truncated, 1 + truncated)
    assert sum(counts["reasons"].values()) == counts["dropped"] + counts["rejected"]


def test_dropping_stops_no_stage(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("data.too_long=drop")
    write_samples(recipe.path("samples") / "a.jsonl", [conversation("a", "b"), conversation("问 " * 200, "答")])
    [(_, manifest, _)] = run_preprocess(recipe)
    assert (manifest.counts["packed"], manifest.counts["dropped"], manifest.counts["rejected"]) == (1, 1, 0)
    assert "tokens, above data.seq_length 128" in (recipe.path("shards") / "a/rejects.jsonl").read_text("utf-8")
    write_samples(recipe.path("samples") / "a.jsonl", [conversation("问 " * 200, "答")])
    assert "no sample is left to train on" in refusal_of(run_preprocess, recipe)


def test_allowed_control_tokens_are_those_of_the_class(tokenizer: Tokenizer) -> None:
    sample = parse_sample(conversation("a[unused10][unused9]助手：b", "c[unused16]"))
    outcome = encode(tokenizer, sample, control="allow")
    expected = [number for piece in sample_spans(sample) for number in tokenizer.span_ids(piece)]
    assert input_ids_of(outcome.marked).tolist() == expected
    assert expected.count(tokenizer.start_id) == 4


def test_escaped_answers_are_trained_to_their_end(tokenizer: Tokenizer) -> None:
    outcome = encode(tokenizer, parse_sample(conversation("问", "a[unused10]b")), control="escape")
    assert isinstance(outcome, Encoded)
    trained = outcome.marked[outcome.marked >= 0].tolist()
    assert trained.count(tokenizer.end_id) == 1
    assert trained[-1] == tokenizer.end_id
    assert tokenizer.hf.sp_model.decode(trained[:-1]) == "a[unused10]b"


def test_an_escaped_answer_is_never_cut_at_its_own_control_token(tokenizer: Tokenizer) -> None:
    messages = (Message("user", "问"), Message("assistant", "a[unused10]" * 5), Message("user", "b"))
    sample = Sample(("",), (*messages, Message("assistant", "c " * 99)))
    whole = encode(tokenizer, Sample(("",), messages[:2]), control="escape").marked
    for seq_length in range(len(whole), len(whole) + 30):
        outcome = encode(tokenizer, sample, seq_length, control="escape", long="truncate")
        assert outcome.marked.tolist() == whole.tolist()
    assert isinstance(encode(tokenizer, sample, len(whole) - 1, control="escape", long="truncate"), TooLong)


def test_lengths_of_answers_accumulate(tokenizer: Tokenizer) -> None:
    """What the truncation counts is what packs hold."""
    sample = parse_sample(conversation("一", "二", "三", "四"))
    lengths = list(accumulate(map(len, tokenizer.encode(list(sample_spans(sample))))))
    assert lengths[-1] == len(encode(tokenizer, sample).marked)
