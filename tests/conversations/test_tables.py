"""Records of CSV, parquet and Arrow files."""

from __future__ import annotations

import datetime
import io
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc, parquet

from openpangu_sft.conversations.format import run_format
from openpangu_sft.recipe.load import load_recipe
from raw_data import OTHER, TALK, compressed, contents, put, read, refusal
from refusals import refusal_of

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"

# --- CSV


def test_csv_cells_are_texts_and_empty_ones_absent(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", '\ufeff"a",b,c\r\n1,"x\n""y""",\r\n\r\n,,true\r\n')
    first, last = read(path)
    assert (first.place, first.content) == (":2", {"a": "1", "b": 'x\n"y"'})
    assert (last.place, last.content) == (":5", {"c": "true"})
    assert last.position == path.stat().st_size


def test_csv_with_the_index_of_pandas_and_long_cells(tmp_path: Path) -> None:
    assert contents(put(tmp_path / "a.csv", f",a\n0,{'x' * 200_000}\n")) == [{"index": "0", "a": "x" * 200_000}]


def test_csv_rows_of_another_length_are_unreadable(tmp_path: Path) -> None:
    short, good, long = read(put(tmp_path / "a.csv", "a,b\n1\n1,2\n1,2,3\n"))
    assert short.unreadable == "1 cells, and the header has 2"
    assert long.unreadable == "3 cells, and the header has 2"
    assert long.text == "['1', '2', '3']"
    assert good.content == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a;b\n1;2\n", ":1", "columns are separated by ';', not by commas"),
        ("a\tb\n", ":1", "columns are separated by '\\t', not by commas"),
        ("a,a\n1,2\n", ":1", "has the column 'a' twice"),
        ("a,,b\n", ":1", "column 2 has no name"),
        ('a,b\n1,2\n1,"2\n3,4\n', ":3", "not valid CSV: unexpected end of data"),
        ('a,b\n1,"2"x\n', ":2", "not valid CSV: ',' expected after '\"'"),
        ("a,b\n", "", "holds no records"),
        ("", "", "holds no records"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, text: str, where: str, what: str) -> None:
    assert refusal(put(tmp_path / "a.csv", text)).startswith(f"{tmp_path}/a.csv{where}: {what}")


# --- Parquet and Arrow


def test_merged_structures_maps_and_dictionaries(tmp_path: Path) -> None:
    calls = [{"arguments": {"x": 1, "y": None, "deep": [{"z": None, "w": "a"}]}}, {"arguments": {"y": "b"}}]
    table = pyarrow.table(
        {
            "calls": pyarrow.array([[call] for call in calls]),
            "map": pyarrow.array([[("k", "v")], None], pyarrow.map_(pyarrow.string(), pyarrow.string())),
            "kind": pyarrow.array(["q", "q"]).dictionary_encode(),
            "large": pyarrow.array([["a"], None], pyarrow.large_list(pyarrow.large_string())),
        }
    )
    expected = [
        {"calls": [{"arguments": {"x": 1, "deep": [{"w": "a"}]}}], "map": {"k": "v"}, "kind": "q", "large": ["a"]},
        {"calls": [{"arguments": {"y": "b"}}], "kind": "q"},
    ]
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    assert contents(tmp_path / "a.parquet") == contents(tmp_path / "a.arrow") == expected


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(datetime.date(2024, 5, 1), "date"), (b"x", "bytes"), (datetime.datetime(2024, 5, 1), "datetime")],
)
def test_dates_and_bytes_are_no_answers_but_may_stand_beside_them(tmp_path: Path, answer: object, kind: str) -> None:
    path = tmp_path / "raw" / "a.parquet"
    path.parent.mkdir()
    row = {"instruction": "When?", "output": "Now.", "created_at": answer}
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    recipe = load_recipe(DEMO, [f"paths.cache={tmp_path}"])
    assert run_format(recipe).counts["written"] == 1
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "output": answer}]), path)
    message = refusal_of(run_format, recipe)
    assert message.startswith(f"{path}:row 0: ")
    assert f"a {kind}, not a text" in message


def test_arrow_position_and_batches(tmp_path: Path) -> None:
    table = pyarrow.table({"n": [*range(5000)]})
    with (
        ipc.new_file(tmp_path / "file.arrow", table.schema) as file,
        ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream,
    ):
        file.write_table(table, max_chunksize=1000)
        stream.write_table(table, max_chunksize=1000)
    for path in tmp_path.iterdir():
        records = read(path)
        assert [record.content for record in records] == [{"n": number} for number in range(5000)]
        assert records[-1].place == ":row 4999"
        assert records[0].position < records[2500].position < records[-1].position <= path.stat().st_size


def test_damaged_arrow_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a" * 50] * 50})
    for writer, name in ((ipc.new_file, "file.arrow"), (ipc.new_stream, "stream.arrow")):
        with writer(tmp_path / name, table.schema) as stream:
            stream.write_table(table)
        whole = (tmp_path / name).read_bytes()
        for content in (
            b"",
            b"ARROW1",
            whole[: len(whole) // 2],
            b"x" * 100,
            whole.replace(b"text", b"\xff\xff\xff\xff"),
        ):
            (tmp_path / name).write_bytes(content)
            assert "not readable as Arrow" in refusal(tmp_path / name)


def test_a_full_disk_for_temporary_files_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a.arrow.gz", b"ARROW1")
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"1"))
    with pytest.raises(OSError, match="No space left") as found:
        read(path)
    assert found.value.filename == tempfile.gettempdir()


def test_an_arrow_stream_cut_between_batches_is_refused(tmp_path: Path) -> None:
    batch = pyarrow.record_batch({"n": [1, 2]})
    sizes, path = list[int](), tmp_path / "a.arrow"
    with path.open("wb") as sink, ipc.new_stream(sink, batch.schema) as stream:
        for _ in range(3):
            stream.write_batch(batch)
            sizes.append(sink.tell())
    whole = path.read_bytes()
    assert len(contents(path)) == 6
    for size in sizes:
        path.write_bytes(whole[:size])
        assert "not readable as Arrow: the stream ends without its end mark: it may be cut off" in refusal(path)
    path.write_bytes(whole + b"\0" * 8)
    assert len(contents(path)) == 6


def test_offsets_beyond_the_data_spoil_only_their_row(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 1, 2_000_000_000, 2], pyarrow.int32()).buffers()[1]
    texts = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"ab"))
    with ipc.new_stream(tmp_path / "a.arrow", pyarrow.schema([("text", pyarrow.string())])) as stream:
        stream.write_batch(pyarrow.RecordBatch.from_arrays([texts], ["text"]))
    assert [bool(record.unreadable) for record in read(tmp_path / "a.arrow")] == [False, True, True]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), tmp_path / "a.parquet")
    assert "has the column 'a' twice -> keep one of them" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_tables(tmp_path: Path, suffix: str) -> None:
    table = pyarrow.Table.from_pylist([TALK, OTHER])
    for kind in ("parquet", "stream", "file"):
        content = io.BytesIO()
        if kind == "parquet":
            parquet.write_table(table, content)
        else:
            with (ipc.new_stream if kind == "stream" else ipc.new_file)(content, table.schema) as writer:
                writer.write_table(table)
        name = f"{kind}.{'parquet' if kind == 'parquet' else 'arrow'}{suffix}"
        path = tmp_path / name
        path.write_bytes(compressed(content.getvalue(), suffix))
        assert contents(path) == [TALK, OTHER]
        path.write_bytes(path.read_bytes()[:-20])
        assert "not readable as" in refusal(path)
