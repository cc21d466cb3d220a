"""Converters and reader: what each format becomes, what is refused and how the refusal reads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from openpangu_sft.conversations import alpaca, openai, sharegpt
from openpangu_sft.conversations.conversation import BadSample, Message, Sample
from openpangu_sft.conversations.files import raw_files, read_records
from openpangu_sft.conversations.format import convert_record, reason_class
from openpangu_sft.conversations.readers import RawRecord
from openpangu_sft.util.errors import UserError
from parameter_ids import named_by
from refusals import refusal_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"城市": {"type": "string"}}}}
WEATHER_TEXT = '[{"name":"get_weather","parameters":{"type":"object","properties":{"城市":{"type":"string"}}}}]'


def sample(prompts: list[str], *messages: tuple[str, str]) -> Sample:
    return Sample(tuple(prompts), tuple(Message(role, content) for role, content in messages))


def reason_of(record: object, source_format: str = "auto") -> str:
    with pytest.raises(BadSample) as caught:
        convert_record(record, source_format)
    return str(caught.value)


# --- Alpaca


def test_alpaca_joins_instruction_and_input_by_a_newline() -> None:
    assert alpaca.convert({"instruction": "翻译", "input": "早上好", "output": "Good morning"}) == sample(
        [""], ("user", "翻译\n早上好"), ("assistant", "Good morning")
    )


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_is_the_instruction_alone(extra: dict[str, Any]) -> None:
    record = {"instruction": "你好", "output": "好", **extra}
    assert alpaca.convert(record).data[0].content == "你好"


def test_alpaca_with_an_empty_instruction_asks_the_input() -> None:
    assert alpaca.convert({"instruction": "", "input": "你好", "output": "好"}).data[0].content == "你好"


def test_alpaca_history_and_system() -> None:
    record = {
        "instruction": "c",
        "output": "d",
        "system": "简短",
        "history": [["a", "b"], ["e", "f"]],
    }
    assert alpaca.convert(record) == sample(
        ["简短"],
        ("user", "a"),
        ("assistant", "b"),
        ("user", "e"),
        ("assistant", "f"),
        ("user", "c"),
        ("assistant", "d"),
    )


@pytest.mark.parametrize("history", [None, []])
def test_alpaca_history_may_be_absent(history: object) -> None:
    assert len(alpaca.convert({"instruction": "a", "output": "b", "history": history}).data) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": ""}, "output is empty"),
        ({"output": None}, "output is missing"),
        ({"output": 3}, "output is a number, not a text"),
        ({"instruction": ""}, "instruction and input are both empty"),
        ({"instruction": ["a"]}, "instruction is a list, not a text"),
        ({"input": {}}, "input is an object, not a text"),
        ({"system": 1.5}, "system is a number, not a text"),
        ({"history": "a"}, "history is a text, not a list of [user, assistant] pairs"),
        ({"history": [["a", "b"], ["c"]]}, "round 2 of history is not a pair of texts"),
        ({"history": [["a", None]]}, "round 1 of history is not a pair of texts"),
        ({"history": ["ab"]}, "round 1 of history is not a pair of texts"),
    ],
)
def test_alpaca_refuses(change: dict[str, Any], reason: str) -> None:
    assert reason in reason_of({"instruction": "a", "output": "b", **change}, "alpaca")


def test_alpaca_needs_an_instruction_key() -> None:
    assert reason_of({"output": "b"}, "alpaca") == "instruction is missing"


# --- ShareGPT


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


def test_sharegpt_with_tools() -> None:
    record = {
        "conversations": turns(
            ("human", "天气?"), ("function_call", '{"name": "w"}'), ("observation", "晴"), ("gpt", "晴天")
        ),
        "system": "你是助手",
        "tools": [WEATHER],
    }
    assert sharegpt.convert(record) == sample(
        ["你是助手", WEATHER_TEXT],
        ("user", "天气?"),
        ("assistant", '{"name": "w"}'),
        ("tool", "晴"),
        ("assistant", "晴天"),
    )


def test_tools_as_text_and_as_list_give_the_same_prompt() -> None:
    conversations = turns(("human", "a"), ("gpt", "b"))
    for tools in ([WEATHER], json.dumps([WEATHER]), json.dumps([WEATHER], ensure_ascii=False, indent=2)):
        converted = sharegpt.convert({"conversations": conversations, "tools": tools})
        assert converted.meta_prompt == (WEATHER_TEXT,)


@pytest.mark.parametrize("tools", [None, "", " ", "[]", []])
def test_no_tools_no_prompt(tools: object) -> None:
    record = {"conversations": turns(("human", "a"), ("gpt", "b")), "tools": tools}
    assert sharegpt.convert(record).meta_prompt == ("",)


def test_sharegpt_system_turn_becomes_the_system_prompt() -> None:
    record = {"conversations": turns(("system", "s"), ("human", "a"), ("gpt", "b")), "tools": [WEATHER]}
    assert sharegpt.convert(record) == sample(["s", WEATHER_TEXT], ("user", "a"), ("assistant", "b"))
    assert sharegpt.convert({**record, "system": "s"}).meta_prompt == ("s", WEATHER_TEXT)
    assert sharegpt.convert({**record, "system": ""}).meta_prompt == ("s", WEATHER_TEXT)


@pytest.mark.parametrize(
    ("change", "reason"),
    named_by(
        1,
        ({"system": "t", "conversations": turns(("system", "s"), ("human", "a"), ("gpt", "b"))}, "keep one of them"),
        ({"conversations": turns(("human", "a"), ("system", "s"), ("gpt", "b"))}, "turn 2 is a system prompt inside"),
        (
            {"conversations": turns(("user", "a"), ("gpt", "b"))},
            "turn 1 has an unknown role: 'user', known: ",
        ),
        ({"conversations": turns(("human", None), ("gpt", "b"))}, "turn 1 has no text in value: null"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "missing, keys found are role, content"),
        ({"conversations": ["a"]}, "turn 1 is a text, not an object"),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": "a"}, "conversations is a text, not a list"),
        ({"conversations": turns(("human", "a"))}, "the last message is the user's"),
        ({"tools": "{not json"}, "tools is a text that cannot be read: not valid JSON"),
        ({"tools": "[NaN]"}, "tools is a text that cannot be read: number that JSON does not know: NaN"),
        ({"tools": WEATHER}, "tools is an object, not a list of tool objects"),
        ({"tools": ["a"]}, "tools is a list of something else"),
        ({"tools": [{"default": float("nan")}]}, "has no JSON form"),
        ({"tools": [{"default": b"x"}]}, "has no JSON form"),
    ),
)
def test_sharegpt_refuses(change: dict[str, Any], reason: str) -> None:
    assert reason in reason_of({"conversations": turns(("human", "a"), ("gpt", "b")), **change}, "sharegpt")


def test_a_rule_of_the_samples_says_what_its_numbers_count() -> None:
    plain = turns(("human", "a"), ("human", "b"), ("gpt", "c"))
    assert reason_of({"conversations": plain}) == "message 2 (user) follows user: expected assistant"
    behind_system = turns(("system", "s")) + plain
    assert "counted from turn 2 on, after the system prompt" in reason_of({"conversations": behind_system})


# --- OpenAI


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(*functions: tuple[str, Any]) -> list[dict[str, Any]]:
    return [
        {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(functions)
    ]


def test_openai_with_tools() -> None:
    record = {
        "messages": [
            says("system", "s"),
            says("developer", "t"),
            says("user", "a"),
            says("assistant", None, tool_calls=calls(("f", '{"城市": "北京", "n": 1.50}'), ("g", "{}"))),
            says("tool", "1", tool_call_id="c0"),
            says("tool", "2", tool_call_id="c1"),
            says("assistant", "b"),
        ],
        "tools": [WEATHER],
    }
    assert openai.convert(record) == sample(
        ["s", "t", WEATHER_TEXT],
        ("user", "a"),
        ("assistant", '[{"name":"f","arguments":{"城市":"北京","n":1.5}},{"name":"g","arguments":{}}]'),
        ("tool", "1"),
        ("tool", "2"),
        ("assistant", "b"),
    )


def test_openai_older_names_for_calls_and_tools() -> None:
    record = {
        "messages": [
            says("user", "a"),
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            says("function", "1", name="f"),
            says("assistant", "b"),
        ],
        "functions": [WEATHER],
    }
    assert openai.convert(record) == sample(
        [WEATHER_TEXT], ("user", "a"), ("assistant", '[{"name":"f","arguments":{}}]'), ("tool", "1"), ("assistant", "b")
    )


def test_openai_arguments_may_already_be_an_object_and_content_an_empty_text() -> None:
    record = {"messages": [says("user", "a"), says("assistant", "", tool_calls=calls(("f", {"x": 1})))]}
    assert openai.convert(record).data[1].content == '[{"name":"f","arguments":{"x":1}}]'


def test_openai_joins_text_parts() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    assert (
        openai.convert({"messages": [says("user", parts), says("assistant", "b", weight=1)]}).data[0].content == "你好"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([says("user", "a"), says("assistant", None)], "message 2 (assistant) has neither content nor tool calls"),
        ([says("user", "a"), says("assistant", "b", tool_calls=calls(("f", "{}")))], "both a text and tool calls"),
        ([says("user", "a"), says("assistant", None, tool_calls=calls(("f", "{")))], "cannot be read: not valid JSON"),
        ([says("user", "a"), says("assistant", None, tool_calls=calls(("f", "[]")))], "is no object: a list"),
        ([says("user", "a"), says("assistant", None, tool_calls=[{"function": {}}])], "names no function"),
        ([says("user", "a"), says("assistant", None, tool_calls=["f"])], "names no function"),
        ([says("user", "a"), says("assistant", None, tool_calls={"f": 1})], "tool_calls of message 2 is an object"),
        ([says("user", "a"), says("assistant", "b", weight=0)], "message 2 has weight 0"),
        ([says("user", None), says("assistant", "b")], "message 1 has no content"),
        ([says("user", 1), says("assistant", "b")], "content of message 1 is a number, not a text"),
        ([says("user", [{"type": "image_url"}]), says("assistant", "b")], "'image_url', and only text can be trained"),
        ([says("user", ["a"]), says("assistant", "b")], "message 1 has content other than text"),
        ([says("user", [{"type": "text"}]), says("assistant", "b")], "a text part without text"),
        ([says("bot", "a")], "message 1 has an unknown role: 'bot'"),
        ([{"from": "human"}], "message 1 has no text in role: missing, keys found are from"),
        ([says("user", "a"), says("system", "s"), says("assistant", "b")], "message 2 (system) stands inside"),
        ([says("system", "s")], "data has no messages"),
        ([1], "message 1 is a number, not an object"),
        ([], "messages is empty"),
    ],
)
def test_openai_refuses(messages: list[Any], reason: str) -> None:
    assert reason in reason_of({"messages": messages})


def test_openai_refuses_two_lists_of_tools() -> None:
    record = {"messages": [says("user", "a"), says("assistant", "b")], "tools": [WEATHER], "functions": [WEATHER]}
    assert "both tools and functions" in reason_of(record)


# --- Which format


def test_formats_are_told_by_their_keys() -> None:
    wanted = sample([""], ("user", "a"), ("assistant", "b"))
    for record in (
        {"instruction": "a", "output": "b"},
        {"conversations": turns(("human", "a"), ("gpt", "b"))},
        {"messages": [says("user", "a"), says("assistant", "b")], "conversations": None},
        wanted.to_json(),
    ):
        assert convert_record(record, "auto") == wanted


def test_unknown_and_ambiguous_formats_are_refused() -> None:
    reason = reason_of({"prompt": "a", "completion": "b"})
    assert "keys found are prompt, completion" in reason
    assert all(name in reason for name in ("samples", "alpaca", "sharegpt", "openai"))
    assert "alpaca, openai; set data.source_format" in reason_of({"instruction": "a", "messages": []})
    assert convert_record({"instruction": "a", "output": "b", "messages": []}, "alpaca").data[0].content == "a"
    assert reason_of([1]) == "is a list, not an object"
    assert "message 1 has no text in role" in reason_of({"messages": turns(("human", "a"))})
    assert len(reason_of({str(number): 0 for number in range(9999)})) < 300


def test_reasons_are_grouped_without_what_differs() -> None:
    def group(*records: object) -> set[str]:
        return {reason_class(reason_of(record)) for record in records}

    shifted = [says("system", "s"), says("user", "a"), says("user", "a")]
    repeated = [{"messages": shifted[begin:]} for begin in (0, 1)]
    assert group(*repeated) == {"message N (user) follows user"}
    assert len(group(*({"conversations": turns((name, "a"))} for name in ("x", "y: z", "it's 3")))) == 1
    assert len(group({"a": 1}, {"b": 2}, {})) == 1


# --- Round trip

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any sample that keeps the rules."""
    messages: list[Message] = []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(TEXT)), Message("assistant", draw(TEXT))]
        for _ in range(draw(st.integers(0, 2))):
            results = [Message("tool", draw(TEXT)) for _ in range(draw(st.integers(1, 2)))]
            messages += [*results, Message("assistant", draw(TEXT))]
    return Sample(tuple(draw(st.lists(TEXT, min_size=1, max_size=3))), tuple(messages))


def as_sharegpt(given_sample: Sample) -> dict[str, Any]:
    speaker = {"user": "human", "assistant": "gpt", "tool": "observation"}
    spoken = turns(*((speaker[message.role], message.content) for message in given_sample.data))
    return {"conversations": turns(*(("system", prompt) for prompt in given_sample.meta_prompt)) + spoken}


def as_openai(given_sample: Sample) -> dict[str, Any]:
    prompts = [says("system", prompt) for prompt in given_sample.meta_prompt]
    return {"messages": prompts + [says(message.role, message.content) for message in given_sample.data]}


@given(samples())
def test_every_sample_comes_back_from_sharegpt_openai_and_itself(original: Sample) -> None:
    assert convert_record(as_sharegpt(original), "auto") == original
    assert convert_record(as_openai(original), "auto") == original
    assert convert_record(original.to_json(), "auto") == original


@given(TEXT, st.lists(st.tuples(TEXT, TEXT).map(list), max_size=3), TEXT.filter(bool), TEXT, TEXT.filter(bool))
def test_every_simple_sample_comes_back_from_alpaca(
    system: str, history: list[list[str]], question: str, extra: str, answer: str
) -> None:
    record = {"instruction": question, "input": extra, "output": answer, "system": system, "history": history}
    rounds = [pair for user, reply in history for pair in (("user", user), ("assistant", reply))]
    asked = f"{question}\n{extra}" if extra else question
    assert convert_record(record, "auto") == sample([system], *rounds, ("user", asked), ("assistant", answer))


KEYS = st.text(max_size=2) | st.sampled_from(
    [
        "meta_prompt",
        "data",
        "role",
        "content",
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "conversations",
        "from",
        "value",
        "tools",
        "messages",
        "tool_calls",
        "function_call",
        "function",
        "name",
        "arguments",
        "type",
        "weight",
    ]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(JSON_VALUES, st.sampled_from(["auto", "alpaca", "sharegpt", "openai", "samples"]))
def test_any_value_gives_a_sample_or_a_reason(value: object, source_format: str) -> None:
    with contextlib.suppress(BadSample):
        assert isinstance(convert_record(value, source_format), Sample)


# --- Reader


def read(path: Path, content: bytes | str) -> list[RawRecord]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return list(read_records(path))


def test_lines_with_bom_crlf_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    records = read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe4\xbd\xa0", "a": 2}\n{"a": 3}')
    assert [record.content for record in records] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [record.place for record in records] == [":1", ":4", ":5"]
    assert records[-1].position == (tmp_path / "a.jsonl").stat().st_size


def test_line_separators_inside_texts_are_no_ends_of_lines(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "a.jsonl", '{"a": "x\u2028y\x85z"}\n')
    assert record.content == {"a": "x\u2028y\x85z"}


@pytest.mark.parametrize(
    ("line", "reason"),
    named_by(
        0,
        (b'{"a": 1,}\n', r"^not valid JSON: .* \(column 9\)$"),
        (b'{"a": 1} {"b": 2}\n', r"^not valid JSON: Extra data \(column 10\)$"),
        (b'{"a": "cut', r"^the last line is cut off, or not JSON: "),
        (b'{"a": "\xff"}\n', r"^not UTF-8: byte 0xff at byte 8 of the line$"),
        (b'{"a": "\xe4\xbd', r"^the last line is cut off, inside a character$"),
        (b'{"a": NaN}\n', r"^number that JSON does not know: NaN$"),
        (b'{"a": -Infinity}\n', r"^number that JSON does not know: -Infinity$"),
        (b'{"a": 1e999}\n', r"^number that JSON does not know: 1e999$"),
        (b"[" * 100_000 + b"\n", r"^nested too deeply$"),
        (b"\xef\xbb\xbf{}\n", r"^not valid JSON"),
        (b"[\n", r"name it \.json$"),
    ),
)
def test_a_bad_line_is_named_and_the_next_one_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"a": 0}\n'
    records = read(tmp_path / "a.jsonl", good + line + (good if line.endswith(b"\n") else b""))
    assert re.search(reason, records[1].unreadable)
    assert records[1].place == ":2"
    assert records[1].text.strip()
    assert all(record.content == {"a": 0} for record in records[:1] + records[2:])


def test_a_number_with_thousands_of_digits_gives_a_record_or_a_reason(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "a.jsonl", '{"a": ' + "1" * 5000 + "}\n")
    assert record.unreadable in ("", "holds a number with thousands of digits")


def test_lines_are_not_gathered_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 10)
    records = read_records(path)
    assert next(records).position == 9
    with path.open("a") as stream:
        stream.write('{"late": 1}\n')
    assert list(records)[-1].content == {"late": 1}  # seen only by whoever reads on demand


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", b"\r\n  "])
def test_array(tmp_path: Path, prefix: bytes) -> None:
    records = read(tmp_path / "a.json", prefix + b'[\r\n {"a": 1} , [2],\n3]\n')
    assert [(record.place, record.content) for record in records] == [("[0]", {"a": 1}), ("[1]", [2]), ("[2]", 3)]
    assert records[-1].position <= (tmp_path / "a.json").stat().st_size


def test_a_constant_in_an_array_spoils_only_its_record(tmp_path: Path) -> None:
    records = read(tmp_path / "a.json", '[{"a": 1}, {"a": [NaN, 1e999]}, {"a": 3}]')
    assert records[1].unreadable == "number that JSON does not know: NaN"
    assert records[1].text == '{"a": [NaN, 1e999]}'
    assert (records[0].content, records[2].content) == ({"a": 1}, {"a": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    named_by(
        0,
        ('[{"a": 1},\n {"a" 2}]', r"a\.json:2: not valid JSON: .* in record \[1\] \(column 7\)"),
        ('[{"a": 1},\n {"a": "x', r"a\.json:2: .* in record \[1\]: the file ends inside it"),
        ('[{"a": 1},', r"in record \[1\]: the file ends inside it"),
        ('[{"a": 1}', r"expecting , or \] after record \[0\], the file ends"),
        ('[{"a": 1} {"a": 2}]', r"expecting , or \] after record \[0\], found '\{' \(column 11\)"),
        ('[{"a": NaN} x]', r"expecting , or \]"),
        ('[{"a": NaN, }]', r"in record \[0\]"),
        ('[{"a": 1},]', r"in record \[1\]"),
        ('[{"a": 1}]\n[2]', r"a\.json:2: .*something follows the array \(column 1\)"),
        ("[", r"in record \[0\]: the file ends inside it"),
        ("[" * 100_000, r"a\.json\[0\]: nested too deeply"),
        ('{"data": [{"a": 1}]}', r"one object with the records under \"data\", not an array -> .*jq '\.\[\"data\"\]'"),
        ('{"data": [1]}', r"is not an array of records -> put the records into one list"),
        ('{\n"a": 1}\n{\n"a": 2}\n', r"holds objects one after another, not an array -> .*jq -c \. OLD\.json"),
        ('"text"', r"is not an array of records"),
        ("hello", r"a\.json:1: .*expecting an array of records"),
        (b'[\n\n"\xff"]', r"a\.json:3: not UTF-8: byte 0xff"),
        ("[1]".encode("utf-16"), r"not UTF-8"),
        ("", r"holds no records"),
        (" \n", r"holds no records"),
        ("[ ]", r"holds no records"),
        ("[] x", r"something follows the array"),
    ),
)
def test_a_broken_array_is_refused_whole(tmp_path: Path, content: bytes | str, message: str) -> None:
    assert re.search(message, refusal_of(read, tmp_path / "a.json", content))


@pytest.mark.parametrize("content", ["", "\n \r\n", b"\xef\xbb\xbf"])
def test_no_lines_no_records(tmp_path: Path, content: bytes | str) -> None:
    assert "holds no records" in refusal_of(read, tmp_path / "a.jsonl", content)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([".jsonl", ".json", ".parquet"]))
def test_random_bytes_give_records_or_a_user_error(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(UserError):
        assert read(Path(directory) / f"a{suffix}", content)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('[]{}",:\\ \n\re1-N\u2028a'), max_size=30), st.sampled_from([".jsonl", ".json"]))
def test_whatever_python_takes_for_json_is_read_the_same(content: str, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        try:
            records = read(Path(directory) / f"a{suffix}", content)
        except UserError:
            records = []
    try:
        expected = json.loads(
            f"[{','.join(filter(str.strip, content.split(chr(10))))}]" if suffix[-1] == "l" else content
        )
    except ValueError:
        return
    if suffix == ".jsonl" and any(record.unreadable for record in records):
        return  # a value over two lines
    assert [record.content for record in records] == (expected if isinstance(expected, list) else [])


# --- Parquet


def write_parquet(path: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


def in_any_key_order(converted: Sample) -> tuple[list[Any], Any]:
    """The sample with tools parsed: pyarrow sorts the keys of objects when it makes up a schema."""
    prompts = [json.loads(prompt) if prompt.startswith("[") else prompt for prompt in converted.meta_prompt]
    return prompts, converted.data


def test_parquet_gives_back_every_format(tmp_path: Path) -> None:
    alpaca_rows = [
        {"instruction": "a", "input": None, "output": "b", "history": [["x", "y"], ["z", "w"]], "system": None},
        {"instruction": "c", "input": "d", "output": "e", "history": None, "system": "s"},
    ]
    openai_rows: list[dict[str, Any]] = [
        {"messages": [says("user", "a"), says("assistant", None, tool_calls=calls(("f", "{}")))], "tools": [WEATHER]},
        {"messages": [says("user", "a"), says("assistant", "b")]},
    ]
    sharegpt_rows = [{"conversations": turns(("human", "a"), ("gpt", "b")), "tools": None, "system": "s"}]
    for rows in (alpaca_rows, openai_rows, sharegpt_rows, [sample(["x"], ("user", "a"), ("assistant", "b")).to_json()]):
        records = list(read_records(write_parquet(tmp_path / "a.parquet", rows)))
        assert [record.place for record in records] == [f":row {row}" for row in range(len(rows))]
        for record, row in zip(records, rows):
            assert in_any_key_order(convert_record(record.content, "auto")) == in_any_key_order(
                convert_record(row, "auto")
            )


def test_parquet_fields_of_another_row_do_not_show_up_in_tools(tmp_path: Path) -> None:
    other = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "number", "minimum": 0}}}}
    rows = [{"conversations": turns(("human", "a"), ("gpt", "b")), "tools": [tool]} for tool in (WEATHER, other)]
    records = list(read_records(write_parquet(tmp_path / "a.parquet", rows)))
    prompts = [in_any_key_order(convert_record(record.content, "auto"))[0] for record in records]
    assert prompts == [[[WEATHER]], [[other]]]


def test_parquet_over_several_batches_and_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"n": number} for number in range(1000)], row_group_size=300)
    records = list(read_records(path))
    assert [record.content for record in records] == [{"n": number} for number in range(1000)]
    assert records[-1].place == ":row 999"
    assert records[-1].position == path.stat().st_size


def test_parquet_text_that_is_not_utf8_spoils_only_its_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet"))
    assert [bool(record.unreadable) for record in records] == [False, True, False]


def test_parquet_column_name_that_is_not_utf8_is_a_user_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"column": 1}], store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"column", b"\xffolumn"))
    assert "not readable as parquet" in refusal_of(list, read_records(path))


def test_parquet_without_rows_or_cut_off(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"n": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "not readable as parquet" in refusal_of(list, read_records(path))
    parquet.write_table(pyarrow.table({"n": pyarrow.array([], pyarrow.int64())}), path)
    assert "holds no records" in refusal_of(list, read_records(path))


# --- Which files


def names(path: Path) -> list[str]:
    return [file.name for file in raw_files(path)]


def test_files_come_sorted_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "B.json", "a.PARQUET", ".DS_Store", ".c.jsonl", "对话.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "b.jsonl")
    assert names(tmp_path) == ["B.json", "a.PARQUET", "b.jsonl", "link.json", "对话.jsonl"]
    assert names(tmp_path / "b.jsonl") == ["b.jsonl"]


@pytest.mark.parametrize("name", ["a.tsv", "NOTES", "a.parquet.gz", "a.txt"])
def test_a_file_of_another_kind_is_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "b.jsonl").touch()
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        message = refusal_of(raw_files, path)
        assert message.startswith(f"{tmp_path / name}: ")
        assert " -> " in message


def test_what_is_no_file_is_not_passed_over(tmp_path: Path) -> None:
    assert "no raw conversations here" in refusal_of(raw_files, tmp_path / "missing")
    assert "holds no raw conversations" in refusal_of(raw_files, tmp_path)
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "nowhere")
    assert "broken link" in refusal_of(raw_files, tmp_path)
    (tmp_path / "a.jsonl").unlink()
    os.mkfifo(tmp_path / "a.jsonl")  # opening it would wait forever
    assert "not a regular file" in refusal_of(raw_files, tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").mkdir()
    assert "holds no raw conversations" in refusal_of(raw_files, tmp_path)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/\xff\xf0\x9f\x90\xbc.jsonl")).touch()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    message = refusal_of(raw_files, tmp_path)
    assert "not UTF-8" in message
    message.encode("utf-8")


# --- Real data


@pytest.mark.parametrize(
    "path", [*sorted(EXAMPLES.iterdir()), *sorted(SHARED.glob("*.json"))], ids=lambda path: path.stem
)
def test_every_record_of_real_files_converts(path: Path) -> None:
    """Of the examples, and of the published demo data where it is beside the repository."""
    text = path.read_text("utf-8")
    raw = list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else json.loads(text)
    converted = [convert_record(record.content, "auto") for record in read_records(path)]
    assert len(converted) == len(raw) > 20
    for before, after in zip(raw, converted):
        if "output" in before:
            assert after.data[-1].content == before["output"]
            assert after.data[2 * len(before.get("history", []))].content.startswith(before["instruction"])
        else:
            assert [message.content for message in after.data] == [turn["value"] for turn in before["conversations"]]
        prompts = [before.get("system"), before.get("tools")]
        assert [spaceless(prompt) for prompt in after.meta_prompt if prompt] == [
            spaceless(prompt) for prompt in prompts if prompt and prompt != "[]"
        ]


def spaceless(text: str) -> str:
    """JSON is written again."""
    return "".join(text.split())
