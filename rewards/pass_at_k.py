"""pass@k without bias, and how far a mean over tasks can be trusted. `pipeline/evaluate.py` calls both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the n samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    n = num_samples, c = num_correct (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1).
    ValueError if n < k: fewer samples than k give no unbiased estimate.
    """
    if k < 1 or num_samples < k:
        raise ValueError(f"pass@{k} needs k >= 1 and at least k samples, there are {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct of {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over tasks with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float
    num_tasks: int


def mean_with_interval(
    per_task_values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `per_task_values` and its percentile bootstrap interval. Tasks are resampled, not samples: samples of
    one task are not independent. The same seed gives the same interval. ValueError for no tasks."""
    values = np.asarray(per_task_values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"a mean needs at least one task, got values of shape {values.shape}")
    generator = np.random.default_rng(seed)
    means = np.array([generator.choice(values, size=len(values)).mean() for _ in range(num_resamples)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))
