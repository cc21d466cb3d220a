"""Compares the logits of Hugging Face and Megatron-core, each computed from its own form of a checkpoint.

fp32 shows whether it is the same model: the effect of a lost bias or a swapped head is a thousand times above rounding
there, and below it in bf16. bf16 is the precision of training: both results are compared with the fp32 one, and not
with each other, as they round in different places.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import numpy.typing as npt
import torch

from openpangu_sft.checkpoint.files.arrays import DTYPES, DType
from openpangu_sft.checkpoint.hf import open_hf
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.model.llama import build_model
from openpangu_sft.model.tensors import TORCH_DTYPES, Precision, tensors_of
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.template import prompt_spans
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.verify.megatron import megatron_logits
from openpangu_sft.verify.tensors import Compared

Logits = npt.NDArray[np.float32]

CONVERSATIONS = {
    "Chinese": ("你是一位耐心的客服助手。", "你好，上周买的耳机只有左边有声音，重新配对也不行，应该怎么办？"),
    "English": ("You answer in one sentence.", "Why does the moon look larger when it is close to the horizon?"),
}
"""System prompt and question of each prompt, by its language."""

FP32_LIMIT = 1e-5
"""Limit in fp32 of the largest difference, as a share of the largest logit. Measured: 1.2e-6 at the size of the 1B."""
BF16_LIMIT = 1.5
"""Limit in bf16 of Megatron's RMS distance from fp32, in terms of Hugging Face's own. Measured: 1.0 to 1.1."""


class Row(NamedTuple):
    """The result for one prompt in one precision."""

    prompt: str  # its language
    precision: Precision
    tokens: int
    largest_logit: float  # by magnitude, of Hugging Face in fp32
    largest_difference: float  # between Megatron and Hugging Face
    same_token: float  # share of positions with the same most probable token
    measure: float  # must not be above `limit`; see FP32_LIMIT and BF16_LIMIT
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is within the limit; NaN is not."""
        return self.measure <= self.limit


def compare_logits(recipe: Recipe, hf: Path, compared: Compared) -> list[Row]:
    """Computes the logits of the prompts in fp32 and in bf16, with both implementations.

    Where the dtypes differ, both have their weights rounded as the tensors were compared: what is left is the model.
    Raises `UserError` where megatron-core is not installed, the tokenizer does not load, or Megatron refuses the ranks.
    """
    tokenizer = Tokenizer(hf, recipe.tokenizer.trust_remote_code)
    prompts = []
    for system, question in CONVERSATIONS.values():
        prompts.append(tokenizer.prompt_ids(prompt_spans((system,), (Message("user", question),), reply=True)))
    mcore, rounded = compared.mcore, compared.rounded
    rows: list[Row] = []
    exact: list[Logits] = []
    for precision in TORCH_DTYPES:
        theirs = hugging_face_logits(recipe, hf, prompts, precision, rounded)
        exact = exact or theirs
        ours = megatron_logits(mcore.directory, prompts, precision, recipe.model, mcore.layout, rounded)
        rows += [_row(precision, *row) for row in zip(CONVERSATIONS, ours, theirs, exact)]
    return rows


@torch.no_grad()
def hugging_face_logits(
    recipe: Recipe, hf: Path, prompts: list[list[int]], precision: Precision, rounded: Optional[DType] = None
) -> list[Logits]:
    """The logits of stock transformers, its weights `rounded` first: for each prompt fp32 [tokens, vocabulary]."""
    tensors = tensors_of(open_hf(hf, recipe.model), recipe.model)
    first, dtype = getattr(torch, str(rounded or DTYPES[precision])), TORCH_DTYPES[precision]
    weights = {name: tensors.pop(name).to(first).to(dtype) for name in list(tensors)}
    model = build_model(hf, weights, "eager", torch.device("cpu")).eval()
    return [model(torch.tensor([ids])).logits[0].float().numpy() for ids in prompts]


def _row(precision: Precision, prompt: str, ours: Logits, theirs: Logits, exact: Logits) -> Row:
    largest, difference = float(np.abs(exact).max()), float(np.abs(ours - theirs).max())
    same = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    measure, limit = difference / largest, FP32_LIMIT
    if precision == "bf16":
        rms = [float(np.sqrt(np.mean(np.square(values - exact, dtype=np.float64)))) for values in (ours, theirs)]
        measure, limit = rms[0] / rms[1], BF16_LIMIT
    return Row(prompt, precision, len(ours), largest, difference, same, measure, limit)
