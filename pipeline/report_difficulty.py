"""The report's panel on foresight: what the curriculum expected of each group against what came.

Called by `pipeline/report.py` with the rows of `observations.jsonl`. An expectation is the posterior's mean when the
task was chosen, so every group is a test of it that it has not seen. A group's pass rate is itself an estimate from its
few answers: even a perfect forecast has a Spearman correlation below 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import plots
from pipeline.plots import Series
from pipeline.rank_correlation import binned, calibration_error, spearman
from pipeline.run_reader import Row


def foresight_panel(
    rows: Sequence[Row], calibration: Row | None, domain_of: dict[str, str], colours: dict[str, int]
) -> Row | None:
    """Rank correlation, calibration error, and a plot of expected against seen; `fresh` for what the posteriors of the
    end came to when they were put to the test. None without observations."""
    pairs = [(row["expected"], row["passes"] / row["total"], row["entry"]) for row in rows if row["total"]]
    if not pairs:
        return None
    by_domain = {
        domain: binned([(expected, seen) for expected, seen, entry in pairs if domain_of.get(entry) == domain])
        for domain in sorted(set(domain_of.values()))
    }
    series = [Series("perfect", [(0.0, 0.0), (1.0, 1.0)], 0)] + [
        Series(domain, [(expected, seen) for expected, seen, _ in found], colours.get(domain, 1))
        for domain, found in by_domain.items()
        if found
    ]
    fresh = calibration and {
        "entries": calibration["entries"], "spearman": calibration["spearman"], "ece": calibration["ece"],
        "answers": max((row["total"] for row in calibration["rows"]), default=0),
    }  # fmt: skip
    return {
        "fresh": fresh,
        "groups": len(pairs),
        "spearman": spearman([expected for expected, _, _ in pairs], [seen for _, seen, _ in pairs]),
        "ece": calibration_error([(expected, seen) for expected, seen, _ in pairs]),
        "figures": [
            plots.line_plot(
                "pass rate by what was expected", series, x_label="expected", y_range=(0, 1), percent=True, dots=True
            ),
            *([_fresh_plot(calibration["rows"], colours)] if calibration else []),
        ],
    }  # fmt: skip


def _fresh_plot(rows: Sequence[Row], colours: dict[str, int]) -> plots.Markup:
    """A dot for every posterior that was put to the test."""
    domains = sorted({row["domain"] for row in rows})
    series = [
        Series(
            domain,
            [(row["expected"], row["passes"] / row["total"]) for row in rows if row["domain"] == domain],
            colours.get(domain, 1),
        )
        for domain in domains
    ]
    return plots.scatter_plot(
        "fresh pass rate by posterior", series, x_label="posterior at the end", y_range=(0, 1), percent=True
    )
