"""The loss a chunk of logits at a time, against the loss of all logits at once."""

from __future__ import annotations

import contextlib
from typing import Callable

import pytest
import torch
from torch.nn import functional

from openpangu_sft.model import chunked_loss
from openpangu_sft.model.chunked_loss import loss_sum, token_losses
from openpangu_sft.plan import memory


def drawn(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 8).to(dtype), torch.randn(11, 8).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(11, (rows,))


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 6, 7])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_loss_and_gradients(rows: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK", 3)
    hidden, weight, targets = drawn(rows)
    loss = loss_sum(hidden, weight, targets)
    found = torch.autograd.grad(loss * scale, [hidden, weight])
    expected = functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, other in zip(found, torch.autograd.grad(expected * scale, [hidden, weight])):
        torch.testing.assert_close(gradient, other)


def test_in_bf16_gradients_are_as_close_as_those_of_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK", 64)
    hidden, weight, targets = drawn(1000, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.autograd.grad(
        functional.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum") / 1000, exact
    )
    at_once = functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum") / 1000
    for gradient, other, right in zip(
        torch.autograd.grad(loss_sum(hidden, weight, targets) / 1000, [hidden, weight]),
        torch.autograd.grad(at_once, [hidden, weight]),
        expected,
    ):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - right).norm() <= 1.5 * (other - right).norm()  # 16 products are rounded, not one


def test_a_fp32_weight_gets_a_fp32_gradient_from_bf16_products() -> None:
    hidden, _, targets = drawn(5, torch.bfloat16)
    weight = torch.randn(11, 8, requires_grad=True)
    loss_sum(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_the_plan_counts_the_same_chunk() -> None:
    assert memory.CHUNK == chunked_loss.CHUNK


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, weight, targets = drawn(5)
    weight.requires_grad_(False)
    loss_sum(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("evaluating", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_computes_no_gradients(evaluating: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    computed = []

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        computed.append(logits.requires_grad)
        return token_losses(logits, targets)

    hidden, weight, targets = drawn(5)
    with evaluating():
        loss = loss_sum(hidden, weight, targets, losses)
    assert computed == [False]
    assert not loss.requires_grad
