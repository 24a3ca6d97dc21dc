"""Grouped matrix products on CUDA as two Triton kernels: numbers of 16 bits as they are, or FP8 with scales.

    grouped_mm      rows [R, K] by the matrix [K, N] of their expert: forward, and dgrad with the matrices transposed
    grouped_wgrad   xᵀ · dy over the rows of each expert

Imported only where they run. Sums are fp32. The host launches as many programs as there could be tiles of rows
(row_tiles.py), so it waits for no routing; a program without rows ends at once.

Tested on a CPU under Triton's interpreter (TRITON_INTERPRET=1, read when triton is imported) and compiled for sm_80,
sm_86 and sm_90. Not measured on a GPU: tile sizes and warps are first guesses.

Axes: R rows sorted by expert, E experts, K contracted and N output width of the forward product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from model.kernels.row_tiles import TILE, row_tiles, starts

NUM_WARPS = 8


@triton.jit
def _grouped_mm(
    x_ptr, x_stride_row, x_stride_k, sx_ptr, sx_stride_row, sx_stride_k,
    w_ptr, w_stride_expert, w_stride_k, w_stride_n, sw_ptr, sw_stride_expert, sw_stride_k, sw_stride_n,
    out_ptr, starts_ptr, stops_ptr, expert_ptr, num_k, num_n,
    SCALES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one expert by WIDTH columns of its matrix. A stride of 0 repeats a scale."""
    tile = tl.program_id(0)
    start, stop = tl.load(starts_ptr + tile), tl.load(stops_ptr + tile)
    if start >= stop:
        return
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    row_ok, column_ok = rows < stop, columns < num_n
    if SCALES != "none":
        block = columns // DEPTH if SCALES == "block" else columns
        sw_columns = sw_ptr + expert * sw_stride_expert + block * sw_stride_n
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for chunk in range(tl.cdiv(num_k, DEPTH)):
        k = (chunk * DEPTH + tl.arange(0, DEPTH)).to(tl.int64)
        x_at = rows[:, None] * x_stride_row + k[None, :] * x_stride_k
        w_at = expert * w_stride_expert + k[:, None] * w_stride_k + columns[None, :] * w_stride_n
        x = tl.load(x_ptr + x_at, mask=row_ok[:, None] & (k < num_k)[None, :], other=0.0)
        w = tl.load(w_ptr + w_at, mask=(k < num_k)[:, None] & column_ok[None, :], other=0.0)
        if SCALES == "block":
            part = tl.dot(x, w, max_num_imprecise_acc=DEPTH)
            sx = tl.load(sx_ptr + rows * sx_stride_row + chunk * sx_stride_k, mask=row_ok, other=0.0)
            sw = tl.load(sw_columns + chunk * sw_stride_k, mask=column_ok, other=0.0)
            total += part * sx[:, None] * sw[None, :]
        else:
            total = tl.dot(x, w, total, max_num_imprecise_acc=DEPTH)
    if SCALES == "sum":
        sx = tl.load(sx_ptr + rows * sx_stride_row, mask=row_ok, other=0.0)
        sw = tl.load(sw_columns, mask=column_ok, other=0.0)
        total = total * sx[:, None] * sw[None, :]
    out = out_ptr + rows[:, None] * num_n + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _grouped_wgrad(
    x_ptr, x_stride_row, x_stride_k, sx_ptr, sx_stride_segment, sx_stride_k,
    dy_ptr, dy_stride_row, dy_stride_n, sdy_ptr, sdy_stride_segment, sdy_stride_n,
    out_ptr, starts_ptr, stops_ptr, num_k, num_n,
    SCALES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """HEIGHT × WIDTH of one expert's xᵀ · dy, summed over its rows. A stride of 0 repeats a scale."""
    expert = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts_ptr + expert), tl.load(stops_ptr + expert)
    k = (tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    columns = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    k_ok, column_ok = k < num_k, columns < num_n
    segment = (start // DEPTH + expert) if SCALES == "block" else expert  # numbered as row_tiles.py numbers tiles
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for first in range(start, stop, DEPTH):
        rows = (first + tl.arange(0, DEPTH)).to(tl.int64)
        row_ok = rows < stop
        x_at = k[:, None] * x_stride_k + rows[None, :] * x_stride_row
        dy_at = rows[:, None] * dy_stride_row + columns[None, :] * dy_stride_n
        x = tl.load(x_ptr + x_at, mask=k_ok[:, None] & row_ok[None, :], other=0.0)
        dy = tl.load(dy_ptr + dy_at, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        if SCALES == "block":
            part = tl.dot(x, dy, max_num_imprecise_acc=DEPTH)
            sx = tl.load(sx_ptr + segment * sx_stride_segment + k * sx_stride_k, mask=k_ok, other=0.0)
            sdy = tl.load(sdy_ptr + segment * sdy_stride_segment + columns * sdy_stride_n, mask=column_ok, other=0.0)
            total += part * sx[:, None] * sdy[None, :]
            segment += 1
        else:
            total = tl.dot(x, dy, total, max_num_imprecise_acc=DEPTH)
    if SCALES == "sum":
        sx = tl.load(sx_ptr + segment * sx_stride_segment + k * sx_stride_k, mask=k_ok, other=0.0)
        sdy = tl.load(sdy_ptr + segment * sdy_stride_segment + columns * sdy_stride_n, mask=column_ok, other=0.0)
        total = total * sx[:, None] * sdy[None, :]
    out = out_ptr + expert * num_k * num_n + k[:, None] * num_n + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=k_ok[:, None] & column_ok[None, :])


@dataclass(frozen=True)
class Scales:
    """fp32 scales of both operands of FP8. A dimension of 1 is shared by all."""

    left: torch.Tensor
    right: torch.Tensor
    per_block: bool  # one for every 128 of the sum, else one for the whole


def grouped_mm(
    x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor, out_dtype: torch.dtype, scales: Scales | None = None
) -> torch.Tensor:
    """x[r] · w[e] for the rows r of expert e, [R, N]. `ends_E` int32, the last is R; operands of any strides."""
    (num_rows, num_k), num_n = x_RK.shape, w_EKN.shape[2]
    out_RN = torch.empty(num_rows, num_n, dtype=out_dtype, device=x_RK.device)
    tiles = row_tiles(ends_E, num_rows)
    _grouped_mm[(len(tiles.starts_S), triton.cdiv(num_n, TILE))](
        x_RK, *x_RK.stride(), *_with_strides(scales and scales.left, num_dims=2),
        w_EKN, *w_EKN.stride(), *_with_strides(scales and scales.right, num_dims=3),
        out_RN, *tiles, num_k, num_n,
        SCALES=_kind(scales), ROWS=TILE, WIDTH=TILE, DEPTH=_depth(x_RK), num_warps=NUM_WARPS,
    )  # fmt: skip
    return out_RN


def grouped_wgrad(
    x_RK: torch.Tensor, dy_RN: torch.Tensor, ends_E: torch.Tensor, out_dtype: torch.dtype, scales: Scales | None = None
) -> torch.Tensor:
    """xᵀ · dy over the rows of each expert, [E, K, N]; zero for an empty one. `ends_E` int32, the last is R."""
    num_k, num_n = x_RK.shape[1], dy_RN.shape[1]
    out_EKN = torch.empty(len(ends_E), num_k, num_n, dtype=out_dtype, device=x_RK.device)
    _grouped_wgrad[(len(ends_E), triton.cdiv(num_k, TILE), triton.cdiv(num_n, TILE))](
        x_RK, *x_RK.stride(), *_with_strides(scales and scales.left, num_dims=2),
        dy_RN, *dy_RN.stride(), *_with_strides(scales and scales.right, num_dims=2),
        out_EKN, starts(ends_E), ends_E, num_k, num_n,
        SCALES=_kind(scales), HEIGHT=TILE, WIDTH=TILE, DEPTH=_depth(x_RK), num_warps=NUM_WARPS,
    )  # fmt: skip
    return out_EKN


def _depth(operand: torch.Tensor) -> int:
    """How much of a sum is done at a time: 128 bytes of a row. For FP8 that is what a scale of block128 spans; for 16
    bits as much again would not fit into the shared memory of compute capability 8.6 and 8.9."""
    return TILE // operand.element_size()


def _kind(scales: Scales | None) -> str:
    return "none" if scales is None else "block" if scales.per_block else "sum"


def _with_strides(scale: torch.Tensor | None, num_dims: int) -> list[Any]:
    if scale is None:
        return [None] + [0] * num_dims
    return [scale, *(stride if size > 1 else 0 for size, stride in zip(scale.shape, scale.stride()))]
