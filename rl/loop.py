"""Carries out the controller's commands with asyncio: owns every task, every deadline, and the shutdown.

    Lease ─▶ curriculum.choose ─▶ generator.sample ─▶ grade (threads) ─▶ GroupReady
    Train ─▶ learner.step (publishes its weights) ─▶ StepDone
    Sync  ─▶ take_weights on every generator, digests compared ─▶ SyncDone

Events meet in one queue and are handled one at a time; nothing here decides, `rl/controller.py` does. Every call to a
generator or to the learner carries a deadline; the first task that fails ends the run with its own error, and all
others are cancelled. CPU work (grading) never runs on the event loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from rewards.task import Score, Task, Ungraded
from rl import controller as protocol
from rl.curriculum import Curriculum
from rl.losses import group_advantages
from rl.types import Generator, Learner, Rollout, RolloutGroup, SampleRequest, StepReport, SyncReport, TrainBatch


class HealthStop(RuntimeError):
    """A number says that going on would train a broken model."""


class WeightsDiffer(HealthStop):
    """A generator read back other weights than the learner published. Its samples would be lies."""


class GradientNotFinite(HealthStop):
    """The gradient is infinite or not a number; the step was not taken."""


class NothingGraded(RuntimeError):
    """Not one answer of a step could be checked."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    groups_per_step: int
    group_size: int
    num_steps: int
    max_staleness: int
    max_answer_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    advantage: str
    overlong_penalty: float
    weights_path: str  # where the learner publishes, memory-backed: "{version}" is filled in
    keep_versions: int = 2  # published files kept: an engine may still be reading the one before


@dataclass(frozen=True, kw_only=True)
class TaskPool:
    """How the loop gets tasks and words; handed in, so that the loop knows neither data sets nor tokenizers."""

    task_of: Callable[[str, int], Task]  # (curriculum cell, slot) → task
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    grade: Callable[[Task, str], Score | Ungraded]


@dataclass(kw_only=True)
class StepRecord:
    """What one step leaves behind: its row of metrics, and the groups it consumed."""

    step: int
    metrics: dict[str, Any]
    groups: Sequence[RolloutGroup]
    curriculum: Curriculum


@dataclass
class Timings:
    """Seconds each party waited, and what was generated, since the last step."""

    generated_tokens: int = 0
    sync_ms: float = 0.0
    last_step_end: float = field(default_factory=time.perf_counter)


class AsyncLoop:
    """One run of stage 2. Build it, `await run()` once."""

    def __init__(
        self,
        settings: LoopSettings,
        pool: TaskPool,
        curriculum: Curriculum,
        generators: Sequence[Generator],
        learner: Learner,
        graders: Executor,
        *,
        on_step: Callable[[StepRecord], None],
        on_lost: Callable[[RolloutGroup], None],
        on_event: Callable[..., None],
    ) -> None:
        self.settings, self.pool, self.curriculum = settings, pool, curriculum
        self.generators, self.learner, self.graders = generators, learner, graders
        self.on_step, self.on_lost, self.on_event = on_step, on_lost, on_event
        self.controller = protocol.Controller(
            groups_per_step=settings.groups_per_step, max_staleness=settings.max_staleness, num_steps=settings.num_steps
        )
        self.groups: dict[int, RolloutGroup] = {}  # slot → finished group, until its step
        self.cells: dict[int, str] = {}  # slot → the curriculum's cell
        self.digests: dict[int, str] = {}  # version → what the learner published
        self.outstanding = [0] * len(generators)
        self.timings = Timings()
        self.generated_tokens = self.trained_tokens = 0
        self._events: asyncio.Queue[protocol.Event] = asyncio.Queue()

    async def run(self, publish_first: bool = False) -> None:
        """Ends after the last step's sync, or with the first error of any task. `publish_first`: engines do not begin
        with the checkpoint they loaded but with what the learner makes of it."""
        try:
            if publish_first:
                self.digests[0] = await self.learner.publish(self.settings.weights_path.format(version=0))
                await self._sync(0)
            async with asyncio.TaskGroup() as tasks:
                self._events.put_nowait(protocol.Begin())
                finished = False
                while not finished:
                    # Ended by any task's event; a task that dies cancels this wait through the group.
                    event = await self._events.get()
                    for command in self.controller.handle(event):
                        if isinstance(command, protocol.Finish):
                            finished = True
                        else:
                            tasks.create_task(self._carry_out(command), name=repr(command))
        except BaseExceptionGroup as group:
            raise _first_error(group) from None
        finally:
            for version in list(self.digests):
                self._forget(version)

    async def _carry_out(self, command: protocol.Command) -> None:
        match command:
            case protocol.Lease(slot, attempt):
                self._events.put_nowait(await self._sample_group(slot, attempt))
            case protocol.Train(step, slots):
                self._events.put_nowait(protocol.StepDone(await self._train(step, slots)))
            case protocol.Sync(version):
                await self._sync(version)
                self._events.put_nowait(protocol.SyncDone(version))

    # --- Lease ---------------------------------------------------------------------------------------------------

    async def _sample_group(self, slot: int, attempt: int) -> protocol.Event:
        """Ended by the generator's answer or its deadline; a group whose every answer is ungraded is lost."""
        if slot not in self.cells:  # a group leased again keeps its task
            self.cells[slot] = self.curriculum.choose()
        cell = self.cells[slot]
        task = self.pool.task_of(cell, slot)
        prompt_ids = self.pool.encode(task.prompt)
        leased_at = self.controller.generator_version
        index = min(range(len(self.generators)), key=self.outstanding.__getitem__)
        request = SampleRequest(
            request_id=f"slot{slot}.{attempt}",
            prompt_ids=prompt_ids,
            num_samples=self.settings.group_size,
            max_tokens=self.settings.max_answer_tokens,
            temperature=self.settings.temperature,
            stop_token_ids=self.settings.stop_token_ids,
        )
        self.outstanding[index] += 1
        try:
            answers = await self.generators[index].sample(request)
        finally:
            self.outstanding[index] -= 1
        if not self.generated_tokens:
            self.on_event("first_rollout")
        tokens = sum(len(answer.token_ids) for answer in answers)
        self.generated_tokens += tokens
        self.timings.generated_tokens += tokens
        texts = [self.pool.decode(answer.token_ids) for answer in answers]
        event_loop = asyncio.get_running_loop()
        verdicts = await asyncio.gather(
            *(event_loop.run_in_executor(self.graders, self.pool.grade, task, text) for text in texts)
        )
        rollouts = [
            Rollout(
                task=task,
                group_id=str(slot),
                answer=answer,
                text=text,
                reason=verdict.reason,
                score=verdict.value if isinstance(verdict, Score) else None,
            )
            for answer, text, verdict in zip(answers, texts, verdicts, strict=True)
        ]
        group = RolloutGroup(
            group_id=str(slot), task=task, prompt_ids=prompt_ids, rollouts=rollouts, leased_at_version=leased_at
        )
        scores = [rollout.score for rollout in rollouts if rollout.score is not None]
        if not scores:
            self.on_lost(group)  # what is dropped can still be read on disk
            return protocol.GroupLost(slot, f"ungraded: {rollouts[0].reason}")
        self.curriculum.observe(cell, sum(score >= 1.0 for score in scores), len(scores), leased_at)
        self.groups[slot] = group
        return protocol.GroupReady(slot)

    # --- Train ---------------------------------------------------------------------------------------------------

    async def _train(self, step: int, slots: tuple[int, ...]) -> int:
        """Ended by the learner's report or its deadline."""
        waited = time.perf_counter() - self.timings.last_step_end
        groups = [self.groups.pop(slot) for slot in slots]
        for slot in slots:
            del self.cells[slot]
        path = self.settings.weights_path.format(version=step + 1)
        batch, zero_signal = self._batch(step, groups)
        report = await self.learner.step(batch, path)
        norm = report.metrics.get("grad_norm", 0.0)
        if not math.isfinite(norm):
            raise GradientNotFinite(f"step {step}: gradient norm is {norm}; lower learning_rate or look at the batch")
        if step == 0:
            self.on_event("first_step")
        self.digests[report.version] = report.extras["digest"]
        self.trained_tokens += report.trained_tokens
        for text in report.extras.get("notes", ()):
            self.on_event("note", text=text)
        self._record(step, groups, report, waited, zero_signal)
        return report.version

    def _batch(self, step: int, groups: Sequence[RolloutGroup]) -> tuple[TrainBatch, int]:
        """The rows of a step, and how many groups carry no signal (all answers scored alike)."""
        rows: list[tuple[RolloutGroup, Rollout, float]] = []
        zero_signal = 0
        for group in groups:
            scores = [self._shaped(rollout) for rollout in group.rollouts]
            advantages = group_advantages(scores, self.settings.advantage)
            zero_signal += not any(advantages)
            rows += [(group, *pair) for pair in zip(group.rollouts, advantages, strict=True)]
        if all(rollout.score is None for _, rollout, _ in rows):
            raise NothingGraded(f"step {step}: none of {len(rows)} answers could be graded: {rows[0][1].reason}")
        batch = TrainBatch(
            version=step,
            prompt_ids=[group.prompt_ids for group, _, _ in rows],
            answer_ids=[rollout.answer.token_ids for _, rollout, _ in rows],
            generator_logprobs=[rollout.answer.logprobs for _, rollout, _ in rows],
            token_versions=[rollout.answer.versions for _, rollout, _ in rows],
            advantages=[advantage for _, _, advantage in rows],
        )
        oldest = min(version for versions in batch.token_versions for version in versions)
        assert step - oldest <= self.settings.max_staleness, f"step {step} would train on a token of version {oldest}"
        return batch, zero_signal

    def _shaped(self, rollout: Rollout) -> float | None:
        truncated = rollout.answer.finish_reason == "length"
        return None if rollout.score is None else rollout.score - self.settings.overlong_penalty * truncated

    def _record(
        self, step: int, groups: Sequence[RolloutGroup], report: StepReport, waited: float, zero_signal: int
    ) -> None:
        now = time.perf_counter()
        seconds = now - self.timings.last_step_end
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [rollout.score for rollout in rollouts if rollout.score is not None]
        levels: dict[str, list[int]] = {}
        for group in groups:
            levels.setdefault(group.task.domain, []).append(group.task.level)
        metrics: dict[str, Any] = report.metrics | {
            "step": step + 1,
            "version": report.version,
            "time": time.time(),
            "reward_mean": sum(scores) / len(scores),
            "pass_rate": sum(score >= 1.0 for score in scores) / len(scores),
            "staleness_counts": report.extras["staleness_counts"],
            "answer_tokens_mean": sum(len(r.answer.token_ids) for r in rollouts) / len(rollouts),
            "truncated_share": sum(r.answer.finish_reason == "length" for r in rollouts) / len(rollouts),
            "ungraded": len(rollouts) - len(scores),
            "zero_signal_groups": zero_signal,
            "groups": len(groups),
            "groups_lost": dict(self.controller.lost),
            "generated_tokens": self.generated_tokens,
            "trained_tokens": self.trained_tokens,
            "generate_wait_s": waited,
            "sync_ms": self.timings.sync_ms,
            "tokens_per_s": self.timings.generated_tokens / seconds,
            "levels": {domain: sum(values) / len(values) for domain, values in levels.items()},
        }
        self.timings.generated_tokens, self.timings.last_step_end = 0, now
        self.on_step(StepRecord(step=step + 1, metrics=metrics, groups=groups, curriculum=self.curriculum))

    # --- Sync ----------------------------------------------------------------------------------------------------

    async def _sync(self, version: int) -> None:
        """Ended by every generator's report or the first deadline. Requests in flight go on with the new weights."""
        begin = time.perf_counter()
        path, digest = self.settings.weights_path.format(version=version), self.digests[version]
        reports: list[SyncReport] = await asyncio.gather(
            *(generator.take_weights(path, version, digest) for generator in self.generators)
        )
        for index, report in enumerate(reports):
            if report.digest != digest or report.version != version:
                raise WeightsDiffer(
                    f"generator {index} holds version {report.version}, digest {report.digest[:12]}; the learner "
                    f"published version {version}, digest {digest[:12]}"
                )
        self.timings.sync_ms = (time.perf_counter() - begin) * 1e3
        for old in [v for v in self.digests if v <= version - self.settings.keep_versions]:
            self._forget(old)

    def _forget(self, version: int) -> None:
        del self.digests[version]
        path = self.settings.weights_path.format(version=version)
        if os.path.exists(path):
            os.unlink(path)


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first; a cancelled neighbour is a consequence, not a cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
