"""Grouped matrix product: every expert multiplies its own rows, in one call.

    rows sorted by expert    x [R, K]   ▏ e=0 ▏ e=1 ▏ (e=2 has none) ▏ e=3 ▏
    ends                     [E] int32        3     7               7     9

    forward  out[r] = x[r] · w[e]        dgrad  dx[r] = dy[r] · w[e]ᵀ        wgrad  dw[e] = x_eᵀ · dy_e

`torch.nn.functional.grouped_mm` does all three on a CPU and, with compute capability 9.0, on CUDA (not measured on a
GPU). On a CPU core it is as fast as a loop of `torch.mm` into slices of one output, and as one function that fuses
the whole SwiGLU (docs/log.md).

Axes: R rows sorted by expert, E experts, K contracted width, N output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# device type → (dtypes of operands, lowest CUDA compute capability)
SUPPORTED: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, int] | None]] = {
    "cpu": ((torch.float32, torch.bfloat16, torch.float16), None),
    "cuda": ((torch.bfloat16,), (9, 0)),
}


def grouped_mm(x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """out[r] = x[r] · w[e] for the rows r of expert e, [R, N]; gradients to x and w, zero for an expert without rows.

    `ends_E` int32: one past the last row of each expert. Under autocast both operands take its dtype. ValueError where
    the device or dtype has no kernel.
    """
    device = x_RK.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_RK, w_EKN = x_RK.to(dtype), w_EKN.to(dtype)
    _refuse_unsupported(x_RK, w_EKN)
    return _GroupedMm.apply(x_RK, w_EKN, ends_E)


def _refuse_unsupported(x_RK: torch.Tensor, w_EKN: torch.Tensor) -> None:
    dtypes, lowest = SUPPORTED.get(x_RK.device.type, ((), None))
    if x_RK.dtype not in dtypes or w_EKN.dtype != x_RK.dtype:
        known = "; ".join(f"{device}: {', '.join(map(str, known))}" for device, (known, _) in SUPPORTED.items())
        raise ValueError(
            f"no grouped product of {x_RK.dtype} rows and {w_EKN.dtype} weights on {x_RK.device.type}; known: {known}"
        )
    if lowest is not None and (seen := torch.cuda.get_device_capability(x_RK.device)) < lowest:
        raise ValueError(f"grouped products need compute capability {lowest} or later; this device has {seen}")


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_RK, w_EKN, ends_E)
        return F.grouped_mm(x_RK, w_EKN, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_RK, w_EKN, ends_E = ctx.saved_tensors
        dy_RN = dy_RN.contiguous()  # a sum's gradient has strides of zero, which the kernel refuses
        dx_RK = F.grouped_mm(dy_RN, w_EKN.transpose(1, 2), offs=ends_E) if ctx.needs_input_grad[0] else None
        dw_EKN = F.grouped_mm(x_RK.T, dy_RN, offs=ends_E) if ctx.needs_input_grad[1] else None
        return dx_RK, dw_EKN, None
