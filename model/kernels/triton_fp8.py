"""FP8 on CUDA: quantisation as Triton kernels. Imported only where they run; the products are triton_grouped.py's.

The bytes and scales are those of model/kernels/quantise.py, bit for bit, but for the exponential in SwiGLU. What a
kernel quantises it may make on the way: a permutation with its gates, or SwiGLU, so that neither is ever stored. The
contracted axis of what is quantised lies contiguous in memory, as FP8 tensor cores want both operands.

Tested on a CPU under Triton's interpreter (TRITON_INTERPRET=1, read when triton is imported) and compiled for sm_90.
Not measured on a GPU: tile sizes are first guesses.

Axes: R rows sorted by expert, E experts, C columns, K contracted and N output width, S segments of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from model.kernels.quantise import FORMATS, SMALLEST_SCALE, TILE, Layout, Quantised, segments
from model.precision import Format, Recipe

KINDS = {"plain": 0, "permuted": 1, "swiglu": 2}
PLAIN, PERMUTED = tl.constexpr(0), tl.constexpr(1)
ROWS_AT_ONCE = 32  # of a quantisation: 32 × 128 numbers are 32 registers a thread


@triton.jit
def _values(KIND: tl.constexpr, x_ptr, stride, token_ptr, gate_ptr, rows, row_ok, columns, num_columns):
    """[rows, columns] of the left operand, fp32. Operands are cast here: the interpreter gets bf16 arithmetic wrong."""
    mask = row_ok[:, None] & (columns < num_columns)[None, :]
    if KIND == PLAIN:
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if KIND == PERMUTED:
        token = tl.load(token_ptr + rows, mask=row_ok, other=0).to(tl.int64)
        gate = tl.load(gate_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        return x.to(tl.float32) * gate[:, None]
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    gate = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + num_columns, mask=mask, other=0.0).to(tl.float32)
    return tl.math.div_rn(gate, 1.0 + tl.exp(-gate)) * up


@triton.jit
def _magnitude(x):
    """|x| as an integer: ordered as the numbers are, with NaN above all, so that a maximum does not lose it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(amax_bits, LARGEST: tl.constexpr, FLOOR: tl.constexpr):
    scale = tl.math.div_rn(amax_bits.to(tl.float32, bitcast=True), LARGEST)
    return tl.where(scale < FLOOR, FLOOR, scale)


@triton.jit
def _encode(x, scale, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """The FP8 byte of x / scale: nearest, ties to even, saturating. Spelled out in integers, because casts differ by
    backend (the interpreter's loses the carry into the exponent)."""
    quotient = tl.math.div_rn(x, scale)
    bits = _magnitude(quotient)
    drop: tl.constexpr = 23 - MANTISSA
    rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number all steps are alike: with 1.5 · 2²³ added, fp32 itself rounds to whole steps.
    smallest: tl.constexpr = (128 - BIAS) << 23
    steps = tl.minimum(bits, smallest).to(tl.float32, bitcast=True) * (2.0 ** (BIAS - 1 + MANTISSA))
    subnormal = ((steps + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(bits < smallest, subnormal, tl.minimum(normal, LARGEST_CODE))
    code = tl.where(bits > 0x7F800000, 0x7F, code)
    sign = (quotient.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def _quantise_rows(
    x_ptr, stride, token_ptr, gate_ptr, q_ptr, scale_ptr, num_rows, num_columns, scale_stride, rows_per_scale,
    KIND: tl.constexpr, GIVEN: tl.constexpr, STORE: tl.constexpr, CHUNKS: tl.constexpr, FLOOR: tl.constexpr,
    LARGEST: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST_CODE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scales along rows: one per row and CHUNKS · COLUMNS columns. GIVEN: the scales are there already, one for every
    `rows_per_scale` rows. STORE off: only the scales."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < num_rows
    begin = tl.program_id(1) * CHUNKS * COLUMNS
    if GIVEN:
        scale = tl.load(scale_ptr + rows // rows_per_scale, mask=row_ok, other=1.0)
    else:
        amax = tl.zeros([ROWS], tl.int32)
        for chunk in range(CHUNKS):
            columns = begin + chunk * COLUMNS + tl.arange(0, COLUMNS)
            x = _values(KIND, x_ptr, stride, token_ptr, gate_ptr, rows, row_ok, columns, num_columns)
            amax = tl.maximum(amax, tl.max(_magnitude(x), axis=1))
        scale = _scale_of(amax, LARGEST, FLOOR)
        tl.store(scale_ptr + rows.to(tl.int64) * scale_stride + tl.program_id(1), scale, mask=row_ok)
    if STORE:
        for chunk in range(CHUNKS):
            columns = begin + chunk * COLUMNS + tl.arange(0, COLUMNS)
            x = _values(KIND, x_ptr, stride, token_ptr, gate_ptr, rows, row_ok, columns, num_columns)
            code = _encode(x, scale[:, None], MANTISSA, BIAS, LARGEST_CODE)
            mask = row_ok[:, None] & (columns < num_columns)[None, :]
            tl.store(q_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], code, mask=mask)


@triton.jit
def _quantise_segments(
    x_ptr, stride, token_ptr, gate_ptr, q_ptr, q_stride_matrix, q_stride_row, q_stride_column, scale_ptr, scale_stride,
    starts_ptr, stops_ptr, height, num_columns,
    KIND: tl.constexpr, SQUARE: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr, LARGEST_CODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scales down columns, within segments of rows: one per segment and column, or (SQUARE) per segment and COLUMNS.
    Every `height` rows are a matrix of their own, whose bytes may be stored transposed."""
    segment = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts_ptr + segment), tl.load(stops_ptr + segment)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = columns < num_columns
    amax = tl.zeros([COLUMNS], tl.int32)
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        x = _values(KIND, x_ptr, stride, token_ptr, gate_ptr, rows, rows < stop, columns, num_columns)
        amax = tl.maximum(amax, tl.max(_magnitude(x), axis=0))
    if SQUARE:
        amax = tl.zeros([COLUMNS], tl.int32) + tl.max(amax, axis=0)
    scale = _scale_of(amax, LARGEST, FLOOR)
    if SQUARE:
        one = tl.arange(0, COLUMNS) == 0
        tl.store(scale_ptr + segment * scale_stride + tl.program_id(1) + tl.zeros_like(columns), scale, mask=one)
    else:
        tl.store(scale_ptr + segment * scale_stride + columns, scale, mask=column_ok)
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        x = _values(KIND, x_ptr, stride, token_ptr, gate_ptr, rows, rows < stop, columns, num_columns)
        code = _encode(x, scale[None, :], MANTISSA, BIAS, LARGEST_CODE)
        at = (rows // height).to(tl.int64) * q_stride_matrix + (rows % height).to(tl.int64) * q_stride_row
        at = at[:, None] + columns.to(tl.int64)[None, :] * q_stride_column
        tl.store(q_ptr + at, code, mask=(rows < stop)[:, None] & column_ok[None, :])


def quantise(
    kind: str, tensors: tuple[torch.Tensor, ...], recipe: Recipe, axis: int, fmt: Format, ends_E: torch.Tensor | None
) -> Quantised:
    """`quantise` of model/kernels/quantise.py for a left operand by its kind, or for weights [E, K, N] as "plain"."""
    x, token_R, gate_R = (*tensors, None, None)[:3]
    if x.dim() == 3 and not x.is_contiguous() and x.mT.is_contiguous():  # a linear layer's, output-major in memory
        return quantise(kind, (x.mT,), recipe, 3 - axis, fmt, ends_E).transposed()
    x = x.contiguous()
    shape = (
        *x.shape[:-2],
        x.shape[-2] if token_R is None else len(token_R),
        x.shape[-1] // (2 if kind == "swiglu" else 1),
    )
    source = (x, x.shape[-1], token_R, gate_R)
    if recipe == "tensor" or axis == len(shape) - 1 and not (recipe == "block128" and len(shape) == 3):
        return _along_rows(source, shape, KINDS[kind], recipe, FORMATS[fmt])
    return _down_columns(source, shape, KINDS[kind], recipe, axis, FORMATS[fmt], ends_E)


def _along_rows(
    source: tuple[Any, ...], shape: tuple[int, ...], kind: int, recipe: Recipe, layout: Layout
) -> Quantised:
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    num_tiles = triton.cdiv(columns, TILE)
    chunks, across = (1, num_tiles) if recipe == "block128" else (num_tiles, 1)
    q = torch.empty(shape, dtype=torch.uint8, device=source[0].device)
    scale = torch.empty((*shape[:-1], across), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(rows, ROWS_AT_ONCE), across)
    consts = _format_constants(layout) | {"KIND": kind, "CHUNKS": chunks, "ROWS": ROWS_AT_ONCE, "COLUMNS": TILE}
    if rows:
        _quantise_rows[grid](
            *source, q, scale, rows, columns, across, 1, GIVEN=False, STORE=recipe != "tensor", **consts
        )
    if recipe == "tensor":  # the first pass made the scales of the rows; the largest is the scale of all
        scale = scale.amax((-2, -1), keepdim=True) if rows else scale.new_full([1] * len(shape), SMALLEST_SCALE)
        if rows:
            _quantise_rows[grid](*source, q, scale, rows, columns, across, shape[-2], GIVEN=True, STORE=True, **consts)
    return Quantised(q.view(layout.dtype), scale)


def _down_columns(
    source: tuple[Any, ...], shape: tuple[int, ...], kind: int, recipe: Recipe, axis: int, layout: Layout,
    ends_E: torch.Tensor | None,
) -> Quantised:  # fmt: skip
    columns, device = shape[-1], source[0].device
    square, segment_R = len(shape) == 3 and recipe == "block128", None
    if len(shape) == 3:
        starts_S, stops_S = _segments_of_weights(shape, TILE if square else shape[1], device)
    else:
        assert ends_E is not None, "a sum over rows is a sum within each expert"
        starts_S, stops_S = segments(ends_E, shape[0], recipe)
        # The segments hold all rows; output_size says so to the host, which need not wait for the device.
        segment_R = torch.arange(len(starts_S), device=device).repeat_interleave(
            (stops_S - starts_S).long(), output_size=shape[0]
        )
    per_segment = triton.cdiv(columns, TILE) if square else columns
    scale = torch.empty(len(starts_S), per_segment, dtype=torch.float32, device=device)
    if axis == len(shape) - 1:
        q = torch.empty(shape, dtype=torch.uint8, device=device)
    else:
        q = torch.empty((*shape[:-2], columns, shape[-2]), dtype=torch.uint8, device=device).transpose(-1, -2)
    _quantise_segments[(len(starts_S), triton.cdiv(columns, TILE))](
        *source, q, shape[-2] * columns, q.stride(-2), q.stride(-1), scale, per_segment, starts_S, stops_S,
        max(shape[-2], 1), columns,
        KIND=kind, SQUARE=square, ROWS=ROWS_AT_ONCE, COLUMNS=TILE, **_format_constants(layout),
    )  # fmt: skip
    scale = scale if segment_R is not None else scale.view(shape[0], -1, per_segment)
    return Quantised(q.view(layout.dtype), scale, segment_R)


def _segments_of_weights(
    shape: tuple[int, ...], height: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights are rows too: expert e's are K·e to K·(e+1), in pieces of `height`."""
    first_E1 = (torch.arange(shape[0], device=device) * shape[1]).unsqueeze(1)
    within = torch.arange(0, shape[1], height, device=device)
    return (first_E1 + within).flatten(), (first_E1 + (within + height).clamp(max=shape[1])).flatten()


def _format_constants(layout: Layout) -> dict[str, Any]:
    return {
        "FLOOR": SMALLEST_SCALE,
        "LARGEST": layout.largest,
        "MANTISSA": layout.mantissa_bits,
        "BIAS": layout.exponent_bias,
        "LARGEST_CODE": layout.largest_code,
    }
