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
IMAGE = {"type": "image_url", "image_url": {"url": "a"}}
CALLED: Any = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": f"c{number}", "type": "function", "function": {"name": "weather", "arguments": f'{{"day":{number}}}'}}
        for number in (1, 2)
    ],
}
RESULTS: Any = [{"role": "tool", "tool_call_id": f"c{number}", "content": f"第{number}天"} for number in (1, 2)]
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
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role: Input should be 'system', 'developer'"),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": "九"}]},
            "the last one is to be a user's or a tool's",
        ),
        ({"messages": [{"role": "system", "content": "a"}]}, "the last one is to be a user's or a tool's"),
        ({"messages": [*QUESTION, {"role": "system", "content": "a"}]}, "a system message comes after others"),
        ({"messages": [*QUESTION, {"role": "tool", "tool_call_id": "a", "content": "b"}]}, "has the tool_call_id 'a'"),
        ({"messages": [*QUESTION, {**CALLED, "role": "user"}]}, "in a message that is not the assistant's"),
        (
            {"messages": [*QUESTION, {**CALLED, "tool_calls": CALLED["tool_calls"][:1] * 2}, *RESULTS]},
            "a tool_call_id stands twice",
        ),
        ({"messages": [*QUESTION, CALLED, *QUESTION]}, "each of the calls ['c1', 'c2'] needs one result"),
        ({"messages": [*QUESTION, CALLED, RESULTS[0], *QUESTION]}, "each of the calls ['c1', 'c2'] needs one result"),
        ({"messages": [*QUESTION, CALLED, RESULTS[0], RESULTS[0]]}, "each of the calls ['c1', 'c2'] needs one result"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type: Input should be 'text'"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "messages.0.weight: Extra inputs"),
        ({"messages": [{"role": "user", "content": "a" * (1 << 22)}]}, "the request has more than 4,194,304 bytes"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: Field required"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"extra_body": {"tool_choice": "required"}}, "tool_choice: Input should be 'auto' or 'none'"),
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


def test_results_of_tools_are_in_the_order_of_their_calls(
    endpoint: tuple[Endpoint, OpenAI], answering: Answering, chat: Chat
) -> None:
    _, client = endpoint
    seen = answering("好")
    for results in (RESULTS, RESULTS[::-1]):
        client.chat.completions.create(model="tiny", messages=[*QUESTION, CALLED, *results], tools=TOOLS)
    assert seen[0] == seen[1]
    text = chat.tokenizer.decode(seen[0])
    assert text.index('[{"name":"weather","arguments":{"day":1}},{"name":"weather","arguments":{"day":2}}]') > 0
    assert text.index("第1天") < text.index("第2天")


@pytest.mark.parametrize(
    ("answer", "content", "reason"),
    [
        ('看[unused11][{"name"', '看[unused11][{"name"', "stop"),
        ("[unused11]没有[unused12]", "[unused11]没有[unused12]", "stop"),
        ("看[unused11][][unused12]后", "看[unused11][][unused12]后", "stop"),
        ("想[unused17]答", "想[unused17]答", "stop"),
        ("嗯[unused16]想[unused17]答", "嗯[unused16]想[unused17]答", "stop"),
        ("[unused16]想[unused17]答[unused16]又[unused17]", "答[unused16]又[unused17]", "stop"),
        ("[unused16]想[unused11]又[unused12]想[unused17]答", "答", "stop"),
        ("[unused16]想[unused17]", "", "stop"),
        ("", "", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_no_call_is_text_and_any_answer_can_be_sent_back(
    endpoint: tuple[Endpoint, OpenAI], answering: Answering, answer: str, content: str, reason: str, stream: bool
) -> None:
    _, client = endpoint
    answering(answer)
    if stream:
        chunks = [*client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS, stream=True)]
        found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert (found, chunks[-1].choices[0].finish_reason) == (content, reason)
        return
    choice = client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS).choices[0]
    assert (choice.message.content, choice.finish_reason) == (content, reason)
    history: Any = [*QUESTION, choice.message.model_dump(), *QUESTION]
    assert client.chat.completions.create(model="tiny", messages=history).choices[0].message.content == content


def test_earlier_thinking_is_seen_only_where_it_is_trained_in_every_answer(
    make_recipe: MakeRecipe, endpoint: tuple[Endpoint, OpenAI], answering: Answering, chat: Chat
) -> None:
    _, client = endpoint
    seen = answering("好")
    history: Any = [*QUESTION, {"role": "assistant", "content": "答", "reasoning_content": "想"}, *QUESTION]
    client.chat.completions.create(model="tiny", messages=history)
    chat.recipe = make_recipe("data.thinking=all")
    client.chat.completions.create(model="tiny", messages=history)
    assert ["[unused16]想[unused17]" in chat.tokenizer.decode(prompt) for prompt in seen] == [False, True]


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_stops_waits_for_no_token(
    endpoint: tuple[Endpoint, OpenAI], answering: Answering, stream: bool
) -> None:
    found, client = endpoint
    begun, go_on = threading.Event(), threading.Event()
    answering("好", before=lambda number: (begun.set(), go_on.wait(PATIENCE)))
    threading.Thread(target=lambda: (begun.wait(PATIENCE), found.stopping.set())).start()
    try:
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(client.chat.completions.create(model="tiny", messages=QUESTION, stream=stream))  # type: ignore[call-overload]
    finally:
        go_on.set()


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-9, 0.009])
def test_a_temperature_next_to_nothing_is_greedy(endpoint: tuple[Endpoint, OpenAI], temperature: float) -> None:
    _, client = endpoint
    answers = [
        client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5, temperature=value)
        for value in (0, temperature)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_a_stream_that_the_server_ends_is_an_error(endpoint: tuple[Endpoint, OpenAI], answering: Answering) -> None:
    found, client = endpoint
    answering("好" * 100_000, before=lambda number: number == 3 and found.stopping.set())
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(client.chat.completions.create(model="tiny", messages=QUESTION, stream=True))


def test_a_client_that_leaves_before_its_request_is_whole(
    endpoint: tuple[Endpoint, OpenAI], caplog: pytest.LogCaptureFixture
) -> None:
    _, client = endpoint
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as half:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\nContent-Length: 99\r\n"
        half.sendall(f"{head}\r\n{{".encode())
    assert [model.id for model in client.models.list()] == ["tiny"]  # the server has seen the end of the other by then
    assert "Traceback" not in caplog.text


def test_what_is_null_is_not_given(endpoint: tuple[Endpoint, OpenAI], answering: Answering) -> None:
    _, client = endpoint
    seen = answering("好")
    nothing = dict.fromkeys(("stream", "seed", "stop", "n", "tools", "logit_bias", "response_format", "user"))
    for extra in ({}, nothing):
        client.chat.completions.create(model="tiny", messages=QUESTION, extra_body=extra)
    assert seen[0] == seen[1]


def test_a_tool_is_shown_as_it_is_given(endpoint: tuple[Endpoint, OpenAI], answering: Answering, chat: Chat) -> None:
    _, client = endpoint
    seen = answering("好")
    tool: Any = {"type": "function", "function": {"description": "天气", "parameters": {"type": "object"}, "name": "w"}}
    client.chat.completions.create(model="tiny", messages=QUESTION, tools=[tool])
    assert '"description":"天气","parameters":{"type":"object"},"name":"w"' in chat.tokenizer.decode(seen[0])
