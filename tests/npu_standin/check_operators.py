"""The small operators of the stand-in against plain torch, forward and backward.

Run by test_npu_standin.py, in a process of its own.
"""

from __future__ import annotations

import math
from typing import Any

import apex.optimizers
import pytest
import torch
import torch_npu
from hypothesis import given, settings
from hypothesis import strategies as st

property_test = settings(deadline=None, max_examples=60)
few_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp32, with a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(result: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a sum with weights that no two values share."""
    weights = torch.arange(1.0, result.numel() + 1).view(result.shape).sin()
    return torch.autograd.grad((result * weights).sum(), inputs)


def assert_same(ours: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(gradients(ours, *inputs), gradients(expected, *inputs)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@property_test
@given(few_sizes, st.integers(1, 9), st.sampled_from([1e-5, 1e-6, 0.1]))
def test_rms_norm(sizes: list[int], width: int, epsilon: float) -> None:
    x, gamma = random(*sizes, width), random(width, seed=1)
    squares = sum(x[..., at] ** 2 for at in range(width)) / width
    root = torch.sqrt(squares + epsilon)
    ours, rstd = torch_npu.npu_rms_norm(x, gamma, epsilon=epsilon)
    assert_same(ours, torch.stack([x[..., at] / root * gamma[at] for at in range(width)], -1), x, gamma)
    torch.testing.assert_close(rstd, (1 / root).unsqueeze(-1))
    assert not rstd.requires_grad


def test_rms_norm_of_zeros_and_of_bf16() -> None:
    zeros = torch.zeros(2, 4, requires_grad=True)
    ours = torch_npu.npu_rms_norm(zeros, torch.ones(4))[0]
    assert (ours == 0).all()
    assert gradients(ours, zeros)[0].isfinite().all()
    half = torch_npu.npu_rms_norm(torch.full((2, 4), 3.0).bfloat16(), torch.ones(4).bfloat16())
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)


@property_test
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_rotary_turns_pairs(s: int, b: int, n: int, pairs: int) -> None:
    """Each pair is a complex number times one of absolute value 1. Shapes as upstream has them."""
    x = random(s, b, n, 2 * pairs)
    angles = random(s, 1, 1, pairs, seed=1).detach()
    cos, sin = (part(torch.cat((angles, angles), -1)) for part in (torch.cos, torch.sin))
    turned = torch.complex(x[..., :pairs], x[..., pairs:]) * torch.polar(torch.ones_like(angles), angles)
    ours = torch_npu.npu_rotary_mul(x, cos, sin)
    assert_same(ours, torch.cat((turned.real, turned.imag), -1), x)


def test_rotary_takes_the_wider_dtype() -> None:
    """The model's bf16 and cosines in fp32, as upstream has them."""
    x = torch.ones(2, 1, 1, 4).bfloat16().requires_grad_()
    ours = torch_npu.npu_rotary_mul(x, torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    assert ours.dtype == torch.float32
    assert gradients(ours, x)[0].dtype == torch.bfloat16


@property_test
@given(few_sizes, st.integers(1, 4), st.integers(0, 3))
def test_swiglu(sizes: list[int], half: int, dim: int) -> None:
    dim = min(dim, len(sizes))
    x = random(*sizes[:dim], 2 * half, *sizes[dim:])
    gate, value = x.narrow(dim, 0, half), x.narrow(dim, half, half)
    assert_same(torch_npu.npu_swiglu(x, dim=dim), gate / (1 + torch.exp(-gate)) * value, x)
    last = torch_npu.npu_swiglu(x.transpose(dim, -1)).transpose(dim, -1)  # -1 is the default
    torch.testing.assert_close(last, torch_npu.npu_swiglu(x, dim=dim))


def adam_w(
    steps: list[torch.Tensor], value: torch.Tensor, lr: float, decay: float, betas: tuple[float, float], epsilon: float
) -> torch.Tensor:
    """By the paper's formula, in fp64: the means of all gradients so far, not those of a step before."""
    value = value.double()
    for step in range(1, len(steps) + 1):
        weights = [[(1 - beta) * beta ** (step - at) for at in range(1, step + 1)] for beta in betas]
        mean = sum(weight * g.double() for weight, g in zip(weights[0], steps)) / (1 - betas[0] ** step)
        square = sum(weight * g.double() ** 2 for weight, g in zip(weights[1], steps)) / (1 - betas[1] ** step)
        value = value - lr * (mean / (square.sqrt() + epsilon) + decay * value)
    return value.float()


hyperparameters = st.tuples(
    st.integers(1, 6),
    st.sampled_from([2e-5, 1e-2]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)]),
    st.sampled_from([1e-8, 1e-3]),
)


@property_test
@given(hyperparameters, st.booleans())
def test_apply_adam_w(chosen: Any, maximize: bool) -> None:
    """Called as mindspeed/optimizer/adamw.py does."""
    count, lr, decay, betas, epsilon = chosen
    steps = [random(3, 2, seed=seed).detach() for seed in range(1, count + 1)]
    value, mean, square = random(3, 2).detach(), torch.zeros(3, 2), torch.zeros(3, 2)
    expected = adam_w([-g for g in steps] if maximize else steps, value.clone(), lr, decay, betas, epsilon)
    torchs = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.AdamW(
        [torchs], lr=lr, betas=betas, eps=epsilon, weight_decay=decay, maximize=maximize, foreach=False
    )
    for step, gradient in enumerate(steps, 1):
        powers = [beta ** (step - 1) for beta in betas]
        kept = gradient.clone()
        result = torch_npu.npu_apply_adam_w(
            *powers, lr, decay, *betas, epsilon, gradient, None, False, maximize, out=(value, mean, square)
        )
        assert [got is own for got, own in zip(result, (value, mean, square))] == [True] * 3
        assert torch.equal(gradient, kept)
        torchs.grad = gradient
        optimizer.step()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, torchs.data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, optimizer.state[torchs]["exp_avg"])
    torch.testing.assert_close(square, optimizer.state[torchs]["exp_avg_sq"])


@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
def test_unscale(bad: Any) -> None:
    """As megatron/core/optimizer/optimizer.py calls it, through torch's name."""
    gradients_ = [torch.arange(3.0), torch.ones(2).bfloat16()]
    if bad is not None:
        gradients_[1][0] = bad
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients_, found, torch.tensor([0.5]))
    assert found.item() == (bad is not None)
    assert gradients_[0].tolist() == [0.0, 0.5, 1.0]
    assert gradients_[1][1] == 0.5


X = torch.ones(2, 3, 4, 6)
THREE = torch.ones(3)


def adam(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"grad": THREE, "max_grad_norm": None, "amsgrad": False, "maximize": False}
    out = changes.pop("out", [torch.ones(3), torch.zeros(3), torch.zeros(3)])
    return torch_npu.npu_apply_adam_w(1, 1, 0.1, 0.1, 0.9, 0.9, 1e-8, **{**arguments, **changes}, out=out)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: torch_npu.npu_rms_norm(X, torch.ones(1)), "gamma of shape"),
        (lambda: torch_npu.npu_rms_norm(X, torch.ones(4, 6)), "gamma of shape"),
        (lambda: torch_npu.npu_rms_norm(X, torch.ones(6).bfloat16()), "bfloat16"),
        (lambda: torch_npu.npu_rms_norm(X.double(), torch.ones(6).double()), "float64"),
        (lambda: torch_npu.npu_rotary_mul(X[0], X, X), "x of shape"),
        (lambda: torch_npu.npu_rotary_mul(X[..., :5], X[..., :5], X[..., :5]), "x of shape"),
        (lambda: torch_npu.npu_rotary_mul(X, X[..., :3], X[..., :3]), "shapes"),
        (lambda: torch_npu.npu_rotary_mul(X, X[:1], X), "shapes"),
        (lambda: torch_npu.npu_rotary_mul(X[:1], X, X), "shapes"),
        (lambda: torch_npu.npu_rotary_mul(X, X[0], X[0]), "shapes"),
        (lambda: torch_npu.npu_swiglu(X, dim=1), "no halves"),
        (lambda: adam(amsgrad=True), "amsgrad"),
        (lambda: adam(max_grad_norm=THREE), "max_grad_norm"),
        (lambda: adam(grad=torch.ones(1)), "the grad is"),
        (lambda: adam(grad=torch.ones(3).bfloat16()), "bfloat16"),
        (lambda: adam(out=[torch.ones(3), torch.zeros(1), torch.zeros(3)]), "the mean is"),
        (lambda: apex.optimizers.FusedAdam([THREE]), "FusedAdam"),
        (lambda: apex.optimizers.FusedSGD([THREE], lr=1.0), "FusedSGD"),
    ],
)
def test_what_is_not_supported_is_refused(call: Any, said: str) -> None:
    with pytest.raises((ValueError, NotImplementedError, TypeError), match=said):
        call()


def test_the_good_adam_is_good() -> None:
    adam()
