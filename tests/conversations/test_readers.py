"""Readers: every record with its place, what is refused and how the refusal reads."""

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

from converting import chat, convert, says
from openpangu_sft.conversations.conversation import Sample
from openpangu_sft.conversations.files import raw_files, read_records
from openpangu_sft.conversations.readers import RawRecord
from openpangu_sft.util.errors import UserError
from parameter_ids import named_by
from refusals import refusal_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"城市": {"type": "string"}}}}


def read(path: Path, content: bytes | str) -> list[RawRecord]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return list(read_records(path))


def test_lines_with_bom_crlf_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    records = read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe4\xbd\xa0"}\n{"a": 3}')
    assert [record.content for record in records] == [{"a": 1}, {"a": "你"}, {"a": 3}]
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
        (b'{"a": "cut', r"^the last line is cut off, or not valid JSON: "),
        (b'{"a": "\xff"}\n', r"^not UTF-8: byte 0xff at character 8$"),
        (b'{"a": "\xe4\xbd', r"^the last line is cut off, or not UTF-8: byte 0xe4 at character 8$"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', r"^has the key 'c' twice: keep one of them$"),
        (b'{"a": NaN}\n', r"^number that JSON does not know: NaN$"),
        (b'{"a": -Infinity}\n', r"^number that JSON does not know: -Infinity$"),
        (b'{"a": 1e999}\n', r"^number that JSON does not know: 1e999$"),
        (b"[" * 100_000 + b"\n", r"^nested too deeply$"),
        (b"\xef\xbb\xbf{}\n", r"^not valid JSON"),
        (b"[\n", r"name it \.json$"),
        (b'{"a": 1}\r{"a": 2}\r', r"^its lines end with CR alone: write LF, e\.g\. tr "),
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
    assert next(records).content == {"a": 1}
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
        ('{"data": [{"a": 1}]}', r"a\.json: is not an array of records -> keep only the list under \"data\": jq '"),
        (
            '{\n"a": 1}\n{\n"a": 2}\n',
            r"is not an array of records -> .*; of objects one after another jq -s \. OLD\.json > NEW\.json",
        ),
        ('"text"', r"is not an array of records"),
        ("hello", r"is not an array of records"),
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


def in_any_key_order(converted: Sample) -> tuple[object, ...]:
    """The sample with tools parsed: pyarrow sorts the keys of objects when it makes up a schema."""
    return converted.meta_prompt, converted.data, json.loads(converted.tools or "[]")


def test_parquet_gives_back_every_format(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    formats: list[list[dict[str, Any]]] = [
        [
            {"instruction": "a", "input": None, "output": "b", "history": [["x", "y"], ["z", "w"]], "system": None},
            {"instruction": "c", "input": "d", "output": "e", "history": None, "system": "s"},
        ],
        [
            chat(
                says(
                    "assistant", None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
                ),
                tools=[WEATHER],
            ),
            chat(says("assistant", "b", reasoning_content="t", weight=1)),
        ],
        [{"conversations": turns, "tools": None, "system": "s"}],
        [convert(chat(says("assistant", "b", thinking="t"), tools=[WEATHER])).to_json()],
    ]
    for rows in formats:
        records = list(read_records(write_parquet(tmp_path / "a.parquet", rows)))
        assert [record.place for record in records] == [f":row {row}" for row in range(len(rows))]
        for record, row in zip(records, rows):
            assert in_any_key_order(convert(record.content)) == in_any_key_order(convert(row))


def test_parquet_fields_of_another_row_do_not_show_up_in_tools_and_calls(tmp_path: Path) -> None:
    other = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "number", "minimum": 0}}}}
    rows = [
        chat(says("assistant", None, tool_calls=[{"name": "f", "arguments": arguments}]), tools=[tool])
        for tool, arguments in ((WEATHER, {"x": 1}), (other, {"label": "quay"}))
    ]
    records = list(read_records(write_parquet(tmp_path / "a.parquet", rows)))
    assert [in_any_key_order(convert(record.content)) for record in records] == [
        in_any_key_order(convert(row)) for row in rows
    ]


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


@pytest.mark.parametrize("name", ["a.tsv", "NOTES", "a.parquet.bz2", "a.txt"])
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
    converted = [convert(record.content) for record in read_records(path)]
    assert len(converted) == len(raw) > 20
    for before, after in zip(raw, converted):
        if "output" in before:
            assert after.data[-1].content == before["output"]
            assert after.data[2 * len(before.get("history", []))].content.startswith(before["instruction"])
        else:
            spoken = [json.loads(message.calls)[0] if message.calls else message.content for message in after.data]
            turns = [(turn["from"], turn["value"]) for turn in before["conversations"]]
            assert spoken == [json.loads(value) if who == "function_call" else value for who, value in turns]
        assert after.meta_prompt == (before.get("system") or "",)
        assert spaceless(after.tools) == spaceless(before.get("tools") or "").removeprefix("[]")


def spaceless(text: str) -> str:
    """JSON is written again."""
    return "".join(text.split())
