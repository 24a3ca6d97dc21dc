"""The three grouped products of experts, alone: ours over `torch.mm` expert by expert and over one dense product.

    python bench/grouped_products.py [--seconds 8]

GFLOP/s on one core in fp32, rows routed uniformly at random, the fastest call of each; contenders take turns. Rows and
results are others at every call, so that they come from memory as they do in training; the allocator keeps what is
freed (`kept_memory.py`). `torch.mm`: the same module as
without a compiler (DROVER_COMPILED=0). docs/log.md has the figures and what was tried.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import kept_memory

if __name__ == "__main__":
    kept_memory.keep_memory_and_one_thread()

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.kernels import grouped_gemm  # noqa: E402

ROWS = 4096
SHAPES = ((128, 256, 1024), (128, 512, 256), (64, 256, 1024), (64, 512, 256), (16, 256, 1024), (8, 512, 1024))
Ways = Mapping[str, Callable[[], object]]
COPIES = 5  # of rows and results: more than a cache holds


def fastest(contenders: Ways, seconds: float) -> dict[str, float]:
    best = dict.fromkeys(contenders, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


class Products:
    """Each call with the next rows; `few_rows` 0: all by torch.mm, more than there are: all by ours."""

    def __init__(self, num_experts: int, k: int, n: int) -> None:
        torch.manual_seed(0)
        sizes = torch.bincount(torch.randint(num_experts, (ROWS,)), minlength=num_experts)
        self.ends_E = sizes.cumsum(0).to(torch.int32)
        self.w_EKN = torch.randn(num_experts, k, n)
        self.x_RK = itertools.cycle([torch.randn(ROWS, k) for _ in range(COPIES)])
        self.dy_RN = itertools.cycle([torch.randn(ROWS, n) for _ in range(COPIES)])

    def dense(self) -> None:
        torch.mm(next(self.x_RK), self.w_EKN[0])

    def forward(self, few_rows: int) -> None:
        grouped_gemm.FEW_ROWS = few_rows
        grouped_gemm._forward(next(self.x_RK), self.w_EKN, self.ends_E)

    def input_gradient(self, few_rows: int) -> None:
        grouped_gemm.FEW_ROWS = few_rows
        grouped_gemm._dgrad(next(self.dy_RN), self.w_EKN, self.ends_E)

    def weight_gradient(self, few_rows: int) -> None:
        grouped_gemm.FEW_ROWS = few_rows
        grouped_gemm._wgrad(next(self.x_RK), next(self.dy_RN), self.ends_E)


def main(seconds: Annotated[float, typer.Option(help="For each product of each shape.")] = 8.0) -> None:
    """Measure and print one table."""
    torch.set_num_threads(1)
    grouped_gemm.outruns_mkl = lambda: False  # type: ignore[assignment]  # FEW_ROWS alone decides
    table = Table("experts", "rows", "K, N", "one dense", "product", "torch.mm", "ours", "ours / dense")
    for num_experts, k, n in SHAPES:
        products = Products(num_experts, k, n)
        for product in (products.forward, products.input_gradient, products.weight_gradient):
            ways: Ways = {"dense": products.dense, "torch.mm": partial(product, 0), "ours": partial(product, ROWS + 1)}
            speed = {who: 2 * ROWS * k * n / taken / 1e9 for who, taken in fastest(ways, seconds).items()}
            table.add_row(
                str(num_experts), str(ROWS // num_experts), f"{k}, {n}", f"{speed['dense']:.0f}",
                product.__name__.replace("_", " "), f"{speed['torch.mm']:.0f}", f"{speed['ours']:.0f}",
                f"{speed['ours'] / speed['dense']:.2f}",
            )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
