"""The endpoint: models and chat completions, whole or streamed, in OpenAI's form.

An answer's thinking is in reasoning_content, as vLLM and DeepSeek have it; calls are sent when they are complete.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from openpangu_sft.conversations.calls import CALLS, THINKING, answer_of, call_text
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.model.chat import Chat, Completion, Parts
from openpangu_sft.serve.request import Request
from openpangu_sft.util.errors import UserError

AT_ONCE = 4  # requests that are answered at the same time; others wait
CLOSED = 499  # status of a request that its client has given up, in logs; nobody receives it
SECONDS = 1.0  # between looks whether anybody waits, where no token comes
LARGEST = 1 << 22  # bytes of a request: several times the longest context as text

_FIELDS = {"thinking": "reasoning_content", "text": "content"}


class _Stopped(Exception):
    """Raised inside of generation when nobody waits for the answer."""


class Endpoint:
    """One model under a name, for those who have the key if there is one; `stopping` ends all answers."""

    def __init__(self, chat: Chat, name: str, key: str = "") -> None:
        self.chat, self.name, self._key = chat, name, key
        self.stopping = threading.Event()
        self.pool = ThreadPoolExecutor(AT_ONCE)
        completions = Route("/v1/chat/completions", self._completions, methods=["POST"])
        self.app = Starlette(routes=[Route("/v1/models", self._models), completions])
        self._began = int(time.time())

    async def _models(self, http: HttpRequest) -> Response:
        if not self._admits(http):
            return _error(401, "the API key is missing or wrong", "invalid_api_key")
        model = {"id": self.name, "object": "model", "created": self._began, "owned_by": "openpangu-sft"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": self.chat.context}]})

    async def _completions(self, http: HttpRequest) -> Response:
        if not self._admits(http):
            return _error(401, "the API key is missing or wrong", "invalid_api_key")
        try:
            request = Request.model_validate_json(await _body(http))
            if request.model != self.name:
                return _error(404, f"there is no model {request.model!r} here, but {self.name!r}", "model_not_found")
            prompt = await asyncio.get_running_loop().run_in_executor(self.pool, request.prompt, self.chat)
            self.chat.room(prompt)
        except ValidationError as error:
            first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union's, the one that came farthest
            where = ".".join(part for part in map(str, first["loc"]) if "[" not in part)
            return _error(400, f"{where}: {first['msg']}" if where else first["msg"])
        except (BadSample, UserError) as error:
            return _error(400, str(error))
        except (ClientDisconnect, asyncio.CancelledError):  # Cancelled: the server stops, and the request never ends
            return Response(status_code=CLOSED)
        answer = _Answer(self, request, prompt)
        if request.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        try:
            async for _ in answer.deltas():
                if await http.is_disconnected():
                    return Response(status_code=CLOSED)
        except _Stopped:
            return _error(503, "the server is stopping", "stopping")
        finally:
            answer.cancelled.set()
        return JSONResponse(answer.whole())

    def _admits(self, http: HttpRequest) -> bool:
        given = http.headers.get("authorization", "")
        return not self._key or hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode())


class _Answer:
    """An answer that is being generated, in a thread of the endpoint's pool."""

    def __init__(self, endpoint: Endpoint, request: Request, prompt: list[int]) -> None:
        self._endpoint, self._request, self._prompt = endpoint, request, prompt
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": endpoint.name}
        self._loop, self._texts = asyncio.get_running_loop(), asyncio.Queue[Optional[str]]()
        self.cancelled = threading.Event()
        self._completion: Completion

    def _generate(self) -> bool:
        """False where nobody waited for the end."""
        chat = self._endpoint.chat
        try:
            self._completion = chat.complete(self._prompt, self._put, self._request.settings(chat.recipe.chat))
            return True
        except _Stopped:
            return False
        finally:
            self._loop.call_soon_threadsafe(self._texts.put_nowait, None)

    def _put(self, text: str) -> None:
        if self._endpoint.stopping.is_set() or self.cancelled.is_set():
            raise _Stopped
        self._loop.call_soon_threadsafe(self._texts.put_nowait, text)

    async def deltas(self) -> AsyncIterator[dict[str, Any]]:
        """Pieces of the message, each as soon as it is generated; now and then an empty one."""
        parts, done = Parts(), self._loop.run_in_executor(self._endpoint.pool, self._generate)
        sent, tags, held = {"thinking": 0, "text": 0}, list[str](), False
        while (text := await self._next()) is not None:
            name, piece = parts(text)
            if text in (*THINKING, *CALLS):  # only the end tells whether one is text, but for thinking at the beginning
                tags.append(text)
                held = held or sent["text"] > 0 or tags != [*THINKING][: len(tags)]
            if not piece or held:
                yield {}
            else:
                sent[name] += len(piece)
                yield {_FIELDS[name]: piece}
        if not await done:
            raise _Stopped
        found = answer_of(self._completion.text)
        for name, whole in (("thinking", found.thinking or ""), ("text", found.text)):
            if rest := whole[sent[name] :]:
                yield {_FIELDS[name]: rest}
        if calls := self._calls():
            yield {"tool_calls": [{"index": number, **call} for number, call in enumerate(calls)]}

    async def _next(self) -> Optional[str]:
        """The next token's text, None after the last one, empty where there is none for a while."""
        if self._endpoint.stopping.is_set():
            raise _Stopped
        try:
            return await asyncio.wait_for(self._texts.get(), SECONDS)
        except asyncio.TimeoutError:
            return ""

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            async for delta in self.deltas():
                if delta:
                    yield self._event(delta)
            yield self._event({}, self._reason())
            if self._request.stream_options.get("include_usage"):
                yield _event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except _Stopped:
            yield _event(json.loads(bytes(_error(503, "the server is stopping", "stopping").body)))
        finally:
            self.cancelled.set()

    def _event(self, delta: dict[str, Any], reason: Optional[str] = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def whole(self) -> dict[str, Any]:
        """The answer as one object, when it is complete."""
        found, calls = answer_of(self._completion.text), self._calls()
        message: dict[str, Any] = {"role": "assistant", "content": found.text or (None if calls else "")}
        if found.thinking is not None:
            message["reasoning_content"] = found.thinking
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "finish_reason": self._reason(), "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def _calls(self) -> list[dict[str, Any]]:
        calls = json.loads(answer_of(self._completion.text).calls or "[]")
        named = [json.loads(call_text(call)) for call in calls]
        return [
            {
                "id": f"call_{number}_{self._head['id']}",
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for number, call in enumerate(named)
        ]

    def _reason(self) -> str:
        return "length" if not self._completion.ended else "tool_calls" if self._calls() else "stop"

    def _usage(self) -> dict[str, int]:
        asked, answered = len(self._prompt), self._completion.tokens
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


async def _body(http: HttpRequest) -> bytes:
    found = b""
    async for piece in http.stream():
        found += piece
        if len(found) > LARGEST:
            raise UserError(f"the request has more than {LARGEST:,} bytes", remedy="shorten it")
    return found


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(status: int, message: str, code: Optional[str] = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


class Server(uvicorn.Server):
    """Answers requests on the sockets that `run` gets, until SIGINT or SIGTERM, which is raised again at the end."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(uvicorn.Config(endpoint.app, log_level="warning", timeout_graceful_shutdown=10))
        self._stopping = endpoint.stopping

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called for SIGINT and SIGTERM: answers end at their next token, so that connections close."""
        self._stopping.set()
        super().handle_exit(sig, frame)
