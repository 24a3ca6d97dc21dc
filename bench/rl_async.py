"""What generating while the learner steps is worth: the same run synchronous and at staleness 1, 2 and 4.

    python bench/rl_async.py [--steps 40] [--staleness 0 1 2 4] [--keep FOLDER]

The demo's stage 2 from the shipped base model, then held-out pass@1; one core for generation, one for learning. All
runs train on the same number of answers. Rates are those of the steps between the first five, in which a buffer fills,
and the last five, in which it drains; the spread is the interquartile range of a step's seconds. Twice the synchronous
rate is the limit, reached where both sides need the same time and neither waits.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pinned_run
import typer
import yaml
from rich.console import Console
from rich.table import Table

EDGE = 5  # steps at either end that are not counted


def recipe(steps: int, staleness: int, seed: int) -> dict[str, Any]:
    demo = yaml.safe_load((pinned_run.ROOT / "stages.yaml").read_text())
    stages = {stage["name"]: stage for stage in demo["stages"]}
    base = f"{pinned_run.ROOT / 'recipes' / 'tiny_base'}/"
    climb = stages["climb"] | {"policy": base, "steps": steps, "max_staleness": staleness, "save_every_steps": 0}
    score = stages["score"] | {"policies": ["climb"]}
    return {"run": {"name": "rl_async", "seed": seed}, "cluster": demo["cluster"], "stages": [climb, score]}


def measured(run_dir: Path) -> dict[str, Any]:
    steps = pinned_run.json_lines(run_dir / "climb" / "steps.jsonl")
    steady = steps[EDGE:-EDGE]
    seconds = [step["step_s"] for step in steady]
    results = json.loads((run_dir / "score" / "results.json").read_text())
    ages: Counter[int] = Counter()
    for step in steady:
        ages.update({int(age): count for age, count in step["staleness_counts"].items()})
    tokens = steady[-1]["generated_tokens"] - steps[EDGE - 1]["generated_tokens"]
    return {
        "step_s": statistics.median(seconds),
        "quartiles": statistics.quantiles(seconds, n=4),
        "tokens_per_s": tokens / sum(seconds),
        "steps_per_s": len(seconds) / sum(seconds),
        "learner_waits": statistics.fmean(step["learner_wait_share"] for step in steady),
        "generator_waits": statistics.fmean(step["generator_wait_share"] for step in steady),
        "ages": {age: count / ages.total() for age, count in sorted(ages.items())},
        "tokens": steps[-1]["generated_tokens"],
        "pass_at_1": results["policies"][0]["pass_at_k"]["1"],
    }


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of each run.")] = 40,
    staleness: Annotated[list[int], typer.Option(help="What to run; the first is what others are compared to.")] = [  # noqa: B006
        0, 1, 2, 4,
    ],
    seed: Annotated[int, typer.Option()] = 1,
    keep: Annotated[Path | None, typer.Option(help="Leave the runs here.")] = None,
) -> None:  # fmt: skip
    """Run them one after the other and print one table."""
    table = Table(
        "staleness", "groups/s", "×", "tokens/s", "s a step (quartiles)", "learner waits", "generator waits",
        "age of tokens: share", "tokens", "pass@1 (95 %)",
        title=f"stage 2 of the demo, {steps} steps, a core each",
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for bound in staleness:
        with tempfile.TemporaryDirectory() as scratch:
            run_dir = pinned_run.run(recipe(steps, bound, seed), (keep or Path(scratch)) / f"staleness-{bound}")
            row = measured(run_dir)
        rows.append(row)
        low, _, high = row["quartiles"]
        score = row["pass_at_1"]
        table.add_row(
            f"{bound}", f"{16 * row['steps_per_s']:.2f}", f"{row['steps_per_s'] / rows[0]['steps_per_s']:.2f}",
            f"{row['tokens_per_s']:.0f}", f"{row['step_s']:.2f} ({low:.2f}–{high:.2f})", f"{row['learner_waits']:.0%}",
            f"{row['generator_waits']:.0%}", " ".join(f"{age}: {share:.0%}" for age, share in row["ages"].items()),
            f"{row['tokens']:,}", f"{score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})",
        )  # fmt: skip
        Console(width=170).print(table)
    print(pinned_run.circumstances())


if __name__ == "__main__":
    typer.run(main)
