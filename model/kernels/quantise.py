"""Numbers to FP8 and back: formats, scales, and which numbers share one. Why any of it: model/kernels/fp8.py.

This is the definition on a CPU; model/kernels/triton_fp8.py computes the same bytes on CUDA.

Axes: R rows sorted by expert, E experts, K contracted and N output width of the forward product, S segments of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model.kernels.row_tiles import TILE, row_tiles, starts
from model.precision import Format, Recipe

SMALLEST_SCALE = 1e-12  # a scale of zero would make 0/0 of a tensor of zeros


class Layout(NamedTuple):
    dtype: torch.dtype
    largest: float
    mantissa_bits: int
    exponent_bias: int
    largest_code: int  # the byte of `largest`


FORMATS: dict[Format, Layout] = {
    "e4m3": Layout(torch.float8_e4m3fn, 448.0, 3, 7, 0x7E),
    "e5m2": Layout(torch.float8_e5m2, 57344.0, 2, 15, 0x7B),
}
_ALL_BYTES = torch.arange(256, dtype=torch.uint8)
_DECODED = {layout.dtype: _ALL_BYTES.view(layout.dtype).float() for layout in FORMATS.values()}


@dataclass(frozen=True)
class Quantised:
    """FP8 numbers with their fp32 scales.

    A dimension of `scale` is 1 (shared by all), that of `q` (each its own) or ⌈that/128⌉ (shared by 128). With
    `segment_R`, q is [R, C], scale [S, C], and row r uses the scales of segment_R[r]."""

    q: torch.Tensor
    scale: torch.Tensor
    segment_R: torch.Tensor | None = None

    def dequantise(self) -> torch.Tensor:
        """q · scale in fp32."""
        if self.segment_R is not None:
            return _decode(self.q).mul_(self.scale[self.segment_R])
        return _decode(self.q).mul_(_spread_over(self.q, self.scale))

    def rows(self, at: slice) -> Quantised:
        """Only the positions `at` of the last dimension but one, with their scales."""
        q = self.q[..., at, :]
        if self.segment_R is not None:
            return Quantised(q, self.scale, self.segment_R[at])
        scale = _spread(self.scale, -2, self.q.shape[-2])
        return Quantised(q, scale if scale.shape[-2] == 1 else scale[..., at, :])

    def transposed(self) -> Quantised:
        """Of weights: the matrices the other way round, as dgrad multiplies by them."""
        return Quantised(self.q.transpose(-2, -1), self.scale.transpose(-2, -1))


def quantise(
    x: torch.Tensor, recipe: Recipe, axis: int, fmt: Format = "e4m3", ends_E: torch.Tensor | None = None
) -> Quantised:
    """FP8 numbers and scales of activations [R, C] or weights [E, K, N], for a product that sums over `axis`.

    Scales   tensor: one, or one per expert · row: one per line along the axis · block128: one per 128 along the axis,
    for weights per block of 128 × 128. Activations summed over axis 0 need `ends_E`: no scale spans two experts.
    """
    layout, segment_R = FORMATS[fmt], None
    if x.dim() == 2 and axis == 0 and recipe != "tensor":
        if ends_E is None:
            raise ValueError("a product that sums over rows sums within each expert: quantise(axis=0) needs ends_E")
        starts_S, stops_S = segments(ends_E, len(x), recipe)
        amax = x.new_zeros(len(starts_S), x.shape[1])
        for segment, (start, stop) in enumerate(zip(starts_S.tolist(), stops_S.tolist())):
            if start < stop:
                amax[segment] = x[start:stop].abs().amax(0)
        segment_R = torch.arange(len(starts_S)).repeat_interleave((stops_S - starts_S).long())
    elif recipe == "block128":
        amax = _amax_of_blocks(x, TILE if x.dim() == 3 or axis == 0 else 1, TILE if x.dim() == 3 or axis == 1 else 1)
    elif recipe == "row":
        amax = x.abs().amax(axis, keepdim=True)
    else:
        amax = x.abs().amax((-2, -1), keepdim=True) if x.numel() else x.new_zeros([1] * x.dim())
    scale = (amax.float() / layout.largest).clamp_(min=SMALLEST_SCALE)
    wide = scale[segment_R] if segment_R is not None else _spread_over(x, scale)
    q = (x.float() / wide).clamp_(-layout.largest, layout.largest).to(layout.dtype)
    return Quantised(q, scale, segment_R)


def input_major(weight: torch.Tensor) -> torch.Tensor:
    """Weights [E, K, N] as they are, a linear layer's [N, K] as those of one expert, [1, K, N]; a view."""
    return weight if weight.dim() == 3 else weight.T.unsqueeze(0)


def segments(ends_E: torch.Tensor, num_rows: int, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """First row, and one past the last, of each run of rows that shares scales: an expert's, or its tiles of 128."""
    if recipe != "block128":
        return starts(ends_E), ends_E
    tiles = row_tiles(ends_E, num_rows)
    return tiles.starts_S, tiles.stops_S


def _amax_of_blocks(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    height, width = x.shape[-2:]
    if height % rows or width % columns:
        x = F.pad(x, (0, -width % columns, 0, -height % rows))
    return x.abs().unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))


def _spread_over(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _spread(_spread(scale, -2, x.shape[-2]), -1, x.shape[-1])


def _spread(scale: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Scales of every position of a dimension that `scale` holds once, in full, or in tiles; once stays once."""
    if scale.shape[dim] in (1, size):
        return scale
    return scale.repeat_interleave(TILE, dim).narrow(dim, 0, size)


def _decode(q: torch.Tensor) -> torch.Tensor:
    """FP8 to fp32 by table: on a CPU three times as fast as torch's own conversion."""
    if q.device.type != "cpu":
        return q.float()
    return _DECODED[q.dtype].index_select(0, q.view(torch.uint8).flatten().int()).view(q.shape)
