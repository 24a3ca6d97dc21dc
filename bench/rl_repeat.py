"""The same run of stage 2 again and again at staleness 0: every one must end with the same bits.

    python bench/rl_repeat.py [--runs 10] [--steps 6]

Each run is its own process with its own Ray, engine and learner, in fp32. Prints the sha256 of every final checkpoint
and of everything that was sampled on the way, and how many different ones there are.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pinned_run
import pyarrow.parquet as pq
import typer
from rl_async import recipe


def digests(run_dir: Path) -> tuple[str, str]:
    """Of the checkpoint's bytes, and of all answers with their log-probabilities."""
    weights = (run_dir / "climb" / "checkpoint" / "model.safetensors").read_bytes()
    columns = ["group_id", "step", "prompt_ids", "answer_ids", "logprobs", "score"]
    answers = pq.read_table(run_dir / "climb" / "rollouts.parquet", columns=columns).to_pylist()
    return hashlib.sha256(weights).hexdigest(), hashlib.sha256(repr(answers).encode()).hexdigest()


def main(
    runs: Annotated[int, typer.Option(help="How often.")] = 10,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each.")] = 6,
) -> None:
    """Exits with 1 when two runs differ."""
    asked = recipe(steps, staleness=0, seed=1)
    small = {"groups_per_step": 4, "group_size": 8, "max_answer_tokens": 96}
    asked["stages"] = [asked["stages"][0] | small]
    seen = []
    for run in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as scratch:
            seen.append(digests(pinned_run.run(asked, Path(scratch))))
        print(f"run {run:2}   checkpoint {seen[-1][0][:16]}   answers {seen[-1][1][:16]}", flush=True)
    print(f"{runs} runs of {steps} steps: {len({one for one, _ in seen})} checkpoint(s), "
          f"{len({other for _, other in seen})} set(s) of answers")  # fmt: skip
    print(pinned_run.circumstances())
    sys.exit(len(set(seen)) > 1)


if __name__ == "__main__":
    typer.run(main)
