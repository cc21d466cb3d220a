"""`serve` as a process: what it says, and how it stops."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import PATIENCE, ROOT, TINY

Process = "subprocess.Popen[str]"


@pytest.fixture
def command(tiny_hf: Path, tmp_path: Path) -> list[str]:
    overrides = [*TINY, f"paths.cache={tmp_path}", f"paths.hf={tiny_hf}", "chat.max_new_tokens=1000"]
    settings = [f"--set={override}" for override in overrides]
    recipe = str(ROOT / "recipes/demo.yaml")
    return [sys.executable, "-m", "openpangu_sft", "serve", "--recipe", recipe, *settings, "--model", str(tiny_hf)]


@pytest.fixture
def serving(command: list[str], tiny_hf: Path) -> Iterator[tuple[Any, openai.OpenAI]]:
    process = subprocess.Popen([*command, "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        line = next(line for line in process.stderr if line.startswith("serving "))
        assert line.startswith(f"serving {tiny_hf.name} at http://127.0.0.1:")
        address = line.split()[3].rstrip(";")
        yield process, openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_answers_and_then_the_server(serving: tuple[Any, openai.OpenAI]) -> None:
    process, client = serving
    [model] = client.models.list()
    asked: Any = [{"role": "user", "content": "你好"}]
    short = client.chat.completions.create(model=model.id, messages=asked, max_tokens=2)
    assert short.usage is not None
    assert 1 <= short.usage.completion_tokens <= 2
    stream = client.chat.completions.create(model=model.id, messages=asked, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    process.send_signal(signal.SIGINT)
    try:
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
    except openai.APIError as error:
        assert "the server is stopping" in str(error)  # noqa: PT017
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "stopped"
    assert "Traceback" not in said
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("8000", "LISTEN: '8000' is no ADDRESS:PORT -> give one, say, 127.0.0.1:8000"),
        ("127.0.0.1:70000", "LISTEN: '127.0.0.1:70000' is no ADDRESS:PORT -> give one, say, 127.0.0.1:8000"),
        ("0.0.0.0:0", "LISTEN: 0.0.0.0 without a key: anybody who reaches it could ask -> export OPENPANGU_API_KEY=…"),
        ("127.0.0.1:{taken}", "LISTEN: 127.0.0.1:{taken}: Address already in use -> give another address or port"),
    ],
)
def test_addresses_that_are_refused(command: list[str], listen: str, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen, said = listen.replace("{taken}", str(port)), said.replace("{taken}", str(port))
        done = subprocess.run([*command, "--listen", listen], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"openpangu-sft: {said}"
