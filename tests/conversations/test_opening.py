"""Compressed raw files, JSON by another name, and files in other encodings."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from openpangu_sft.conversations import opening
from openpangu_sft.conversations.files import raw_files, read_records
from openpangu_sft.recipe.load import load_recipe
from raw_data import LINES, OTHER, TALK, compressed, contents, put, read, refusal
from refusals import refusal_of

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"

# --- Compressed files


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "A.JSON.GZ", "a.json.zst", "a.csv.gz"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    kind = name.lower().split(".")[1]
    text = {"json": json.dumps([TALK, OTHER]), "jsonl": LINES, "csv": "instruction,output\n"}[kind]
    if kind == "csv":
        text += "".join(f"{record['instruction']},{record['output']}\n" for record in (TALK, OTHER))
    path = tmp_path / name
    path.write_bytes(compressed(text.encode(), path.suffix.lower()))
    assert contents(path) == [TALK, OTHER]
    (file,) = raw_files(tmp_path)
    assert file.samples == f"{name[0]}.jsonl"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_parts_one_after_another_are_all_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(2 * compressed(LINES.encode(), suffix))
    assert contents(path) == 2 * [TALK, OTHER]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_the_position_is_that_of_the_compressed_file(tmp_path: Path, suffix: str) -> None:
    records = [json.dumps({"n": str(number**9)}) for number in range(40_000)]
    for name, text in (("a.jsonl", "\n".join(records)), ("a.json", f"[{','.join(records)}]")):
        path = put(tmp_path / f"{name}{suffix}", text)
        positions = [record.position for record in read_records(path)]
        assert positions == sorted(positions)
        assert 0 < positions[0] < positions[20_000] < positions[-1] <= path.stat().st_size
        assert positions[-1] > 0.99 * path.stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.csv.gz"])
@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: b"no" + whole[2:], lambda whole: b"{}\n" * 9]
)
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, name: str, damage: Any) -> None:
    path = put(tmp_path / name, LINES * 9)
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(path)
    assert message.startswith(f"{path}: damaged, or not {'gzip' if name.endswith('gz') else 'zstd'}: ")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "LONGEST_LINE", 1 << 20)
    for name in ("a.jsonl.zst", "a.jsonl.gz", "a.csv.gz"):
        assert ": a line of 1 MB or more -> " in refusal(put(tmp_path / name, b'{"a": "' + b"x" * (1 << 21)))
    lines = b'{"a": 1}\n' * (1 << 18)  # more than the limit, but not in one line
    assert len(read(put(tmp_path / "b.jsonl.zst", lines))) == 1 << 18


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab你", max_size=2), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.text("ab你", max_size=2), JSON_VALUES, max_size=3), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(RECORDS, st.sampled_from(["utf-8", "utf-16", "gb18030"]), st.booleans())
def test_the_same_records_from_every_file(records: list[Any], encoding: str, ascii_only: bool) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
    array = json.dumps(records, ensure_ascii=ascii_only)
    texts = {"a.jsonl": lines, "a.json": array} | ({"b.json": lines} if len(records) > 1 else {})
    with tempfile.TemporaryDirectory() as made:
        for name, text in texts.items():
            for suffix in ("", *opening.COMPRESSED):
                path = put(Path(made, name + suffix), text, encoding)
                assert contents(path, encoding) == records


FLAT = st.lists(
    st.fixed_dictionaries({"instruction": st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)}).flatmap(
        lambda row: st.fixed_dictionaries(
            {key: st.just(value) for key, value in row.items()},
            optional={"output": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)},
        )
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(FLAT)
def test_the_same_records_from_every_table(records: list[dict[str, str]]) -> None:
    schema = pyarrow.schema([("instruction", pyarrow.string()), ("output", pyarrow.large_string())])
    table = pyarrow.Table.from_pylist(records, schema)
    with tempfile.TemporaryDirectory() as made:
        parquet.write_table(table, Path(made, "a.parquet"))
        with ipc.new_file(Path(made, "file.arrow"), schema) as file, ipc.new_stream(Path(made, "b.arrow"), schema) as s:
            file.write_table(table)
            s.write_table(table)
        for path in Path(made).iterdir():
            assert contents(path) == records


# --- JSON by another name


def test_json_lines_in_a_json_file_are_read_line_by_line(tmp_path: Path) -> None:
    for text in (LINES, "\ufeff\n" + LINES, LINES.replace("\n", "\r\n\r\n")):
        assert contents(put(tmp_path / "a.json", text)) == [TALK, OTHER]
    good, bad, _ = read(put(tmp_path / "a.json", f'{json.dumps(TALK)}\n{{"a" 1}}\n{json.dumps(OTHER)}'))
    assert (good.place, bad.place) == (":1", ":2")
    assert "not valid JSON" in bad.unreadable


@pytest.mark.parametrize(
    ("name", "text", "what", "remedy"),
    [
        (
            "a.json",
            json.dumps({"version": 1, "data": [TALK]}),
            "is not an array of records",
            'keep only the list under "data": jq',
        ),
        ("a.json", json.dumps({"messages": [{"role": "user"}]}), "is not an array of records", "[{…}, {…}]"),
        ("a.json", json.dumps(TALK, indent=2) + json.dumps(OTHER), "is not an array of records", "jq -s ."),
        ("a.jsonl", json.dumps(TALK, indent=2), "holds objects over several lines", "jq -c . OLD.jsonl > NEW.jsonl"),
        ("a.jsonl.gz", json.dumps([TALK], indent=2), "holds an array over several lines", "name it .json"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, name: str, text: str, what: str, remedy: str) -> None:
    message = refusal(put(tmp_path / name, text))
    assert message.startswith(f"{tmp_path / name}: {what}")
    assert remedy in message.split(" -> ")[1]


# --- Encodings

LONG = "".join(json.dumps({**TALK, "n": number}, ensure_ascii=False) + "\n" for number in range(3000))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("gb18030", "gb18030"),
        ("gbk", "gb18030"),
        ("utf-16", "utf-16"),
        ("utf-32", "utf-32"),
    ],
)
def test_another_encoding_is_named_and_then_read(tmp_path: Path, name: str, encoding: str, found: str) -> None:
    text = LINES
    if "csv" in name:
        text = "".join(",".join(row) + "\r\n" for row in (TALK, TALK.values(), OTHER.values()))
    elif "jsonl" not in name:
        text = json.dumps([TALK, OTHER], ensure_ascii=False)
    path = put(tmp_path / name, text, encoding)
    message = refusal(path)
    assert message.startswith(f"{path}: looks like {found.upper()}")
    assert f"data.encoding={found} " in message
    assert contents(path, encoding) == contents(path, found) == [TALK, OTHER]
    path = put(tmp_path / name, text)
    assert "looks like UTF-8, not GBK -> save it as GBK, or set data.encoding=utf-8 for" in refusal(path, "gbk")
    assert contents(path, "UTF8") == [TALK, OTHER]


def test_a_long_file_in_another_encoding(tmp_path: Path) -> None:
    for encoding in ("gb18030", "utf-16"):
        assert [record["n"] for record in contents(put(tmp_path / "a.jsonl", LONG, encoding), encoding)] == [
            *range(3000)
        ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_utf16_of_a_named_byte_order(tmp_path: Path, name: str) -> None:
    text = json.dumps([TALK, OTHER]) if name == "a.json" else LINES
    if name == "a.csv":
        text = "".join(",".join(row) + "\n" for row in (TALK, TALK.values(), OTHER.values()))
    for mark in ("", "\ufeff"):
        assert contents(put(tmp_path / name, mark + text, "utf-16-le"), "utf-16-le") == [TALK, OTHER]


def test_a_byte_that_cannot_be_decoded_spoils_one_line(tmp_path: Path) -> None:
    lines = LINES.encode("gbk").split(b"\n")
    path = put(tmp_path / "a.jsonl", b"\n".join([lines[0], b'{"a": "\xff\xff"}', lines[1]]))
    first, bad, last = read(path, "gbk")
    assert (first.content, last.content) == (TALK, OTHER)
    assert (bad.place, bad.unreadable, bad.text) == (":2", "not GBK: byte 0xff at character 8", '{"a": "\\xff\\xff"}')
    path = put(tmp_path / "a.csv", b"question,answer\na,\xff\n\nb,c\n")
    assert [record.unreadable for record in read(path)] == ["not UTF-8: byte 0xff at character 2", ""]


@pytest.mark.parametrize(
    "text", ["é ñ ü à ç ß — für naïve", "Съешь ещё этих мягких французских булок", "한국어 문장입니다 그리고"]
)
def test_other_texts_are_not_taken_for_chinese(text: str) -> None:
    for encoding in ("latin-1", "cp1252", "cp1251", "utf-8"):
        assert opening.guess(text.encode(encoding, "ignore")) in ("", "utf-8")


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    raw = LINES.encode()
    records = read(put(tmp_path / "a.jsonl", raw.replace("等".encode(), b"\xe7\xad", 1)))
    assert [bool(record.unreadable) for record in records] == [True, False]


def test_a_wrong_encoding_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv"):
        path = put(tmp_path / name, b"\xd8\x00\xd8\x00" * 9)
        assert str(path) in refusal(path, "utf-16-be")


@pytest.mark.parametrize("encoding", ["latin2", "GB18030", "utf_16"])
def test_the_recipe_takes_text_encodings(encoding: str) -> None:
    assert load_recipe(DEMO, [f"data.encoding={encoding}"]).data.encoding == encoding


@pytest.mark.parametrize("encoding", ["gb", "base64", "hex", "", "a/b"])
def test_the_recipe_refuses_other_encodings(encoding: str) -> None:
    message = refusal_of(load_recipe, DEMO, [f"data.encoding='{encoding}'"])
    assert f"data.encoding {encoding!r} is no text encoding -> use utf-8, gb18030 or utf-16" in message
