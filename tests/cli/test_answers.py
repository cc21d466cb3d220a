"""Answers on the screen: thinking apart from the answer, calls one on a line; and tools from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpangu_sft.cli.answers import AnswerPrinter, read_tools
from openpangu_sft.conversations.calls import Answer
from refusals import refusal_of

CALLS = '[{"name":"weather","arguments":{"city":"上海","days":1.50}},{"name":"clock","arguments":{}}]'


@pytest.mark.parametrize(
    ("tokens", "answer", "out", "err"),
    [
        (["您", "", "好"], Answer(None, "您好", ""), "您好\n", ""),
        (["[unused16]", "想", "[unused17]", "好"], Answer("想", "好", ""), "好\n", "thinking: 想\n"),
        (["[unused16]", "[unused17]", "好"], Answer("", "好", ""), "好\n", "thinking: \n"),
        (["[unused16]", "想", "很"], Answer("想很", "", ""), "\n", "thinking: 想很\n"),
        (
            ["查", "[unused11]", CALLS[:9], CALLS[9:], "[unused12]"],
            Answer(None, "查", CALLS),
            '查\ncall: weather {"city": "上海", "days": 1.5}\ncall: clock {}\n',
            "",
        ),
        (["[unused11]", CALLS, "[unused12]"], Answer(None, "", CALLS), "call: weather {", ""),
        (["[unused11]", "[{"], Answer(None, "[unused11][{", ""), "\nno valid call: [{\n", ""),
        ([], Answer(None, "", ""), "\n", ""),
    ],
)
def test_an_answer_as_it_comes(
    tokens: list[str], answer: Answer, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printer = AnswerPrinter()
    for _ in range(2):  # the second answer begins like the first
        for token in tokens:
            printer(token)
        printer.end(answer)
        printed = capsys.readouterr()
        assert printed.err == err
        assert printed.out == out or (out.endswith("{") and printed.out.startswith(out))


@pytest.mark.parametrize(
    "call", ['{"function":{"name":"f","arguments":"{}"}}', '{"name":"f","parameters":{}}', '{"name":"f"}']
)
def test_calls_in_another_form_are_shown_the_same(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    AnswerPrinter().end(Answer(None, "", f"[{call}]"))
    assert capsys.readouterr().out.endswith("call: f {}\n")


def test_tools_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text('\ufeff[\n {"name": "weather", "number": 1.50}\n]', "utf-8")
    assert read_tools(path) == '[{"name":"weather","number":1.50}]'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[{", "tools is a text that cannot be read: not valid JSON"),
        (b"[1]", "tools is a list of something else, not a list of tool objects"),
        (b'"a"', "not a list of tool objects"),
        (b"\xff", "cannot be read: 'utf-8' codec can't decode"),
        (b"", "holds no tools"),
        (b"[]", "holds no tools"),
        (None, "cannot be read: [Errno 2]"),
    ],
)
def test_a_file_without_tools(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_bytes(content)
    said = refusal_of(read_tools, path)
    assert said.startswith(f"{path}: ")
    assert complaint in said
