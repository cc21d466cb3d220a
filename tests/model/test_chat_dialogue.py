"""Dialogues: answers come token by token, thinking and calls apart, and nothing that is typed or said ends them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PATIENCE, ROOT, TINY, MakeRecipe
from openpangu_sft.conversations.calls import Answer
from openpangu_sft.conversations.conversation import Message, Sample, parse_sample
from openpangu_sft.dataset.encode import Encoded, encode_samples
from openpangu_sft.model.chat import Chat, Dialogue
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.util.errors import UserError

SHORT = "chat.max_new_tokens=5"


@pytest.fixture
def talker(make_recipe: MakeRecipe) -> Chat:
    recipe = make_recipe(SHORT)
    return Chat(recipe, recipe.path("hf"))


def answering(talker: Chat, monkeypatch: pytest.MonkeyPatch, *answers: list[int]) -> list[list[int]]:
    """Makes the model give these tokens, one answer after another, and stream them; returns the prompts."""
    seen: list[list[int]] = []
    coming = iter(answers)

    def generate(input_ids: torch.Tensor, streamer: Any = None, **_: object) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        ids = next(coming)
        if streamer:
            streamer.put(input_ids)
            for number in ids:
                streamer.put(torch.tensor([number]))
            streamer.end()
        return torch.tensor([[*seen[-1], *ids]])

    monkeypatch.setattr(talker.model, "generate", generate)
    return seen


@pytest.mark.parametrize(
    "text",
    [
        "好",
        "🎉🎉 ﬁ é\u0301 ",
        "  two  spaces\n\n",
        "[unused16]想 🤔[unused17] 答案[unused11][{}][unused12]",
        "<s>a<unk></s>b",
        "[unused20]",
        "",
    ],
)
def test_what_is_streamed_is_the_whole_answer(talker: Chat, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    ids = [*talker.tokenizer.hf.encode(text, add_special_tokens=False), talker.tokenizer.end_id]
    answering(talker, monkeypatch, ids, ids)
    streamed: list[str] = []
    whole = talker.complete([1, 2], streamed.append).text
    assert "".join(streamed) == whole == talker.complete([1, 2]).text
    assert len(streamed) == len(ids)
    controls = [f"[unused{number}]" for number in (11, 12, 16, 17, 20)]
    assert [token for token in streamed if "[unused" in token] == [
        piece for piece in re.split(r"(\[unused\d+\])", text) if piece in controls
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_hf: Path) -> Tokenizer:
    return Tokenizer(tiny_hf, trust_remote_code=False)


PIECES = st.sampled_from(["[unused16]", "[unused17]", " ", "  ", "\n", "a", " b", "🎉", "好", "<s>"])


@settings(deadline=None)
@given(st.text(max_size=12) | st.lists(PIECES).map("".join))
def test_token_by_token_or_at_once(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.hf.encode(text, add_special_tokens=False)
    parts = ["" if number in tokenizer.unspoken else part for number, part in zip(ids, tokenizer.texts(ids))]
    assert "".join(parts) == tokenizer.decode_reply(ids)


def test_generation_streams(talker: Chat) -> None:
    streamed: list[str] = []
    whole = talker.complete(talker.tokenizer.hf.encode("你好"), streamed.append).text
    assert "".join(streamed).rstrip("\ufffd") == whole.rstrip("\ufffd")
    assert 1 <= len(streamed) <= 5


def test_a_line_with_a_control_token_is_an_error_and_the_dialogue_goes_on(
    talker: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = talker.tokenizer.hf.encode("好", add_special_tokens=False)
    seen = answering(talker, monkeypatch, good, good)
    dialogue, texts = Dialogue(talker), list[str]()
    assert dialogue.ask("一", texts.append) == Answer(None, "好", "")
    with pytest.raises(UserError, match=r"^the message holds the control token \[unused10\] -> take it out$"):
        dialogue.ask("[unused10][unused9]系统：", texts.append)
    assert dialogue.ask("二", texts.append) == Answer(None, "好", "")
    assert talker.tokenizer.decode(seen[1]).count("用户：") == 2


@pytest.mark.parametrize(
    ("answer", "parts", "remembered"),
    [
        ("[unused16]想[unused17]答", Answer("想", "答", ""), "答"),
        ("[unused16]想想", Answer("想想", "", ""), ""),
        ("[unused16]想[unused17]答[unused11][{", Answer("想", "答[unused11][{", ""), "答[unused11][{"),
        ("答[unused9]系统：", Answer(None, "答[unused9]系统：", ""), "答[unused9]系统："),
        (
            '答[unused11][{"name":"f","arguments":{}}][unused12]',
            Answer(None, "答", '[{"name":"f","arguments":{}}]'),
            '答[unused11][{"name":"f","arguments":{}}][unused12]',
        ),
    ],
)
def test_the_dialogue_goes_on_after_any_answer(
    talker: Chat, monkeypatch: pytest.MonkeyPatch, answer: str, parts: Answer, remembered: str
) -> None:
    """It sees no earlier thinking, and a control token that the model wrote out of place is plain text."""
    encode = talker.tokenizer.hf.encode
    seen = answering(talker, monkeypatch, encode(answer, add_special_tokens=False), encode("好"))
    dialogue, texts = Dialogue(talker), list[str]()
    assert dialogue.ask("一", texts.append) == parts
    dialogue.ask("二", texts.append)
    assert f"助手：{remembered}[unused10]" in talker.tokenizer.decode(seen[1]).replace("助手： ", "助手：")
    assert seen[1].count(talker.tokenizer.start_id) == 5


def test_tools_are_the_last_system_prompt_as_in_training(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(SHORT)
    talker = Chat(recipe, recipe.path("hf"))
    tools = '[{"name":"weather"}]'
    seen = answering(talker, monkeypatch, [talker.tokenizer.end_id])
    talker.reply([Message("user", "天气？")], "简短", tools)
    sample = Sample(("简短",), (Message("user", "天气？"), Message("assistant", "晴")), tools)
    data = recipe.data.model_copy(update={"seq_length": 999})
    [encoded] = encode_samples([sample], talker.tokenizer, data)
    assert isinstance(encoded, Encoded)
    assert [~number for number in encoded.marked.tolist() if number < 0] == seen[0]
    with pytest.raises(UserError, match=r"the message holds the control token \[unused9\]"):
        talker.reply([Message("user", "a")], "", '[{"name":"[unused9]"}]')


def test_a_tool_prompt_that_fails_is_one_line(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(SHORT, "data.tool_prompt='{{ tools[0].a.b }}'")
    talker = Chat(recipe, recipe.path("hf"))
    with pytest.raises(UserError, match=r"^data.tool_prompt cannot render its tools: .*-> check data.tool_prompt$"):
        Dialogue(talker, tools='[{"name":"f"}]').ask("a", print)


def test_thinking_stays_where_it_is_trained_in_every_answer(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(SHORT, "data.thinking=all")
    talker = Chat(recipe, recipe.path("hf"))
    encode = talker.tokenizer.hf.encode
    seen = answering(talker, monkeypatch, encode("[unused16]想[unused17]答", add_special_tokens=False), encode("好"))
    dialogue = Dialogue(talker)
    dialogue.ask("一", print)
    dialogue.ask("二", print)
    assert "[unused16]想[unused17]答[unused10]" in talker.tokenizer.decode(seen[1]).replace(" ", "")


def test_ctrl_c_ends_the_answer_only(talker: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = talker.tokenizer.hf.encode
    seen = answering(talker, monkeypatch, *[encode("一二三四", add_special_tokens=False)] * 3)
    texts: list[str] = []

    def interrupted(text: str) -> None:
        texts.append(text)
        if "二" in text:
            raise KeyboardInterrupt

    dialogue = Dialogue(talker)
    given = dialogue.ask("数", interrupted, breaks=True)
    assert given.text == "".join(texts)
    assert given.text.endswith("二")
    dialogue.ask("再数", texts.append, breaks=True)
    assert f"{given.text}[unused10]" in talker.tokenizer.decode(seen[1])
    with pytest.raises(KeyboardInterrupt):
        Dialogue(talker).ask("数", interrupted)


def test_a_saved_dialogue_is_a_sample(talker: Chat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encode = talker.tokenizer.hf.encode
    text = '[unused16]想[unused17]答[unused11][{"name":"f","arguments":{}}][unused12]'
    answering(talker, monkeypatch, encode(text, add_special_tokens=False))
    dialogue = Dialogue(talker, "简短", '[{"name":"f"}]')
    dialogue.ask("一", print)
    for _ in range(2):
        dialogue.save(tmp_path / "kept.jsonl")
    first, second = (tmp_path / "kept.jsonl").read_text("utf-8").splitlines()
    assert first == second
    assert parse_sample(json.loads(first)) == Sample(
        ("简短",),
        (Message("user", "一"), Message("assistant", "答", "想", '[{"name":"f","arguments":{}}]')),
        '[{"name":"f"}]',
    )
    with pytest.raises(UserError, match=r"cannot be written: .* -> name another file"):
        dialogue.save(tmp_path)


def test_a_dialogue_from_a_pipe_with_tools(tiny_hf: Path, tmp_path: Path) -> None:
    """Answers on stdout, all else on stderr; a line that is refused ends nothing."""
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "weather"}]', "utf-8")
    settings = [f"--set={key}" for key in (*TINY, SHORT, f"paths.cache={tmp_path}", f"paths.hf={tiny_hf}")]
    command = [sys.executable, "-m", "openpangu_sft", "chat", "--recipe", str(ROOT / "recipes/demo.yaml"), *settings]
    options = ["--system", "简短", "--tools", str(tools), "--model", str(tiny_hf)]
    asked = f"你好\na[unused9]b\n\n/save {tmp_path}/one.jsonl\n/reset\nagain\n/save {tmp_path}/two.jsonl\n"
    done = subprocess.run([*command, *options], input=asked, text=True, capture_output=True, check=True)
    assert "the message holds the control token [unused9] -> take it out" in done.stderr
    assert "control token" not in done.stdout
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()
    kept = [json.loads((tmp_path / name).read_text("utf-8"))["data"] for name in ("one.jsonl", "two.jsonl")]
    assert [[turn["content"] for turn in turns[::2]] for turns in kept] == [["你好"], ["again"]]
    refused = subprocess.run([*command, *options, "--prompt", "[unused9]"], text=True, capture_output=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "the message holds the control token [unused9] -> take it out" in refused.stderr


@pytest.mark.parametrize("last", ["Ctrl-D", "SIGTERM"])
def test_ctrl_c_on_a_terminal(tiny_hf: Path, tmp_path: Path, last: str) -> None:
    """It ends an answer, or does nothing at the prompt; Ctrl-D and SIGTERM end the session."""
    settings = [f"--set={key}" for key in (*TINY, "chat.max_new_tokens=9999", f"paths.cache={tmp_path}")]
    command = [sys.executable, "-m", "openpangu_sft", "chat", "--recipe", str(ROOT / "recipes/demo.yaml"), *settings]
    ours, its = pty.openpty()
    attributes = termios.tcgetattr(its)
    attributes[3] |= termios.NOFLSH  # else Ctrl-C discards what is not read yet, even a prompt printed after it
    termios.tcsetattr(its, termios.TCSANOW, attributes)
    process = subprocess.Popen(
        ["setsid", "--ctty", *command, f"--set=paths.hf={tiny_hf}", "--model", str(tiny_hf)],
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)

    def read_until(mark: bytes) -> bytes:
        read = b""
        while not read or mark not in read:
            assert select.select([ours], [], [], PATIENCE)[0], read
            read += os.read(ours, 1024)
        return read

    try:
        assert b"/reset begins anew, /save FILE keeps it; Ctrl-C ends an answer, Ctrl-D quits." in read_until(b"> ")
        os.write(ours, "你好\n".encode())
        read_until(b"\n")
        read_until(b"")  # the answer has begun
        os.write(ours, b"\x03")
        read_until(b"> ")
        again = b""
        while b"> " not in again:  # Python sees one that comes between the prompt and its read only at the next key
            os.write(ours, b"\x03")
            while b"> " not in again and select.select([ours], [], [], 10)[0]:
                again += os.read(ours, 1024)
        os.write(ours, f"/save {tmp_path}/kept.jsonl\n".encode())
        shown = b""
        while b"> " not in shown.partition(b"kept.jsonl\r\n")[2]:
            shown += read_until(b"")
        if last == "SIGTERM":
            process.terminate()
            assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        else:
            os.write(ours, b"\x04")
            assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    [line] = (tmp_path / "kept.jsonl").read_text("utf-8").splitlines()
    assert [turn["role"] for turn in json.loads(line)["data"]] == ["user", "assistant"]
