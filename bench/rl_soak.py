"""Does a long run of stage 2 leak? A thousand short steps; what every process holds is looked at all the while.

    python bench/rl_soak.py [--steps 1000] [--keep FOLDER]

A state is saved and weights are exchanged at every other step, so that whatever a step, an exchange or a save leaves
behind adds up. Compared are the second quarter of the run (the first is warming up) and the last: medians, and the
growth per thousand steps that a robust line through all samples in between shows (Theil and Sen). Memory is what would
be free if the process ended (USS); of the disk, what a run writes for good (rollouts, log) is told apart from
the rest. Exits with 1 when something grows: memory by more than 5 %, anything else by more than a tenth and one.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import pinned_run
import psutil
import typer
from rich.console import Console
from rich.table import Table
from rl_async import recipe

SAMPLE_S = 2.0
MEMORY_GROWS, OTHERS_GROW = 0.05, 0.1


def held(root: psutil.Process) -> dict[str, float]:
    """Memory (MiB), open descriptors, threads and processes of one process and its children."""
    family = [root, *root.children(recursive=True)]
    return {
        "memory, MiB": sum(process.memory_full_info().uss for process in family) / 2**20,
        "descriptors": sum(process.num_fds() for process in family),
        "threads": sum(process.num_threads() for process in family),
        "processes": len(family),
    }


def bytes_in(folder: Path, *, but: frozenset[str] = frozenset()) -> float:
    """MiB of a folder's files; files that vanish meanwhile are left out."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file() and not but & set(path.parts) and path.name not in but:
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total / 2**20


class Watch:
    """Samples every party's holdings until it is stopped."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.samples: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)  # (party, what) → step, number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            started = pinned_run.events(self.run_dir, "actor_started")
            done = pinned_run.events(self.run_dir, "progress")
            if len(started) < 2 or not done:
                continue
            step = done[-1]["done"]
            parties = {event["actor"]: event["pid"] for event in started}
            try:
                driver = psutil.Process(pinned_run.events(self.run_dir, "run_started")[-1]["pid"])
                seen = {party: held(psutil.Process(pid)) for party, pid in parties.items()}
                everyone = held(driver)
            except psutil.NoSuchProcess:
                continue
            actors = [sum(numbers[what] for numbers in seen.values()) for what in everyone]
            seen["driver and Ray"] = {
                what: total - ours for (what, total), ours in zip(everyone.items(), actors, strict=True)
            }
            lasting = frozenset({"rollouts", "steps.jsonl", "curriculum.jsonl", "observations.jsonl", "events.jsonl"})
            work = self.run_dir / "climb.partial"
            seen["disk"] = {
                "run folder, MiB": bytes_in(self.run_dir, but=lasting),
                "rollouts and log, MiB": bytes_in(work) - bytes_in(work, but=lasting),
                "files in /dev/shm": float(len(os.listdir("/dev/shm"))),
            }
            for party, numbers in seen.items():
                for what, number in numbers.items():
                    self.samples[party, what].append((step, number))


def slope(samples: list[tuple[int, float]]) -> float:
    """The median slope over pairs, per step (Theil 1950, Sen 1968)."""
    thin = samples[:: max(1, len(samples) // 150)]
    return statistics.median(
        (late - early) / (after - before)
        for index, (before, early) in enumerate(thin)
        for after, late in thin[index + 1 :]
        if after > before
    )


def compared(samples: list[tuple[int, float]]) -> tuple[float, float, float]:
    """Medians of the second and the last quarter of the steps, and the growth in a thousand steps."""
    last = samples[-1][0]
    settled = [(step, number) for step, number in samples if step >= last / 4]
    early = statistics.median(number for step, number in settled if step < last / 2)
    late = statistics.median(number for step, number in settled if step >= 3 * last / 4)
    return early, late, 1000 * slope(settled)


def grows(what: str, early: float, late: float) -> bool:
    if what.startswith("rollouts"):
        return False  # every answer is kept
    return late > early * (1 + MEMORY_GROWS) if what.startswith("memory") else late > early * (1 + OTHERS_GROW) + 1


def soak_recipe(steps: int) -> dict[str, Any]:
    asked = recipe(steps, staleness=1, seed=1)
    short = {
        "tasks": {"domains": ["maths"], "levels": [1, 3]}, "groups_per_step": 2, "group_size": 8,
        "max_answer_tokens": 48, "save_every_steps": 2,
    }  # fmt: skip
    asked["stages"] = [asked["stages"][0] | short]
    return asked


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    keep: Annotated[Path | None, typer.Option(help="Leave the run here.")] = None,
) -> None:
    """Exits with 1 when something grows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        watch = Watch(folder / "run")
        try:
            pinned_run.run(soak_recipe(steps), folder)
        finally:
            watch.stop()
    table = Table("", "", "second quarter", "last quarter", "growth in 1000 steps", title=f"{steps} steps of stage 2")
    leaks = 0
    for (party, what), samples in watch.samples.items():
        early, late, growth = compared(samples)
        leak = grows(what, early, late)
        leaks += leak
        table.add_row(party, what, f"{early:,.1f}", f"{late:,.1f}", f"{growth:+,.2f}" + (" GROWS" if leak else ""))
    Console(width=110).print(table)
    print(pinned_run.circumstances())
    sys.exit(bool(leaks))


if __name__ == "__main__":
    typer.run(main)
