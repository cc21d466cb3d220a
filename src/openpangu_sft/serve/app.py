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
from typing import Any, Optional, Union

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from openpangu_sft.conversations.calls import call_text
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.model.chat import Chat, Completion, Parts, answer_of
from openpangu_sft.serve.request import Request
from openpangu_sft.util.errors import UserError

AT_ONCE = 4
"""Requests that are answered at the same time; others wait."""


class _Stopped(Exception):
    """Raised inside of generation where nobody waits for the answer."""


class Endpoint:
    """One model under a name; `stopping` ends all answers."""

    def __init__(self, chat: Chat, name: str, key: str = "") -> None:
        self._chat, self._name, self._key = chat, name, key
        self.stopping = threading.Event()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._began = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._completions, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _health(self, request: HttpRequest) -> Response:
        return Response()

    async def _models(self, request: HttpRequest) -> Response:
        if refused := self._refused(request):
            return refused
        model = {"id": self._name, "object": "model", "created": self._began, "owned_by": "openpangu-sft"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": self._chat.context}]})

    async def _completions(self, request: HttpRequest) -> Response:
        if refused := self._refused(request):
            return refused
        try:
            wanted = Request.model_validate_json(await request.body())
            if wanted.model != self._name:
                return _error(404, f"there is no model {wanted.model!r} here, but {self._name!r}", "model_not_found")
            prompt = await asyncio.get_running_loop().run_in_executor(self._pool, wanted.prompt, self._chat)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            return _error(400, f"{where}: {first['msg']}" if where else first["msg"])
        except (BadSample, UserError) as error:
            return _error(400, str(error))
        answer = _Answer(self, wanted, prompt)
        if wanted.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        try:
            async for _ in answer.deltas():
                if await request.is_disconnected():
                    return Response(status_code=499)
        finally:
            answer.cancelled.set()
        return JSONResponse(answer.whole())

    def _refused(self, request: HttpRequest) -> Optional[Response]:
        given = request.headers.get("authorization", "")
        if not self._key or hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            return None
        return _error(401, "the API key is missing or wrong", "invalid_api_key")

    def generate(self, wanted: Request, prompt: list[int], answer: _Answer) -> Completion:
        """In a thread of the pool: calls `answer.put` with the text of each token."""

        def on_text(text: str) -> None:
            if self.stopping.is_set() or answer.cancelled.is_set():
                raise _Stopped
            answer.put(text)

        return self._chat.complete(prompt, on_text, wanted.settings(self._chat.recipe.chat))

    def submit(self, wanted: Request, prompt: list[int], answer: _Answer) -> asyncio.Future[Completion]:
        """Begins to generate, or waits for its turn."""
        return asyncio.get_running_loop().run_in_executor(self._pool, self.generate, wanted, prompt, answer)

    @property
    def name(self) -> str:
        return self._name


class _Answer:
    """An answer that is being generated."""

    def __init__(self, endpoint: Endpoint, wanted: Request, prompt: list[int]) -> None:
        self._endpoint, self._wanted, self._prompt = endpoint, wanted, prompt
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._loop, self._texts = asyncio.get_running_loop(), asyncio.Queue[Union[str, None]]()
        self.cancelled = threading.Event()
        self._completion: Completion

    def put(self, text: Optional[str]) -> None:
        """From any thread; None after the last one."""
        self._loop.call_soon_threadsafe(self._texts.put_nowait, text)

    async def deltas(self) -> AsyncIterator[dict[str, Any]]:
        """Pieces of the message, each as soon as it is generated."""
        parts = Parts()
        done = self._endpoint.submit(self._wanted, self._prompt, self)
        done.add_done_callback(lambda _: self._texts.put_nowait(None))
        while (text := await self._texts.get()) is not None:
            name, piece = parts(text)
            if piece and name != "calls":
                yield {"reasoning_content" if name == "thinking" else "content": piece}
        self._completion = await done
        if calls := self._calls():
            yield {"tool_calls": [{"index": number, **call} for number, call in enumerate(calls)]}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            async for delta in self.deltas():
                yield self._event(delta)
            yield self._event({}, self._reason())
            if self._wanted.stream_options and self._wanted.stream_options.include_usage:
                yield f"data: {json.dumps({**self._head('chat.completion.chunk'), 'choices': [], 'usage': self._usage()})}\n\n"
            yield "data: [DONE]\n\n"
        except _Stopped:
            pass
        finally:
            self.cancelled.set()

    def whole(self) -> dict[str, Any]:
        """The answer as one object, when it is complete."""
        found, calls = answer_of(self._completion.text), self._calls()
        message: dict[str, Any] = {"role": "assistant", "content": found.text or (None if calls else "")}
        if found.thinking is not None:
            message["reasoning_content"] = found.thinking
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "finish_reason": self._reason(), "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    def _event(self, delta: dict[str, Any], reason: Optional[str] = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return f"data: {json.dumps({**self._head('chat.completion.chunk'), 'choices': [choice]}, ensure_ascii=False)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._endpoint.name}

    def _calls(self) -> list[dict[str, Any]]:
        calls = json.loads(answer_of(self._completion.text).calls or "[]")
        texts = [json.loads(call_text(call)) for call in calls]
        return [
            {
                "id": f"call_{self._id[-24:]}{number}",
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for number, call in enumerate(texts)
        ]

    def _reason(self) -> str:
        if not self._completion.ended:
            return "length"
        return "tool_calls" if self._calls() else "stop"

    def _usage(self) -> dict[str, int]:
        asked, answered = len(self._prompt), self._completion.tokens
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _error(status: int, message: str, code: Optional[str] = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)
