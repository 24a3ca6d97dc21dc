"""Training tokens a second: our definition of the model against transformers', same weights, same batch, one core.

    python bench/model.py [--runs 3] [--upcycled runs/smollm2-moe]

One step is forward, loss over all tokens and backward; no optimiser. `padded` is a batch of rows of one length, `mixed`
one of rows of 16 to 160 tokens, padded to the longest: real tokens count, holes do not. SmolLM2-135M, upcycled to a
mixture of 8 experts in every second layer (453 M parameters; 10 GiB of memory, minutes), is made in a temporary folder
unless a directory is given. Fastest of the runs, taking turns.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Llama4ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.checkpoint import SMOLLM2, load_policy, resolve  # noqa: E402
from model.upcycle import upcycle  # noqa: E402

ROW_TOKENS, SHORTEST = 160, 16


def batch(kind: str, vocabulary: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, ROW_TOKENS), generator=generator)
    lengths = torch.linspace(SHORTEST if kind == "mixed" else ROW_TOKENS, ROW_TOKENS, rows).long()
    real = torch.arange(ROW_TOKENS) < lengths.unsqueeze(1)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.where(real, ids, -100)}


def seconds(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    model.zero_grad()
    begin = time.perf_counter()
    model(**inputs, use_cache=False).loss.backward()
    return time.perf_counter() - begin


def compare(name: str, directory: Path, rows: int, runs: int, add_row: Callable[..., None]) -> None:
    ours = load_policy(directory, "float32").train()
    theirs = Llama4ForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    for kind in ("padded", "mixed"):
        inputs = batch(kind, 700, rows)
        losses = [model(**inputs, use_cache=False).loss.item() for model in (ours, theirs)]
        best = [float("inf")] * 2
        for _ in range(runs):
            best = [min(fastest, seconds(model, inputs)) for fastest, model in zip(best, (ours, theirs))]
        speeds = [int(inputs["attention_mask"].sum()) / fastest for fastest in best]
        add_row(name, kind, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}",
                f"{abs(losses[0] - losses[1]):.0e}")  # fmt: skip


def main(
    runs: Annotated[int, typer.Option(help="Runs to take the fastest of.")] = 3,
    upcycled: Annotated[Path | None, typer.Option(help="An upcycled SmolLM2, made before.")] = None,
) -> None:
    """Measure and print one table."""
    torch.set_num_threads(1)
    table = Table("model", "batch", "ours tokens/s", "transformers tokens/s", "×", "|Δ loss|",
                  title=f"training, float32, one core, torch {torch.__version__}")  # fmt: skip
    compare("tiny_base", ROOT / "recipes" / "tiny_base", 16, runs, table.add_row)
    with tempfile.TemporaryDirectory() as folder:
        if upcycled is None:
            upcycled = Path(folder, "moe")
            upcycle(resolve(SMOLLM2), upcycled, num_experts=8, moe_step=2, dtype="float32")
        compare("SmolLM2, upcycled", upcycled, 4, runs, table.add_row)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
