"""The report's panel on foresight: what the curriculum expected of each group against what came.

Called by `pipeline/report.py` with the rows of `observations.jsonl`. An expectation is the posterior's mean when the
task was chosen, so every group is a test of it that it has not seen. A group's pass rate is itself an estimate from its
few answers: even a perfect forecast has a Spearman correlation below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pipeline import plots
from pipeline.plots import Series
from pipeline.rank_correlation import spearman
from pipeline.run_reader import Row

BINS = 10


def foresight_panel(rows: Sequence[Row], domain_of: dict[str, str], colours: dict[str, int]) -> Row | None:
    """Rank correlation, expected calibration error, and a plot of expected against seen. None without observations."""
    pairs = [(row["expected"], row["passes"] / row["total"], row["entry"]) for row in rows if row["total"]]
    if not pairs:
        return None
    bins = binned([(expected, seen) for expected, seen, _ in pairs])
    by_domain = {
        domain: binned([(expected, seen) for expected, seen, entry in pairs if domain_of.get(entry) == domain])
        for domain in sorted(set(domain_of.values()))
    }
    series = [Series("perfect", [(0.0, 0.0), (1.0, 1.0)], 0)] + [
        Series(domain, [(expected, seen) for expected, seen, _ in found], colours.get(domain, 1))
        for domain, found in by_domain.items()
        if found
    ]
    return {
        "groups": len(pairs),
        "spearman": spearman([expected for expected, _, _ in pairs], [seen for _, seen, _ in pairs]),
        "ece": calibration_error(bins),
        "figures": [
            plots.line_plot(
                "pass rate by what was expected", series, x_label="expected", y_range=(0, 1), percent=True, dots=True
            )
        ],
    }  # fmt: skip


def binned(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float, int]]:
    """Mean expected, mean seen and the number of groups, for each tenth of expected pass rates that has any."""
    tenths: dict[int, list[tuple[float, float]]] = {}
    for expected, seen in pairs:
        tenths.setdefault(min(BINS - 1, int(expected * BINS)), []).append((expected, seen))
    return [
        (fmean(expected for expected, _ in found), fmean(seen for _, seen in found), len(found))
        for _, found in sorted(tenths.items())
    ]


def calibration_error(bins: Sequence[tuple[float, float, int]]) -> float:
    """Expected calibration error: the mean gap of the bins, weighed by their groups (Naeini et al. 2015)."""
    return sum(number * abs(expected - seen) for expected, seen, number in bins) / sum(number for *_, number in bins)
