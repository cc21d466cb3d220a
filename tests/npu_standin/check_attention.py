"""npu_fusion_attention of the stand-in against attention written out query by query, forward and backward.

Run by test_npu_standin.py, in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from hypothesis import given, settings
from hypothesis import strategies as st

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
FAR = 65536
"""MindSpeed's default of --pre-tockens."""

property_test = settings(deadline=None, max_examples=60)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp32, with a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sees: Callable[[int, int, int], bool]
) -> torch.Tensor:
    """Attention of one sequence, head by head and query by query: [sq, n, d] and [sk, nk, d] to [sq, n, d]."""
    heads, each = query.shape[1], query.shape[1] // key.shape[1]
    rows = []
    for i in range(len(query)):
        row = []
        for head in range(heads):
            keys = [j for j in range(len(key)) if sees(head, i, j)]
            if not keys:
                row.append(query[i, head] * (key.sum() + value.sum()) * 0)  # 0, and so are its gradients
                continue
            scores = torch.stack([(query[i, head] * key[j, head // each]).sum() * scale for j in keys])
            weights = torch.exp(scores - torch.logsumexp(scores, 0))
            row.append(sum(weight * value[j, head // each] for weight, j in zip(weights, keys)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def assert_same(
    ours: torch.Tensor, expected: torch.Tensor, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """Compares results and, for one random gradient of them, the gradients of query, key and value."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad((ours * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def as_upstream(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int]) -> Any:
    """The call of mindspeed_llm/core/transformer/dot_product_attention.py:389 with the published flags."""
    return torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "TND",
        pse=None,
        padding_mask=None,
        atten_mask=TRIANGLE,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        scale=1 / math.sqrt(query.shape[2]),
        pre_tockens=FAR,
        next_tockens=0,
        keep_prob=1 - 0.0,
        inner_precise=0,
        sparse_mode=4,
    )


def ends_of(lengths: list[int]) -> list[int]:
    return [sum(lengths[: number + 1]) for number in range(len(lengths))]


lengths_of_segments = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any)


@property_test
@given(lengths_of_segments, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 5]))
def test_packed_segments_are_causal_and_apart(lengths: list[int], kv_heads: int, each: int, size: int) -> None:
    total = sum(lengths)
    query = random(total, kv_heads * each, size)
    key, value = (random(total, kv_heads, size, seed=seed) for seed in (1, 2))
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    expected = plain(query, key, value, 1 / math.sqrt(size), lambda head, i, j: segment[i] == segment[j] and j <= i)
    assert_same(as_upstream(query, key, value, ends_of(lengths))[0], expected, (query, key, value))


@property_test
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_no_other_segment_changes_a_bit(lengths: list[int], data: st.DataObject) -> None:
    ends = ends_of(lengths)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    inside = slice(ends[changed] - lengths[changed], ends[changed])
    tensors = [random(ends[-1], 2, 4, seed=seed).detach() for seed in range(3)]
    before = as_upstream(*tensors, ends)[0]
    for tensor in tensors:
        tensor[inside] += 1
    after = as_upstream(*tensors, ends)[0]
    outside = torch.ones(ends[-1], dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[inside], after[inside])


def test_the_statistics_are_those_of_the_softmax() -> None:
    query, key, value = random(5, 4, 8), random(5, 2, 8, seed=1), random(5, 2, 8, seed=2)
    _, maximum, total, *rest = as_upstream(query, key, value, [2, 5])
    assert (rest[0].numel(), *rest[1:]) == (0, 0, 0, 0)
    assert not maximum.requires_grad
    assert not total.requires_grad
    assert maximum.shape == total.shape == (5, 4, 8)
    assert maximum.dtype == total.dtype == torch.float32
    scores = torch.einsum("inh,jnh->inj", query, key.repeat_interleave(2, 1)) / math.sqrt(8)
    for i, seen in enumerate([[0], [0, 1], [2], [2, 3], [2, 3, 4]]):
        for repeated in range(8):
            torch.testing.assert_close(maximum[i, :, repeated], scores[i][:, seen].amax(-1))
            sums = torch.exp(scores[i][:, seen].logsumexp(-1) - maximum[i, :, repeated])
            torch.testing.assert_close(total[i, :, repeated], sums)


def test_bf16_comes_back_as_bf16() -> None:
    tensors = [random(6, 2, 8, seed=seed).detach() for seed in range(3)]
    half = as_upstream(*(x.bfloat16() for x in tensors), [6])
    assert half[0].dtype == torch.bfloat16
    assert half[1].dtype == torch.float32
    exact = as_upstream(*(x.bfloat16().float() for x in tensors), [6])[0]
    torch.testing.assert_close(half[0], exact.bfloat16())


def tnd(**changes: Any) -> Any:
    """A good call of layout TND, with changes."""
    shapes = changes.pop("shapes", [(4, 4, 8), (4, 2, 8), (4, 2, 8)])
    dtypes = changes.pop("dtypes", [torch.float32] * 3)
    query, key, value = (torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))
    arguments = {
        "atten_mask": TRIANGLE,
        "actual_seq_qlen": [1, 4],
        "actual_seq_kvlen": [1, 4],
        "pre_tockens": FAR,
        "next_tockens": 0,
        "sparse_mode": 4,
        **changes,
    }
    heads, layout = arguments.pop("head_num", 4), arguments.pop("input_layout", "TND")
    return torch_npu.npu_fusion_attention(query, key, value, heads, layout, **arguments)


def test_the_good_call_is_good() -> None:
    tnd()
    tnd(inner_precise=2, actual_seq_qlen=(1, 4), atten_mask=TRIANGLE.to(torch.uint8), pre_tockens=4)


ONES = torch.ones(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pse": torch.ones(1)}, "pse"),
        ({"padding_mask": torch.ones(1)}, "padding_mask"),
        ({"keep_prob": 0.9}, "dropout"),
        ({"inner_precise": 3}, "inner_precise 3"),
        ({"input_layout": "NTD"}, "NTD"),
        *[({"input_layout": layout}, f"layout {layout}") for layout in ("SBH", "BSH", "BSND", "BNSD")],
        ({"shapes": [(4, 1, 4, 8)] * 3}, "shapes"),
        ({"dtypes": [torch.float64] * 3}, "float64"),
        ({"dtypes": [torch.float32, torch.bfloat16, torch.float32]}, "bfloat16"),
        ({"head_num": 2}, "head_num 2"),
        ({"shapes": [(4, 4, 8), (4, 3, 8), (4, 3, 8)]}, "3 heads of key for 4"),
        ({"shapes": [(4, 4, 8), (4, 2, 4), (4, 2, 4)]}, "key of"),
        ({"shapes": [(4, 4, 8), (5, 2, 8), (5, 2, 8)]}, "key of"),
        ({"shapes": [(4, 4, 8), (4, 2, 8), (4, 2, 4)]}, "value"),
        ({"actual_seq_qlen": [1, 2, 4]}, "other segments of key"),
        ({"actual_seq_kvlen": [2, 4]}, "other segments of key"),
        ({"actual_seq_qlen": [1, 3], "actual_seq_kvlen": [1, 3]}, "ends at"),
        ({"actual_seq_qlen": [4, 1], "actual_seq_kvlen": [4, 1]}, "does not rise"),
        ({"actual_seq_qlen": [4, 0], "actual_seq_kvlen": [4, 0]}, "does not rise"),
        ({"actual_seq_qlen": [-1, 4], "actual_seq_kvlen": [-1, 4]}, "ends at"),
        ({"actual_seq_qlen": [], "actual_seq_kvlen": []}, "ends at"),
        ({"actual_seq_qlen": [1.0, 4], "actual_seq_kvlen": [1.0, 4]}, "other than integers"),
        ({"atten_mask": None}, "sparse_mode 4 without atten_mask"),
        ({"atten_mask": ONES.triu(1)}, "2048×2048"),
        ({"atten_mask": ~TRIANGLE}, "2048×2048"),
        ({"atten_mask": TRIANGLE.float()}, "float32"),
        ({"pre_tockens": 3}, "pre_tockens 3"),
        ({"next_tockens": 1}, "next_tockens 1"),
        ({"next_tockens": -1}, "next_tockens -1"),
        *[({"sparse_mode": mode}, f"sparse_mode {mode}") for mode in (0, 1, 2, 3, 5, -1)],
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=said):
        tnd(**changes)
