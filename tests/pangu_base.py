"""A tiny base model in openPangu's own form: configuration and Python files like the published ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

from checkpoint_files import set_config
from tokenizer.test_tokenizer import REMOTE_CODE

TRUSTED = "tokenizer.trust_remote_code=true"
AUTO_MAP = {
    "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
    "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
    "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
}
CONFIGURATION = '''
"""Sizes of openPangu, as its own file has them."""
from transformers import PretrainedConfig


class PanguEmbeddedConfig(PretrainedConfig):
    model_type = "PanguEmbedded"

    def __init__(self, bias=True, rope_theta=16000000.0, tie_word_embeddings=False, **kwargs):
        self.bias, self.rope_theta = bias, rope_theta
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
'''
FOR_NPUS_ONLY = "import torch\nimport torch_npu\n\ntorch.npu.set_device(0)\n"
FOR_ANY_DEVICE = '''
"""openPangu by what it equals."""
from transformers import LlamaConfig, LlamaForCausalLM
from .configuration_openpangu_dense import PanguEmbeddedConfig


class PanguEmbeddedForCausalLM(LlamaForCausalLM):
    config_class = PanguEmbeddedConfig

    def __init__(self, config):
        values = {key: value for key, value in config.to_dict().items() if key not in ("bias", "model_type")}
        super().__init__(LlamaConfig(**values, attention_bias=config.bias, mlp_bias=False))
'''


def make_pangu_base(
    directory: Path,
    tiny_hf: Path,
    tokenizer: str = REMOTE_CODE,
    modelling: str = FOR_NPUS_ONLY,
    **tokenizer_config: Any,
) -> Path:
    """Weights and SentencePiece model of the tiny checkpoint, everything else as in openPangu's repository.

    Args:
        tokenizer, modelling: content of the Python files.
        tokenizer_config: keys to change; `...` removes one.
    """
    shutil.copytree(tiny_hf, directory, ignore=shutil.ignore_patterns("manifest.json"))
    set_config(directory, auto_map=AUTO_MAP, transformers_version="4.53.2")
    path = directory / "tokenizer_config.json"
    published = {
        "add_prefix_space": True,
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "sp_model_kwargs": {},
        "tokenizer_class": "PanguTokenizer",
        "use_default_system_prompt": False,
    }
    config = {**json.loads(path.read_text("utf-8")), **published, **tokenizer_config}
    config = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(config, ensure_ascii=False), "utf-8")
    (directory / "tokenization_openpangu.py").write_text(tokenizer, "utf-8")
    (directory / "configuration_openpangu_dense.py").write_text(CONFIGURATION, "utf-8")
    (directory / "modeling_openpangu_dense.py").write_text(modelling, "utf-8")
    return directory


def logits(model: Any) -> torch.Tensor:
    """Logits of fixed tokens, viewed as integers to compare every bit."""
    input_ids = torch.arange(40).reshape(2, 20) * 31 % 1536
    with torch.no_grad():
        found = model.eval()(input_ids=input_ids).logits.detach()
    return found.view(torch.int32 if found.dtype == torch.float32 else torch.int16)


@pytest.fixture(autouse=True, scope="module")
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps transformers from copying remote code into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("modules")
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.syspath_prepend(str(cache))
        yield cache
