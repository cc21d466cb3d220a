"""A small checkpoint in openPangu's format: random weights, and a tokenizer trained on the example texts."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from openpangu_sft.artifacts.artifact import Manifest, staged_directory
from openpangu_sft.checkpoint.files.safetensors import write_safetensors
from openpangu_sft.checkpoint.hf import WEIGHTS
from openpangu_sft.checkpoint.weights import Resharder
from openpangu_sft.model.llama import tensors_of_model
from openpangu_sft.model.tensors import weights_of
from openpangu_sft.recipe.model_config import CONFIG, llama_config, pangu_config, write_object
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.template import END, HEADERS, START

CONTROL_TOKENS = [f"[unused{number}]" for number in range(34)]
"""As in openPangu: added tokens whose ids lie inside the SentencePiece vocabulary."""

_TEMPLATE_HEADERS = "{" + ", ".join(f"'{role}': '{header}'" for role, header in HEADERS.items()) + "}"
CHAT_TEMPLATE = (
    "{% set headers = " + _TEMPLATE_HEADERS + " %}"
    "{% if not messages or messages[0].role != 'system' %}{{ '" + START + HEADERS["system"] + END + "' }}{% endif %}"
    "{% for message in messages %}{{ '" + START + "' + headers[message.role] + message.content + '" + END + "' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + START + HEADERS["assistant"] + "' }}{% endif %}"
)


def make_base_model(recipe: Recipe, texts: Iterable[str]) -> Manifest:
    """Writes the demo's base model, with the sizes of the recipe's model section, to `paths.hf`; the texts train its
    tokenizer.
    """
    manifest = Manifest("hf", settings={"model.vocab_size": recipe.model.vocab_size, "train.seed": recipe.train.seed})
    with staged_directory(recipe.path("hf"), manifest) as staging:
        end_id = _write_tokenizer(staging, texts, recipe.model.vocab_size)
        config = pangu_config(recipe.model, end_id, "float32")
        torch.manual_seed(recipe.train.seed)
        model = LlamaForCausalLM(LlamaConfig(**llama_config(config)))
        resharder = Resharder(weights_of(tensors_of_model(model, torch.float32)), recipe.model)
        write_safetensors(resharder.hf(), staging / WEIGHTS)
        write_object(staging / CONFIG, config)
        write_object(staging / "generation_config.json", {"bos_token_id": 1, "eos_token_id": end_id, "pad_token_id": 0})
    return manifest


def texts_of(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for inner in inside for text in texts_of(inner)]


def _write_tokenizer(directory: Path, texts: Iterable[str], vocab_size: int) -> int:
    """Trains and writes a SentencePiece tokenizer like openPangu's; returns the id of its end token."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=trained,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        control_symbols=CONTROL_TOKENS,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(trained.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    added = {processor.piece_to_id(token): token for token in ["<unk>", "<s>", "</s>", *CONTROL_TOKENS]}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    names = {"bos_token": "<s>", "eos_token": END, "pad_token": "<unk>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,  # otherwise the fast tokenizer that AutoTokenizer makes inserts spaces
        "added_tokens_decoder": {str(number): {"content": token, **plain} for number, token in sorted(added.items())},
        **names,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "spaces_between_special_tokens": False,
    }
    write_object(directory / "tokenizer_config.json", config)
    write_object(directory / "special_tokens_map.json", names)
    end_id: int = processor.piece_to_id(END)
    return end_id
