"""The export formats of a model: the files beside the weights, which are the same in both.

llama      openPangu under the name of the architecture that it equals: transformers and vLLM need no remote code
openpangu  the original's configuration and Python files; loads where the original loads, with remote code
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from openpangu_sft.recipe.model_config import CONFIG, PANGU, llama_config, read_object, write_object
from openpangu_sft.tokenizer.remote_code import Trust
from openpangu_sft.tokenizer.template import END
from openpangu_sft.tokenizer.tokenizer import Tokenizer, load_hf, tokenizer_files
from openpangu_sft.util.console import say
from openpangu_sft.util.errors import UserError, naming

LLAMA, OPENPANGU, PEFT = "llama", "openpangu", "peft"
SAME_IDS = "gives the same ids"
"""Recorded of the fast tokenizer class where it does; otherwise, for which text it does not."""

_AS_IT_IS = "export with FORM=openpangu"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"
_ALSO = (_GENERATION_CONFIG, "chat_template.jinja")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "*Notice*", "*NOTICE*")
VLLM_TEMPLATE = "chat_template_vllm.jinja"  # with bos, which vLLM's chat endpoint does not add
_OF_THE_CLASS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template")
"""Attributes that a class may define itself, so that another class lacks them."""


def write_config(directory: Path, config: Mapping[str, Any], base: Path, form: str, dtype: str) -> None:
    """Writes the config.json of the base, with one dtype (`torch_dtype`, which transformers 4 reads) and the right eos.

    Raises `UserError` where the base is not in openPangu's own format, so the export cannot be.
    """
    if form == OPENPANGU and config["model_type"] != PANGU:
        what = f"model_type is {config['model_type']}: openPangu's own configuration and code are not here"
        raise UserError(what, where=base / CONFIG, remedy="export with FORM=llama, or give the original as paths.hf")
    written = {**(llama_config(config) if form == LLAMA else config), "torch_dtype": dtype}
    written.pop("dtype", None)  # transformers 5's name for it
    write_object(directory / CONFIG, _with_right_eos(written, base, CONFIG))


def write_companions(directory: Path, base: Path, form: str) -> None:
    """Copies licence files of the base; for a model its tokenizer, generation config and, of openpangu, Python files.

    Raises `UserError` where a Python file that the base's configuration names is missing.
    """
    files = [] if form == PEFT else [*tokenizer_files(base), *(base / name for name in _ALSO)]
    files += [path for pattern in _LICENCES for path in base.glob(pattern)]
    if form == OPENPANGU:
        files += base.glob("*.py")
        for path in (base / CONFIG, base / _TOKENIZER_CONFIG):
            for module in _modules(path):
                if not (base / module).is_file():
                    raise UserError(f"names {module}, which is not there", where=path, remedy="download it again")
    for path in files:
        if path.is_file() and (form == OPENPANGU or path.suffix != ".py"):
            with naming(directory / path.name):  # shutil would name the original where the disk is full
                (directory / path.name).write_bytes(path.read_bytes())
    if (directory / _GENERATION_CONFIG).is_file():
        config = read_object(base / _GENERATION_CONFIG)
        if (right := _with_right_eos(config, base, _GENERATION_CONFIG)) != config:
            write_object(directory / _GENERATION_CONFIG, right)


def _with_right_eos(config: Mapping[str, Any], base: Path, name: str) -> Mapping[str, Any]:
    """The configuration with the eos that ends messages, where generation has to stop; prints a change."""
    ids, right = config.get("eos_token_id"), _end_id(base)
    if right is None or right in (ids if isinstance(ids, list) else [ids]):
        return config
    say(f"{base / name}: eos_token_id is {ids}; it is exported as {right}, the id of {END}")
    return {**config, "eos_token_id": right}


def _end_id(base: Path) -> Optional[int]:
    """The id of the token that ends messages, from the tokenizer's configuration: no remote code runs."""
    path = base / _TOKENIZER_CONFIG
    added = read_object(path).get("added_tokens_decoder") if path.is_file() else None
    tokens = added.items() if isinstance(added, dict) else ()
    ends = (number for number, token in tokens if isinstance(token, dict) and token.get("content") == END)
    return next((int(number) for number in ends if number.isdecimal()), None)


def make_tokenizer_stock(directory: Path, base: Path, trust_remote_code: Trust) -> str:
    """Makes the copy of a tokenizer load without its own code, and compares it with the original.

    openPangu's class becomes Llama's slow one, which splits and encodes in the same way if it is `legacy`: otherwise
    it would put a mark before each text after a control token and remove it again. `add_prefix_space` does not change
    what this class encodes. But transformers makes a fast tokenizer of it by default, as vLLM does, and that one puts
    a space before each text unless it is told that SentencePiece does not.

    Returns `SAME_IDS`, or how the fast tokenizer differs. Raises `UserError` where the original cannot be loaded, gives
    other ids, or has other special tokens or another template.
    """
    own, path = Tokenizer(base, trust_remote_code), directory / _TOKENIZER_CONFIG
    config = {key: value for key, value in read_object(path).items() if key != "auto_map"}
    if type(own.hf).__module__.startswith("transformers."):
        stock = own
        if config != read_object(path):
            write_object(path, config)
    else:
        try:
            stock = _alias(directory, config)
        except UserError as error:
            raise UserError(f"as LlamaTokenizer {error.what}", where=base, remedy=_AS_IT_IS) from None
        _require_same(own, stock, base)
    template, bos = stock.hf.chat_template, stock.hf.bos_token
    if isinstance(template, str) and stock.opening:
        (directory / VLLM_TEMPLATE).write_text(bos + template.removeprefix(bos), "utf-8")
    try:
        fast = load_hf(directory, trust_remote_code=False, use_fast=True)
    except UserError:
        return "does not load"
    text = stock.first_disagreement(fast)
    return f"gives other ids, for instance for {text}" if text else SAME_IDS


def _alias(directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer as Llama's class, with a space before a text if SentencePiece puts one there."""
    alias = {**config, "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": False}
    write_object(directory / _TOKENIZER_CONFIG, alias)
    stock = Tokenizer(directory, trust_remote_code=False)
    if stock.hf.sp_model.encode("a", out_type=str)[0].startswith("▁"):
        write_object(directory / _TOKENIZER_CONFIG, {**alias, "add_prefix_space": True})
        stock = Tokenizer(directory, trust_remote_code=False)
    return stock


def _require_same(own: Tokenizer, stock: Tokenizer, base: Path) -> None:
    for name in _OF_THE_CLASS:
        one, other = getattr(own.hf, name), getattr(stock.hf, name)
        if one != other:
            what = f"has {name} {reprlib.repr(other)} as LlamaTokenizer, {reprlib.repr(one)} with its own code"
            raise UserError(what, where=base / _TOKENIZER_CONFIG, remedy=_AS_IT_IS)
    if text := stock.first_disagreement(own.hf):
        what = f"gives other ids as LlamaTokenizer than with its own code, for {text}"
        raise UserError(what, where=base / _TOKENIZER_CONFIG, remedy=_AS_IT_IS)


def _modules(path: Path) -> set[str]:
    """The Python files that the auto_map of a configuration names."""
    named = read_object(path).get("auto_map") if path.is_file() else None
    classes = named.values() if isinstance(named, dict) else [named]
    flat = [name for entry in classes for name in (entry if isinstance(entry, list) else [entry])]
    return {f"{name.split('--')[-1].split('.')[0]}.py" for name in flat if isinstance(name, str)}
