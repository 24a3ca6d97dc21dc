"""Slow and plain: what every kernel of this folder is tested against. Nothing here shares code with what it defines.

`round_to_fp8` knows FP8 only by the list of numbers the format can hold, `quantise_loop` visits scale by scale, and the
grouped products are a loop over experts. With fp64 arguments the products are fp64.

Axes: R rows sorted by expert, K contracted width, N output width, E experts; `ends_E[e]` is one past the last row of e.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

TILE = 128


def grouped_mm_loop(x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Rows of expert e times its matrix: out[r] = x[r] · w[e], [R, N]."""
    return torch.cat([x_RK[rows] @ w_KN for rows, w_KN in zip(groups(ends_E), w_EKN)])


def grouped_wgrad_loop(x_RK: torch.Tensor, dy_RN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Gradient of the weights, dw[e] = x_eᵀ · dy_e over the rows of e alone, [E, K, N]; zero for an empty expert."""
    return torch.stack([x_RK[rows].T @ dy_RN[rows] for rows in groups(ends_E)])


def groups(ends_E: torch.Tensor) -> Iterator[slice]:
    """The rows of each expert."""
    return itertools.starmap(slice, itertools.pairwise([0, *ends_E.tolist()]))


def fp8_numbers(exponent_bits: int, mantissa_bits: int) -> torch.Tensor:
    """The non-negative finite numbers of a format in the order of their codes 0, 1, 2, …, fp64.

    A code is exponent and mantissa written one after the other. Exponent 0 holds the subnormals. e4m3 ("fn") gives up
    infinity for range: of its largest exponent only the last mantissa is not a number. e5m2 is IEEE: all of it is.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    finite = 2 ** (exponent_bits + mantissa_bits) - (1 if exponent_bits == 4 else 2**mantissa_bits)
    numbers = []
    for code in range(finite):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits + (exponent > 0)
        numbers.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return torch.tensor(numbers, dtype=torch.float64)


NUMBERS = {"e4m3": fp8_numbers(4, 3), "e5m2": fp8_numbers(5, 2)}


def round_to_fp8(values: torch.Tensor, fmt: str) -> torch.Tensor:
    """The nearest number the format holds, fp64; of two equally near the one with the even code. Past the largest: the
    largest. NaN stays NaN."""
    numbers, size = NUMBERS[fmt], values.double().abs()
    above = torch.searchsorted(numbers, size.clamp(max=float(numbers[-1])).contiguous())  # code of the first ≥ size
    below = (above - 1).clamp(min=0)
    to_below, to_above = size - numbers[below], numbers[above] - size
    even = torch.where(above % 2 == 0, above, below)
    code = torch.where(to_below < to_above, below, torch.where(to_below > to_above, above, even))
    rounded = numbers[code].copysign(values.double())
    return torch.where(values.isnan(), values.double(), rounded)


def quantise_loop(
    x: torch.Tensor, recipe: str, axis: int, fmt: str = "e4m3", ends_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise` of quantise.py one scale at a time: the rounded quotients, fp64, and each element's scale, fp32.

    Scale and quotient are fp32 numbers by definition, hence the casts."""
    rounded = torch.full(x.shape, torch.nan, dtype=torch.float64)
    scales = torch.full(x.shape, torch.nan)
    for cell in cells(tuple(x.shape), recipe, axis, ends_E):
        amax = x[cell].abs().max().float()
        scales[cell] = torch.maximum(amax / NUMBERS[fmt][-1].float(), torch.tensor(1e-12))
        rounded[cell] = round_to_fp8(x[cell].float() / scales[cell], fmt)
    return rounded, scales


def cells(shape: tuple[int, ...], recipe: str, axis: int, ends_E: torch.Tensor | None) -> Iterator[tuple[slice, ...]]:
    """The parts of a tensor that share a scale. `axis` is the one the coming product contracts."""
    every, (rows, columns) = slice(None), shape[-2:]
    if len(shape) == 3:  # weights: each expert by itself
        for e in range(shape[0]):
            expert = slice(e, e + 1)
            match recipe:
                case "tensor":
                    yield expert, every, every
                case "row" if axis == 1:
                    yield from ((expert, every, slice(n, n + 1)) for n in range(columns))
                case "row":
                    yield from ((expert, slice(k, k + 1), every) for k in range(rows))
                case "block128":
                    yield from ((expert, *block) for block in itertools.product(tiles(0, rows), tiles(0, columns)))
    elif recipe == "tensor":
        yield every, every
    elif axis == 1:
        yield from itertools.product(singles(rows), [every] if recipe == "row" else tiles(0, columns))
    else:  # contracted over the rows of each expert: a scale never spans two experts
        assert ends_E is not None
        for group in groups(ends_E):
            if group.start < group.stop:
                parts = [group] if recipe == "row" else tiles(group.start, group.stop)
                yield from itertools.product(parts, singles(columns))


def tiles(start: int, stop: int) -> list[slice]:
    return [slice(low, min(low + TILE, stop)) for low in range(start, stop, TILE)]


def singles(size: int) -> list[slice]:
    return [slice(i, i + 1) for i in range(size)]
