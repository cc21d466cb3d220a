"""Chat with a Hugging Face or Megatron-core checkpoint, in the template of training."""

from __future__ import annotations

import json
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple, Optional

import torch
from transformers.generation.streamers import BaseStreamer

from openpangu_sft.artifacts.artifact import MANIFEST, parse_manifest
from openpangu_sft.checkpoint.hf import open_hf
from openpangu_sft.checkpoint.lora import is_adapter
from openpangu_sft.checkpoint.source import open_checkpoint
from openpangu_sft.conversations.calls import CALLS, THINKING, Answer, answer_of
from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.keys import BadSample
from openpangu_sft.model.llama import build_model, inference_device
from openpangu_sft.model.tensors import tensors_of
from openpangu_sft.recipe.data import Data
from openpangu_sft.recipe.model_config import ADAPTER_CONFIG, CONFIG, TRACKER, model_of, read_config
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.recipe.sections import Chat as Settings
from openpangu_sft.tokenizer.template import prompt_spans
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.tokenizer.tool_prompt import ToolPrompt
from openpangu_sft.util.errors import UserError

OnText = Callable[[str], None]
COLDEST = 0.01  # a lower temperature is greedy: logits divided by it overflow


class Completion(NamedTuple):
    """What a model has generated: the answer, control tokens included, and the number of its tokens."""

    text: str
    tokens: int
    ended: bool  # by the end token, and not by the limit of tokens


class Parts:
    """Tells of which part of an answer the text of each token is."""

    def __init__(self) -> None:
        self._tag = ""

    def __call__(self, text: str) -> tuple[Literal["thinking", "text", "calls"], str]:
        """The part, and the text without the tokens that begin and end parts."""
        if text in (*THINKING, *CALLS):
            self._tag, text = text, ""
        return "thinking" if self._tag == THINKING[0] else "calls" if self._tag == CALLS[0] else "text", text


def prompt_ids(
    tokenizer: Tokenizer, data: Data, systems: Sequence[str], messages: Sequence[Message], tools: str = ""
) -> list[int]:
    """Token ids of a conversation, which end with the assistant's header.

    Thinking is left out, as a served model sees it, unless data.thinking is all; control tokens in the assistant's
    messages are plain text. Tools are the JSON text of a list. Raises `UserError` for a control token in another's
    message, or tools that cannot be rendered.
    """
    if data.thinking != "all":
        messages = [replace(message, thinking=None) for message in messages]
    for text in (*systems, tools, *(message.content for message in messages if message.role != "assistant")):
        if not text.isascii() and text.encode("utf-8", "replace").decode("utf-8") != text:
            raise UserError("the message holds bytes that are not UTF-8", remedy="write it as UTF-8")
        if token := tokenizer.control_token(text):
            raise UserError(f"the message holds the control token {token.group()}", remedy="take it out")
    try:
        tool_prompt = ToolPrompt(data.tool_prompt)(tools, tokenizer.control_token)
    except BadSample as error:
        raise UserError(str(error), remedy="check data.tool_prompt") from None
    cut = tokenizer.inside_control_tokens
    return tokenizer.prompt_ids(prompt_spans(systems, messages, reply=True, cut=cut, tool_prompt=tool_prompt))


class Chat:
    """A model with its tokenizer, from a Hugging Face or Megatron-core checkpoint, a run (its newest by default), or a
    LoRA adapter.

    Configuration and tokenizer of a Megatron-core checkpoint or adapter are in `paths.hf`. Raises `UserError` where
    there is none, or it is damaged.
    """

    iteration: Optional[int]  # of the training that made the checkpoint, where that is known
    context: int  # longest context in tokens

    def __init__(self, recipe: Recipe, checkpoint: Path, iteration: Optional[int] = None) -> None:
        other = (checkpoint / TRACKER).is_file() or is_adapter(checkpoint)
        if (checkpoint / CONFIG).is_file() and not other:
            files, model = checkpoint, model_of(read_config(checkpoint), checkpoint / CONFIG)
            weights, self.iteration = open_hf(checkpoint, model), _trained(checkpoint)
        else:
            files, model = recipe.path("hf"), recipe.model
            opened = open_checkpoint(recipe, checkpoint, iteration, "run make export, or give one with MODEL=…")
            converted = opened.manifest is not None and opened.manifest.kind == "mcore"
            weights, trained = opened.weights, opened.iteration or _trained(checkpoint)
            self.iteration = None if converted else trained
        self.recipe, self.context = recipe, model.max_position_embeddings
        self.tokenizer = Tokenizer(files, recipe.tokenizer.trust_remote_code)
        self.model = build_model(files, tensors_of(weights, model), "eager", inference_device(recipe)).eval()

    def reply(
        self, messages: Sequence[Message], system: str = "", tools: str = "", on_text: Optional[OnText] = None
    ) -> Answer:
        """The assistant's next message; arguments and errors are those of `prompt` and `complete`."""
        return answer_of(self.complete(self.prompt(messages, system, tools), on_text).text)

    def prompt(self, messages: Sequence[Message], system: str = "", tools: str = "") -> list[int]:
        """Token ids of a conversation, which end with the assistant's header; raises as `prompt_ids`."""
        return prompt_ids(self.tokenizer, self.recipe.data, (system,), messages, tools)

    def room(self, prompt: list[int]) -> int:
        """How many tokens an answer may have; raises `UserError` where a prompt leaves none."""
        room = self.context - len(prompt)
        if room <= 0:
            what = f"the conversation has {len(prompt)} tokens, more than the model can hold"
            raise UserError(what, remedy="shorten it, or begin a new one")
        return room

    def complete(
        self, prompt: list[int], on_text: Optional[OnText] = None, settings: Optional[Settings] = None
    ) -> Completion:
        """The answer to token ids that end with the assistant's header; from several threads at once, if wanted.

        `on_text` gets the text of each token, that of a control token alone; `settings` are the recipe's by default.
        Raises `UserError` for a prompt longer than the model's context.
        """
        room = self.room(prompt)
        settings = settings or self.recipe.chat
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature >= COLDEST:
            sampling.update(do_sample=True, temperature=settings.temperature, top_p=settings.top_p)
        input_ids = torch.tensor([prompt], device=self.model.device)
        with torch.no_grad():
            output = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(settings.max_new_tokens, room),
                eos_token_id=self.tokenizer.end_id,
                pad_token_id=self.tokenizer.pad_id,
                streamer=_Stream(self.tokenizer, on_text) if on_text else None,
                **sampling,
            )
        answer = output[0, len(prompt) :].tolist()
        ended = answer[-1:] == [self.tokenizer.end_id]
        return Completion(self.tokenizer.decode_reply(answer[: len(answer) - ended]), len(answer), ended)


class _Stream(BaseStreamer):
    """Hands on the text of each token that is generated; see `Chat.reply`."""

    def __init__(self, tokenizer: Tokenizer, on_text: OnText) -> None:
        self._tokens: deque[int] = deque()
        self._texts = tokenizer.texts(iter(self._tokens.popleft, tokenizer.end_id))
        self._on_text, self._in_prompt, self._unspoken = on_text, True, tokenizer.unspoken

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`, first with the prompt, then with each token."""
        if not self._in_prompt:
            number = int(value)
            self._tokens.append(number)
            text = next(self._texts, "")
            self._on_text("" if number in self._unspoken else text)
        self._in_prompt = False

    def end(self) -> None:
        """Called by `generate` after the last token."""


class Dialogue:
    """A conversation with a model; `messages` so far, with their thinking."""

    def __init__(self, chat: Chat, system: str = "", tools: str = "") -> None:
        self._chat, self._system, self._tools = chat, system, tools
        self.messages: tuple[Message, ...] = ()

    def ask(self, text: str, on_text: OnText, breaks: bool = False) -> Answer:
        """The answer to a user's next message; raises as `Chat.reply`, and then the message is forgotten.

        With `breaks` Ctrl-C ends the answer only, which stays as far as it has come.
        """
        asked, texts = (*self.messages, Message("user", text)), list[str]()

        def take(text: str) -> None:
            texts.append(text)
            on_text(text)

        try:
            answer = self._chat.reply(asked, self._system, self._tools, take)
        except KeyboardInterrupt as stop:
            if not breaks or signal.SIGTERM in stop.args:
                raise
            if not texts:
                return Answer(None, "", "")  # as if it had not been asked
            answer = answer_of("".join(texts))
        self.messages = (*asked, Message("assistant", answer.text, answer.thinking, answer.calls))
        return answer

    def save(self, path: Path) -> None:
        """Adds it to a samples file, as one line; raises `UserError` where that cannot be written."""
        sample = Sample((self._system,), self.messages, self._tools)
        if not self.messages:
            raise UserError("there is nothing to save yet", remedy="ask something first")
        try:
            with path.expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(sample.to_json(), ensure_ascii=False) + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; ~ of nobody
            raise UserError(f"cannot be written: {error}", where=path, remedy="name another file") from None


def default_checkpoint(recipe: Recipe) -> Path:
    """The first that exists of the exported checkpoint, the run and the base; the export's path if none does."""
    for name in ("export", "run"):
        path = recipe.path(name)
        if (path / MANIFEST).is_file() and any((path / file).is_file() for file in (CONFIG, TRACKER, ADAPTER_CONFIG)):
            return path
    base = recipe.path("hf")
    return base if (base / CONFIG).is_file() else recipe.path("export")


def _trained(checkpoint: Path) -> Optional[int]:
    """The iteration that a Hugging Face checkpoint was exported from."""
    if not (checkpoint / MANIFEST).is_file():
        return None
    return parse_manifest(checkpoint / MANIFEST, "run make export").counts.get("iteration")
