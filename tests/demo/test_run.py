"""`make demo` as a new user runs it, and the checkpoint that it begins with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import ROOT, SHARED, TINY, example_texts
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.conversations.files import read_records
from openpangu_sft.demo.base_model import CONTROL_TOKENS, make_base_model
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.tokenizer.template import HEADERS, prompt_spans
from openpangu_sft.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool", "function")


def make(target: str, *variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "SET")}
    venv = f"VENV={Path(sys.prefix)}"
    # what the demo itself uses: the tests limit their workers to one thread
    environment["OMP_NUM_THREADS"] = "2"
    environment["RUNTIME"] = "host"  # tests/image runs it in the image
    return subprocess.run(
        ["make", target, venv, *variables], cwd=ROOT, text=True, capture_output=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's directory."""
    return tmp_path_factory.mktemp("demo")


def test_make_demo_ends_with_the_trained_answers_and_its_stages_can_be_repeated(cache: Path) -> None:
    settings = f"SET=paths.cache={cache}"
    finished = make("demo", settings)
    assert finished.returncode == 0, finished.stderr
    screen = finished.stderr
    for stage in ("format", "preprocess", "merge", "convert", "sft", "evaluate", "report", "export", "chat"):
        assert f"│ {stage} " in screen
    assert "asked:    云雾茶社几点开门？\ntrained:  云雾茶社每天早上九点开门，晚上九点半打烊。\n" in screen
    pairs = [
        line.split(":", 1)[1].strip() for line in screen.splitlines() if line.startswith(("trained:", "answered:"))
    ]
    assert len(pairs) == 4
    assert pairs[0::2] == pairs[1::2]
    assert (cache / "sft_outputs/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "sft_outputs/report.html\n" in screen
    assert "<h2>Answers before and after</h2>" in (cache / "sft_outputs/report.html").read_text("utf-8")
    losses = [json.loads(line)["loss"] for line in (cache / "sft_outputs/metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 7
    assert losses[-1] < 0.1

    recipe = "RECIPE=recipes/demo.yaml"
    asked = make("chat", recipe, settings, "PROMPT=云雾茶社几点开门？")
    assert asked.stdout == "云雾茶社每天早上九点开门，晚上九点半打烊。\n"
    again = make("sft", recipe, settings)
    assert again.returncode == 0
    assert "iterations already" in again.stderr
    other = make("merge", recipe, f"{settings} data.seq_length=256")
    assert other.returncode != 0
    assert "data.seq_length = 512, the recipe says 256 -> run make preprocess again" in other.stderr


def test_a_demo_that_learns_too_little_says_so(cache: Path) -> None:
    finished = make("demo", f"SET=paths.cache={cache}/short train.iterations=11 train.save_interval=11")
    assert finished.returncode != 0
    assert "does not give the trained answer" in finished.stderr


def test_the_base_model_is_the_same_every_time(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        recipe = load_recipe(ROOT / "recipes/demo.yaml", [*TINY, f"paths.hf={tmp_path / name}"])
        digests.append(make_base_model(recipe, example_texts()).digest)
    assert digests[0] == digests[1]


def test_the_chat_template_writes_what_training_sees(tiny_hf: Path) -> None:
    tokenizer = Tokenizer(tiny_hf, trust_remote_code=False)
    messages = (Message("user", "云雾？"), Message("assistant", "好。"), Message("tool", "{}"), Message("user", "x"))
    plain = [{"role": message.role, "content": message.content} for message in messages]
    for system, given in (("", []), ("简短", [{"role": "system", "content": "简短"}])):
        text = tokenizer.hf.apply_chat_template([*given, *plain], add_generation_prompt=True, tokenize=False)
        assert text == "".join(piece.text for piece in prompt_spans((system,), messages, reply=True))


def test_the_chat_template_writes_what_openpangus_own_does(tiny_hf: Path) -> None:
    published = SHARED / "data/openpangu_7b/tokenizer_config.json"
    if not published.is_file():
        pytest.skip("openPangu's tokenizer_config.json is not at hand")
    tokenizer = Tokenizer(tiny_hf, trust_remote_code=False).hf
    template = json.loads(published.read_text("utf-8"))["chat_template"]
    messages = [{"role": role, "content": f"content of {role}"} for role in ROLES]
    for conversation in (messages, messages[1:], messages[1:2]):
        for reply in (True, False):
            ours = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=reply)
            theirs = tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=reply, chat_template=template
            )
            assert ours == theirs
    assert set(HEADERS) == set(ROLES)


def test_special_tokens_are_single_and_inside_the_vocabulary(tiny_hf: Path) -> None:
    tokenizer = Tokenizer(tiny_hf, trust_remote_code=False)
    for token in CONTROL_TOKENS:
        (number,) = tokenizer.hf.encode(token, add_special_tokens=False)
        assert number < tokenizer.hf.sp_model.get_piece_size()
    assert tokenizer.hf.bos_token_id == 1
    assert tokenizer.pad_id == 0
    assert tokenizer.hf.eos_token_id == tokenizer.end_id


def test_the_fast_tokenizer_that_transformers_makes_of_it_gives_the_same_ids(tiny_hf: Path) -> None:
    fast = AutoTokenizer.from_pretrained(str(tiny_hf))
    slow = Tokenizer(tiny_hf, trust_remote_code=False).hf
    assert fast.is_fast
    for text in example_texts():
        whole = f"[unused9]用户：{text}[unused10]"
        assert fast.encode(whole) == slow.encode(whole)


def test_the_examples_have_what_they_should_show() -> None:
    records = [record.content for file in sorted((ROOT / "examples").iterdir()) for record in read_records(file)]
    assert len(records) == 60
    chinese = [record for record in records if isinstance(record, dict) and "conversations" in record]
    english = [record for record in records if isinstance(record, dict) and "instruction" in record]
    assert len(chinese) == len(english) == 30
    assert sum("tools" in record for record in chinese) >= 5
    assert sum("system" in record for record in chinese + english) >= 15
    assert sum(len(record["conversations"]) > 2 for record in chinese) >= 8
    assert sum(bool(record.get("history")) for record in english) >= 5
