"""What the loop costs on top of the bare engine and the bare model, and where it goes.

    python bench/rl_throughput.py [--steps 16] [--keep FOLDER]

First a real run of stage 2 at staleness 4, a core each for generation and learning, with a learning rate so small that
the policy stays what it is, and tasks so hard that few groups are trained on: the engine always has more to do than it
can, and the learner waits. Then, on the same cores, alone and both at once,

  the engine   is asked for the same groups by nothing but vLLM's own interface, all at once; its rate is that of the
               middle four fifths of them, so that neither the start nor the last few long answers count;
  the model    passes the same micro-batches forward and backward: no objective, no gauges, no optimiser;

and the learner takes the same batches as in the loop, alone. What both lose by running at once is the machine's; what
is lost beyond that is ours.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pinned_run  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rl_async import recipe  # noqa: E402

EDGE = 4  # steps at either end that are not counted
BASE = pinned_run.ROOT / "recipes" / "tiny_base"


def in_the_loop(run_dir: Path) -> dict[str, float]:
    """Tokens a second of both sides, in the steps in which both are busy."""
    steps = pinned_run.json_lines(run_dir / "climb" / "steps.jsonl")
    steady = steps[EDGE:-EDGE]
    before = steps[EDGE - 1]
    seconds = sum(step["step_s"] for step in steady)
    waited = sum(step["step_s"] * step["generator_wait_share"] for step in steady)
    generated = steady[-1]["generated_tokens"] - before["generated_tokens"]
    trained = steady[-1]["trained_tokens"] - before["trained_tokens"]
    return {
        "engine": generated / (seconds - waited),
        "engine waits": waited / seconds,
        "learner": trained / sum(step["learner_step_s"] for step in steady),
        "publish": statistics.fmean(step["publish_ms"] for step in steady),
        "sync": statistics.fmean(step["sync_ms"] for step in steady) / 1e3 * len(steady) / seconds,
    }


def rollouts_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(run_dir / "climb" / "rollouts.parquet").to_pylist()
    return [row for row in rows if EDGE < row["step"]]


def on_core(core: int, work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` in a fresh process that has this core alone."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, os.sched_setaffinity, (0, {core})) as pool:
        return pool.submit(work, *args).result()


def bare_engine(rows: list[dict[str, Any]], stage: dict[str, Any], busy: Path | None = None) -> float:
    """Tokens a second of vLLM on the prompts of these rollouts, each once for its whole group. The file `busy` is there
    while it samples."""
    return asyncio.run(_bare_engine(rows, stage, busy))


async def _bare_engine(rows: list[dict[str, Any]], stage: dict[str, Any], busy: Path | None) -> float:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from model.tokenizer import load_tokenizer, stop_token_ids
    from pipeline.engines import engine_settings
    from rl.generator import VllmGenerator

    generator = VllmGenerator(engine_settings("float32", BASE, seed=0), "bare")
    await generator.start()
    stops = stop_token_ids(load_tokenizer(BASE), BASE)
    ends: list[tuple[float, int]] = []
    begin = time.perf_counter()

    async def ask(slot: str, prompt: list[int]) -> None:
        params = SamplingParams(
            n=stage["group_size"], max_tokens=stage["max_answer_tokens"], seed=int(slot), stop_token_ids=list(stops),
            logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        async for output in generator._engine.generate({"prompt_token_ids": prompt}, params, request_id=slot):
            tokens = sum(len(one.token_ids) for one in output.outputs)
        ends.append((time.perf_counter() - begin, tokens))

    try:
        prompts = {row["group_id"]: row["prompt_ids"] for row in rows}
        if busy:
            busy.touch()
        await asyncio.gather(*(ask(slot, prompt) for slot, prompt in prompts.items()))
    finally:
        if busy:
            busy.unlink()
        generator.stop()
    first, last = len(ends) // 10, len(ends) - len(ends) // 10 - 1
    return sum(tokens for _, tokens in ends[first + 1 : last + 1]) / (ends[last][0] - ends[first][0])


def batches_of(rows: list[dict[str, Any]]) -> list[Any]:
    """The learner's batches, as `rl/loop.py` made them."""
    from rl.losses import group_advantages
    from rl.types import TrainBatch

    groups: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["step"]][row["group_id"]].append(row)
    batches = []
    for version, of_step in enumerate(groups.values()):
        members = [row for group in of_step.values() for row in group]
        batches.append(
            TrainBatch(
                version=version, prompt_ids=[row["prompt_ids"] for row in members],
                answer_ids=[row["answer_ids"] for row in members],
                generator_logprobs=[row["logprobs"] for row in members],
                token_versions=[[version] * len(row["answer_ids"]) for row in members],
                advantages=[
                    advantage
                    for group in of_step.values()
                    for advantage in group_advantages([row["score"] for row in group], "rloo")
                ],
            )
        )  # fmt: skip
    return batches


def bare_model(rows: list[dict[str, Any]], settings: Any, busy: Path) -> float:
    """Trained tokens a second of forward and backward passes, while the file `busy` is there."""
    learner = _learner(settings)
    cuts = [cut for batch in batches_of(rows) for cut in _cuts(batch, settings)]
    forward_backward(learner, cuts[:2])
    while not busy.exists():
        time.sleep(0.01)
    begin, tokens = time.perf_counter(), 0
    for cut in itertools.cycle(cuts):
        forward_backward(learner, [cut])
        if not busy.exists():
            return tokens / (time.perf_counter() - begin)
        tokens += len(cut.advantages)
    raise AssertionError


def alone(rows: list[dict[str, Any]], settings: Any, folder: str) -> dict[str, Any]:
    """The bare model and the learner on the same batches, one after the other each time: their tokens a second, and the
    learner's seconds by part."""
    learner = _learner(settings)
    parts: dict[str, float] = defaultdict(float)
    _timed(parts, learner, "_backward", "forward, objective, backward")
    _timed(parts, learner.optimizer, "step", "optimiser")
    _timed(parts, learner.routers, "begin_step", "routers")
    _timed(parts, learner.routers, "end_step", "routers")
    batches = batches_of(rows)
    seconds: dict[str, float] = defaultdict(float)
    tokens = 0
    forward_backward(learner, _cuts(batches[0], settings))
    for batch in batches:
        begin = time.perf_counter()
        forward_backward(learner, _cuts(batch, settings))
        seconds["bare"] += time.perf_counter() - begin
        report = learner.step(batch, f"{folder}/weights.safetensors")
        seconds["learner"] += report.seconds
        seconds["publish"] += report.metrics["publish_ms"] / 1e3
        tokens += report.trained_tokens
    parts["cutting, gauges, clipping"] = seconds["learner"] - sum(parts.values())
    parts["publish and probe, on top"] = seconds["publish"]
    return {"tokens": tokens, "seconds": dict(seconds), "parts": dict(parts)}


def _learner(settings: Any) -> Any:
    import torch

    from rl.learner import PolicyLearner

    torch.set_num_threads(1)
    learner = PolicyLearner(settings)
    learner.start()
    return learner


def _cuts(batch: Any, settings: Any) -> list[Any]:
    from rl.batcher import micro_batches

    return micro_batches(batch, settings.micro_batch_tokens, share_prompts=True)


def forward_backward(learner: Any, cuts: list[Any]) -> None:
    from model.logprobs import token_logprobs

    for cut in cuts:
        stats, _ = token_logprobs(learner.model, cut.ids_BS, cut.answer_BS, 1.0, cut.real_BS, None, cut.position_BS)
        stats.logprob_T.sum().backward()
    learner.optimizer.zero_grad(set_to_none=True)


def _timed(parts: dict[str, float], owner: Any, name: str, part: str) -> None:
    work = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            parts[part] += time.perf_counter() - begin

    setattr(owner, name, timed)


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of the run.")] = 16,
    keep: Annotated[Path | None, typer.Option(help="Leave the run here; one that is there is used.")] = None,
) -> None:
    """Measure and print two tables."""
    from pipeline.config import OnlineRlStage
    from pipeline.online_rl import learner_settings

    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        asked = recipe(steps, staleness=4, seed=1)
        hard = {"domains": ["maths", "reasoning"], "levels": [8, 10]}
        asked["stages"] = [
            asked["stages"][0] | {"learning_rate": 1e-7, "tasks": hard, "curriculum": {"sampler": "uniform"}}
        ]
        run_dir = folder / "run" if (folder / "run" / "climb" / "COMPLETE").exists() else pinned_run.run(asked, folder)
        rows = rollouts_of(run_dir)
        loop = in_the_loop(run_dir)
        engine_core, learner_core = sorted(os.sched_getaffinity(0))[:2]
        stage = OnlineRlStage(**asked["stages"][0])
        (settings,) = learner_settings(stage, BASE, 1, Path(scratch), 1)
        mine = on_core(learner_core, alone, rows, settings, str(scratch))
        engine = on_core(engine_core, bare_engine, rows, stage.model_dump())
        busy = Path(scratch) / "busy"
        with ThreadPoolExecutor(2) as both:
            model_beside = both.submit(on_core, learner_core, bare_model, rows, settings, busy)
            engine_beside = both.submit(on_core, engine_core, bare_engine, rows, stage.model_dump(), busy).result()
            beside = model_beside.result()
    bare, learner = (mine["tokens"] / mine["seconds"][name] for name in ("bare", "learner"))
    table = Table(
        "tokens/s", "bare, alone", "bare, both at once", "ours, alone", "ours, in the loop", "of both at once"
    )
    table.add_row(
        "engine", f"{engine:,.0f}", f"{engine_beside:,.0f}", "", f"{loop['engine']:,.0f}",
        f"{loop['engine'] / engine_beside:.2f}",
    )  # fmt: skip
    table.add_row(
        "learner", f"{bare:,.0f}", f"{beside:,.0f}", f"{learner:,.0f}", f"{loop['learner']:,.0f}",
        f"{loop['learner'] / beside:.2f}",
    )  # fmt: skip
    shares = Table("the learner's time, alone", "of its step")
    for part, seconds in (("bare forward and backward", mine["seconds"]["bare"]), *mine["parts"].items()):
        shares.add_row(part, f"{seconds / mine['seconds']['learner']:.1%}")
    console = Console(width=110)
    console.print(table)
    console.print(shares)
    print(f"engine waits {loop['engine waits']:.1%} of the time (not counted above), syncs take {loop['sync']:.1%}")
    print(pinned_run.circumstances())


if __name__ == "__main__":
    typer.run(main)
