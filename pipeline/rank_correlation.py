"""How well one list of numbers foretells another, without numpy: reports are written in a second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

BINS = 10


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation with ties at their mean rank; None where fewer than three pairs or one side is constant."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


def binned(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float, int]]:
    """Mean expected, mean seen and the number of groups, for each tenth of expected pass rates that has any."""
    tenths: dict[int, list[tuple[float, float]]] = {}
    for expected, seen in pairs:
        tenths.setdefault(min(BINS - 1, int(expected * BINS)), []).append((expected, seen))
    return [
        (fmean(expected for expected, _ in found), fmean(seen for _, seen in found), len(found))
        for _, found in sorted(tenths.items())
    ]


def calibration_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Expected calibration error of (expected, seen): the mean gap of the bins, weighed by their numbers (Naeini et al.
    2015). 0 where there are none."""
    bins = binned(pairs)
    gaps = sum(number * abs(expected - seen) for expected, seen, number in bins)
    return gaps / max(1, sum(number for *_, number in bins))
