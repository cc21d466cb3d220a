"""A request for a chat completion, as OpenAI's clients write it: its prompt and how it is to be answered.

Source of the fields: https://platform.openai.com/docs/api-reference/chat/create. What this server cannot do is refused,
never left out silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field

from openpangu_sft.conversations.conversation import Message, Rules
from openpangu_sft.conversations.convert import Converter
from openpangu_sft.model.chat import Chat
from openpangu_sft.recipe.sections import Chat as Settings

ANSWER = {"role": "assistant", "content": "."}
"""Stands for the answer, as conversations end with one."""
IGNORED = ["refusal", "annotations", "audio", "reasoning", "reasoning_content"]
"""Keys of messages that clients send back as they got them; a served model does not see its earlier thinking."""


class Request(BaseModel):
    """The fields that are taken, and of others the values that change nothing."""

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str
    stream: bool = False
    stream_options: Optional[dict[Literal["include_usage"], bool]] = None
    max_tokens: Optional[int] = Field(default=None, gt=0)
    max_completion_tokens: Optional[int] = Field(default=None, gt=0)
    temperature: Optional[float] = Field(default=None, ge=0)
    top_p: Optional[float] = Field(default=None, gt=0, le=1)
    tools: Optional[list[dict[str, Any]]] = None
    tool_choice: Literal["auto", "none", None] = None
    parallel_tool_calls: Literal[True, None] = None
    response_format: Optional[dict[Literal["type"], Literal["text"]]] = None
    n: Literal[1, None] = None
    logprobs: Literal[False, None] = None
    frequency_penalty: Optional[float] = Field(default=None, ge=0, le=0)
    presence_penalty: Optional[float] = Field(default=None, ge=0, le=0)
    stop: Optional[Sequence[str]] = Field(default=None, max_length=0)
    user: Any = None  # whoever asks, and notes for the service: they change no answer
    metadata: Any = None
    store: Any = None

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids to the assistant's header; raises `BadSample` for messages that are none, else as `Chat.prompt`."""
        data = chat.recipe.data
        rules = data.model_copy(update={"turns": "lenient", "ignore_keys": [*data.ignore_keys, *IGNORED]})
        tools = self.tools if self.tools and self.tool_choice != "none" else []
        record = {"messages": [*self.messages, ANSWER], "tools": tools}
        sample = Converter(rules, Rules(rules, trains=False))(record)
        asked: Sequence[Message] = sample.data[:-1]
        return chat.prompt(asked, "\n".join(sample.meta_prompt), sample.tools)

    def settings(self, default: Settings) -> Settings:
        """How the answer is sampled: what the request says, else the recipe's."""
        given = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        return default.model_copy(update={name: value for name, value in given.items() if value is not None})
