"""FP8 by recipe: error against fp64, what an outlier does, time beside the plain product, bytes per parameter.

    python bench/fp8.py [--experts 8] [--tokens 2048] [--width 256] [--out-width 1024]

On a CPU, where FP8 is emulated (quantise, dequantise, multiply in fp32): the errors are those of any device, the times
say what the emulation costs a CPU run and nothing about a GPU. Times are medians of runs taken in turn, so that a
busy machine disturbs all alike.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.fp8_gauges import Fp8Gauges
from model.kernels import reference
from model.kernels.fp8 import fp8_grouped_mm
from model.kernels.quantise import Quantised, quantise
from model.precision import Format, Fp8Settings, Recipe

RECIPES, FORMATS = get_args(Recipe), get_args(Format)
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def in_fp8(settings: Fp8Settings, gauges: Fp8Gauges | None = None) -> Product:
    return lambda x, w, ends: fp8_grouped_mm(x, w, ends, settings, gauges)


def out_dx_dw(product: Product, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> list[torch.Tensor]:
    x, w = (tensor.clone().requires_grad_() for tensor in (x, w))
    out = product(x, w, ends)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, (x, w), dy)]


def row_errors(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Relative error of each row, fp64."""
    return (got.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-300)


def error_table(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> Table:
    """Gaussian data, then gates from 1 to 1/1000, then one element 100 times the largest: error of all other rows."""
    table = Table(title="relative error against fp64, %")
    for column in ("recipe", "gradients", "out", "dx", "dw", "gated: worst row", "and a 100× outlier"):
        table.add_column(column)
    exact = out_dx_dw(reference.grouped_mm_loop, x.double(), w.double(), ends)
    gated = x * torch.logspace(0, -3, len(x)).unsqueeze(1)
    planted = gated.clone()
    planted[0, 17] = 100 * gated.abs().max()
    for recipe in RECIPES:
        for gradients in FORMATS:
            settings = Fp8Settings(recipe, gradients)
            got = out_dx_dw(in_fp8(settings), x, w, ends)
            whole = [(g.double() - e).norm() / e.norm() for g, e in zip(got, exact)]
            worst = [
                row_errors(
                    fp8_grouped_mm(rows, w, ends, settings)[1:],
                    reference.grouped_mm_loop(rows.double(), w.double(), ends)[1:],
                ).max()
                for rows in (gated, planted)
            ]
            table.add_row(recipe, gradients, *(f"{100 * error:.2f}" for error in (*whole, *worst)))
    return table


def time_table(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, runs: int) -> Table:
    """Forward + backward, and its parts, over the plain product in BF16 of the same run."""
    x16, w16 = x.bfloat16(), w.bfloat16()
    work: dict[str, Callable[[], object]] = {
        "plain BF16": lambda: out_dx_dw(reference.grouped_mm_loop, x16, w16, ends),
        "plain fp32": lambda: out_dx_dw(reference.grouped_mm_loop, x, w, ends),
    }
    for recipe in RECIPES:
        settings, gauges = Fp8Settings(recipe), Fp8Gauges()
        work[f"FP8 {recipe}"] = partial(out_dx_dw, in_fp8(settings), x16, w16, ends)
        work[f"FP8 {recipe}, with gauges"] = partial(out_dx_dw, in_fp8(settings, gauges), x16, w16, ends)
        work[f"  quantise and dequantise alone, {recipe}"] = partial(there_and_back, x16, w16, ends, recipe)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for run in range(runs + 1):  # the first warms up
        for name, step in work.items():
            begin = time.perf_counter()
            step()
            if run:
                seconds[name].append(time.perf_counter() - begin)
    plain = statistics.median(seconds["plain BF16"])
    table = Table(title="forward + backward of one product, median")
    for column in ("", "ms", "× plain BF16"):
        table.add_column(column)
    for name, taken in seconds.items():
        median = statistics.median(taken)
        table.add_row(name, f"{1000 * median:.1f}", f"{median / plain:.2f}")
    return table


def all_quantisations(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, recipe: Recipe) -> list[Quantised]:
    """The six that forward, dgrad and wgrad do; the output's gradient stands in by the weights' rows."""
    dy = w.flatten(0, 1)[: len(x)] if len(x) <= w.shape[0] * w.shape[1] else w.new_ones(len(x), w.shape[2])
    return [
        *(quantise(tensor, recipe, 1) for tensor in (x, w, dy)),
        quantise(w, recipe, 2),
        *(quantise(tensor, recipe, 0, ends_E=ends) for tensor in (x, dy)),
    ]


def there_and_back(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, recipe: Recipe) -> None:
    for stored in all_quantisations(x, w, ends, recipe):
        stored.dequantise()


def bytes_table(experts: int, width: int, out_width: int) -> Table:
    table = Table(
        title=f"bytes per parameter of experts {width} × {out_width}, and of Llama 4's 5120 × 16384 (BF16: 2)"
    )
    for column in ("recipe", f"{width} × {out_width}", "5120 × 16384"):
        table.add_column(column)
    for recipe in RECIPES:
        cells = []
        for shape in ((experts, width, out_width), (1, 5120, 16384)):
            stored = quantise(torch.zeros(1, dtype=torch.bfloat16).expand(shape), recipe, axis=1)
            cells.append(f"{1 + stored.scale.numel() * stored.scale.element_size() / stored.q.numel():.6f}")
        table.add_row(recipe, *cells)
    return table


def main(
    experts: Annotated[int, typer.Option(help="Experts.")] = 8,
    tokens: Annotated[int, typer.Option(help="Rows, spread unevenly over the experts.")] = 2048,
    width: Annotated[int, typer.Option(help="Contracted width K.")] = 256,
    out_width: Annotated[int, typer.Option(help="Output width N.")] = 1024,
    runs: Annotated[int, typer.Option(help="Runs to take medians of.")] = 7,
) -> None:
    """Measure and print four tables."""
    torch.manual_seed(0)
    x, w = torch.randn(tokens, width), torch.randn(experts, width, out_width) / width**0.5
    ends = torch.randint(experts, (tokens,)).bincount(minlength=experts).cumsum(0).to(torch.int32)
    console = Console()
    console.print(
        f"{experts} experts, {tokens} tokens, {width} × {out_width}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s). FP8 emulated on a CPU; not measured on a GPU."
    )
    console.print(error_table(x, w, ends))
    console.print(time_table(x, w, ends, runs))
    console.print(bytes_table(experts, width, out_width))


if __name__ == "__main__":
    typer.run(main)
