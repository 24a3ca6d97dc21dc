"""The loop on in-process stand-ins for engine and learner: the real controller, curriculum and grading path."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards.task import Score, Task, Ungraded
from rl.curriculum import Curriculum
from rl.loop import AsyncLoop, HealthStop, LoopSettings, NothingGraded, TaskPool, WeightsDiffer
from rl.types import SampledAnswer, StepReport, SyncReport


class EchoGenerator:
    """Answers at once, with its version in every token's place."""

    def __init__(self, digest=None, fail_at=None):
        self.version, self.digest, self.fail_at, self.requests = 0, digest, fail_at, 0

    async def sample(self, request):
        self.requests += 1
        if self.fail_at == self.requests:
            raise ConnectionError("engine gone")
        await asyncio.sleep(0)
        return [
            SampledAnswer(token_ids=[index], logprobs=[-1.0], versions=[self.version], finish_reason="stop")
            for index in range(request.num_samples)
        ]

    async def take_weights(self, path, version, expected_digest=None):
        self.version = version
        return SyncReport(version=version, num_tensors=1, digest=self.digest or expected_digest, pause_ms=0, load_ms=0)


class CountingLearner:
    def __init__(self):
        self.batches = []

    async def publish(self, path):
        return "d0"

    async def step(self, batch, publish_to=None):
        self.batches.append(batch)
        extras = {"digest": f"d{batch.version + 1}", "staleness_counts": {}}
        return StepReport(version=batch.version + 1, metrics={"loss": 0.0}, trained_tokens=4, extras=extras)


def run(
    generator,
    learner,
    grade=lambda task, text: Score(float(text), "ok"),
    steps=3,
    max_staleness=1,
    lost=None,
    publish_first=False,
):
    settings = LoopSettings(
        groups_per_step=2,
        group_size=2,
        num_steps=steps,
        max_staleness=max_staleness,
        max_answer_tokens=8,
        temperature=1.0,
        stop_token_ids=(5,),
        advantage="rloo",
        overlong_penalty=0.0,
        weights_path="/nonexistent/v{version}",
    )
    pool = TaskPool(
        task_of=lambda cell, slot: Task(task_id=f"{cell}/{slot}", domain="maths", level=1, prompt="p", verifier="text"),
        encode=lambda prompt: [1],
        decode=lambda ids: str(ids[0]),
        grade=grade,
    )
    records, events, lost = [], [], lost if lost is not None else []
    curriculum = Curriculum({"maths/1": "maths"}, kind="uniform", band=(0.2, 0.8), decay=1.0, explore_share=0.0, seed=0)
    with ThreadPoolExecutor(1) as graders:
        loop = AsyncLoop(
            settings,
            pool,
            curriculum,
            [generator],
            learner,
            graders,
            on_step=records.append,
            on_lost=lost.append,
            on_event=lambda event, **_: events.append(event),
        )
        asyncio.run(asyncio.wait_for(loop.run(publish_first), 20))
    return records, events, loop


def test_engines_begin_with_what_the_learner_makes_of_the_checkpoint_if_asked():
    class Recording(EchoGenerator):
        taken = []

        async def take_weights(self, path, version, expected_digest=None):
            self.taken.append((self.requests, version, expected_digest))
            return await super().take_weights(path, version, expected_digest)

    generator = Recording()
    run(generator, CountingLearner(), publish_first=True)
    assert generator.taken[0] == (0, 0, "d0"), "before the first request"
    with pytest.raises(WeightsDiffer, match="version 0"):
        run(EchoGenerator(digest="other"), CountingLearner(), publish_first=True)


def test_every_step_consumes_its_groups_in_order():
    learner = CountingLearner()
    records, events, loop = run(EchoGenerator(), learner)
    assert [group.group_id for record in records for group in record.groups] == ["0", "1", "2", "3", "4", "5"]
    assert events == ["first_rollout", "first_step"]
    assert learner.batches[0].advantages == [-1.0, 1.0, -1.0, 1.0]  # answers 0 and 1 score 0 and 1
    assert all(batch.version - v <= 1 for batch in learner.batches for row in batch.token_versions for v in row)
    assert loop.curriculum.posteriors["maths/1"].mean == pytest.approx(0.5)


def test_the_first_error_of_a_background_task_ends_the_run():
    with pytest.raises(ConnectionError, match="engine gone"):
        run(EchoGenerator(fail_at=3), CountingLearner())


def test_an_engine_with_other_weights_stops_the_run():
    with pytest.raises(WeightsDiffer, match="d1"):
        run(EchoGenerator(digest="stale"), CountingLearner())


def test_an_ungraded_answer_is_never_scored_zero():
    verdicts = iter([Ungraded("sandbox died"), Score(1.0, "ok")] * 100)
    learner = CountingLearner()
    records, _, _ = run(EchoGenerator(), learner, grade=lambda task, text: next(verdicts), steps=1)
    assert records[0].metrics["ungraded"] == 2 and records[0].metrics["reward_mean"] == 1.0
    assert not any(learner.batches[0].advantages)


def test_a_group_nobody_could_grade_is_leased_again_then_given_up():
    from rl.controller import LeaseExhausted

    lost = []
    with pytest.raises((LeaseExhausted, NothingGraded), match="sandbox died"):
        run(EchoGenerator(), CountingLearner(), grade=lambda task, text: Ungraded("sandbox died"), lost=lost)
    assert len(lost) >= 3 and all(rollout.score is None for group in lost for rollout in group.rollouts)


def test_a_gradient_that_is_not_finite_stops_the_run():
    class Diverging(CountingLearner):
        async def step(self, batch, publish_to=None):
            report = await super().step(batch, publish_to)
            return dataclasses.replace(report, metrics={"loss": 0.0, "grad_norm": float("nan")})

    with pytest.raises(HealthStop, match="gradient norm is nan"):
        run(EchoGenerator(), Diverging())
