"""The endpoint, asked by OpenAI's own client."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import openai
import pytest
import torch
from openai import OpenAI

from conftest import PATIENCE, MakeRecipe
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.model.chat import Chat
from openpangu_sft.serve.app import Endpoint, Server

TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '[{"name": "weather", "arguments": {"city": "北京"}}]'
QUESTION: Any = [{"role": "user", "content": "你好"}]
Answering = Callable[..., list[list[int]]]


@pytest.fixture
def chat(make_recipe: MakeRecipe) -> Chat:
    recipe = make_recipe("chat.max_new_tokens=64")
    return Chat(recipe, recipe.path("hf"))


@pytest.fixture
def endpoint(chat: Chat) -> Iterator[tuple[Endpoint, OpenAI]]:
    """A server with a key, in a thread of this process, and a client that has it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found = Endpoint(chat, "tiny", "secret")
        server = Server(found)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        try:
            yield found, OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=PATIENCE)
        finally:
            found.stopping.set()
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def answering(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Answering:
    """Makes the model answer every request with a text, token by token; returns the prompts that it got."""

    def make(text: str, ended: bool = True, before: Callable[[int], object] = lambda number: None) -> list[list[int]]:
        seen: list[list[int]] = []
        ids = chat.tokenizer.hf.encode(text, add_special_tokens=False) + [chat.tokenizer.end_id] * ended

        def generate(input_ids: torch.Tensor, streamer: Any, **_: object) -> torch.Tensor:
            seen.append(input_ids[0].tolist())
            streamer.put(input_ids)
            for number, token in enumerate(ids):
                before(number)
                streamer.put(torch.tensor([token]))
            streamer.end()
            return torch.tensor([[*seen[-1], *ids]])

        monkeypatch.setattr(chat.model, "generate", generate)
        return seen

    return make


def test_an_answer_as_a_whole_and_streamed(endpoint: tuple[Endpoint, OpenAI], answering: Answering) -> None:
    _, client = endpoint
    answering("你好，有什么可以帮您？")
    whole = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert whole.choices[0].message.content == "你好，有什么可以帮您？"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options: Any = {"include_usage": True}
    chunks = [*client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, stream_options=options)]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "你好，有什么可以帮您？"
    assert len([text for text in texts if text]) > 3  # in pieces
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage


def test_thinking_and_calls(endpoint: tuple[Endpoint, OpenAI], answering: Answering, chat: Chat) -> None:
    _, client = endpoint
    seen = answering(f"[unused16]查一下[unused17]我来查。[unused11]{CALL}[unused12]")
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content == "我来查。"
    assert whole.message.reasoning_content == "查一下"  # type: ignore[attr-defined]
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "北京"})
    assert "weather" in chat.tokenizer.decode(seen[0])
    chunks = [*client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS, stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "查一下"
    assert "".join(delta.content or "" for delta in deltas) == "我来查。"
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert streamed.function is not None
    assert json.loads(streamed.function.arguments or "") == {"city": "北京"}
    history = [*QUESTION, whole.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "晴"}]
    answering("晴天。")
    assert client.chat.completions.create(model="tiny", messages=history, tools=TOOLS).choices[0].message.content


def test_the_limit_of_tokens_and_the_recipe_s_own_model(endpoint: tuple[Endpoint, OpenAI], chat: Chat) -> None:
    _, client = endpoint
    found = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=3, temperature=0)
    assert found.usage is not None
    assert found.usage.completion_tokens <= 3
    assert found.choices[0].finish_reason == ("length" if found.usage.completion_tokens == 3 else "stop")
    short = chat.recipe.chat.model_copy(update={"max_new_tokens": 3})
    expected = chat.complete(chat.prompt([Message("user", "你好")]), settings=short)
    assert found.choices[0].message.content == expected.text
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_two_clients_at_once(endpoint: tuple[Endpoint, OpenAI], answering: Answering) -> None:
    _, client = endpoint
    meet = threading.Barrier(2, timeout=PATIENCE)  # neither goes on before both have begun
    answering("好的", before=lambda number: meet.wait() if number == 0 else None)

    def ask(_: int) -> Any:
        return client.chat.completions.create(model="tiny", messages=QUESTION).choices[0].message.content

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(ask, range(2))] == ["好的", "好的"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_request_ends_its_answer(
    endpoint: tuple[Endpoint, OpenAI], answering: Answering, stream: bool
) -> None:
    found, client = endpoint
    begun, given = threading.Event(), list[int]()

    def before(number: int) -> None:
        given.append(number)
        begun.set()
        time.sleep(0.01)

    answering("好" * 100_000, before=before)
    if stream:
        client.chat.completions.create(model="tiny", messages=QUESTION, stream=True).close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1).chat.completions.create(model="tiny", messages=QUESTION)
    assert begun.wait(PATIENCE)
    found.pool.shutdown(wait=True)  # returns when the answer has ended
    assert len(given) < 100_000


def test_a_server_that_stops_ends_its_answers(endpoint: tuple[Endpoint, OpenAI], answering: Answering) -> None:
    found, client = endpoint
    answering("好" * 100_000, before=lambda number: number == 3 and found.stopping.set())
    with pytest.raises(openai.InternalServerError, match="the server is stopping"):
        client.chat.completions.create(model="tiny", messages=QUESTION)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"messages": [{"role": "user", "content": "[unused10]"}]}, "the message holds the control token [unused10]"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "nobody"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"n": 2}, "n: Input should be 1"),
        ({"stop": ["a"]}, "stop: "),
        ({"seed": 1}, "seed: Extra inputs are not permitted"),
        ({"messages": [{"role": "user", "content": "好" * 5000}]}, "more than the model can hold"),
    ],
)
def test_refused_with_a_reason(endpoint: tuple[Endpoint, OpenAI], given: dict[str, Any], said: str) -> None:
    _, client = endpoint
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, **given})
    assert said in str(raised.value)


def test_another_model_and_another_key(endpoint: tuple[Endpoint, OpenAI]) -> None:
    _, client = endpoint
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here, but 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        client.with_options(api_key="other").models.list()
