"""Hugging Face checkpoints: config.json and safetensors, single or sharded with an index."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from openpangu_sft.artefact import MANIFEST
from openpangu_sft.checkpoint.layout import hf_shapes
from openpangu_sft.checkpoint.mcore import Tensors, require_tensors
from openpangu_sft.errors import UserError, naming
from openpangu_sft.recipe import Model
from openpangu_sft.tokenizer import tokenizer_files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_AGAIN = "download it again"
_PUBLISHED = "take the published config.json"
_USUAL = {"hidden_act": "silu", "rope_scaling": None, "mlp_bias": False, "quantization_config": None}
"""Keys of config.json that would make it another architecture if they had another value."""


def read_config(directory: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        UserError: there is none, or it is not an object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError("no Hugging Face checkpoint here (config.json)", where=directory, remedy="check paths.hf")
    return _read_object(path)


def model_of(config: Mapping[str, Any], path: Path) -> Model:
    """Sizes of the model that a config.json describes: openPangu's own form, or its re-alias as Llama.

    Raises:
        UserError: a key is missing, or another architecture.
    """
    if config.get("model_type") not in ("PanguEmbedded", "llama"):
        raise UserError(
            f"model_type {config.get('model_type')!r} is not openPangu-Embedded", where=path, remedy="check paths.hf"
        )
    for key, usual in _USUAL.items():
        if config.get(key, usual) != usual:
            raise UserError(
                f"{key} is {config[key]!r}, openPangu-Embedded has {usual!r}", where=path, remedy="check paths.hf"
            )
    try:
        heads = config["num_attention_heads"]
        bias = config["bias"] if config["model_type"] == "PanguEmbedded" else config.get("attention_bias", False)
        return Model(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads", heads),
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            rotary_base=config["rope_theta"],
            norm_epsilon=config["rms_norm_eps"],
            add_qkv_bias=bias,
            add_dense_bias=bias,
            tie_word_embeddings=config.get("tie_word_embeddings", False),  # the class's default is false
        )
    except KeyError as error:
        raise UserError(f"key {error} is missing", where=path, remedy=_PUBLISHED) from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, detail['loc']))} = {detail['input']!r}: " if detail["loc"] else ""
        raise UserError(f"{what}{detail['msg']}", where=path, remedy=_PUBLISHED) from None
    except (TypeError, ZeroDivisionError):
        raise UserError(
            f"hidden_size {config['hidden_size']!r} and num_attention_heads {heads!r} give no head size",
            where=path,
            remedy=_PUBLISHED,
        ) from None


def require_model(directory: Path, model: Model) -> dict[str, Any]:
    """Reads config.json and checks it against the recipe.

    Raises:
        UserError: names the first key that differs, with both values.
    """
    config, path = read_config(directory), directory / "config.json"
    found = model_of(config, path)
    for key, value in model.model_dump().items():
        if getattr(found, key) != value:
            raise UserError(
                f"model.{key} is {value} in the recipe, {getattr(found, key)} in this checkpoint",
                where=path,
                remedy=f"set model.{key}={getattr(found, key)}",
            )
    return config


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """openPangu's configuration under the name of the architecture it equals: Llama with biases in the attention.

    Its own modelling code asks for an NPU at import; stock transformers loads this form anywhere, without remote code.
    """
    own = {"architectures", "auto_map", "bias", "model_type", "attention_bias", "mlp_bias", "transformers_version"}
    bias = config["bias"] if "bias" in config else config.get("attention_bias", False)
    kept = {key: value for key, value in config.items() if key not in own}
    tied = bool(config.get("tie_word_embeddings", False))  # written out: no default to rely on
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **kept,
        "attention_bias": bool(bias),
        "mlp_bias": False,
        "tie_word_embeddings": tied,
    }


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all present.

    Raises:
        UserError: none, or a shard is missing, or only `.bin` files.
    """
    index, single = directory / INDEX, directory / WEIGHTS
    if index.is_file() and single.is_file():
        raise UserError(f"there are two sets of weights, {WEIGHTS} and {INDEX}", where=directory, remedy="remove one")
    if index.is_file():
        shards = _read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(_is_file_name(name) for name in shards.values()):
            raise UserError("weight_map names no files", where=index, remedy="download it again")
        names = sorted(set(shards.values()))
        for name in names:
            if not (directory / name).is_file():
                raise UserError("shard is missing", where=directory / name, remedy="download the checkpoint again")
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    if list(directory.glob("*.bin")):
        raise UserError(
            "only .bin weights, which transformers 4.53.2 refuses to load with torch 2.1",
            where=directory,
            remedy="take the safetensors files",
        )
    raise UserError(f"no weights here ({WEIGHTS})", where=directory, remedy="check paths.hf")


def read_weights(directory: Path, model: Model) -> Tensors:
    """Reads all tensors, by Hugging Face name, in the dtype of the file.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; tie_word_embeddings contradicts the weights.
    """
    found: Tensors = {}
    with ExitStack() as stack:
        for path in weight_files(directory):
            try:
                reader = stack.enter_context(safe_open(str(path), "pt"))
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    if name in found:
                        raise UserError(f"tensor {name} is in another shard too", where=path, remedy=_AGAIN)
                    found[name] = reader.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"damaged: {error}", where=path, remedy=_AGAIN) from None
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if model.tie_word_embeddings and head is not None and embedding is not None:
        if not _same_bits(head, embedding):
            raise UserError(
                "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight",
                where=directory,
                remedy="set it to false in config.json and in the recipe",
            )
        del found["lm_head.weight"]
    if not model.tie_word_embeddings and head is None:
        raise UserError(
            "tensor lm_head.weight is missing, but tie_word_embeddings is false",
            where=directory,
            remedy="is it right in config.json? The class's default is false, openPangu-Embedded-1B has true",
        )
    remedy = "is this openPangu-Embedded, downloaded in full, with its own config.json?"
    require_tensors(found, hf_shapes(model), directory, remedy)
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=path, remedy=_AGAIN) from None
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=path, remedy=_AGAIN)
    return content


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


def write_weights(tensors: Tensors, path: Path) -> None:
    """Writes safetensors. A full disk is an OSError, of which safetensors makes a type of its own without errno."""
    with naming(path):
        try:
            save_file(tensors, str(path), metadata={"format": "pt"})
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code.group(1)), str(error)) from None


def write_checkpoint(directory: Path, config: Mapping[str, Any], tensors: Tensors, source: Path) -> None:
    """Writes a checkpoint that stock transformers loads; the tokenizer and generation config come from `source`."""
    write_weights(tensors, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    extra = [source / "generation_config.json", source / "chat_template.jinja"]
    for path in [*tokenizer_files(source), *(path for path in extra if path.is_file())]:
        assert path.name != MANIFEST
        shutil.copyfile(path, directory / path.name)
