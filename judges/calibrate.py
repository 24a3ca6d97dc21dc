"""How far to trust a judge: its difficulty against the measured pass rate of a policy.

Called by `pipeline/judge_filter.py`. The numbers are reported whatever they are; each carries a bootstrap interval,
for a few dozen prompts prove little. A number that the data cannot give (one class only, no spread) is None, not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

EASY_PASS_RATE = 0.9  # a prompt is easy where the policy passes at least this share of its attempts
BOOTSTRAP_DRAWS = 1000

Array = np.ndarray
Statistic = Callable[[Array, Array], float | None]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % percentile-bootstrap interval over prompts."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return "undefined" if self.value is None else f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True, slots=True)
class Agreement:
    num_prompts: int
    num_easy: int  # prompts with a pass rate of EASY_PASS_RATE or more
    spearman: Estimate  # rank correlation of judged difficulty with pass rate; -1 is perfect, 0 none
    auroc_easy: Estimate  # chance that an easy prompt is judged easier than another; 0.5 is none

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"judge against measured pass rate on {self.num_prompts} prompts ({self.num_easy} easy): "
            f"Spearman {self.spearman} (-1 is perfect), AUROC for easy {self.auroc_easy} (1 is perfect)"
        )


def agreement(scores: Sequence[float], pass_rates: Sequence[float], seed: int) -> Agreement:
    """`scores[i]`: judged difficulty of prompt i, higher is harder; `pass_rates[i]`: its measured share of passes."""
    score_array, rates = np.asarray(scores, float), np.asarray(pass_rates, float)
    in_range = np.isfinite(score_array).all() and ((rates >= 0.0) & (rates <= 1.0)).all()
    if score_array.shape != rates.shape or not in_range:
        raise ValueError("agreement needs one finite score and one pass rate in [0, 1] per prompt")
    return Agreement(
        num_prompts=len(rates),
        num_easy=int((rates >= EASY_PASS_RATE).sum()),
        spearman=_with_interval(spearman, score_array, rates, seed),
        auroc_easy=_with_interval(lambda s, r: auroc(-s, r >= EASY_PASS_RATE), score_array, rates, seed),
    )


def ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of the ranks they cover."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def spearman(first: Array, second: Array) -> float | None:
    """Pearson's correlation of the ranks. None for fewer than two values, or where either side is all ties."""
    a, b = ranks(np.asarray(first)), ranks(np.asarray(second))
    if len(a) < 2 or a.std() == 0.0 or b.std() == 0.0:
        return None
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def auroc(scores: Array, positive: Array) -> float | None:
    """P(a positive scores above a negative) + half P(they tie), by rank sums. None where one class is empty."""
    positive = np.asarray(positive, bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return None
    rank_sum = ranks(np.asarray(scores))[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2.0) / (num_positive * num_negative))


def _with_interval(statistic: Statistic, scores: Array, rates: Array, seed: int) -> Estimate:
    value = statistic(scores, rates)
    if value is None:
        return Estimate(None, None, None)
    rng = np.random.default_rng(seed)
    resamples = rng.integers(len(rates), size=(BOOTSTRAP_DRAWS, len(rates)))
    draws = [drawn for rows in resamples if (drawn := statistic(scores[rows], rates[rows])) is not None]
    low, high = np.quantile(draws, [0.025, 0.975]) if draws else (value, value)
    return Estimate(value, float(low), float(high))
