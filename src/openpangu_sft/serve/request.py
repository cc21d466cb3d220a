"""A request for a chat completion, as OpenAI's clients write it: its prompt and how it is to be answered.

Source of the fields: https://platform.openai.com/docs/api-reference/chat/create. What is not done here is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openpangu_sft.conversations.calls import calls_text, tools_text
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.model.chat import Chat
from openpangu_sft.recipe.sections import Chat as Settings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        """A null is as good as nothing."""
        return {key: inner for key, inner in value.items() if inner is not None} if isinstance(value, dict) else value


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Called(_Strict):
    name: str = Field(min_length=1)
    arguments: str


class _Call(_Strict):
    id: str
    type: Literal["function"]
    function: _Called
    index: int = 0  # of a stream


class _Tool(_Strict):
    type: Literal["function"]
    function: dict[str, Any]  # as it is: the prompt shows the whole definition


class _Turn(_Strict):
    """A message, as it is sent or as it was answered here."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Union[str, list[_Part], None] = None
    reasoning_content: Optional[str] = None
    reasoning: Any = None  # the same in newer vLLM
    tool_calls: list[_Call] = []
    tool_call_id: Optional[str] = None
    name: Any = None  # of a participant or a function: the template has no place for it
    refusal: Any = None
    annotations: Any = None

    @property
    def text(self) -> str:
        """Texts of several parts are joined by line breaks, as vLLM does."""
        return "\n".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""


class Request(_Strict):
    """The fields that are taken, and of others the values that change nothing."""

    messages: list[_Turn] = Field(min_length=1)
    model: str
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}
    max_tokens: Optional[int] = Field(default=None, gt=0)
    max_completion_tokens: Optional[int] = Field(default=None, gt=0)
    temperature: Optional[float] = Field(default=None, ge=0, le=2)
    top_p: Optional[float] = Field(default=None, gt=0, le=1)
    tools: list[_Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: Literal[True] = True
    response_format: dict[Literal["type"], Literal["text"]] = {"type": "text"}
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: float = Field(default=0, ge=0, le=0)
    presence_penalty: float = Field(default=0, ge=0, le=0)
    stop: Sequence[str] = Field(default=(), max_length=0)
    user: Any = None  # whoever asks, and notes for the service: they change no answer
    metadata: Any = None
    store: Any = None

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids to the assistant's header; raises `BadSample` for messages that are none, else as `Chat.prompt`."""
        systems = [turn.text for turn in self.messages if turn.role in ("system", "developer")]
        if any(turn.role not in ("system", "developer") for turn in self.messages[: len(systems)]):
            raise BadSample("messages: a system message comes after others: put it first")
        defined = tools_text([tool.model_dump() for tool in self.tools if self.tool_choice != "none"])
        return chat.prompt([*_asked(self.messages[len(systems) :])], "\n".join(systems), defined)

    def settings(self, default: Settings) -> Settings:
        """How the answer is sampled: what the request says, else the recipe's."""
        tokens = self.max_completion_tokens or self.max_tokens
        given = {"max_new_tokens": tokens, "temperature": self.temperature, "top_p": self.top_p}
        return default.model_copy(update={name: value for name, value in given.items() if value is not None})


def _asked(turns: Sequence[_Turn]) -> Iterator[Message]:
    """The conversation; results of tools in the order of their calls, as the template does not name them."""
    if not turns or turns[-1].role == "assistant":
        raise BadSample("messages: the last one is to be a user's or a tool's")
    place = 0
    while place < len(turns):
        turn = turns[place]
        place += 1
        if turn.role == "tool":
            raise BadSample(f"messages: no call has the tool_call_id {turn.tool_call_id!r}")
        calls = turn.tool_calls
        if len({call.id for call in calls}) < len(calls) or (calls and turn.role != "assistant"):
            raise BadSample("messages: a tool_call_id stands twice, or in a message that is not the assistant's")
        if turn.role == "assistant":
            dumped = [call.function.model_dump() for call in calls]
            yield Message("assistant", turn.text, turn.reasoning_content, calls_text(dumped))
        else:
            yield Message("user", turn.text)
        results = {one.tool_call_id: one.text for one in turns[place : place + len(calls)] if one.role == "tool"}
        if results.keys() != {call.id for call in calls}:
            raise BadSample(
                f"messages: each of the calls {[call.id for call in calls]} needs one result, right after it"
            )
        yield from (Message("tool", results[call.id]) for call in calls)
        place += len(calls)
