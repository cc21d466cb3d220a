"""Attention inside the segments of a pack, against its formula."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from openpangu_sft.model.llama import segment_attention


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As on a user's machine: torch 2.1's kernel for CPUs in bf16 ends the process only with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def by_formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[tuple[int, int]]
) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v over a mask of the whole pack."""
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    number = torch.tensor([number for number, (begin, end) in enumerate(bounds) for _ in range(begin, end)])
    seen = (number[:, None] == number) & torch.ones(tokens, tokens).tril().bool()
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 32, 128])
@pytest.mark.parametrize("bounds", [[(0, 1)], [(0, 2), (2, 3), (3, 66)], [(0, 129)], [(0, 7), (7, 262), (262, 301)]])
def test_result_and_gradients(dtype: torch.dtype, width: int, bounds: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, bounds[-1][1], width) for heads in (4, 2, 2)]
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    result, _ = segment_attention(torch.nn.Module(), given[0], given[1], given[2], None, width**-0.5, segments=[bounds])
    expected = by_formula(exact[0], exact[1], exact[2], bounds)
    weights = torch.randn(expected.shape)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    close = 1e-5 if dtype == torch.float32 else 0.01  # bf16 has 8 bits
    torch.testing.assert_close(result.double(), expected, rtol=close, atol=close)
    for tensor, other in zip(given, exact):
        assert tensor.grad is not None
        assert other.grad is not None
        error = (tensor.grad.double() - other.grad).norm()
        assert error <= close * other.grad.norm() + 1e-6 * weights.norm()  # of one token q and k have none
