"""Routed experts: ours over transformers' and over a dense MLP of the same active FLOPs, forward + backward, one core.

    python bench/moe.py [--dtype float32] [--runs 5] [--tokens 4096] [--hidden 256]

Every row routes the same tokens (uniformly at random) to E experts of one SwiGLU each. Columns:

  dense      a SwiGLU of an expert's size over all tokens: the same FLOPs, one matrix instead of E
  ours       `model/experts.py`; its share of the dense speed
  × HF       how many times faster than transformers' Llama 4 experts, which run every expert on every token; at most E
  roofline   the time that the machine needs at least, over ours. Least time: each of the three products takes the
             longer of its arithmetic, at the best speed seen here, and of the bytes of the experts it touches, at the
             bandwidth measured here: weights read forward and backward, gradients written. Best speed: the dense MLP's,
             or that of two experts with half of the tokens each, where our own products outrun the library's
  bytes      the same of the bytes alone
  memory     of one forward + backward above what was there before: ours, transformers'

The allocator keeps freed memory, for all contenders alike (`kept_memory.py`); each row has a process of its own, which
gives back what transformers' experts took (up to 15 GB). Minimum of the runs, contenders taking turns.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import kept_memory

if __name__ == "__main__":
    kept_memory.keep_memory_and_one_thread()

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import Llama4TextConfig  # noqa: E402
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.experts import Experts  # noqa: E402
from model.moe_layer import SwiGlu  # noqa: E402

# experts, hidden size, width of an expert
SHAPES = (
    (8, 256, 512),
    (16, 256, 512),
    (64, 256, 512),
    (128, 256, 512),
    (8, 512, 512),
    (16, 512, 512),
    (64, 512, 512),
    (128, 512, 512),
    (16, 1024, 512),
    (64, 1024, 512),
)
SLOW_RUNS = 2  # of transformers' implementation, which takes E times as long


class Contenders:
    """The same tokens, experts and gradient for all; `run(name)` is one forward and backward."""

    def __init__(self, num_experts: int, hidden: int, width: int, num_tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_tokens, hidden, generator=generator).to(dtype).requires_grad_()
        self.gate = torch.rand(num_tokens, generator=generator).requires_grad_()
        self.expert = torch.randint(num_experts, (num_tokens,), generator=generator)
        self.dy = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
        self.ours, self.two = Experts(num_experts, hidden, width), Experts(2, hidden, width)
        for experts in (self.ours, self.two):
            experts.initialise()
            experts.to(dtype)
        self.dense = SwiGlu(hidden, width).to(dtype)
        config = Llama4TextConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=num_experts)
        self.theirs = Llama4TextExperts(config)
        self.theirs.gate_up_proj, self.theirs.down_proj = self.ours.gate_up_proj, self.ours.down_proj

    def run(self, name: str) -> None:
        modules = (self.ours, self.two, self.dense)
        for tensor in (self.x, self.gate, *(weight for module in modules for weight in module.parameters())):
            tensor.grad = None
        getattr(self, f"_{name}")().backward(self.dy)

    def _ours(self) -> torch.Tensor:
        return self.ours(self.x, self.expert, self.gate)

    def _two(self) -> torch.Tensor:
        return self.two(self.x, self.expert % 2, self.gate)

    def _dense(self) -> torch.Tensor:
        return self.dense(self.x)

    def _theirs(self) -> torch.Tensor:
        """As transformers' Llama4TextMoe does it: every expert gets every token, times a gate that is mostly 0."""
        num_experts, (num_tokens, hidden) = len(self.ours.down_proj), self.x.shape
        gates_ET = torch.zeros(num_experts, num_tokens).scatter(0, self.expert.unsqueeze(0), self.gate.unsqueeze(0))
        rows = self.x.repeat(num_experts, 1) * gates_ET.reshape(-1, 1).to(self.x.dtype)
        return self.theirs(rows).view(num_experts, num_tokens, hidden).sum(0)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def peak_mib(work: Callable[[], object]) -> float:
    """Resident memory that `work` adds at its highest, in a child process that begins with what is here."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is needed now
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        work()
        highest = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1])
        os.write(writing, str((highest * 1024 - before) / 2**20).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        added = float(pipe.read())
    os.wait()
    return added


Bandwidth = tuple[float, float]


def bandwidth(runs: int) -> Bandwidth:
    """(read, write) bytes a second of one core, over 256 MiB: far more than it has cache."""
    data = torch.ones(2**25, dtype=torch.int64)
    read = min(seconds(data.sum) for _ in range(runs))
    written = min(seconds(lambda: data.fill_(1)) for _ in range(runs))
    return data.nbytes / read, data.nbytes / written


def row(
    shape: tuple[int, int, int], num_tokens: int, dtype: torch.dtype, runs: int, with_theirs: bool, speed: Bandwidth
) -> list[str]:
    contenders, (num_experts, hidden, width) = Contenders(*shape, num_tokens, dtype), shape
    read, write = speed
    compared = ("ours", "theirs") if with_theirs else ("ours",)
    names = ("dense", "two", *compared)
    memory = {name: peak_mib(partial(contenders.run, name)) for name in compared}
    best = dict.fromkeys(names, float("inf"))
    for turn in range(runs + 1):  # the first one warms up
        for name in names[: 3 if turn >= SLOW_RUNS else 4]:
            taken = seconds(partial(contenders.run, name))
            best[name] = min(best[name], taken) if turn else best[name]
    touched = sum(weight.nbytes for weight in contenders.ours.parameters())
    arithmetic = min(best["dense"], best["two"]) / 3  # of each product: the three have the same FLOPs
    least = 2 * max(arithmetic, touched / read) + max(arithmetic, touched / write)
    bytes_alone = 2 * touched / read + touched / write
    faster = best["theirs"] / best["ours"] if with_theirs else 0.0
    return [
        *map(str, (num_experts, hidden, width, num_tokens // num_experts)),
        f"{best['dense'] * 1e3:.0f}", f"{best['ours'] * 1e3:.0f}", f"{best['dense'] / best['ours']:.2f}",
        f"{least / best['ours']:.2f}", f"{bytes_alone / best['ours']:.2f}",
        *((f"{faster:.1f}", f"{faster / num_experts:.2f}") if with_theirs else ("", "")),
        *(f"{memory[name]:.0f}" for name in compared), *([] if with_theirs else [""]),
    ]  # fmt: skip


def main(
    dtype: Annotated[str, typer.Option(help="float32, in which a CPU trains, or bfloat16.")] = "float32",
    runs: Annotated[int, typer.Option(help="Runs to take the fastest of.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of the batch.")] = 4096,
    with_theirs: Annotated[bool, typer.Option(help="Run transformers' experts too: many minutes, 15 GB.")] = True,
    hidden: Annotated[int | None, typer.Option(help="Only the shapes of this hidden size.")] = None,
) -> None:
    """Measure and print one table."""
    torch.set_num_threads(1)
    kind: torch.dtype = getattr(torch, dtype)
    read, write = speed = bandwidth(runs)
    table = Table(
        "E", "hidden", "width", "tokens/expert", "dense ms", "ours ms", "of dense", "roofline", "bytes", "× HF",
        "× HF / E", "MiB ours", "MiB HF",
        title=f"{dtype}, {tokens} tokens, {platform.machine()}, torch {torch.__version__}",
        caption=f"read {read / 1e9:.1f} GB/s, write {write / 1e9:.1f} GB/s, one core",
    )  # fmt: skip
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as process:
        for shape in SHAPES:
            if hidden not in (None, shape[1]):
                continue
            print(f"{shape[0]} experts, hidden {shape[1]}", file=sys.stderr, flush=True)
            table.add_row(*process.submit(row, shape, tokens, kind, runs, with_theirs, speed).result())
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
