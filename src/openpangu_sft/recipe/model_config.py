"""The mapping between config.json and the model section of a recipe.

Keys are openPangu's own (PanguEmbedded) or those of its re-alias as Llama, as transformers 4.53.2 and vLLM read them.
Version 5 of transformers writes `rope_parameters` with rope_theta in it, and `dtype` (seen in files of 5.24.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openpangu_sft.recipe.sections import Model
from openpangu_sft.util.errors import UserError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of peft; it names the base
AGAIN = "download it again"
TRACKER = "latest_checkpointed_iteration.txt"  # file of a Megatron-core checkpoint that names its newest iteration
PANGU = "PanguEmbedded"
PUBLISHED = "take the published config.json"
_USUAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
"""Keys of config.json, with the values that openPangu-Embedded allows; the first one is meant where it is missing."""
_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "bias",
    "add_dense_bias": "bias",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""The key of the recipe's model section, and of config.json."""
_ROPE = ("rope_parameters", "rope_scaling")


def read_config(directory: Path) -> dict[str, Any]:
    """Reads config.json; `UserError` if there is none, or it is no object."""
    path = directory / CONFIG
    if not path.is_file():
        what = "no Hugging Face checkpoint here (config.json)"
        raise not_hf(directory, UserError(what, where=directory, remedy="check paths.hf"))
    return read_object(path)


def model_of(config: Mapping[str, Any], path: Path) -> Model:
    """Sizes in a config.json of openPangu's form or Llama's; `UserError` for a missing key or another architecture."""
    if config.get("model_type") not in (PANGU, "llama"):
        what = f"model_type {config.get('model_type')!r} is not openPangu-Embedded"
        raise UserError(what, where=path, remedy="check paths.hf")
    unusual = [key for key, usual in _USUAL.items() if config.get(key, usual[0]) not in usual]
    complaints = [f"{key} is {config[key]!r}, openPangu-Embedded has {_USUAL[key][0]!r}" for key in unusual]
    if complaint := next(iter(complaints), _rope_complaint(config)):
        raise UserError(complaint, where=path, remedy="check paths.hf")
    config = as_version_4(config)
    try:
        heads, head_dim = config["num_attention_heads"], config.get("head_dim")
        values = {
            "num_key_value_heads": heads,
            "tie_word_embeddings": False,  # the class's default
            **config,
            "head_dim": config["hidden_size"] // heads if head_dim is None else head_dim,
            "bias": _has_bias(config),
        }
        return Model(**{key: values[name] for key, name in _KEYS.items()})
    except KeyError as error:
        raise UserError(f"key {error} is missing", where=path, remedy=PUBLISHED) from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        if not detail["loc"]:  # our own rule, with its remedy for a recipe
            raise UserError(detail["ctx"]["error"].what, where=path, remedy=PUBLISHED) from None
        what = f"{_KEYS[str(detail['loc'][0])]} = {detail['input']!r}: {detail['msg']}"
        raise UserError(what, where=path, remedy=PUBLISHED) from None
    except (TypeError, ZeroDivisionError):
        what = f"hidden_size {config['hidden_size']!r} and num_attention_heads {heads!r} give no head size"
        raise UserError(what, where=path, remedy=PUBLISHED) from None


def _has_bias(config: Mapping[str, Any]) -> Any:
    """Whether the attention has biases, by the key of either form of config.json."""
    return config["bias"] if config["model_type"] == PANGU else config.get("attention_bias", False)


def require_stated(stated: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Model:
    """The model that a config.json describes; raises `UserError` with all keys in which a recipe's `stated` differ."""
    found, differing, settings = model_of(config, path), [], []
    for key, its in found.model_dump().items():
        if (wanted := stated.get(key, its)) == its:
            continue
        where = f"{its} in this checkpoint"
        if key == "tie_word_embeddings" and key not in config:
            where = "not given here: the class's default is false"
        else:
            settings.append(f"model.{key}={its}")
        differing.append(f"model.{key} is {wanted} in the recipe, {where}")
    if differing:
        them = "it" if len(settings) == 1 else "them"
        remedy = f"set {' '.join(settings)}, or leave {them} out of the recipe" if settings else PUBLISHED
        raise UserError("; ".join(differing), where=path, remedy=remedy)
    return found


def require_model(directory: Path, model: Model) -> dict[str, Any]:
    """Reads config.json with transformers 4.53.2's keys; `UserError` names those that differ from the recipe's."""
    config = read_config(directory)
    require_stated(model.model_dump(), config, directory / CONFIG)
    return as_version_4(config)


def pangu_config(model: Model, eos_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json, in openPangu's own form, for a new model; `eos_id` ends a message."""
    return {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "model_type": PANGU,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": eos_id,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        "use_cache": True,
        **{name: getattr(model, key) for key, name in _KEYS.items()},
    }


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """openPangu's configuration under the name of the architecture it equals: Llama with biases in the attention.

    Its own modelling code asks for an NPU at import; stock transformers loads this form anywhere, without remote code.
    """
    own = {"architectures", "auto_map", "bias", "model_type", "attention_bias", "mlp_bias", "transformers_version"}
    config = as_version_4(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: value for key, value in config.items() if key not in own and not key.startswith("_")},  # CVE-2026-4372
        "attention_bias": bool(_has_bias(config)),
        "mlp_bias": False,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),  # written out: no default to rely on
    }


def not_hf(directory: Path, otherwise: UserError) -> UserError:
    """Why a directory is not a Hugging Face checkpoint, if its files show; else `otherwise`."""
    if (settings := directory / ADAPTER_CONFIG).is_file():
        base = read_object(settings).get("base_model_name_or_path")
        what = f"is a LoRA adapter, not a model (its base: {base or 'not named'})"
        return UserError(what, where=directory, remedy="give its base as paths.hf, and the adapter as FROM or MODEL")
    if (directory / TRACKER).is_file():
        what = "is a Megatron-core checkpoint; a Hugging Face one is needed"
        return UserError(what, where=directory, remedy=f"check the path, or convert it: make export FROM={directory}")
    if any(directory.glob("mp_rank_*")):
        what = "is one iteration of a Megatron-core checkpoint"
        return UserError(what, where=directory, remedy=f"give the directory that contains it: {directory.parent}")
    return otherwise


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; `UserError` if it is none."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=path, remedy=AGAIN) from None
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=path, remedy=AGAIN)
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object as transformers does: indented by two, in UTF-8."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _rope_complaint(config: Mapping[str, Any]) -> str:
    """Where the rotary embedding is not openPangu-Embedded's, the reason; else empty."""
    for key in _ROPE:
        rope = {} if config.get(key) is None else config[key]
        kinds = [rope.get(name, "default") for name in ("rope_type", "type")] if isinstance(rope, dict) else []
        if kinds != ["default"] * 2 or not rope.keys() <= {"rope_theta", "rope_type", "type"}:
            return f"{key} is {config[key]!r}, openPangu-Embedded has the default rotary embedding"
    sources = (config, *(config.get(key) or {} for key in _ROPE))
    bases = [source["rope_theta"] for source in sources if "rope_theta" in source]
    return f"rope_theta is {bases[0]!r} and {bases[-1]!r}" if any(base != bases[0] for base in bases) else ""


def as_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the keys of transformers 4, in their order; it must be without a `_rope_complaint`."""
    written = dict(config)
    for key in _ROPE:
        given = written.get(key)
        if isinstance(given, dict):
            del written[key]
            if "rope_theta" in given:
                written.setdefault("rope_theta", given["rope_theta"])
    if "dtype" in written:
        written.setdefault("torch_dtype", written.pop("dtype"))
    if written.get("num_key_value_heads", 0) is None:
        written["num_key_value_heads"] = written.get("num_attention_heads")
    return written
