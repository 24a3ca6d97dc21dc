"""What the demo is held to, from a finished run: signal, floors, posteriors, and how far up the levels it came.

    make demo && python bench/demo_figures.py runs/tiny

Exit 1 where one of them is missed. A level is "reached" up to where pass@1 falls below one half, between two levels in
proportion.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import CurriculumSettings

WARM_UP = 5  # steps
LEAST_SIGNAL = 0.85  # of the groups after them
LEAST_SPEARMAN = 0.7
LEVELS_UP, DOMAINS_UP = 2.0, 3  # the level of one half rises by so many, in so many domains


def main(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    climb: Annotated[str, typer.Option(help="Its online_rl stage.")] = "climb",
    score: Annotated[str, typer.Option(help="Its evaluate stage.")] = "score",
) -> None:
    """Print the figures."""
    if not (run / score / "results.json").exists():
        raise SystemExit(f"{run}: its stage {score} is not finished; the command that began the run goes on with it")
    steps = [json.loads(line) for line in (run / climb / "steps.jsonl").read_text().splitlines()]
    warm = steps[WARM_UP:]
    groups = sum(step["groups"] for step in warm)
    signal = 1 - sum(step["zero_signal_groups"] for step in warm) / groups
    smallest = min(min(step["trained_shares"].values()) for step in warm)
    print(f"tokens generated: {steps[-1]['generated_tokens']:,} in {len(steps)} steps")
    print(f"groups with signal after step {WARM_UP}: {signal:.3f}; smallest share of trained tokens: {smallest:.3f}")
    missed = {"signal"} if signal < LEAST_SIGNAL else set()
    if smallest < floor_of(run, climb):
        missed.add("a domain's floor")
    calibration = run / climb / "calibration.json"
    if calibration.exists():
        found = json.loads(calibration.read_text())
        print(f"posteriors, {found['entries']} tested: Spearman {found['spearman']:.3f}, ECE {found['ece']:.3f}")
        missed |= {"posteriors"} if found["spearman"] < LEAST_SPEARMAN else set()
    at_end: list[dict[str, float]] = []
    for policy in json.loads((run / score / "results.json").read_text())["policies"]:
        by_domain: dict[str, dict[int, float]] = {}
        for cell, passes in policy["cells"].items():
            domain, level = cell.split("/")
            by_domain.setdefault(domain, {})[int(level)] = passes["1"]["value"]
        levels = ", ".join(f"{domain} {shown(rates)}" for domain, rates in by_domain.items())
        at_end.append({domain: reached(rates) for domain, rates in by_domain.items()})
        print(f"{policy['policy']}: pass@1 {policy['pass_at_k']['1']['value']:.3f}; reached: {levels}")

    risen = sum(at_end[-1][domain] - level >= LEVELS_UP for domain, level in at_end[0].items())
    missed |= {"the level of one half"} if risen < DOMAINS_UP else set()
    print(f"the level of one half is {LEVELS_UP:g} higher or more in {risen} of {len(at_end[0])} domains")
    if missed:
        raise SystemExit(f"missed: {', '.join(sorted(missed))}")


def floor_of(run: Path, climb: str) -> float:
    stages = yaml.safe_load((run / "recipe.yaml").read_text())["stages"]
    curriculum = next(stage for stage in stages if stage["name"] == climb).get("curriculum", {})
    return curriculum.get("domain_floor", CurriculumSettings().domain_floor)


def reached(rates: Mapping[int, float]) -> float:
    """`rates`: level → pass@1; 0 where none is solved half of the time, the last level where all are.

    >>> reached({1: 0.9, 2: 0.6, 3: 0.4}), reached({1: 0.4}), reached({1: 0.9, 2: 0.7})
    (2.5, 0.0, 2.0)
    """
    before = 1.0
    for level, rate in sorted(rates.items()):
        if rate < 0.5:
            return level - 1 + (before - 0.5) / (before - rate) if level > min(rates) else 0.0
        before = rate
    return float(max(rates))


def shown(rates: Mapping[int, float]) -> str:
    level = reached(rates)
    if level == max(rates):
        return f"beyond {level:g}"
    return f"{level:.1f}" if level else f"below {min(rates)}"


if __name__ == "__main__":
    typer.run(main)
