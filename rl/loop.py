"""Carries out the controller's commands with asyncio: owns every task, every deadline, and the shutdown.

    Lease   ─▶ generator.sample ─▶ grade (threads) ─▶ the gate's verdict ─▶ GroupReady, or PartReady where the slot
               needs more answers or another task, or GroupLost where nothing could be graded
    Accept  ─▶ the group or part is kept
    Train   ─▶ learner.step (publishes its weights) ─▶ StepDone
    Save    ─▶ learner, curriculum, ready groups and the controller's state to disk (`rl/run_state.py`) ─▶ Saved
    Sync    ─▶ generator.take_weights ─▶ SyncDone with the digest read back, or SyncFailed
    Restart ─▶ generator.restart ─▶ GeneratorUp
    a generator that dies or misses a deadline ─▶ GeneratorDied

Events meet in one queue and are handled one at a time; nothing here decides, `rl/controller.py` does. The first task
that fails in any other way ends the run with its own error, and all others are cancelled. CPU work (grading) never runs
on the event loop.

What is drawn for a step depends on the steps before it alone, not on which group happened to end first: the curriculum
learns from a step's groups when the step is taken, in the order of their slots, those that were discarded included, and
all tasks of step s, those in reserve included, are planned from what it knows at version s - max_staleness.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rewards.task import Score, Task, Ungraded
from rl import controller as protocol
from rl.clocks import IdleClock, Timings
from rl.curriculum import Curriculum
from rl.gates import Outcome, Verdict
from rl.health import Finding, HealthMonitor
from rl.losses import Advantage, group_advantages, overlong_penalty
from rl.places import Part, Place
from rl.renewal import NewTask
from rl.replay import Replayable, to_replay
from rl.run_state import LEARNER, RunState, RunStates
from rl.step_metrics import answer_metrics, outcomes_of
from rl.types import (
    Generator,
    GeneratorGone,
    Learner,
    Published,
    Rollout,
    RolloutGroup,
    SampledAnswer,
    SampleRequest,
    StepReport,
    SyncRefused,
    TrainBatch,
)


class HealthStop(RuntimeError):
    """A number says that going on would train a broken model."""


class NothingGraded(RuntimeError):
    """Not one answer of several steps in a row could be graded: that is no fault of their tasks."""


class GradientNotFinite(HealthStop):
    """The gradient is infinite or not a number; the step was not taken."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    groups_per_step: int
    num_steps: int
    max_staleness: int
    max_answer_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    advantage: Advantage
    overlong_penalty: float
    pass_at_k: int = 1  # of the advantage of that name
    overlong_buffer: int = 0  # tokens
    weights_path: str  # where the learner publishes, memory-backed: "{version}" is filled in
    sync_every: int = 1  # steps
    replay_steps: int = 0  # after its own, in which a group is trained on again; 0: never
    save_every: int = 0  # steps; 0: never
    checkpoint_every: int = 0  # steps; 0: never
    checkpoint_path: str = ""  # "{step}" is filled in
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskPool:
    """How the loop gets tasks and words; handed in, so that the loop knows neither data sets nor tokenizers."""

    task_of: Callable[[str, int, int], Task]  # (curriculum entry, slot, turn) → task, the same for the same
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    grade: Callable[[Task, str], Score | Ungraded]


@dataclass(kw_only=True)
class StepRecord:
    """What one step leaves behind: its row of metrics, and the groups it consumed."""

    step: int
    metrics: dict[str, Any]
    groups: Sequence[RolloutGroup]  # trained on
    discarded: Sequence[RolloutGroup]  # sampled for the step's slots and not trained on
    outcomes: Sequence[Outcome]  # of all of these, in the order of slots
    renewed: Sequence[NewTask]  # added to the pool after it
    curriculum: Curriculum


LAG_PROBE_S = 0.2
GRADINGS = 2  # of answers to a task that nobody can grade, before its slot goes on without it
UNGRADED_STEPS = 3  # in a row, after which the run ends
Work = Callable[[], Awaitable[protocol.Event]]


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
        states: RunStates,
        health: HealthMonitor,
        *,
        on_step: Callable[[StepRecord], None],
        on_lost: Callable[[RolloutGroup], None],
        on_event: Callable[..., None],
    ) -> None:
        self.settings, self.pool, self.curriculum = settings, pool, curriculum
        self.generators, self.learner, self.graders = generators, learner, graders
        self.states, self.health = states, health
        self.on_step, self.on_lost, self.on_event = on_step, on_lost, on_event
        self.bounds = protocol.Bounds(settings.groups_per_step, settings.max_staleness, settings.sync_every)
        self.places: dict[int, Place] = {}  # slot → planned before it is needed; gone once trained on
        self.num_planned = 0  # steps
        self.replayable: list[Replayable] = []  # trained on of late, with signal
        # Slot, attempt → what is on its way to the controller.
        self.answered: dict[tuple[int, int], tuple[Part, Verdict]] = {}
        self.together: dict[tuple[int, int], tuple[str, int]] = {}  # slot, attempt → the batch that it is sampled in
        self.ungraded: Counter[tuple[int, int]] = Counter()  # slot, turn → times that not one answer could be graded
        self.ungraded_steps = 0  # in a row
        self.published: dict[int, Published] = {}  # version → what the learner wrote, while its file is there
        self.timings = Timings()
        self.idle = [IdleClock() for _ in generators]
        self.generated_tokens = self.trained_tokens = 0
        self.controller = self._controller(protocol.State())
        self._deaths_told: set[tuple[int, int]] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._events: asyncio.Queue[protocol.Event] = asyncio.Queue()

    def _controller(self, state: protocol.State) -> protocol.Controller:
        settings = self.settings
        return protocol.Controller(
            self.bounds, settings.num_steps, num_generators=len(self.generators), save_every=settings.save_every,
            max_parts=self.curriculum.max_parts, resumed=state,
        )  # fmt: skip

    async def resume(self, state: RunState, learner_state: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Go on from there; before `run`. `rows`: metrics of the steps before, by which health judges the next ones."""
        for row in rows:
            self.health.observe(row)
        await self.learner.load_state(learner_state)
        self.curriculum.restore(state.curriculum)
        self.places = dict(state.places)
        self.replayable = list(state.replayable)
        self.num_planned = state.protocol.version + len(self.places) // self.settings.groups_per_step
        self.generated_tokens, self.trained_tokens = state.generated_tokens, state.trained_tokens
        self.controller = self._controller(state.protocol)

    async def run(self) -> None:
        """Ends with the protocol's Finish, or with the first error of any task."""
        try:
            first = self.controller.learner_version
            self._plan_up_to(first + self.bounds.max_staleness)
            self.published[first] = published = await self.learner.publish(self._path(first))
            async with asyncio.TaskGroup() as tasks:
                self._events.put_nowait(protocol.Begin(published.digest))
                watch = tasks.create_task(self._watch_lag())
                while not self.controller.finished:
                    # Ended by any task's event; a task that dies cancels this wait through the group.
                    commands = self.controller.handle(await self._events.get())
                    self._gather(commands)
                    for command in commands:
                        self._start(command, tasks)
                for task in (watch, *self._running):  # what a retired generator was asked, too
                    task.cancel()
        except BaseExceptionGroup as group:
            error = _first_error(group)
            if isinstance(error, (protocol.WeightsDiffer, protocol.WrongVersion)):
                raise HealthStop(str(error)) from error
            raise error from None
        finally:
            for version in list(self.published):
                self._forget(version)

    def _gather(self, commands: Sequence[protocol.Command]) -> None:
        """Without staleness, the groups that a generator is given at once are sampled as one batch. Its numbers then
        depend on the batch alone, and a run can be repeated bit for bit."""
        if self.bounds.max_staleness:
            return
        leases = [command for command in commands if isinstance(command, protocol.Lease)]
        for generator in {lease.generator for lease in leases}:
            batch = [lease for lease in leases if lease.generator == generator]
            self.together |= {(lease.slot, lease.attempt): (f"{batch[0]}", len(batch)) for lease in batch}

    def _start(self, command: protocol.Command, tasks: asyncio.TaskGroup) -> None:
        """What a command needs to know is looked up now: when its task begins to run, more may have happened."""
        match command:
            case protocol.Accept(slot, attempt):
                self.places[slot].accept(*self.answered.pop((slot, attempt)))
                return
            case protocol.Drop(version):
                self._forget(version)
                return
            case protocol.Finish():
                return
            case protocol.Lease(_, _, index, incarnation):
                sampling = partial(self._sample_group, command, self.controller.generators[index].version)
                work = partial(self._or_death, index, incarnation, sampling)
            case protocol.Train(step, slots):
                work = partial(self._train, step, slots)
            case protocol.Save(version, state):
                work = partial(self._save, version, self._state(state))
            case protocol.Sync(index, incarnation, version):
                syncing = partial(self._sync, command, self.published[version], bool(self.controller.resyncing))
                work = partial(self._or_death, index, incarnation, syncing)
            case protocol.Restart(index, incarnation):
                work = partial(self._or_death, index, incarnation, partial(self._restart, command))
        task = tasks.create_task(self._carry_out(work), name=repr(command))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _carry_out(self, work: Work) -> None:
        """Ended by the answer to the command; every call in there has its own deadline."""
        self._events.put_nowait(await work())

    async def _or_death(self, index: int, incarnation: int, work: Work) -> protocol.Event:
        try:
            return await work()
        except GeneratorGone as error:
            if (index, incarnation) not in self._deaths_told:  # once, not for every request that it had
                self._deaths_told.add((index, incarnation))
                self.on_event("generator_died", generator=index, incarnation=incarnation, reason=str(error))
            return protocol.GeneratorDied(index, incarnation, str(error).split("\n")[0])

    async def _watch_lag(self) -> None:
        """Ended by the run's end."""
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(LAG_PROBE_S)
            self.timings.loop_lag_s = max(self.timings.loop_lag_s, time.perf_counter() - begin - LAG_PROBE_S)

    def _path(self, version: int) -> str:
        return self.settings.weights_path.format(version=version)

    # --- Lease ---------------------------------------------------------------------------------------------------

    def _plan_up_to(self, last: int) -> None:
        """The tasks of all steps up to this one."""
        for step in range(self.num_planned, min(last + 1, self.settings.num_steps)):
            slots = self.bounds.slots_of(step)
            self.places |= {slot: Place(choices=turns) for slot, turns in zip(slots, self.curriculum.plan(slots))}
            self.num_planned = step + 1

    async def _sample_group(self, lease: protocol.Lease, leased_at: int) -> protocol.Event:
        """A group, or the next part of one. Where every answer is ungraded it is lost and sampled once more, in case
        that was the sandbox's fault; if it was the task's, the slot then goes on to its next one."""
        slot, place = lease.slot, self.places[lease.slot]
        choice, turn, before = place.choice, place.turn, place.rollouts
        task = self.pool.task_of(choice.entry, slot, turn)
        prefix = list(choice.prefix)
        prompt_ids = [*self.pool.encode(task.prompt), *prefix]
        request = SampleRequest(
            request_id=f"slot{slot:08}.{lease.attempt}",
            prompt_ids=prompt_ids,
            num_samples=self.curriculum.wanted(choice, len(before)),
            max_tokens=self.settings.max_answer_tokens - len(prefix),
            temperature=self.settings.temperature,
            stop_token_ids=self.settings.stop_token_ids,
            seed=self._seed(slot, turn, len(before)),
            together=self.together.pop((slot, lease.attempt), None),
        )
        with self.idle[lease.generator]:
            answers = await self.generators[lease.generator].sample(request)
        if not self.generated_tokens:
            self.on_event("first_rollout")
        tokens = sum(len(answer.token_ids) for answer in answers)
        self.generated_tokens += tokens
        self.timings.generated_tokens += tokens
        group_id = f"{slot}.{turn}" if turn else f"{slot}"
        rollouts = await self._graded(group_id, task, prefix, answers)
        part = Part(task=task, prompt_ids=prompt_ids, rollouts=rollouts, leased_at=leased_at)
        if any(rollout.score is not None for rollout in (*before, *rollouts)):
            verdict = self.curriculum.verdict(choice, [self._shaped(rollout) for rollout in (*before, *rollouts)])
        else:
            self.ungraded[slot, turn] += 1
            if self.ungraded[slot, turn] < GRADINGS:
                self.on_lost(part.group())  # what is dropped can still be read on disk
                return protocol.GroupLost(slot, lease.attempt, f"ungraded: {rollouts[0].reason}")
            verdict = "replace"
        self.answered[slot, lease.attempt] = part, verdict
        versions = [version for answer in answers for version in answer.versions]
        event = protocol.GroupReady if place.settles(verdict) else protocol.PartReady
        return event(slot, lease.attempt, min(versions), max(versions))

    def _seed(self, slot: int, turn: int, have: int) -> int:
        """What a part's answers are drawn with, whenever, beside whichever others and on whichever engine. The same
        when it is leased again, at a newer version too: long answers are lost more often, and another draw in their
        place would be a shorter one."""
        key = f"{self.settings.seed}/{slot}/{turn}/{have}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) >> 1

    async def _graded(
        self, group_id: str, task: Task, prefix: list[int], answers: list[SampledAnswer]
    ) -> list[Rollout]:
        texts = [self.pool.decode([*prefix, *answer.token_ids]) for answer in answers]
        event_loop = asyncio.get_running_loop()
        verdicts = await asyncio.gather(
            *(event_loop.run_in_executor(self.graders, self.pool.grade, task, text) for text in texts)
        )
        return [
            Rollout(
                task=task,
                group_id=group_id,
                answer=answer,
                text=text,
                reason=verdict.reason,
                score=verdict.value if isinstance(verdict, Score) else None,
                num_begun=len(prefix),
            )
            for answer, text, verdict in zip(answers, texts, verdicts, strict=True)
        ]

    # --- Train ---------------------------------------------------------------------------------------------------

    async def _train(self, step: int, slots: tuple[int, ...]) -> protocol.Event:
        """Ended by the learner's report or its deadline."""
        waited = time.perf_counter() - self.timings.last_step_end
        places = [self.places.pop(slot) for slot in slots]
        for key in [key for key in self.answered if key[0] in slots]:
            late, _ = self.answered.pop(key)  # came after its generator had been given up
            self.on_lost(late.group())
        self.ungraded = Counter({key: times for key, times in self.ungraded.items() if key[0] not in slots})
        answers = [answer for place in places for _, group in place.outcomes() for answer in group.rollouts]
        self.ungraded_steps = 0 if any(answer.score is not None for answer in answers) else self.ungraded_steps + 1
        if self.ungraded_steps == UNGRADED_STEPS:
            raise NothingGraded(
                f"step {step + 1}, the {UNGRADED_STEPS}rd in a row of which not one answer could be graded, the last "
                f"for: {answers[-1].reason}"
            )
        fresh = [place.group for place in places if place.group]
        again = to_replay(
            self.replayable, step, for_steps=self.settings.replay_steps, max_staleness=self.settings.max_staleness
        )
        batch, trained = self._batch(step, [*fresh, *(one.group for one in again)])
        report = await self.learner.step(batch, self._path(step + 1))
        assert report.published is not None
        self.published[step + 1] = report.published
        norm = report.metrics.get("grad_norm", 0.0)
        if not math.isfinite(norm):
            raise GradientNotFinite(f"step {step}: gradient norm is {norm}; lower learning_rate or look at the batch")
        if step == 0:
            self.on_event("first_step")
        if self.settings.replay_steps:
            self.replayable = [*again, *(Replayable(step=step, group=one) for one in fresh if trained[one.group_id])]
        outcomes = [one for slot, place in zip(slots, places) for one in outcomes_of(slot, place, trained)]
        planned = [choice for place in places for choice in place.choices]
        replayed: Counter[str] = Counter()
        for one in again:
            replayed[one.group.task.domain] += trained[one.group.group_id]
        for change in self.curriculum.learn(step + 1, outcomes, planned, replayed):
            self.on_event("task_state", step=step + 1, **asdict(change))
        if self.curriculum.renewed:
            sources = Counter(new.source for new in self.curriculum.renewed)
            self.on_event("pool_renewed", step=step + 1, prompts=dict(sources))
        self._plan_up_to(step + 1 + self.bounds.max_staleness)
        self.trained_tokens += report.trained_tokens
        for text in report.extras.get("notes", ()):
            self.on_event("note", text=text)
        self._record(step, places, outcomes, report, waited, len(again), replayed)
        if self.settings.checkpoint_every and (step + 1) % self.settings.checkpoint_every == 0:
            await self.learner.save(self.settings.checkpoint_path.format(step=step + 1))
        return protocol.StepDone(report.version, report.published.digest)

    def _batch(self, step: int, groups: Sequence[RolloutGroup]) -> tuple[TrainBatch, dict[str, int]]:
        """The rows of a step, and each group's tokens that are trained on: of answers with an advantage."""
        rows: list[tuple[RolloutGroup, Rollout, float]] = []
        trained: dict[str, int] = {}
        for group in groups:
            scores = [self._shaped(rollout) for rollout in group.rollouts]
            advantages = group_advantages(scores, self.settings.advantage, self.settings.pass_at_k)
            rows += [(group, *pair) for pair in zip(group.rollouts, advantages, strict=True)]
            lengths = (len(rollout.answer.token_ids) for rollout in group.rollouts)
            trained[group.group_id] = sum(length for length, advantage in zip(lengths, advantages) if advantage)
        batch = TrainBatch(
            version=step,
            prompt_ids=[group.prompt_ids for group, _, _ in rows],
            answer_ids=[rollout.answer.token_ids for _, rollout, _ in rows],
            generator_logprobs=[rollout.answer.logprobs for _, rollout, _ in rows],
            token_versions=[rollout.answer.versions for _, rollout, _ in rows],
            advantages=[advantage for _, _, advantage in rows],
            routes=[rollout.answer.routes for _, rollout, _ in rows],
        )
        oldest = min((version for versions in batch.token_versions for version in versions), default=step)
        assert step - oldest <= self.settings.max_staleness, f"step {step} would train on a token of version {oldest}"
        return batch, trained

    def _shaped(self, rollout: Rollout) -> float | None:
        if rollout.score is None:
            return None
        settings, truncated = self.settings, rollout.answer.finish_reason == "length"
        length = rollout.num_begun + len(rollout.answer.token_ids)
        return rollout.score - overlong_penalty(
            length, settings.max_answer_tokens, settings.overlong_buffer, settings.overlong_penalty, truncated
        )

    def _record(
        self, step: int, places: Sequence[Place], outcomes: Sequence[Outcome], report: StepReport, waited: float,
        num_replayed: int, replayed: Counter[str],
    ) -> None:  # fmt: skip
        now = time.perf_counter()
        seconds = now - self.timings.last_step_end
        kept = [place.group for place in places if place.group]
        discarded = [group for place in places for group in place.discarded]
        metrics: dict[str, Any] = report.metrics | answer_metrics(kept, discarded, outcomes, self._shaped) | {
            "step": step + 1,
            "version": report.version,
            "time": time.time(),
            "staleness_counts": report.extras["staleness_counts"],
            "weights_moved": self.published[step + 1].digest != self.published[step].digest,
            "loop_lag_s": self.timings.loop_lag_s,
            "groups_replayed": num_replayed,
            "empty_slots": len(places) - len(kept),
            "groups_lost": dict(self.controller.lost),
            "late_answers": sum(self.controller.late.values()),
            "generated_tokens": self.generated_tokens,
            "trained_tokens": self.trained_tokens,
            "step_s": seconds,
            "learner_wait_share": waited / seconds,
            "generator_wait_share": sum(clock.taken() for clock in self.idle) / (seconds * len(self.idle)),
            "sync_ms": self.timings.sync_ms,
            "tokens_per_s": self.timings.generated_tokens / seconds,
        }  # fmt: skip
        metrics["trained_tokens_by_domain"] = dict(Counter(metrics["trained_tokens_by_domain"]) + replayed)
        metrics |= self.curriculum.metrics()
        self.timings.generated_tokens, self.timings.last_step_end, self.timings.loop_lag_s = 0, now, 0.0
        record = StepRecord(
            step=step + 1, metrics=metrics, groups=kept, discarded=discarded, outcomes=outcomes,
            renewed=self.curriculum.renewed, curriculum=self.curriculum,
        )  # fmt: skip
        self.on_step(record)
        self._act_on(self.health.observe(metrics), step + 1)

    def _act_on(self, findings: Sequence[Finding], step: int) -> None:
        for finding in findings:
            self.on_event("health", step=step, action=finding.action, metric=finding.metric, text=finding.text)
            if finding.action == "stop":
                raise HealthStop(f"step {step}: {finding.text}")
            if finding.action == "resync":
                self._events.put_nowait(protocol.Resync(finding.text))

    # --- Save ----------------------------------------------------------------------------------------------------

    def _state(self, state: protocol.State) -> RunState:
        return RunState(
            protocol=state,
            curriculum=self.curriculum.state(),
            places={slot: copy(place) for slot, place in self.places.items()},
            replayable=self.replayable,
            generated_tokens=self.generated_tokens,
            trained_tokens=self.trained_tokens,
        )

    async def _save(self, version: int, state: RunState) -> protocol.Event:
        """Ended by the learner's answer or its deadline, and by the disk."""
        if self.settings.save_every:
            partial = await asyncio.to_thread(self.states.open, version)
            await self.learner.save_state(str(partial / LEARNER))
            await asyncio.to_thread(self.states.publish, partial, state)
        return protocol.Saved(version)

    # --- generators ----------------------------------------------------------------------------------------------

    async def _sync(self, sync: protocol.Sync, expected: Published, repair: bool) -> protocol.Event:
        """Requests in flight go on with the new weights."""
        begin = time.perf_counter()
        generator = self.generators[sync.generator]
        try:
            report = await generator.take_weights(expected.location, sync.version, expected, repair)
        except SyncRefused as error:
            self.on_event("sync_refused", generator=sync.generator, version=sync.version, reason=str(error))
            return protocol.SyncFailed(sync, str(error))
        self.timings.sync_ms = (time.perf_counter() - begin) * 1e3
        if not report.probe_distance <= expected.probe.tolerance:
            raise HealthStop(
                f"generator {sync.generator} was sent the bytes of version {sync.version}, but answers the probe "
                f"otherwise than the learner: by {report.probe_distance:.3g} nats, {expected.probe.tolerance:g} allowed"
            )
        return protocol.SyncDone(sync, report.digest if report.version == sync.version else f"version {report.version}")

    async def _restart(self, restart: protocol.Restart) -> protocol.Event:
        begin = time.perf_counter()
        await self.generators[restart.generator].restart()
        seconds = round(time.perf_counter() - begin, 3)
        self.on_event("generator_up", generator=restart.generator, incarnation=restart.incarnation, seconds=seconds)
        return protocol.GeneratorUp(restart.generator, restart.incarnation)

    def _forget(self, version: int) -> None:
        self.published.pop(version, None)
        path = self._path(version)
        if os.path.exists(path):
            os.unlink(path)


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first; a cancelled neighbour is a consequence, not a cause."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
