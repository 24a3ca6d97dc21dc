"""What the demo is held to, from a finished run: signal, floors, posteriors, and how far up the levels it came.

    make demo && python bench/demo_figures.py runs/tiny

A level is "reached" up to where pass@1 falls below one half, between two levels in proportion.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WARM_UP = 5  # steps


def main(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    climb: Annotated[str, typer.Option(help="Its online_rl stage.")] = "climb",
    score: Annotated[str, typer.Option(help="Its evaluate stage.")] = "score",
) -> None:
    """Print the figures."""
    steps = [json.loads(line) for line in (run / climb / "steps.jsonl").read_text().splitlines()]
    warm = steps[WARM_UP:]
    groups = sum(step["groups"] for step in warm)
    signal = 1 - sum(step["zero_signal_groups"] for step in warm) / groups
    smallest = min(min(step["trained_shares"].values()) for step in warm)
    print(f"tokens generated: {steps[-1]['generated_tokens']:,} in {len(steps)} steps")
    print(f"groups with signal after step {WARM_UP}: {signal:.3f}; smallest share of trained tokens: {smallest:.3f}")
    calibration = run / climb / "calibration.json"
    if calibration.exists():
        found = json.loads(calibration.read_text())
        print(f"posteriors, {found['entries']} tested: Spearman {found['spearman']:.3f}, ECE {found['ece']:.3f}")
    for policy in json.loads((run / score / "results.json").read_text())["policies"]:
        by_domain: dict[str, dict[int, float]] = {}
        for cell, passes in policy["cells"].items():
            domain, level = cell.split("/")
            by_domain.setdefault(domain, {})[int(level)] = passes["1"]["value"]
        levels = ", ".join(f"{domain} {reached(rates)}" for domain, rates in by_domain.items())
        print(f"{policy['policy']}: pass@1 {policy['pass_at_k']['1']['value']:.3f}; reached: {levels}")


def reached(rates: Mapping[int, float]) -> str:
    """`rates`: level → pass@1.

    >>> reached({1: 0.9, 2: 0.6, 3: 0.4}), reached({1: 0.4}), reached({1: 0.9, 2: 0.7})
    ('2.5', 'below 1', 'beyond 2')
    """
    before = None
    for level, rate in sorted(rates.items()):
        if rate < 0.5:
            if before is None:
                return f"below {level}"
            return f"{level - 1 + (before - 0.5) / (before - rate):.1f}"
        before = rate
    return f"beyond {max(rates)}"


if __name__ == "__main__":
    typer.run(main)
