"""What is trained, read by the parsers and the chat template that openPangu's vendor publishes.

Available where PANGU_URL names a git repository with the commit below; `make test-upstream` sets it. Only the
text files named here are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openpangu_sft.conversations.calls import CALLS, THINKING
from openpangu_sft.conversations.conversation import Message, Sample
from openpangu_sft.conversations.convert import Converter
from openpangu_sft.recipe.data import Data
from openpangu_sft.tokenizer.template import END, HEADERS, START, sample_spans

COMMIT = "03f0072ebf7c483c62cccf47391c25ba13191b46"
PARSERS = "inference/vllm_ascend/entrypoints/openai"
FILES = {
    "tools": f"{PARSERS}/tool_parsers/pangu_tool_parser.py",
    "reasoning": f"{PARSERS}/reasoning_parsers/pangu_reasoning_parser.py",
    "config": "tokenizer_config.json",
}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="["), min_size=1, max_size=40)
WORDS = TEXTS.filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)
)
CALL = st.fixed_dictionaries({"name": WORDS, "arguments": st.dictionaries(TEXTS, VALUES, max_size=3)})


class Vendor:
    """The vendor's parsers and chat template, from its files by their names in `FILES`."""

    def __init__(self, files: dict[str, str]) -> None:
        self.tools = parser(files["tools"], "PanguToolParser")
        self.reasoning = parser(files["reasoning"], "PanguReasoningParser")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(json.loads(files["config"])["chat_template"])


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Vendor:
    url = os.environ.get("PANGU_URL")
    if not url:
        pytest.skip("PANGU_URL is not set: make test-upstream sets it")
    folder = tmp_path_factory.mktemp("vendor")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    try:
        git("fetch", "-q", "--depth=1", "--filter=blob:none", url, COMMIT)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{url} cannot be fetched: {error.stderr.strip()}")
    git("remote", "add", "origin", url)
    git("config", "remote.origin.promisor", "true")
    return Vendor({name: git("show", f"{COMMIT}:{path}") for name, path in FILES.items()})


def parser(source: str, name: str) -> Any:
    """A parser of the vendor's without vLLM: what it imports from there are records without behaviour."""

    class Base:
        def __init__(self, tokenizer: object) -> None:
            self.model_tokenizer = tokenizer
            self.vocab = {token: number for number, token in enumerate((*THINKING, *CALLS))}

    class Registry:
        @staticmethod
        def register_module(_: str) -> Any:
            return lambda kind: kind

    records = "ChatCompletionRequest DeltaFunctionCall DeltaMessage DeltaToolCall ExtractedToolCallInformation"
    stubs: list[str] = []

    def module(path: str, **names: Any) -> None:
        stubs.append(path)
        sys.modules[path] = ModuleType(path)
        sys.modules[path].__dict__.update(names)

    try:
        for path in ("vllm", "vllm.entrypoints", "vllm.entrypoints.openai", "partial_json_parser.core"):
            module(path)
        openai = "vllm.entrypoints.openai"
        module(f"{openai}.protocol", **dict.fromkeys((*records.split(), "FunctionCall", "ToolCall"), SimpleNamespace))
        module(f"{openai}.tool_parsers")
        module(f"{openai}.tool_parsers.abstract_tool_parser", ToolParser=Base, ToolParserManager=Registry)
        module(
            f"{openai}.tool_parsers.utils",
            extract_intermediate_diff=None,
            find_common_prefix=None,
            is_complete_json=None,
        )
        module("vllm.entrypoints.chat_utils", random_tool_call_id=None)
        module("vllm.logger", init_logger=lambda _: SimpleNamespace(exception=pytest.fail))
        module("vllm.reasoning", ReasoningParser=Base, ReasoningParserManager=Registry)
        module("partial_json_parser")
        module("partial_json_parser.core.options", Allow=None)
        inside: dict[str, Any] = {"__name__": "vendor"}
        exec(compile(source, name, "exec"), inside)
    finally:
        for path in stubs:
            del sys.modules[path]
    return inside[name](SimpleNamespace())


def trained_text(sample: Sample) -> str:
    """The text that is trained, without its end token."""
    text = "".join(span.text for span in sample_spans(sample) if span.trained)
    assert text.count(END) == 1
    return text.removesuffix(END)


def converted(answer: dict[str, Any]) -> Sample:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", **answer}]
    return Converter(Data(seq_length=64, seed=1, workers=1))({"messages": turns})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(WORDS, st.lists(CALL, min_size=1, max_size=3), st.booleans())
def test_the_tool_parser_finds_the_calls(vendor: Vendor, text: str, calls: list[dict[str, Any]], as_text: bool) -> None:
    functions = [
        {"name": call["name"], "arguments": json.dumps(call["arguments"]) if as_text else call["arguments"]}
        for call in calls
    ]
    sample = converted({"content": text, "tool_calls": [{"type": "function", "function": each} for each in functions]})
    found = vendor.tools.extract_tool_calls(trained_text(sample), None)
    assert found.tools_called
    assert found.content == text
    read = [{"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in found.tool_calls]
    assert read == calls


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(WORDS, WORDS, st.lists(CALL, max_size=2))
def test_the_reasoning_parser_finds_the_thoughts(
    vendor: Vendor, thinking: str, text: str, calls: list[dict[str, Any]]
) -> None:
    sample = converted({"reasoning_content": thinking, "content": text, "tool_calls": calls})
    read = vendor.reasoning.extract_reasoning_content(trained_text(sample), None)
    assert read[0] == thinking
    if calls:
        found = vendor.tools.extract_tool_calls(read[1], None)
        assert [call.function.name for call in found.tool_calls] == [call["name"] for call in calls]
        assert found.content == text
    else:
        assert read[1] == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(TEXTS, max_size=2), st.lists(st.tuples(st.sampled_from(sorted(HEADERS)[1:]), TEXTS), max_size=5))
def test_every_structure_of_the_chat_template_is_rendered_the_same(
    vendor: Vendor, prompts: list[str], turns: list[tuple[str, str]]
) -> None:
    turns = [(role, text) for role, text in turns if role != "system"]
    messages = [{"role": "system", "content": text} for text in prompts]
    messages += [{"role": role, "content": text} for role, text in turns]
    messages += [{"role": "assistant", "content": "答"}]
    sample = Sample(
        tuple(prompts) or ("",), (*(Message(role, text) for role, text in turns), Message("assistant", "答"))
    )
    assert "".join(span.text for span in sample_spans(sample)) == vendor.template.render(messages=messages)
    assert vendor.template.render(messages=[], add_generation_prompt=True) == START + HEADERS["assistant"]
