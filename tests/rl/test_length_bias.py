"""Long answers are lost more often than short ones, whatever kills a run or an engine. None may go missing for it.

The real loop on a virtual clock: an answer takes as long as it has tokens, lengths differ by a factor of hundreds, and
runs and engines die every few steps. What is trained on must have the lengths that the policy gives to its answers.
Loops that draw again in the place of what was lost show that the measurement would notice.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import selectors
import tempfile
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, variance
from typing import Any

import pytest
from curricula import curriculum

from rewards.task import Score, Task
from rl import controller as protocol
from rl.health import HealthMonitor
from rl.loop import AsyncLoop, LoopSettings, StepRecord, TaskPool
from rl.run_state import LEARNER, RunStates
from rl.types import (
    GeneratorGone,
    Probe,
    Published,
    SampledAnswer,
    SampleRequest,
    StepReport,
    SyncReport,
    TrainBatch,
)  # fmt: skip

TOKEN_S, STEP_S, START_S = 0.01, 2.0, 5.0
GROUPS, SIZE, STEPS, GENERATORS = 2, 2, 40, 2
LONGEST = 2000  # tokens


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop that never waits: where nothing is left to do, the clock jumps to whatever is due next. What it is
    told to do in a thread it does at once, so that two runs are the same."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self._now = 0.0
        select, jump = self._selector.select, self._jump
        self._selector.select = lambda timeout=None: (jump(timeout), select(0))[1]

    def _jump(self, seconds: float | None) -> None:
        assert seconds is not None, "everybody waits for something that nothing will end"
        self._now += seconds

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor: Executor | None, function: Callable[..., Any], *args: Any) -> Any:
        done: asyncio.Future[Any] = self.create_future()
        done.set_result(function(*args))
        return done


def length(seed: int, sample: int) -> int:
    """Tokens: heavy-tailed, as reasoning is. Mean about 100, one in a hundred above 700."""
    return min(LONGEST, int(random.Random(f"{seed}/{sample}").lognormvariate(4.0, 1.1)) + 1)


class SlowEngine:
    """All samples of a group at once, a token every TOKEN_S. It dies after `lives()` seconds, again and again."""

    def __init__(self, lives: Callable[[], float]) -> None:
        self.lives, self.version = lives, -1
        self.dies_at = asyncio.get_running_loop().time() + lives()

    async def sample(self, request: SampleRequest) -> list[SampledAnswer]:
        lengths = [length(request.seed or 0, sample) for sample in range(request.num_samples)]
        clock, version = asyncio.get_running_loop(), self.version
        seconds = min(max(lengths) * TOKEN_S, self.dies_at - clock.time())
        if seconds > 0:
            await asyncio.sleep(seconds)
        if clock.time() >= self.dies_at:
            raise GeneratorGone("killed")
        return [
            SampledAnswer(token_ids=[1] * tokens, logprobs=[-1.0] * tokens, versions=[version] * tokens,
                          finish_reason="stop")
            for tokens in lengths
        ]  # fmt: skip

    async def take_weights(self, path: str, version: int, expected: Published, repair: bool = False) -> SyncReport:
        self.version = version
        return SyncReport(version=version, num_tensors=1, digest=expected.digest, pause_ms=0, load_ms=0)

    async def restart(self) -> None:
        await asyncio.sleep(START_S)
        self.dies_at = asyncio.get_running_loop().time() + self.lives()


class SlowLearner:
    version = 0

    async def publish(self, path: str) -> Published:
        probe = Probe(prompt_ids=[1], label_ids=[2], logprobs=[-0.5], tolerance=0.1)
        return Published(digest=f"d{self.version}", probe=probe, location=path)

    async def save_state(self, path: str) -> None:
        Path(path).write_text(str(self.version))

    async def load_state(self, path: str) -> None:
        self.version = int(Path(path).read_text())

    async def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport:
        await asyncio.sleep(STEP_S)
        self.version += 1
        return StepReport(
            version=self.version, metrics={"loss": 0.0}, trained_tokens=1, published=await self.publish(""),
            extras={"staleness_counts": {}},
        )  # fmt: skip


@dataclass
class Deaths:
    """Seconds from one to the next, on average; in reality they are hours or days."""

    of_run_s: float = float("inf")
    of_engine_s: float = float("inf")

    def after(self, mean_s: float, rng: random.Random) -> float:
        return rng.expovariate(1 / mean_s) if mean_s < float("inf") else mean_s


@dataclass
class Trained:
    """What a run trained on."""

    lengths: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # step, slot → of its answers
    lives: int = 0  # of the run
    lost: int = 0  # groups, with an engine

    def note(self, record: StepRecord) -> None:
        """A step that a death undid is done again, and noted again."""
        for group in record.groups:
            answers = [len(rollout.answer.token_ids) for rollout in group.rollouts]
            self.lengths[record.step, int(group.group_id)] = answers


def train(folder: Path, seed: int, max_staleness: int, deaths: Deaths, loop_class: type[AsyncLoop]) -> Trained:
    """One run to its end, by the same command after each death."""
    rng, trained, states = random.Random(f"deaths/{seed}"), Trained(), RunStates(folder)

    async def life() -> bool:
        scores = itertools.cycle([0.0, 1.0])
        engines = [SlowEngine(lambda: deaths.after(deaths.of_engine_s, rng)) for _ in range(GENERATORS)]
        loop = loop_class(
            LoopSettings(
                groups_per_step=GROUPS, num_steps=STEPS, max_staleness=max_staleness,
                max_answer_tokens=LONGEST, temperature=1.0, stop_token_ids=(), advantage="rloo", overlong_penalty=0.0,
                weights_path="/nonexistent/v{version}", save_every=2, seed=seed,
            ),
            TaskPool(
                task_of=lambda _, slot, turn: Task(
                    task_id=f"{slot}", domain="maths", level=1, prompt="", verifier="text"
                ),
                encode=lambda prompt: [1], decode=lambda ids: "",
                grade=lambda task, text: Score(next(scores), "in turn"),
            ),
            curriculum({"maths/1": ("maths", 1)}, sampler="uniform", endless=True, group_size=SIZE, seed=seed),
            engines, SlowLearner(), None, states, HealthMonitor({}),
            on_step=trained.note, on_lost=lambda group: None, on_event=lambda event, **said: None,
        )  # fmt: skip
        if newest := states.newest():
            await loop.resume(newest[0], str(newest[1] / LEARNER), [])
        running = asyncio.ensure_future(loop.run())
        await asyncio.wait({running}, timeout=deaths.after(deaths.of_run_s, rng))
        ended = running.done()
        running.cancel()
        try:
            await running
        except (asyncio.CancelledError, protocol.LeaseExhausted, protocol.NoGeneratorLeft):
            ended = False
        trained.lost += sum(loop.controller.lost.values())
        return ended

    while True:
        trained.lives += 1
        with asyncio.Runner(loop_factory=VirtualTime) as runner:
            if runner.run(life()):
                return trained


# --- the measurement ------------------------------------------------------------------------------------------------

RUNS = 10
DEATHS = {"runs": Deaths(of_run_s=8.0), "engines": Deaths(of_engine_s=6.0)}  # a step takes 2 to 25 s
POPULATION = [length(seed, sample) for seed in range(10_000) for sample in range(SIZE)]  # what the policy says
SIGNIFICANT = 1e-3


def train_all(
    memory_path: Path, max_staleness: int, deaths: Deaths, loop_class: type[AsyncLoop] = AsyncLoop
) -> list[Trained]:
    with tempfile.TemporaryDirectory(dir=memory_path) as folder:
        runs = [train(Path(folder) / f"{seed}", seed, max_staleness, deaths, loop_class) for seed in range(RUNS)]
    print(f"{sum(run.lives for run in runs)} lives, {sum(run.lost for run in runs)} groups lost with an engine")
    return runs


def is_shorter(runs: list[Trained]) -> bool:
    """Is the mean lower than the population's, or the distribution another, by more than chance explains?"""
    lengths = [tokens for run in runs for answers in run.lengths.values() for tokens in answers]
    error = math.sqrt(variance(lengths) / len(lengths) + variance(POPULATION) / len(POPULATION))
    z = (mean(POPULATION) - mean(lengths)) / error
    p_mean, p_shape = math.erfc(z / math.sqrt(2)) / 2, kolmogorov_smirnov(lengths, POPULATION)
    print(f"mean {mean(lengths):.1f}, of all {mean(POPULATION):.1f}: p {p_mean:.1e}; shape: p {p_shape:.1e}")
    return min(p_mean, p_shape) < SIGNIFICANT


def kolmogorov_smirnov(one: list[int], other: list[int]) -> float:
    """How likely two samples of one distribution are as far apart: Kolmogorov's series at √(nm / (n + m))·D."""
    values = sorted({*one, *other})
    one, other = sorted(one), sorted(other)
    distance = max(abs(bisect_right(one, x) / len(one) - bisect_right(other, x) / len(other)) for x in values)
    x = math.sqrt(len(one) * len(other) / (len(one) + len(other))) * distance
    return 1.0 if x < 0.3 else 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_whatever_dies_each_slot_is_trained_on_with_the_answers_of_an_undisturbed_run(
    memory_path: Path, max_staleness: int
) -> None:
    undisturbed = train_all(memory_path, max_staleness, Deaths())
    assert all(run.lives == 1 and run.lost == 0 and len(run.lengths) == STEPS * GROUPS for run in undisturbed)
    for deaths in DEATHS.values():
        runs = train_all(memory_path, max_staleness, deaths)
        assert not is_shorter(runs)
        assert [run.lengths for run in runs] == [run.lengths for run in undisturbed]


# --- what the measurement would notice ------------------------------------------------------------------------------


class DrawsAnew(AsyncLoop):
    """Other answers, or another task, in the place of what was lost."""

    draws = itertools.count()

    def _seed(self, slot: int, turn: int, have: int) -> int:
        return super()._seed(next(self.draws) + 10**6, turn, have)


class DrawsByVersion(AsyncLoop):
    """As this loop did until it was measured: what is leased again meets a newer version, and is drawn with it."""

    def _seed(self, slot: int, turn: int, have: int) -> int:
        return super()._seed(slot * 1000 + self.controller.learner_version, turn, have)


@pytest.mark.parametrize("deaths", DEATHS)
@pytest.mark.parametrize("loop_class, max_staleness", [(DrawsAnew, 0), (DrawsByVersion, 2)])
def test_a_loop_that_draws_again_trains_on_shorter_answers(
    memory_path: Path, loop_class: type[AsyncLoop], max_staleness: int, deaths: str
) -> None:
    assert is_shorter(train_all(memory_path, max_staleness, DEATHS[deaths], loop_class))
