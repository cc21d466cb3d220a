"""Memory of upstream's processes on the stand-in, as an NPU's fused operators would have it.

The stand-in's operators are composed of torch's and save other tensors for backward than the NPU's. Here they get a
backward pass that saves exactly what op-plugin's derivatives.yaml lists; gradients are still correct, as each calls the
stand-in's operator again.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Callable

import torch
import torch_npu
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile, record_function

Operator = Callable[..., Any]

INSIDE = "inside of one operator"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
"""Spans whose temporary tensors an NPU does not have: the stand-in's operators and collectives, and torch's products,
which in bf16 make an fp32 copy of the result on some CPUs."""


def npu_operators() -> dict[str, Operator]:
    """The stand-in's operators that training calls, by name, with the memory of the NPU's."""
    attention = torch_npu.npu_fusion_attention
    return {
        "npu_rms_norm": _keeping(torch_npu.npu_rms_norm, 2, 1),
        "npu_rotary_mul": _keeping(torch_npu.npu_rotary_mul, 3, 0),
        "npu_swiglu": _keeping(torch_npu.npu_swiglu, 1, 0),
        # its first three results are the tensors
        "npu_fusion_attention": _keeping(lambda *given, **options: attention(*given, **options)[:3], 3, 3),
    }


def _keeping(operator: Operator, tensors: int, results: int) -> Operator:
    """An operator that saves its first arguments, and results, those after the first one first.

    Args:
        operator: of the stand-in.
        tensors: arguments that are kept.
        results: results that are kept.
    """

    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, options: dict[str, Any], others: tuple[Any, ...], *given: torch.Tensor) -> Any:
            with record_function(INSIDE):
                found = operator(*given, *others, **options)
            all_of_it = found if isinstance(found, tuple) else (found,)
            ctx.options, ctx.others, ctx.given = options, others, len(given)
            mask = [value for value in options.values() if isinstance(value, torch.Tensor)]
            kept = [*all_of_it[1:], all_of_it[0]][:results]
            ctx.save_for_backward(*given, *kept, *mask)
            return found

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors[: ctx.given]]
            with record_function(INSIDE):
                return None, None, *_gradients(ctx, given, gradients[0])

    def _gradients(ctx: Any, given: list[torch.Tensor], gradient: torch.Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():  # type: ignore[no-untyped-call]
            found = operator(*given, *ctx.others, **ctx.options)
        first = found[0] if isinstance(found, tuple) else found
        return torch.autograd.grad(first, given, gradient, allow_unused=True)

    def call(*arguments: Any, **options: Any) -> Any:
        return Keeping.apply(options, arguments[tensors:], *arguments[:tensors])  # type: ignore[no-untyped-call]

    return call


class MemoryRecord(profile):
    """Records what torch allocates and frees, without torch's own summary: for an iteration that takes minutes."""

    def __init__(self) -> None:
        super().__init__(profile_memory=True)  # type: ignore[no-untyped-call]

    def _parse_kineto_results(self, result: Any) -> list[Any]:
        return []

    def peak(self, without: int = 0) -> int:
        """Most bytes that were allocated at once since the record began.

        Left out is what spans INSIDE and PRODUCTS free again, and tensors of exactly `without` bytes.
        """
        assert self.kineto_results
        changes: list[tuple[int, int, int, bool]] = []
        nodes: list[tuple[Any, bool]] = [(node, False) for node in self.kineto_results.experimental_event_tree()]
        while nodes:
            node, inside = nodes.pop()
            inside = inside or node.name in (INSIDE, *PRODUCTS)
            if node.tag == _EventType.Allocation:
                changes.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, inside))
            nodes += ((child, inside) for child in node.children)
        alive: Counter[int] = Counter()
        total = most = 0
        for _, address, size, inside in sorted(changes):
            if abs(size) == without:
                continue
            if size > 0:  # what gloo's threads have freed is not recorded, but its address is given out again
                total, alive[address] = total + size - alive[address], size
            else:  # or it was allocated before
                total, alive[address] = total + size, 0
            if not inside:
                most = max(most, total)
        return most
