"""The objective's switches, one at a time: what each is worth on the demo's tasks.

    python bench/objectives.py [--steps 24] [--arm NAME …] [--keep FOLDER]

Every arm is the demo's stage 2 from the shipped base model with one switch turned, scored on the same held-out tasks;
its difference to the default is paired by task, with the standard error over tasks. One seed: the noise of a run comes
on top. Ten arms of 24 steps take half an hour.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import pinned_run
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table
from rl_async import recipe

ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "grpo": {"advantage": "grpo"},
    "dr-grpo": {"advantage": "dr_grpo", "aggregation": "constant"},
    "max-rl": {"advantage": "max_rl"},
    "pass-at-4": {"advantage": "pass_at_k", "pass_at_k": 4},
    "sequence-mean": {"aggregation": "sequence_mean"},
    "no-trust-region": {"trust_region": "none"},
    "dppo": {"trust_region": "dppo"},
    "cispo": {"trust_region": "cispo"},
    "gspo": {"ratio": "sequence"},
}


def experiment(names: list[str], steps: int, seed: int) -> dict[str, Any]:
    asked = recipe(steps, staleness=2, seed=seed)
    climb, score = asked["stages"]
    asked["stages"] = [climb | {"name": name, "objective": ARMS[name]} for name in names]
    asked["stages"].append(score | {"policies": names})
    return asked


def pass_rates(run_dir: Path) -> dict[str, dict[str, float]]:
    """Arm → held-out task → the share of its answers that pass."""
    answers: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in pq.read_table(run_dir / "score" / "answers.parquet").to_pylist():
        answers[row["policy"]][row["task_id"]].append((row["score"] or 0.0) >= 1.0)
    return {arm: {task: statistics.fmean(passed) for task, passed in tasks.items()} for arm, tasks in answers.items()}


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of each arm.")] = 24,
    arm: Annotated[list[str], typer.Option(help=f"Beside the default; any of {', '.join(ARMS)}.")] = list(ARMS),  # noqa: B006
    seed: Annotated[int, typer.Option()] = 1,
    keep: Annotated[Path | None, typer.Option(help="Leave the run here.")] = None,
) -> None:
    """Run them one after the other and print one table."""
    names = ["default", *(name for name in arm if name != "default")]
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = pinned_run.run(experiment(names, steps, seed), keep or Path(scratch))
        rates = pass_rates(run_dir)
        ends = {name: pinned_run.json_lines(run_dir / name / "steps.jsonl") for name in names}
    table = Table("", "switches", "pass@1", "difference", "entropy at the end", "groups with signal")
    for name in names:
        gaps = [rates[name][task] - rates["default"][task] for task in rates["default"]]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        table.add_row(
            name, " ".join(f"{key}={value}" for key, value in ARMS[name].items()),
            f"{statistics.fmean(rates[name].values()):.3f}", f"{statistics.fmean(gaps):+.3f} ± {error:.3f}",
            f"{ends[name][-1]['entropy']:.3f}", f"{statistics.fmean(step['signal_share'] for step in ends[name]):.2f}",
        )  # fmt: skip
    Console(width=140).print(table)
    print(pinned_run.circumstances())


if __name__ == "__main__":
    typer.run(main)
