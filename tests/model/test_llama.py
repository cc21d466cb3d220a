"""The model of stock transformers, made from a config.json that may be anybody's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint_files import read_hf
from conftest import MakeRecipe
from openpangu_sft.model.llama import SEGMENTS, build_model
from openpangu_sft.recipe.model_config import llama_config, read_config


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("attention", ["eager", SEGMENTS])
def test_a_config_selects_no_attention(
    tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, key: str, attention: str
) -> None:
    """transformers would download and run the code of such a name, if the package kernels is installed."""
    shutil.copytree(tiny_hf, tmp_path / "hf")
    config = tmp_path / "hf/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), key: "someone/kernel:f"}), "utf-8")
    model = build_model(tmp_path / "hf", read_hf(tmp_path / "hf", make_recipe().model), attention, torch.device("cpu"))
    assert model.config._attn_implementation == attention
    assert not [name for name in llama_config(read_config(tmp_path / "hf")) if name.startswith("_")]
