"""The two forms of an exported checkpoint: what stands beside the weights, which are the same in both.

llama      openPangu under the name of the architecture it equals: transformers and vLLM load it without remote code
openpangu  the original's configuration and Python files; loads where the original loads, with remote code
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpangu_sft.checkpoint.hf import CONFIG, PANGU, llama_config, read_object
from openpangu_sft.errors import UserError
from openpangu_sft.tokenizer import Tokenizer, tokenizer_files

LLAMA, OPENPANGU = "llama", "openpangu"
FORMS = (LLAMA, OPENPANGU)

_TOKENIZER_CONFIG = "tokenizer_config.json"
_ALSO = ("generation_config.json", "chat_template.jinja")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "*Notice*")


def write_config(directory: Path, config: Mapping[str, Any], base: Path, form: str, dtype: str) -> None:
    """Writes config.json.

    Args:
        config: the base's.
        dtype: of the weights, as config.json has it.

    Raises:
        UserError: the base is not in openPangu's own form, so it cannot be exported in it.
    """
    if form == OPENPANGU and config["model_type"] != PANGU:
        what = f"model_type is {config['model_type']}: openPangu's own configuration and code are not here"
        raise UserError(what, where=base / CONFIG, remedy="export with FORM=llama, or give the original as paths.hf")
    written = llama_config(config) if form == LLAMA else config
    _write_json(directory / CONFIG, {**written, "torch_dtype": dtype})


def write_companions(directory: Path, base: Path, form: str, trust_remote_code: bool) -> None:
    """Copies tokenizer, generation config, licence and, in openPangu's form, the Python files of the base.

    Raises:
        UserError: a Python file that the base's configuration names is missing; or the tokenizer gives other ids when
            it is loaded without its own code.
    """
    files = {path.name: path for path in tokenizer_files(base)}
    files.update({name: base / name for name in _ALSO if (base / name).is_file()})
    files.update({path.name: path for pattern in _LICENCES for path in base.glob(pattern) if path.is_file()})
    if form == OPENPANGU:
        files.update({path.name: path for path in base.glob("*.py")})
        for name in (CONFIG, _TOKENIZER_CONFIG):
            for module in _modules(base / name):
                if module not in files:
                    raise UserError(
                        f"names {module}, which is not there", where=base / name, remedy="download it again"
                    )
    own_code = form == LLAMA and bool(_modules(base / _TOKENIZER_CONFIG))
    for name, path in files.items():
        if not (own_code and path.suffix == ".py"):
            shutil.copyfile(path, directory / name)
    if own_code:
        _alias_tokenizer(directory, base, trust_remote_code)


def _modules(path: Path) -> set[str]:
    """The Python files that a configuration names in its auto_map."""
    named = read_object(path).get("auto_map") if path.is_file() else None
    classes = named.values() if isinstance(named, dict) else []
    flat = [name for entry in classes for name in (entry if isinstance(entry, list) else [entry])]
    return {f"{name.split('--')[-1].split('.')[0]}.py" for name in flat if isinstance(name, str)}


def _alias_tokenizer(directory: Path, base: Path, trust_remote_code: bool) -> None:
    """Makes the tokenizer load as Llama's slow class, which splits and encodes as openPangu's does, and compares both.

    legacy: without it the class would put a mark before each stretch behind a control token and take it off again.
    """
    path = directory / _TOKENIZER_CONFIG
    config = {key: value for key, value in read_object(path).items() if key != "auto_map"}
    _write_json(path, {**config, "tokenizer_class": "LlamaTokenizer", "legacy": True})
    own, alias = Tokenizer(base, trust_remote_code), Tokenizer(directory, trust_remote_code=False)
    if text := own.first_disagreement(alias):
        raise UserError(
            f"gives other ids as LlamaTokenizer than with its own code, for {text}",
            where=base / _TOKENIZER_CONFIG,
            remedy="export with FORM=openpangu",
        )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
