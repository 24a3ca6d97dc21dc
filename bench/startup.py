"""Seconds from `drover run` to the first rollout and to the first optimiser step, and where they go.

    python bench/startup.py [--runs 3]

Runs the RL stage of the smoke recipe alone, from the shipped base model, in a fresh process and run directory each
time, and reads the run's own events. Prints one table: median over the runs, minimum and maximum beside it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["run", "recipes/smoke.yaml", "--only", "climb", "--set", "stages.climb.policy=recipes/tiny_base/"]


def measure(run_dir: Path) -> dict[str, float]:
    """One run: seconds by milestone since the process was started, and the parts that actors report."""
    begin = time.time()
    command = [sys.executable, str(ROOT / "cli.py"), *WORDS, "--set", f"run.dir={run_dir}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=300)
    end = time.time()
    seconds: dict[str, float] = {}
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        at = event["time"] - begin
        match event["event"]:
            case "run_started":
                seconds["recipe read, run directory locked"] = at
            case "stage_started":
                seconds["stage started"] = at
            case "actor_started":
                kind = "learner" if "learner" in event["actor"] else "generator"
                seconds[f"{kind} up"] = at
                seconds |= {f"  of it {part}": value for part, value in event.get("parts", {}).items()}
            case "first_rollout":
                seconds["FIRST ROLLOUT"] = at
            case "first_step":
                seconds["FIRST OPTIMISER STEP"] = at
            case "stage_completed":
                seconds["stage completed"] = at
    return seconds | {"process ended": end - begin}


def main(runs: Annotated[int, typer.Option(help="Runs to take the median of.")] = 3) -> None:
    """Measure the start-up and print where the seconds go."""
    measured = []
    for index in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            measured.append(measure(Path(folder) / "run"))
        Console(stderr=True).print(f"run {index + 1} of {runs} done")
    table = Table("since `drover run`", "median s", "min", "max", title=f"{platform.machine()}, {os.cpu_count()} cores")
    for name in measured[0]:
        values = [one[name] for one in measured if name in one]
        table.add_row(name, *(f"{f(values):.1f}" for f in (statistics.median, min, max)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
