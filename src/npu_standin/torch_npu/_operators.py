"""The small fused operators, as plain torch expressions: autograd gives their gradients."""

from __future__ import annotations

from typing import Optional

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # supported by the operators of this stack


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x²) + epsilon) * gamma, the mean over the last dimension.

    Source: torch_npu's documentation of npu_rms_norm, which asks for one dtype. Called at
    mindspeed_llm/legacy/model/rms_norm.py:41. The real one also takes a gamma of several dimensions.

    Args:
        x: [..., h].
        gamma: [h].

    Returns:
        The norm, like x; and 1 / sqrt(…) in fp32, [..., 1], without a gradient.
    """
    require(x.dtype in DTYPES, f"npu_rms_norm: x is {x.dtype}")
    require(gamma.dtype == x.dtype, f"npu_rms_norm: gamma is {gamma.dtype} where x is {x.dtype}")
    if gamma.shape != x.shape[-1:]:
        raise NotImplementedError(f"npu_rms_norm: a gamma of shape {list(gamma.shape)} for x of {list(x.shape)}")
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * rstd).to(x.dtype) * gamma, rstd.detach()


def npu_rotary_mul(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + (-second half of x, first half of x) * sin, the halves of the last dimension.

    Source: torch_npu's documentation of npu_rotary_mul (input, r1, r2). Called at
    mindspeed_llm/core/models/common/embeddings/rotary_pos_embedding.py:155, with x of [s, b, n, d] in the model's dtype
    and cos, sin of [s, 1, 1, d] in fp32; the result has the wider dtype, which the caller narrows.

    Args:
        x: four dimensions, the last one even.
        cos: four dimensions, each 1 or x's, the last x's.
        sin: like cos.
    """
    require(x.dim() == 4 and x.shape[-1] % 2 == 0, f"npu_rotary_mul: x of shape {list(x.shape)}")
    fits = cos.dim() == 4 and cos.shape == sin.shape and cos.shape[-1] == x.shape[-1]
    fits = fits and all(size in (1, of) for size, of in zip(cos.shape, x.shape))
    shapes = [list(tensor.shape) for tensor in (x, cos, sin)]
    require(fits, f"npu_rotary_mul: x, cos, sin of shapes {shapes}")
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half of x) * second half of x.

    Source: torch_npu's documentation of npu_swiglu. Called at mindspeed/core/fusions/fused_bias_swiglu.py:5.
    """
    require(x.shape[dim] % 2 == 0, f"npu_swiglu: dimension {dim} of {list(x.shape)} has no halves")
    gate, value = x.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * value


def npu_apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: torch.Tensor,
    max_grad_norm: Optional[torch.Tensor],
    amsgrad: Optional[bool],
    maximize: Optional[bool],
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of AdamW, in place.

    Source: the formula in torch_npu's own test of npu_apply_adam_w. Called at mindspeed/optimizer/adamw.py:35.

    Args:
        beta1_power, beta2_power: to the power of the steps before this one.
        weight_decay: decoupled from the gradient.
        epsilon: is added to the root, after the bias correction.
        max_grad_norm: only with amsgrad, which is not implemented.
        out: parameter, mean and mean of squares, of one shape and dtype; returned as well.
    """
    if amsgrad or max_grad_norm is not None:
        raise NotImplementedError("npu_apply_adam_w with amsgrad or max_grad_norm")
    parameter, mean, square = out
    for name, tensor in (("grad", grad), ("mean", mean), ("mean of squares", square)):
        same = (tensor.shape, tensor.dtype) == (parameter.shape, parameter.dtype)
        got = f"{list(tensor.shape)} of {tensor.dtype}, the parameter {list(parameter.shape)} of {parameter.dtype}"
        require(same, f"npu_apply_adam_w: the {name} is {got}")
    gradient = -grad if maximize else grad
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.mul_(1 - lr * weight_decay)
    root = (square / (1 - beta2_power * beta2)).sqrt_().add_(epsilon)
    parameter.addcdiv_(mean, root, value=-lr / (1 - beta1_power * beta1))
    return parameter, mean, square
