"""Attention inside the segments of a pack against its formula, and whole layers against stock transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from openpangu_sft.model.layers import segment_attention, use_segments


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
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
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
    shapes = [(1, bounds[-1][1], heads, width) for heads in (4, 2, 2)]
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    result = segment_attention(given[0], given[1], given[2], width**-0.5, [bounds])
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


@pytest.mark.parametrize("rows", [None, [0, 1, 7, 18, 20, 36]], ids=["all", "some"])
def test_layers_are_those_of_stock_transformers(rows: Optional[list[int]]) -> None:
    """Results and gradients of every weight, in fp64, for two packs of one segment each, also at some positions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, head_dim=8, attention_bias=True, rope_theta=5e2, **sizes)
    config._attn_implementation = "eager"
    stock, ours = LlamaModel(config).double(), LlamaModel(config).double()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours.load_state_dict(stock.state_dict())
    use_segments(ours)
    ids = torch.randint(50, (2, 19))
    expected = stock(ids).last_hidden_state
    if rows is not None:
        expected = expected.flatten(0, 1)[rows]
    weights = torch.randn_like(expected)
    chosen = None if rows is None else torch.tensor(rows)
    result = ours(ids, segments=[[(0, 19)], [(0, 19)]], rows=chosen).last_hidden_state
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)  # transformers' norm and angles are fp32
    (expected * weights).sum().backward()
    (result * weights).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), stock.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)
