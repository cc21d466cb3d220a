"""The recipe's section of LoRA, and the shape of adapters."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Optional

from pydantic import Field, model_serializer

from openpangu_sft.recipe.section import Section

LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron's name of a linear layer, and the projections of Hugging Face's model that it holds."""

Target = Literal["all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter(NamedTuple):
    """The shape of LoRA adapters: W + alpha / rank * B A, with A [rank, in features] and B [out features, rank]."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # projections, in the order of LINEARS

    @property
    def linears(self) -> list[str]:
        """Megatron's names of the adapted layers."""
        return [linear for linear, names in LINEARS.items() if names[0] in self.targets]

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, on {', '.join(self.targets)}"


class Lora(Section):
    """Low-rank adapters (LoRA): only they are trained, beside frozen weights."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0: full-parameter fine-tuning."""
    alpha: int = Field(default=32, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: list[Target] = Field(default=["all-linear"], min_length=1)
    """Adapted projections, by Hugging Face name; `all-linear` is all of them."""

    @property
    def adapter(self) -> Optional[Adapter]:
        """The adapters' shape; None without."""
        wanted = [name for names in LINEARS.values() for name in names if {name, "all-linear"} & {*self.targets}]
        return Adapter(self.rank, self.alpha, tuple(wanted)) if self.rank else None

    @model_serializer
    def _canonical(self) -> dict[str, Any]:
        """Equal for equal adapters: settings are recorded and compared in this form."""
        found = self.adapter
        return {**found._asdict(), "targets": list(found.targets)} if found else {"rank": 0}
