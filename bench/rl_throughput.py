"""What the loop costs on top of the bare engine and the bare model, and where it goes.

    python bench/rl_throughput.py [--steps 24] [--keep FOLDER]

A real run of stage 2 at staleness 4, a core each for generation and learning, with a learning rate so small that the
policy stays what it is, and tasks so hard that few groups are trained on: the engine always has more to do than it
can, and the learner waits. On the same cores, on what a first such run sampled,

  the engine   is asked for the same groups by nothing but vLLM's own interface, as many at once as in the loop;
  the model    passes the same micro-batches forward and backward: no objective, no gauges, no optimiser.

**They take turns of some seconds with the run**, the one stopped while the other goes on, so that a machine that is
faster now than a minute ago is so for both. Rates are tokens by the seconds in which a party was not stopped. Last the
learner takes the batches alone, for the seconds of its parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pinned_run  # noqa: E402
import psutil  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rl_async import recipe  # noqa: E402

TURN_S = 5.0
EDGE = 4  # steps at either end that are not counted
BASE = pinned_run.ROOT / "recipes" / "tiny_base"


@dataclass
class Turns:
    """Two parties that never run at the same time: of each, how to find its processes, and when it was let run."""

    parties: dict[str, Callable[[], list[int]]]  # name → pids of the roots
    ran: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def take(self, until: Callable[[], bool]) -> None:
        """Ended by `until`, asked at each turn; leaves both running."""
        try:
            for name in itertools.cycle(self.parties):
                if until():
                    return
                for other in self.parties:
                    self._signal(other, signal.SIGCONT if other == name else signal.SIGSTOP)
                begin = time.time()
                time.sleep(TURN_S)
                self.ran[name].append((begin, time.time()))
        finally:
            for name in self.parties:
                self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, which: signal.Signals) -> None:
        for pid in self.parties[name]():
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                for process in (root, *root.children(recursive=True)):
                    process.send_signal(which)

    def seconds(self, name: str, begin: float, end: float) -> float:
        """How long a party ran between two points of time."""
        return sum(max(0.0, min(end, last) - max(begin, first)) for first, last in self.ran[name])


def in_the_loop(run_dir: Path, turns: Turns) -> dict[str, float]:
    """Tokens a second of both sides, in the steps in which both are busy."""
    steps = pinned_run.json_lines(run_dir / "climb" / "steps.jsonl")
    before, steady = steps[EDGE - 1], steps[EDGE:-EDGE]
    begin, end = before["time"], steady[-1]["time"]
    generated = steady[-1]["generated_tokens"] - before["generated_tokens"]
    trained = steady[-1]["trained_tokens"] - before["trained_tokens"]
    learner_s = 0.0
    for step in steady:
        stepped = step["time"] - step["publish_ms"] / 1e3
        learner_s += turns.seconds("loop", stepped - step["learner_step_s"], stepped)
    waited = sum(step["step_s"] * step["generator_wait_share"] for step in steady) / (end - begin)
    seconds = turns.seconds("loop", begin, end)
    return {
        "engine": generated / seconds,
        "engine waits": waited,
        "learner": trained / learner_s,
        "sync": statistics.median(step["sync_ms"] for step in steady) / 1e3 * len(steady) / seconds,
        "seconds": seconds,
    }


def rollouts_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(run_dir / "climb" / "rollouts.parquet").to_pylist()
    return [row for row in rows if EDGE < row["step"]]


def bare_engine(rows: list[dict[str, Any]], stage: dict[str, Any], busy: Path, done: Any) -> None:
    """vLLM on the prompts of these rollouts, again and again, each once for its whole group, while the file `busy` is
    there. Puts what it generated into `done`: (time, tokens) of every group."""
    asyncio.run(_bare_engine(rows, stage, busy, done))


async def _bare_engine(rows: list[dict[str, Any]], stage: dict[str, Any], busy: Path, done: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from model.tokenizer import load_tokenizer, stop_token_ids
    from pipeline.engines import engine_settings
    from rl.generator import VllmGenerator

    generator = VllmGenerator(engine_settings("float32", BASE, seed=0), "bare")
    await generator.start()
    stops = stop_token_ids(load_tokenizer(BASE), BASE)
    prompts = itertools.cycle(list({row["group_id"]: row["prompt_ids"] for row in rows}.values()))
    numbers, ends = itertools.count(), []

    async def ask() -> None:
        while busy.exists():
            slot = next(numbers)
            params = SamplingParams(
                n=stage["group_size"], max_tokens=stage["max_answer_tokens"], seed=slot, stop_token_ids=list(stops),
                logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            asked = generator._engine.generate({"prompt_token_ids": next(prompts)}, params, request_id=f"{slot}")
            tokens = [sum(len(one.token_ids) for one in output.outputs) async for output in asked]
            ends.append((time.time(), tokens[-1]))

    try:
        await asyncio.gather(*(ask() for _ in range((stage["max_staleness"] + 1) * stage["groups_per_step"])))
    finally:
        generator.stop()
    done.put(("engine", ends))


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


def bare_model(rows: list[dict[str, Any]], settings: Any, busy: Path, done: Any) -> None:
    """Forward and backward passes while the file `busy` is there; puts (time, trained tokens) of each into `done`."""
    learner = _learner(settings)
    cuts = [cut for batch in batches_of(rows) for cut in _cuts(batch, settings)]
    ends = []
    for cut in itertools.cycle(cuts):
        forward_backward(learner, [cut])
        ends.append((time.time(), len(cut.advantages)))
        if not busy.exists():
            break
    done.put(("learner", ends))


def alone(rows: list[dict[str, Any]], settings: Any, folder: str) -> dict[str, Any]:
    """The bare model and the learner on the same batches, one after the other each time: their tokens a second, and the
    learner's seconds by part."""
    learner = _learner(settings)
    parts: dict[str, float] = defaultdict(float)
    _timed(parts, learner, "_backward", "forward, objective, backward")
    for optimizer in learner.optimizers:
        _timed(parts, optimizer, "step", "optimiser")
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
    learner.model.zero_grad(set_to_none=True)


def _timed(parts: dict[str, float], owner: Any, name: str, part: str) -> None:
    work = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            parts[part] += time.perf_counter() - begin

    setattr(owner, name, timed)


def rate(ends: list[tuple[float, int]], turns: Turns) -> float:
    """Tokens a second in the middle four fifths of what was done while turns were taken."""
    first_turn, last_turn = turns.ran["bare"][0][0], turns.ran["bare"][-1][1]
    ends = sorted(end for end in ends if first_turn <= end[0] <= last_turn)
    kept = ends[len(ends) // 10 : len(ends) - len(ends) // 10]
    return sum(tokens for _, tokens in kept[1:]) / turns.seconds("bare", kept[0][0], kept[-1][0])


def pinned(core: int, work: Callable[..., Any], *args: Any) -> None:
    os.sched_setaffinity(0, {core})
    work(*args)


def in_turns(asked: dict[str, Any], folder: Path, bare: list[Any], busy: Path, done: Any) -> tuple[Path, Turns, Any]:
    """A run and the two bare processes; the run's folder, the turns, and what the bare ones did."""
    run_dir = folder / "run"

    def loop_pids() -> list[int]:
        return [event["pid"] for event in pinned_run.events(run_dir, "actor_started")]

    turns = Turns({"loop": loop_pids, "bare": lambda: [process.pid for process in bare]})
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(pinned_run.run, asked, folder)
        while not pinned_run.events(run_dir, "first_step"):
            if running.done():
                running.result()
            time.sleep(0.2)
        busy.touch()
        for process in bare:
            process.start()
        turns.take(lambda: running.done() or len(steps_of(run_dir)) >= asked["stages"][0]["steps"] - EDGE)
        busy.unlink()
        ends = dict(done.get() for _ in bare)
        return running.result(), turns, ends


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """While it runs, too."""
    return [row for path in run_dir.glob("climb*/steps.jsonl") for row in pinned_run.json_lines(path)]


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps of the run that takes turns.")] = 40,
    keep: Annotated[Path | None, typer.Option(help="Leave the runs here.")] = None,
) -> None:
    """Measure and print two tables."""
    from pipeline.config import OnlineRlStage
    from pipeline.online_rl import learner_settings

    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        hard = {"domains": ["maths", "reasoning"], "levels": [8, 10]}
        asked = recipe(steps, staleness=4, seed=1)
        climb = asked["stages"][0] | {"learning_rate": 1e-7, "tasks": hard, "curriculum": {"sampler": "uniform"}}
        first = pinned_run.run(asked | {"stages": [climb | {"steps": 3 * EDGE}]}, folder / "first")
        rows = rollouts_of(first)
        engine_core, learner_core = sorted(os.sched_getaffinity(0))[:2]
        stage = OnlineRlStage(**climb)
        (settings,) = learner_settings(stage, BASE, 1, Path(scratch), 1)
        busy, fresh = Path(scratch) / "busy", multiprocessing.get_context("spawn")
        done = fresh.Queue()
        bare = [
            fresh.Process(target=pinned, args=(engine_core, bare_engine, rows, stage.model_dump(), busy, done)),
            fresh.Process(target=pinned, args=(learner_core, bare_model, rows, settings, busy, done)),
        ]
        run_dir, turns, ends = in_turns(asked | {"stages": [climb]}, folder / "turns", bare, busy, done)
        loop = in_the_loop(run_dir, turns)
        with ProcessPoolExecutor(1, fresh, os.sched_setaffinity, (0, {learner_core})) as pool:
            mine = pool.submit(alone, rows, settings, str(scratch)).result()
    table = Table("tokens/s", "bare", "in the loop", "share", title=f"in turns of {TURN_S:g} s")
    for name in ("engine", "learner"):
        unhindered = rate(ends[name], turns)
        table.add_row(name, f"{unhindered:,.0f}", f"{loop[name]:,.0f}", f"{loop[name] / unhindered:.2f}")
    shares = Table("the learner's time, alone", "of its step")
    for part, seconds in (("bare forward and backward", mine["seconds"]["bare"]), *mine["parts"].items()):
        shares.add_row(part, f"{seconds / mine['seconds']['learner']:.1%}")
    console = Console(width=110)
    console.print(table)
    console.print(shares)
    print(
        f"in {loop['seconds']:.0f} s of the loop's own; its engine waited {loop['engine waits']:.1%} of the time (not "
        f"taken out above), its exchanges took {loop['sync']:.1%}"
    )
    print(pinned_run.circumstances())


if __name__ == "__main__":
    typer.run(main)
