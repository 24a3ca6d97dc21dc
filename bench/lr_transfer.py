"""Does the best learning rate of a small model stay the best of a wide one? (`model/param_groups.py`)

    python bench/lr_transfer.py [--quick] [--out FILE] [--tokens FILE]

Trains the same Llama 4 toy (MoE and dense layers in turn, heads of 32, all widths growing alike) at several hidden
sizes under both parametrisations, tuned at the first width. Two tables each:

  coordinate check: how much five steps change the activations at each depth (RMS), by width. Flat is what is wanted.
  learning rates: loss by rate and width, one grid step a factor of two. From the width before's best the grid is
    walked until the best has two worse rates on either side, so that the optimum is never at an edge.

Every run sees the same tokens in the same order, none twice; its loss is the mean over the last quarter of its steps.
The tokens are the project's corpus, or those of a .npy file of ids. Each finished run is a line of `--out`, and is not
run again. About twenty minutes on one core with AVX-512 and nothing beside it; --quick takes seconds, proves nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Llama4TextConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose model.py would be taken for the package

from model.config import TinyShape, tiny  # noqa: E402
from model.param_groups import COMPLETE_P, STANDARD, Rules, initialise, parameter_groups  # noqa: E402
from model.tensor_map import Config  # noqa: E402
from model.transformer import MoeForCausalLM  # noqa: E402

PARAMETRISATIONS: dict[str, Rules] = {"ours": COMPLETE_P, "standard": STANDARD}
HEAD_DIM = 32
NUM_EXPERTS = 8
BALANCE = 0.01  # coefficient of the router's balance loss; without it one expert takes all
ROWS, ROW_TOKENS = 8, 128
WARMUP_SHARE = 0.1  # of the steps; then the rate falls in a line to a tenth
FIRST_EXPONENT = -7  # the walk begins at a rate of 2^-7
MARGIN = 2  # worse rates wanted on either side of the best
EXPONENTS = range(-14, 3)  # a walk that would leave these has found no optimum
COORDINATE_STEPS = 5
COORDINATE_RATE = 2.0**-8


@dataclass(frozen=True)
class Plan:
    widths: tuple[int, ...]
    layers: int
    steps: int
    seeds: int


FULL = Plan(widths=(64, 128, 256, 512), layers=4, steps=60, seeds=1)
QUICK = Plan(widths=(64, 128), layers=2, steps=8, seeds=1)


def toy(width: int, layers: int, vocab_size: int) -> Config:
    """Grows in width only: more heads, wider experts; their number and the heads' size stay."""
    heads = width // HEAD_DIM
    shape = TinyShape(hidden_size=width, num_layers=layers, num_heads=heads, num_kv_heads=heads // 2, head_dim=HEAD_DIM,
                      expert_size=width, dense_size=2 * width, num_experts=NUM_EXPERTS)  # fmt: skip
    return tiny(shape, vocab_size) | {"router_aux_loss_coef": BALANCE}


def build(config: Config, base: Config, rules: Rules, seed: int) -> MoeForCausalLM:
    model = MoeForCausalLM(Llama4TextConfig(**config))
    initialise(model, base, rules, torch.Generator().manual_seed(seed))
    return model.train()


def optimiser(model: MoeForCausalLM, rate: float, base: Config, rules: Rules) -> torch.optim.AdamW:
    groups = parameter_groups(model, rate, weight_decay=0.1, base=base, rules=rules)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def step(model: MoeForCausalLM, optimizer: torch.optim.AdamW, ids_BS: torch.Tensor) -> float:
    """One update; the language model's loss before it."""
    out = model(input_ids=ids_BS, labels=ids_BS, output_router_logits=True)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return (out.loss - model.config.router_aux_loss_coef * out.aux_loss).item()


def train(model: MoeForCausalLM, optimizer: torch.optim.AdamW, batches: torch.Tensor) -> float:
    """Mean loss over the last quarter of `batches` [steps, B, S]; infinite where it diverged."""
    rates, losses = [group["lr"] for group in optimizer.param_groups], []
    for index, ids_BS in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule((index + 1) / len(batches))
        losses.append(step(model, optimizer, ids_BS))
        if not math.isfinite(losses[-1]):
            return math.inf
    tail = losses[-max(1, len(losses) // 4) :]
    return sum(tail) / len(tail)


def schedule(done: float) -> float:
    return min(done / WARMUP_SHARE, 1 - 0.9 * (done - WARMUP_SHARE) / (1 - WARMUP_SHARE))


# --- coordinate check ---------------------------------------------------------------------------------------------


def activation_changes(model: MoeForCausalLM, optimizer: torch.optim.AdamW, batches: torch.Tensor) -> dict[str, float]:
    """RMS of what training on `batches` [steps, B, S] changes in the activations on the first of them, by place."""

    @torch.no_grad()
    def activations() -> dict[str, torch.Tensor]:
        out = model.eval()(input_ids=batches[0], use_cache=False, output_hidden_states=True, output_router_logits=True)
        model.train()
        *inputs, last = out.hidden_states
        places = {"embedding": inputs[0]} | {f"after layer {layer}": x for layer, x in enumerate(inputs[1:])}
        routers = {f"router {index}": logits for index, logits in enumerate(out.router_logits)}
        return places | {"final norm": last, "logits": out.logits} | routers

    before = activations()
    for ids_BS in batches:
        step(model, optimizer, ids_BS)
    return {place: (x - before[place]).square().mean().sqrt().item() for place, x in activations().items()}


def slope(widths: tuple[int, ...], values: list[float]) -> float:
    """Exponent p of the power law value ~ width^p that fits best."""
    x, y = numpy.log2(widths), numpy.log2(values)
    return float(numpy.polyfit(x, y, 1)[0])


# --- learning rates -----------------------------------------------------------------------------------------------


def walk(loss_at: Callable[[int], float], start: int) -> dict[int, float]:
    """Losses by exponent: from `start` outwards until the best has MARGIN worse neighbours on either side."""
    losses = {start: loss_at(start)}
    while True:
        best = min(losses, key=losses.__getitem__)
        missing = [best + step for step in range(-MARGIN, MARGIN + 1) if best + step not in losses]
        if not missing:
            return dict(sorted(losses.items()))
        nearest = min(missing, key=lambda exponent: abs(exponent - best))
        if nearest not in EXPONENTS:
            raise RuntimeError(f"the loss still falls at a rate of 2^{best}: {losses}")
        losses[nearest] = loss_at(nearest)


def vertex(losses: dict[int, float]) -> float:
    """Where the parabola through the best loss and its two neighbours is lowest, as an exponent."""
    best = min(losses, key=losses.__getitem__)
    left, here, right = (losses[best + step] for step in (-1, 0, 1))
    if not math.isfinite(left + right):
        return float(best)
    return best + (left - right) / (2 * (left - 2 * here + right))


# --- data and report ----------------------------------------------------------------------------------------------


def corpus_ids(count: int) -> numpy.ndarray:
    """Ids of the project's corpus, documents laid end to end."""
    from pipeline.corpus import documents

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "tiny_base")
    texts = (f"{prompt}\n{answer}{tokenizer.eos_token}" for prompt, answer in documents(seed=17))
    stream: Iterator[int] = itertools.chain.from_iterable(tokenizer(text)["input_ids"] for text in texts)
    return numpy.fromiter(itertools.islice(stream, count), dtype=numpy.int64, count=count)


def main(
    quick: Annotated[bool, typer.Option(help="Two widths, eight steps: only to see that it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Results so far, a JSON line each; read first.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="A .npy file of token ids in place of the corpus.")] = None,
) -> None:
    """Measure how the best learning rate moves with the width, and print the tables."""
    torch.set_num_threads(1)
    plan, console = QUICK if quick else FULL, Console(width=120)
    wanted = plan.steps * ROWS * ROW_TOKENS
    ids = corpus_ids(wanted) if tokens is None else numpy.load(tokens)[:wanted].astype(numpy.int64)
    batches = torch.from_numpy(ids).view(plan.steps, ROWS, ROW_TOKENS)
    vocab_size = int(ids.max()) + 1
    base = toy(plan.widths[0], plan.layers, vocab_size)
    # All that a loss depends on beside its own place in the grid: a file of results never answers for other settings.
    settings = (
        f"{plan.layers} layers, {NUM_EXPERTS} experts, {plan.steps} steps, {plan.seeds} seeds, "
        f"tokens {hashlib.sha256(ids.tobytes()).hexdigest()[:8]}"
    )
    done: dict[str, float] = {}
    if out is not None and out.exists():
        done = {line["run"]: line["loss"] for line in map(json.loads, out.read_text().splitlines())}

    def prepared(name: str, width: int, rate: float, seed: int) -> tuple[MoeForCausalLM, torch.optim.AdamW]:
        rules = PARAMETRISATIONS[name]
        model = build(toy(width, plan.layers, vocab_size), base, rules, seed)
        return model, optimiser(model, rate, base, rules)

    def loss_of(name: str, width: int, exponent: int) -> float:
        run = f"{name} width {width} rate 2^{exponent}, {settings}"
        if run not in done:
            begin = time.process_time()
            seeds = [train(*prepared(name, width, 2.0**exponent, seed), batches) for seed in range(plan.seeds)]
            done[run] = sum(seeds) / len(seeds)
            line = {"run": run, "loss": done[run], "cpu_s": round(time.process_time() - begin, 1)}
            print(json.dumps(line), file=sys.stderr, flush=True)
            if out is not None:
                with out.open("a") as file:
                    print(json.dumps(line), file=file)
        return done[run]

    for name in PARAMETRISATIONS:
        changes = [
            activation_changes(*prepared(name, width, COORDINATE_RATE, 0), batches[:COORDINATE_STEPS])
            for width in plan.widths
        ]
        table = Table("change (RMS) of", *map(str, plan.widths), "∝ width^", title=f"{name}: coordinate check")
        for place in changes[0]:
            values = [change[place] for change in changes]
            table.add_row(place, *(f"{value:.3f}" for value in values), f"{slope(plan.widths, values):+.2f}")
        console.print(table)

    for name in PARAMETRISATIONS:
        start, sweeps = FIRST_EXPONENT, {}
        for width in plan.widths:
            sweeps[width] = walk(lambda exponent: loss_of(name, width, exponent), start)  # noqa: B023
            start = min(sweeps[width], key=sweeps[width].__getitem__)
        exponents = sorted(set().union(*sweeps.values()))
        table = Table("width", *(f"2^{e}" for e in exponents), "best", "vertex", title=f"{name}: loss by learning rate")
        for width, losses in sweeps.items():
            best = min(losses, key=losses.__getitem__)
            cells = [f"{losses[e]:.3f}" if e in losses else "" for e in exponents]
            cells[exponents.index(best)] = f"[bold]{cells[exponents.index(best)]}[/bold]"
            table.add_row(str(width), *cells, f"2^{best}", f"2^{vertex(losses):.1f}")
        console.print(table)
        bests = {width: min(losses, key=losses.__getitem__) for width, losses in sweeps.items()}
        moves = {width: best - bests[plan.widths[0]] for width, best in bests.items()}
        kept = all(abs(move) <= 1 for move in moves.values())
        console.print(
            f"{name}: grid steps from the best rate of width {plan.widths[0]}: "
            f"{', '.join(f'{move:+d} at {width}' for width, move in moves.items())}; "
            f"{'within one step at every width' if kept else 'it drifts'}\n"
        )


if __name__ == "__main__":
    typer.run(main)
