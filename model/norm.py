"""RMS norm, y = x / √(mean x² + eps) · weight, in few passes over memory.

On a CPU PyTorch composes it of eight operations, each of which reads and writes all of x, and its backward of more; it
was a tenth of a training step. Here forward takes three passes and backward five. On other devices, and for other
dtypes than fp32, PyTorch's own (on CUDA one kernel).

Axes: T tokens (any leading axes), D the normalised one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """In the dtype that `F.rms_norm` gives."""
    if x_TD.device.type != "cpu" or x_TD.dtype != torch.float32:
        return F.rms_norm(x_TD, (x_TD.shape[-1],), weight_D, eps)
    return _RmsNorm.apply(x_TD, weight_D, eps)


class RmsNorm(nn.RMSNorm):
    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None
        return rms_norm(x_TD, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / √(mean x² + eps) and g = dy ∘ weight:  dx = r·g − x·r³·mean(g ∘ x),  dweight = Σ_T r·dy ∘ x."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        r_T1 = length_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, r_T1)
        y_TD = x_TD * r_T1
        return y_TD if weight_D is None else y_TD.mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_D, r_T1 = ctx.saved_tensors
        size = x_TD.shape[-1]
        product_TD = dy_TD * x_TD
        ones_D = product_TD.new_ones(size) if weight_D is None else weight_D
        mean_T1 = (product_TD.view(-1, size) @ ones_D).view_as(r_T1) / size
        dweight_D = r_T1.reshape(-1) @ product_TD.view(-1, size) if ctx.needs_input_grad[1] else None
        dx_TD = dy_TD * r_T1 if weight_D is None else (dy_TD * weight_D).mul_(r_T1)
        dx_TD.sub_(torch.mul(x_TD, mean_T1 * r_T1**3, out=product_TD))
        return dx_TD, dweight_D, None
