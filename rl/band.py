"""Which counts of right answers a group can really produce inside a band of pass rates, and how many answers it takes
to set a task aside. Light: recipes are checked with it.

A band of 0.25 to 0.75 is 4 to 12 right of 16, but only 1 or 2 right of 3, and no count at all of 2 where it says 0.6 to
0.9. None and all right are never inside: such a group carries no signal.
"""

from __future__ import annotations

import math

ROUNDING = 1e-9  # 0.3 · 10 is a little more than 3


def counts_inside(group_size: int, band: tuple[float, float]) -> range:
    """The counts c with 0 < c < group_size and low <= c / group_size <= high; may be empty."""
    low, high = band
    first = max(1, math.ceil(low * group_size - ROUNDING))
    last = min(group_size - 1, math.floor(high * group_size + ROUNDING))
    return range(first, last + 1)


def reachable_band(group_size: int, band: tuple[float, float]) -> tuple[float, float]:
    """The pass rates of the lowest and the highest count inside; ValueError where there is none."""
    counts = counts_inside(group_size, band)
    if not counts:
        larger = next((size for size in range(group_size + 1, 1000) if counts_inside(size, band)), None)
        hint = f"widen it, or raise group_size to {larger}" if larger else "widen it"
        raise ValueError(f"no count of right answers of {group_size} lies between {band[0]:g} and {band[1]:g}; {hint}")
    return counts[0] / group_size, counts[-1] / group_size


def band_in_words(group_size: int, band: tuple[float, float]) -> str:
    """
    >>> band_in_words(8, (0.25, 0.75))
    '2 to 6 right of 8 are inside the band 0.25 to 0.75'
    """
    counts = counts_inside(group_size, band)
    inside = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    verb = "are" if len(counts) > 1 else "is"
    return f"{inside} right of {group_size} {verb} inside the band {band[0]:g} to {band[1]:g}"


def set_aside_in_words(retire_above: float | None, park_below: float | None) -> str:
    """After how many of its own answers at least: n right ones make the mean (1 + n)/(2 + n), n wrong ones 1/(2 + n).
    Those of older policies count less, so it takes some more.

    >>> set_aside_in_words(0.9, 0.05)
    'retired after 8 answers or more, all right; parked after 18 or more, all wrong'
    >>> set_aside_in_words(None, 0.0)
    'never retired; never parked'
    """
    words = []
    for state, limit, how in (("retired", retire_above, "right"), ("parked", park_below, "wrong")):
        share = limit if how == "right" else 1.0 - limit if limit is not None else None
        if share is None or share >= 1.0:  # no number of answers proves it
            words.append(f"never {state}")
        else:
            answers = max(1, math.ceil((2.0 * share - 1.0) / (1.0 - share) - ROUNDING))
            unit = "" if any("after" in part for part in words) else " answers"
            words.append(f"{state} after {answers}{unit} or more, all {how}")
    return "; ".join(words)
