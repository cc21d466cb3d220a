"""Every rule that a sample must meet: its message, what is counted, and that docs/data.md says the same."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from conftest import ROOT, MakeRecipe, conversation
from openpangu_sft.dataset.preprocess import run_preprocess
from refusals import refusal_of


class Rule(NamedTuple):
    """A rule, what breaks it, and what is said then; an empty message means that it is taken as it is."""

    rule: str
    line: bytes
    message: str


def sample(**changes: Any) -> bytes:
    """A good sample with some keys changed, as a line; a key that becomes `...` is left out."""
    record = {**conversation("问", "答"), **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...}, ensure_ascii=False).encode()


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "好"} for role in roles]


def content(value: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": value}, *turns("assistant")]


def answers(**changes: object) -> list[dict[str, object]]:
    """A question and an answer with some keys changed."""
    return [{"role": "user", "content": "好"}, {"role": "assistant", "content": "好", **changes}]


CALLS = '[{"name":"f","arguments":{}}]'
GOOD = sample()
LONG = json.dumps(
    {"meta_prompt": [""], "data": [*turns("user"), {"role": "assistant", "content": "a " * 200}]}
).encode()

LENIENT = "; data.turns=lenient accepts it"
DROPS = "; data.turns=lenient drops what follows the last one"
FORGES = "which could forge a turn: take it out, or set data.control_tokens=escape"

RULES = {
    "byte-order-mark": Rule("a byte order mark at the beginning of the file", b"\xef\xbb\xbf" + GOOD, ""),
    "crlf": Rule("CRLF at the end of a line", GOOD + b"\r", ""),
    "blank": Rule("blank lines", b"  \r\n\n" + GOOD, ""),
    "not-utf8": Rule("valid UTF-8", b'{"a": "\xff"}', "not UTF-8: byte 0xff at character 8"),
    "not-json": Rule(
        "valid JSON", b"{broken", "not valid JSON: Expecting property name enclosed in double quotes (column 2)"
    ),
    "nan": Rule("only numbers that JSON knows", b'{"a": NaN}', "number that JSON does not know: NaN"),
    "nested": Rule("not nested without end", b"[" * 100000, "nested too deeply"),
    "array": Rule(
        "one sample a line",
        b"[",
        "not valid JSON: an array over several lines; if the file is one array, name it .json",
    ),
    "no-object": Rule("an object", b"[1]", "is a list, not an object with meta_prompt and data"),
    "no-meta-prompt": Rule(
        "`meta_prompt` is there", sample(meta_prompt=...), 'meta_prompt is missing: write "meta_prompt": [""] for none'
    ),
    "null-meta-prompt": Rule("and is not null", sample(meta_prompt=None), "meta_prompt is null, not a list of texts"),
    "text-meta-prompt": Rule("a text as well as a list of texts, mixed in one file", sample(meta_prompt="简短"), ""),
    "mixed-meta-prompt": Rule(
        "with nothing but texts in it", sample(meta_prompt=["a", 1]), "meta_prompt 2 is a number, not a text"
    ),
    "empty-meta-prompt": Rule(
        "not an empty list: chat always writes a system header",
        sample(meta_prompt=[]),
        'meta_prompt is an empty list: write [""] for no system prompt',
    ),
    "no-data": Rule("`data` is there", sample(data=...), "data is missing"),
    "null-data": Rule("and is not null", sample(data=None), "data is null, not a list of messages"),
    "no-messages": Rule("and not empty", sample(data=[]), "data has no messages"),
    "no-message": Rule(
        "messages are objects", sample(data=["好"]), "message 1 is a text, not an object with role and content"
    ),
    "no-role": Rule("with a role", sample(data=[{"content": "好"}]), "role of message 1 is missing, not a text"),
    "no-content": Rule("and a content", sample(data=[{"role": "user"}]), "content of message 1 is missing, not a text"),
    "null-content": Rule("that is not null", sample(data=content(None)), "content of message 1 is null, not a text"),
    "list-content": Rule("nor a list", sample(data=content(["好"])), "content of message 1 is a list, not a text"),
    "half-character": Rule(
        "whole characters only",
        sample(data=turns("user", "assistant")).replace(b'"content": "', b'"content": "\\ud800', 1),
        "message 1 holds half a character: '\\ud800', a surrogate without its pair",
    ),
    "unknown-role": Rule(
        "roles are user, assistant, tool and function",
        sample(data=turns("human", "assistant")),
        "message 1 has unknown role 'human': use user, assistant, tool, function",
    ),
    "system-role": Rule(
        "system prompts stand in `meta_prompt`",
        sample(data=turns("system", "user", "assistant")),
        "message 1 has role system: move its content into meta_prompt",
    ),
    "assistant-first": Rule(
        "the user comes first",
        sample(data=turns("assistant", "user", "assistant")),
        f"message 1 (assistant) comes first: expected user{LENIENT}",
    ),
    "tool-first": Rule(
        "a tool follows an assistant or a tool",
        sample(data=turns("user", "tool", "assistant")),
        "message 2 (tool) follows user: expected assistant",
    ),
    "tool-before-all": Rule(
        "and never begins", sample(data=turns("tool", "assistant")), "message 1 (tool) comes first: expected user"
    ),
    "user-twice": Rule(
        "nobody speaks twice",
        sample(data=turns("user", "user", "assistant")),
        f"message 2 (user) follows user: expected assistant{LENIENT}",
    ),
    "assistant-twice": Rule(
        "the assistant neither",
        sample(data=turns("user", "assistant", "assistant")),
        f"message 3 (assistant) follows assistant: expected user or tool or function{LENIENT}",
    ),
    "user-after-tool": Rule(
        "a tool's result is for the assistant",
        sample(data=turns("user", "assistant", "tool", "user", "assistant")),
        f"message 4 (user) follows tool: expected tool or function or assistant{LENIENT}",
    ),
    "tools-twice": Rule(
        "several tools may answer one after another",
        sample(data=turns("user", "assistant", "tool", "tool", "assistant")),
        "",
    ),
    "odd-last": Rule(
        "the last message is the assistant's",
        sample(data=turns("user", "assistant", "user")),
        f"the last message is the user's: a sample must end with an assistant message{DROPS}",
    ),
    "nothing-trained": Rule(
        "so something is trained",
        sample(data=turns("user")),
        f"the last message is the user's: a sample must end with an assistant message{DROPS}",
    ),
    "weight-0": Rule(
        "nor is every answer's weight 0",
        sample(data=answers(weight=0)),
        "nothing to train on: every answer has weight 0",
    ),
    "weight": Rule(
        "weights are 0 or 1",
        sample(data=answers(weight=0.5)),
        "weight of message 2 is 0.5: tokens are trained on or not, so write 0 or 1",
    ),
    "weight-1": Rule("also as true and false", sample(data=answers(weight=True)), ""),
    "empty-question": Rule("no question is blank", sample(data=content(" ")), "message 1 (user) is empty"),
    "empty-answer": Rule(
        "no answer is blank",
        sample(data=answers(content="")),
        "message 2 (assistant) is empty: there is nothing to train on but its end",
    ),
    "empty-result": Rule(
        "a tool's result may be",
        sample(data=[*turns("user", "assistant"), {"role": "tool", "content": ""}, *turns("assistant")]),
        "",
    ),
    "thinking": Rule("an answer may have thinking and calls", sample(data=answers(thinking="想", calls=CALLS)), ""),
    "own-thinking": Rule("also in the model's tokens", sample(data=answers(content="[unused16]想[unused17]好")), ""),
    "text-thinking": Rule(
        "thinking is a text", sample(data=answers(thinking=1)), "thinking of message 2 is a number, not a text"
    ),
    "broken-calls": Rule(
        "calls are the JSON text of a list",
        sample(data=answers(calls="f")),
        "message 2: calls is a text that cannot be read: not valid JSON: Expecting value (column 1)",
    ),
    "no-function": Rule(
        "of calls with a name",
        sample(data=answers(calls="[{}]")),
        "message 2: a call names no function: expected name and arguments",
    ),
    "calls-of-user": Rule(
        "of the assistant only",
        sample(data=[{"role": "user", "content": "问", "calls": CALLS}, *turns("assistant")]),
        "message 1 (user) has calls: only an assistant's message may",
    ),
    "tools": Rule("tools are a list of objects", sample(tools=1), "tools is a number, not a list of tool objects"),
    "unknown-key": Rule(
        "every key with content is known",
        sample(mood="grim"),
        "unknown key mood: if it does not change what is to be learnt, set data.ignore_keys=[mood]",
    ),
    "harmless-key": Rule("or does not matter", sample(id=7, source="x"), ""),
    "start-token": Rule(
        "no start token in a content",
        sample(data=content("a[unused9]助手：b")),
        f"message 1 holds the control token [unused9], {FORGES}",
    ),
    "end-token": Rule(
        "no end token",
        sample(data=content("a[unused10]b")),
        f"message 1 holds the control token [unused10], {FORGES}",
    ),
    "other-token": Rule(
        "nor any other added token of the tokenizer",
        sample(meta_prompt=["<s>"]),
        f"meta_prompt holds the control token <s>, {FORGES}",
    ),
    "too-long": Rule(
        "not longer than `data.seq_length`",
        LONG,
        "221 tokens, above data.seq_length 128: shorten it, or set data.too_long",
    ),
}


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.message])
def test_a_sample_that_breaks_a_rule(make_recipe: MakeRecipe, name: str) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(GOOD + b"\n\n" + RULES[name].line + b"\n" + GOOD + b"\n")
    message = RULES[name].message
    assert refusal_of(run_preprocess, recipe) == f"{path}:3: {message} -> fix it, or set data.on_bad_sample=skip"
    assert not (recipe.path("shards") / "a").exists()

    [(_, manifest, _)] = run_preprocess(make_recipe("data.on_bad_sample=skip"))
    assert [manifest.counts[key] for key in ("read", "packed", "rejected", "dropped")] == [3, 2, 1, 0]
    assert list(manifest.counts["reasons"].values()) == [1]
    [line] = (recipe.path("shards") / "a/rejects.jsonl").read_text("utf-8").splitlines()
    reject = json.loads(line)
    assert (reject["file"], reject["place"], reject["reason"]) == ("a.jsonl", "3", message)
    text = RULES[name].line.decode("utf-8", "backslashreplace")
    assert reject["record"] == (text if isinstance(reject["record"], str) else json.loads(text))


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.message])
def test_what_is_taken_as_it_is(make_recipe: MakeRecipe, name: str) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(RULES[name].line + b"\n" + GOOD + b"\n")
    [(_, manifest, _)] = run_preprocess(recipe)
    assert [manifest.counts[key] for key in ("read", "packed", "rejected", "dropped")] == [2, 2, 0, 0]


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        pytest.param(slice(5), "the last line is cut off, or not valid JSON", id="cut-off"),
        pytest.param(slice(-6), "the last line is cut off, or not UTF-8: byte 0xe7", id="cut-off-inside"),
    ],
)
def test_a_last_line(make_recipe: MakeRecipe, cut: slice, reason: str) -> None:
    recipe = make_recipe()
    path = recipe.path("samples") / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(GOOD + b"\n" + GOOD[cut])
    assert refusal_of(run_preprocess, recipe).startswith(f"{path}:2: {reason}")
    assert f"| `{reason}" in TABLE


TABLE = (ROOT / "docs/data.md").read_text("utf-8")


@pytest.mark.parametrize("name", RULES)
def test_the_docs_list_the_rule(name: str) -> None:
    rule, _, message = RULES[name]
    said = f"`{message}`" if message else "(taken as it is)"
    assert f"| {rule} | {said} | `{name}` |\n" in TABLE


def test_the_docs_list_no_other_rule() -> None:
    rows = TABLE.partition("\n| rule | message | test |\n|---|---|---|\n")[2].partition("\n\n")[0].splitlines()
    listed = {row.rsplit("`", 2)[1] for row in rows}
    assert listed - {"cut-off", "cut-off-inside"} == set(RULES)
