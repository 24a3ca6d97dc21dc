"""The steps between grouped products that PyTorch's autograd does in more passes over memory than they need.

`gated` brings tokens into the order of their experts and scales them, `permuted` brings them back. Each token has
exactly one row (top-1), so the gradient of these gathers is a gather as well; autograd, which cannot know that, would
add up into a tensor of zeros.

`swiglu` is silu(gate) ∘ up of rows that hold gate and up side by side. Its backward writes both gradients into one
tensor, where they belong; autograd would fill two with zeros and add them.

Axes: T tokens, R = T rows sorted by expert, D hidden size, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def inverse(order_R: torch.Tensor) -> torch.Tensor:
    """Where each row went: `x[order_R][inverse(order_R)]` is x."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def permuted(x_RD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
    """x_RD[order_R] for an order that names every row once, and its inverse."""
    return _Permuted.apply(x_RD, order_R, inverse_R)


def gated(x_TD: torch.Tensor, gate_T: torch.Tensor, order_R: torch.Tensor, inverse_T: torch.Tensor) -> torch.Tensor:
    """(x_TD · gate_T)[order_R] in the dtype of x, for an order that names every token once, and its inverse."""
    return _Gated.apply(x_TD, gate_T, order_R, inverse_T)


def swiglu(h_R2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) ∘ up, [R, F], of h = [gate, up]."""
    return _SwiGlu.apply(h_R2F)


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        return dy_RD.index_select(0, inverse_R), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, gate_T: torch.Tensor, order_R: torch.Tensor, inverse_T: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, gate_T, order_R, inverse_T)
        return x_TD.index_select(0, order_R).mul_(gate_T[order_R].unsqueeze(1).to(x_TD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, gate_T, order_R, inverse_T = ctx.saved_tensors
        dscaled_TD = drows_RD.index_select(0, inverse_T)
        dgate_T = torch.linalg.vecdot(dscaled_TD, x_TD).to(gate_T.dtype)
        return dscaled_TD.mul_(gate_T.unsqueeze(1).to(x_TD.dtype)), dgate_T, None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_R2F: torch.Tensor) -> torch.Tensor:
        gate_RF, up_RF = h_R2F.chunk(2, dim=-1)
        silu_RF = F.silu(gate_RF)
        ctx.save_for_backward(h_R2F, silu_RF)
        return silu_RF * up_RF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RF: torch.Tensor) -> torch.Tensor:
        h_R2F, silu_RF = ctx.saved_tensors
        gate_RF, up_RF = h_R2F.chunk(2, dim=-1)
        dh_R2F = torch.empty_like(h_R2F)
        dgate_RF, dup_RF = dh_R2F.chunk(2, dim=-1)
        torch.mul(dy_RF, silu_RF, out=dup_RF)
        torch.ops.aten.silu_backward.grad_input(dy_RF * up_RF, gate_RF, grad_input=dgate_RF)
        return dh_R2F
