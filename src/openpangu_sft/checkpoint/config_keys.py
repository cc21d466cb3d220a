"""Keys of config.json that mean the same: as transformers 5 writes them, and as 4.53.2 and vLLM read them. Pure.

Version 5 writes `rope_parameters` with rope_theta in it, and `dtype` (seen in files of 5.24.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE = ("rope_parameters", "rope_scaling")


def rope_complaint(config: Mapping[str, Any]) -> str:
    """What makes the rotary embedding another one than openPangu-Embedded's; empty where nothing does."""
    for key in _ROPE:
        if config.get(key) is not None and not _is_default(config[key]):
            return f"{key} is {config[key]!r}, openPangu-Embedded has the default rotary embedding"
    sources = (config, *(config.get(key) or {} for key in _ROPE))
    bases = [source["rope_theta"] for source in sources if "rope_theta" in source]
    return f"rope_theta is {bases[0]!r} and {bases[-1]!r}" if any(base != bases[0] for base in bases) else ""


def as_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration with version 4's keys, those that it has already in their order.

    Args:
        config: without a `rope_complaint`.
    """
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


def _is_default(rope: Any) -> bool:
    """Whether nothing but the base is set."""
    if not isinstance(rope, dict) or not rope.keys() <= {"rope_theta", "rope_type", "type"}:
        return False
    return all(rope.get(key, "default") == "default" for key in ("rope_type", "type"))
