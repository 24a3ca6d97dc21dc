"""Grouped matrix product: every expert multiplies its own rows, in one call.

    rows sorted by expert    x [R, K]   ▏ e=0 ▏ e=1 ▏ (e=2 has none) ▏ e=3 ▏
    ends                     [E] int32        3     7               7     9

    forward  out[r] = x[r] · w[e]        dgrad  dx[r] = dy[r] · w[e]ᵀ        wgrad  dw[e] = x_eᵀ · dy_e

On a CPU experts with few rows, in fp32, go through `grouped_gemm.cpp`, which fetches the next weights while it
multiplies (and so does any number of rows where MKL does without the processor's AVX-512); all others, and all where
there is no C++ compiler, through a loop of `torch.mm` into slices of one output.
(`torch.nn.functional.grouped_mm` does the same, but allocates every expert's part and copies it.) There the gradient
of a wide weight is made in slices of rows, which MKL packs faster. docs/log.md has the figures.

On CUDA choice.py says which: torch's function where it is one kernel, else ours in Triton (triton_grouped.py) for 16
bits, else the loop. DROVER_GROUPED_MM=torch, triton or loop asks for one, which is an error where it cannot do it. Not
measured on a GPU.

Axes: R rows sorted by expert, M those of one expert, E experts, K contracted width, N output width, k rows of a slice.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.kernels.choice import Wanted, choose_kernel, has_triton
from model.kernels.compiled import compiled, processor

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMED_BY = "DROVER_GROUPED_MM"  # environment variable

FEW_ROWS = 128  # an expert, on average: with more, MKL's product is as fast, if it uses all that the processor has
WIDE = 512  # columns from which an fp32 gradient is cut; a slice of fewer is too small to pay for a call
GRADIENT_SLICE = 128  # rows


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
    return _GroupedMm.apply(x_RK, w_EKN, ends_E, _kernel(w_EKN))


def _refuse_unsupported(x_RK: torch.Tensor, w_EKN: torch.Tensor) -> None:
    if x_RK.device.type not in DEVICES or x_RK.dtype not in DTYPES or w_EKN.dtype != x_RK.dtype:
        raise ValueError(
            f"no grouped product of {x_RK.dtype} rows and {w_EKN.dtype} weights on {x_RK.device.type}; known: "
            f"{' and '.join(DEVICES)}, both operands one of {', '.join(map(str, DTYPES))}"
        )


def _kernel(w_EKN: torch.Tensor) -> str:
    if w_EKN.device.type == "cpu":
        return "loop"
    wanted = Wanted(
        out_dtype=w_EKN.dtype,
        widths=(w_EKN.shape[1], w_EKN.shape[2]),
        device="rocm" if torch.version.hip else w_EKN.device.type,
        capability=torch.cuda.get_device_capability(w_EKN.device),
        has_triton=has_triton(),
    )
    return choose_kernel(wanted, named=os.environ.get(NAMED_BY) or None)


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor, kernel: str) -> torch.Tensor:
        ctx.save_for_backward(x_RK, w_EKN, ends_E)
        ctx.products = PRODUCTS[kernel]
        return ctx.products.forward(x_RK, w_EKN, ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_RK, w_EKN, ends_E = ctx.saved_tensors
        dy_RN = dy_RN.contiguous()  # a sum's gradient has strides of zero, which the kernels refuse or are slow at
        dx_RK = ctx.products.dgrad(dy_RN, w_EKN, ends_E) if ctx.needs_input_grad[0] else None
        dw_EKN = ctx.products.wgrad(x_RK, dy_RN, ends_E) if ctx.needs_input_grad[1] else None
        return dx_RK, dw_EKN, None, None


def _forward(x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    out_RN = x_RK.new_empty(len(x_RK), w_EKN.shape[2])
    if library := _library(x_RK, w_EKN):
        _call(library.grouped_forward, x_RK, w_EKN, out_RN, ends_E, w_EKN.shape)
        return out_RN
    sizes = _sizes(ends_E)
    for x_MK, w_KN, out_MN in zip(x_RK.split(sizes), w_EKN, out_RN.split(sizes)):
        torch.mm(x_MK, w_KN, out=out_MN)
    return out_RN


def _dgrad(dy_RN: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    dx_RK = dy_RN.new_empty(len(dy_RN), w_EKN.shape[1])
    if library := _library(dy_RN, w_EKN):
        _call(library.grouped_dgrad, dy_RN, w_EKN, dx_RK, ends_E, w_EKN.shape)
        return dx_RK
    sizes = _sizes(ends_E)
    for dy_MN, w_KN, dx_MK in zip(dy_RN.split(sizes), w_EKN, dx_RK.split(sizes)):
        torch.mm(dy_MN, w_KN.T, out=dx_MK)
    return dx_RK


def _wgrad(x_RK: torch.Tensor, dy_RN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    dw_EKN = x_RK.new_empty(len(ends_E), x_RK.shape[1], dy_RN.shape[1])
    if library := _library(x_RK, dw_EKN):
        _call(library.grouped_wgrad, x_RK, dy_RN, dw_EKN, ends_E, dw_EKN.shape)
        return dw_EKN
    sizes = _sizes(ends_E)
    # oneDNN (16 bits) reads a transposed matrix slowly: where it is the smaller one, a copy pays.
    straighten = x_RK.dtype != torch.float32 and x_RK.shape[1] < dy_RN.shape[1]
    for x_MK, dy_MN, dw_KN in zip(x_RK.split(sizes), dy_RN.split(sizes), dw_EKN):
        x_KM = x_MK.T.contiguous() if straighten else x_MK.T
        cut = dw_KN.dtype == torch.float32 and dw_KN.shape[1] >= WIDE
        slice_rows = GRADIENT_SLICE if cut else len(dw_KN)
        for x_kM, dw_kN in zip(x_KM.split(slice_rows), dw_KN.split(slice_rows)):
            torch.mm(x_kM, dy_MN, out=dw_kN)  # zeros where there is no row
    return dw_EKN


def _library(rows_RX: torch.Tensor, w_EKN: torch.Tensor) -> ctypes.CDLL | None:
    """Ours, where it is faster than `torch.mm`."""
    few = len(rows_RX) < FEW_ROWS * len(w_EKN)
    # ours gives an expert to one thread, MKL a product to all
    any_number = outruns_mkl() and len(w_EKN) >= 2 * torch.get_num_threads()
    faster = rows_RX.device.type == "cpu" and rows_RX.dtype == torch.float32 and (few or any_number)
    return compiled(Path(__file__).with_suffix(".cpp")) if faster else None


@functools.cache
def outruns_mkl() -> bool:
    """MKL uses AVX-512 on Intel's processors only; ours wherever there is."""
    return "avx512f" in processor("flags").split() and processor("vendor_id") != "GenuineIntel"


def _call(
    function: Any, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, ends_E: torch.Tensor, shape_EKN: torch.Size
) -> None:
    a, b, ends_E = a.contiguous(), b.contiguous(), ends_E.contiguous()
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, out, ends_E))
    function(*pointers, *map(ctypes.c_int64, shape_EKN), torch.get_num_threads())


def _sizes(ends_E: torch.Tensor) -> list[int]:
    """Rows of each expert."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


def _triton_mm(x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    from model.kernels import triton_grouped  # here, since a machine without a GPU need not have Triton

    return triton_grouped.grouped_mm(x_RK, w_EKN, ends_E, x_RK.dtype)


def _triton_wgrad(x_RK: torch.Tensor, dy_RN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    from model.kernels import triton_grouped

    return triton_grouped.grouped_wgrad(x_RK, dy_RN, ends_E, x_RK.dtype)


class Products(NamedTuple):
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, w, ends
    dgrad: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # dy, w, ends
    wgrad: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, dy, ends


PRODUCTS = {
    "torch": Products(
        forward=lambda x_RK, w_EKN, ends_E: F.grouped_mm(x_RK, w_EKN, offs=ends_E),
        dgrad=lambda dy_RN, w_EKN, ends_E: F.grouped_mm(dy_RN, w_EKN.transpose(1, 2), offs=ends_E),
        wgrad=lambda x_RK, dy_RN, ends_E: F.grouped_mm(x_RK.T, dy_RN, offs=ends_E),
    ),
    "triton": Products(
        forward=_triton_mm,
        dgrad=lambda dy_RN, w_EKN, ends_E: _triton_mm(dy_RN, w_EKN.transpose(1, 2), ends_E),
        wgrad=_triton_wgrad,
    ),
    "loop": Products(_forward, _dgrad, _wgrad),
}
