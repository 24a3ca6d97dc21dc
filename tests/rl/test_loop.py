"""The loop on in-process stand-ins for engine and learner: the real controller, curriculum and grading path."""

import asyncio
import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from curricula import curriculum as make_curriculum
from curricula import levels

from rewards.task import Score, Task, Ungraded
from rl.curriculum import Curriculum
from rl.health import HealthMonitor, Limit
from rl.loop import AsyncLoop, HealthStop, LoopSettings, NothingGraded, TaskPool
from rl.run_state import LEARNER, RunStates
from rl.types import GeneratorGone, Probe, Published, SampledAnswer, StepReport, SyncRefused, SyncReport


def published(version):
    probe = Probe(prompt_ids=[1], label_ids=[2], logprobs=[-0.5], tolerance=0.1)
    return Published(digest=f"d{version}", probe=probe, location=f"v{version}")


class EchoGenerator:
    """Answers at once, with its version in every token's place."""

    def __init__(self, digest=None, fail_at=None, error=None):
        self.version, self.digest, self.fail_at, self.requests, self.restarts = None, digest, fail_at, 0, 0
        self.error = error or ConnectionError("engine gone")

    async def sample(self, request):
        self.requests += 1
        if self.fail_at == self.requests:
            raise self.error
        await asyncio.sleep(0)
        return [
            SampledAnswer(token_ids=[index], logprobs=[-1.0], versions=[self.version], finish_reason="stop")
            for index in range(request.num_samples)
        ]

    async def take_weights(self, path, version, expected, repair=False):
        self.version = version
        return SyncReport(version=version, num_tensors=1, digest=self.digest or expected.digest, pause_ms=0, load_ms=0)

    async def restart(self):
        self.restarts, self.version = self.restarts + 1, None


class LevelGenerator(EchoGenerator):
    """Right at levels below 3, wrong above, by turns at 3."""

    async def sample(self, request):
        answers = await super().sample(request)
        (level,) = request.prompt_ids
        return [
            dataclasses.replace(answer, token_ids=[int(level < 3 or level == 3 and index % 2)])
            for index, answer in enumerate(answers)
        ]


class CountingLearner:
    def __init__(self):
        self.batches, self.saved = [], []
        self.version = 0

    async def publish(self, path):
        return published(self.version)

    async def save(self, directory):
        self.saved.append((directory, self.version))

    async def save_state(self, path):
        Path(path).write_text(str(self.version))

    async def load_state(self, path):
        self.version = int(Path(path).read_text())

    async def step(self, batch, publish_to=None):
        self.batches.append(batch)
        self.version = batch.version + 1
        return StepReport(
            version=batch.version + 1, metrics={"loss": 0.0}, trained_tokens=4, published=published(batch.version + 1),
            extras={"staleness_counts": {}},
        )  # fmt: skip


def run(
    generator,
    learner,
    grade=lambda task, text: Score(float(text), "ok"),
    steps=3,
    max_staleness=1,
    lost=None,
    cells=1,
    states=None,
    save_every=0,
    limits=None,
    told=None,
    drawn=None,
    records=None,
    replay_steps=0,
    checkpoint_every=0,
    decode=lambda ids: str(ids[0]),
    **curriculum,
):
    settings = LoopSettings(
        groups_per_step=2,
        num_steps=steps,
        max_staleness=max_staleness,
        max_answer_tokens=8,
        temperature=1.0,
        stop_token_ids=(5,),
        advantage="rloo",
        overlong_penalty=0.0,
        weights_path="/nonexistent/v{version}",
        save_every=save_every,
        replay_steps=replay_steps,
        checkpoint_every=checkpoint_every,
        checkpoint_path="step-{step}",
    )
    drawn = {} if drawn is None else drawn  # (slot, turn) → entry

    def task_of(entry, slot, turn):
        assert drawn.setdefault((slot, turn), entry) == entry, "another life drew something else"
        task_id = f"{entry}/{slot}/{turn}"
        return Task(task_id=task_id, domain="maths", level=int(entry[-1]), prompt=entry, verifier="text")

    words = TaskPool(
        task_of=task_of,
        encode=lambda prompt: [int(prompt[-1])],
        decode=decode,
        grade=grade,
    )
    records, events, lost = [] if records is None else records, [], lost if lost is not None else []
    pool = levels(["maths"], cells)
    chooser = make_curriculum(pool, endless=True, seed=0, **{"group_size": 2, "decay": 1.0, "screen": 2} | curriculum)
    with ThreadPoolExecutor(1) as graders:
        loop = AsyncLoop(
            settings,
            words,
            chooser,
            generator if isinstance(generator, list) else [generator],
            learner,
            graders,
            states or RunStates(Path("/nonexistent")),
            HealthMonitor(limits or {}),
            on_step=records.append,
            on_lost=lost.append,
            on_event=lambda event, **said: (events.append(event), told is None or told.append(said)),
        )

        async def go():
            if states and (newest := states.newest()):
                rows = [record.metrics for record in records if record.step <= newest[0].protocol.version]
                await loop.resume(newest[0], str(newest[1] / LEARNER), rows)
            await asyncio.wait_for(loop.run(), 20)

        asyncio.run(go())
    loop.drawn = drawn
    return records, events, loop


def test_engines_begin_with_what_the_learner_makes_of_the_checkpoint():
    class Recording(EchoGenerator):
        taken = []

        async def take_weights(self, path, version, expected, repair=False):
            self.taken.append((self.requests, version, expected.digest))
            return await super().take_weights(path, version, expected)

    generator = Recording()
    run(generator, CountingLearner())
    assert generator.taken[0] == (0, 0, "d0"), "before the first request"
    with pytest.raises(HealthStop, match="version 0"):
        run(EchoGenerator(digest="other"), CountingLearner())


def test_every_step_consumes_its_groups_in_order():
    learner = CountingLearner()
    records, events, loop = run(EchoGenerator(), learner)
    assert [group.group_id for record in records for group in record.groups] == ["0", "1", "2", "3", "4", "5"]
    assert events == ["first_rollout", "first_step", "task_state"]
    assert learner.batches[0].advantages == [-1.0, 1.0, -1.0, 1.0]  # answers 0 and 1 score 0 and 1
    assert all(batch.version - v <= 1 for batch in learner.batches for row in batch.token_versions for v in row)
    assert list(loop.curriculum.difficulty.mean(np.array([0]))) == [0.5]
    assert [(one.slot, one.turn, one.passes, one.total, one.kept) for record in records for one in record.outcomes] == [
        (slot, 0, 1, 2, True) for slot in range(6)
    ]


def test_the_first_error_of_a_background_task_ends_the_run():
    with pytest.raises(ConnectionError, match="engine gone"):
        run(EchoGenerator(fail_at=3), CountingLearner())


def test_an_engine_with_other_weights_stops_the_run():
    class StaleFromVersion1(EchoGenerator):
        async def take_weights(self, path, version, expected, repair=False):
            return await super().take_weights(path, version, expected if version == 0 else published(0))

    with pytest.raises(HealthStop, match="holds digest d0 after it was given version 1; the learner published d1"):
        run(StaleFromVersion1(), CountingLearner())


def test_an_engine_that_was_sent_the_right_bytes_and_computes_something_else_stops_the_run():
    class Unpacked(EchoGenerator):
        async def take_weights(self, path, version, expected, repair=False):
            report = await super().take_weights(path, version, expected)
            return dataclasses.replace(report, probe_distance=0.2 if version == 2 else 0.0)

    with pytest.raises(HealthStop, match="bytes of version 2, but answers the probe otherwise .* by 0.2 nats"):
        run(Unpacked(), CountingLearner())


@pytest.mark.parametrize("generators", [1, 2])
def test_a_generator_that_dies_is_replaced_and_its_groups_are_sampled_again(generators):
    dying = EchoGenerator(fail_at=2, error=GeneratorGone("killed"))
    learner = CountingLearner()
    records, events, loop = run([dying, *(EchoGenerator() for _ in range(generators - 1))], learner)
    assert dying.restarts == 1 and events.count("generator_died") == 1 and events.count("generator_up") == 1
    assert [group.group_id for record in records for group in record.groups] == ["0", "1", "2", "3", "4", "5"]
    assert sum(loop.controller.lost.values()) >= 1
    assert records[-1].metrics["groups_lost"] == {"generator died: killed": sum(loop.controller.lost.values())}


def test_a_refused_sync_is_tried_again():
    class RefusesOnce(EchoGenerator):
        refused = False

        async def take_weights(self, path, version, expected, repair=False):
            if version == 1 and not self.refused:
                self.refused = True
                raise SyncRefused("not now")
            return await super().take_weights(path, version, expected)

    generator = RefusesOnce()
    records, events, _ = run(generator, CountingLearner())
    assert len(records) == 3 and events.count("sync_refused") == 1 and generator.restarts == 0


def test_what_is_drawn_does_not_depend_on_which_group_ends_first():
    class Shuffled(EchoGenerator):
        """Later requests end earlier, or the other way round."""

        def __init__(self, backwards):
            super().__init__()
            self.backwards = backwards

        async def sample(self, request):
            answers = await super().sample(request)
            slot = int(request.request_id.removeprefix("slot").split(".")[0])
            for _ in range((7 - slot if self.backwards else slot) * 5):
                await asyncio.sleep(0)
            return answers

    def drawn(backwards):
        loop = run(Shuffled(backwards), CountingLearner(), steps=6, cells=5)[2]
        return loop.drawn

    assert drawn(True) == drawn(False) and len(set(drawn(True).values())) > 1


def test_an_ungraded_answer_is_never_scored_zero():
    verdicts = iter([Ungraded("sandbox died"), Score(1.0, "ok")] * 100)
    learner = CountingLearner()
    records, _, _ = run(EchoGenerator(), learner, grade=lambda task, text: next(verdicts), steps=1)
    assert records[0].metrics["ungraded"] == 2 and records[0].metrics["reward_mean"] == 1.0
    assert not any(learner.batches[0].advantages)


def test_steps_of_which_nobody_could_grade_anything_end_the_run():
    lost, records = [], []
    with pytest.raises(NothingGraded, match="step 3, the 3rd in a row .* graded, the last for: sandbox died"):
        run(EchoGenerator(), CountingLearner(), grade=lambda task, text: Ungraded("sandbox died"), lost=lost,
            records=records)  # fmt: skip
    assert [record.metrics["ungraded"] for record in records] == [4, 4] and "pass_rate" not in records[0].metrics
    assert len(lost) >= 2 and all(rollout.score is None for group in lost for rollout in group.rollouts)


@pytest.mark.parametrize("gate, max_resamples", [("none", 3), ("dapo", 0), ("speed", 2)])
def test_a_task_that_nobody_can_grade_costs_its_slot_and_not_the_run(gate, max_resamples):
    """Its answers are drawn with the same seed whenever they are sampled again."""

    def grade(task, text):
        return Ungraded("the tests did not run") if task.level == 3 else Score(float(text) % 2, "ok")

    lost = []
    records, _, loop = run(EchoGenerator(), CountingLearner(), grade=grade, steps=12, cells=4, sampler="uniform",
                           gate=gate, max_resamples=max_resamples, screen=2, group_size=3, lost=lost)  # fmt: skip
    given_up = [group for record in records for group in record.discarded if group.task.level == 3]
    assert len(records) == 12 and given_up and all(answer.score is None for g in given_up for answer in g.rollouts)
    assert [group.group_id for group in lost] == list(dict.fromkeys(group.group_id for group in lost)), "once more each"
    assert {group.group_id for group in given_up} <= {group.group_id for group in lost}
    of_level = loop.curriculum.entries.id_of["maths/3"]
    assert loop.curriculum.difficulty.tried[of_level] == 0 and not loop.ungraded


def test_a_gradient_that_is_not_finite_stops_the_run():
    class Diverging(CountingLearner):
        async def step(self, batch, publish_to=None):
            report = await super().step(batch, publish_to)
            return dataclasses.replace(report, metrics={"loss": 0.0, "grad_norm": float("nan")})

    with pytest.raises(HealthStop, match="gradient norm is nan"):
        run(EchoGenerator(), Diverging())


# --- groups in parts ------------------------------------------------------------------------------------------------


def test_a_slot_without_signal_is_given_another_task_so_often_and_then_stays_empty():
    learner = CountingLearner()
    records, _, loop = run(LevelGenerator(), learner, cells=2, gate="dapo", max_resamples=2)
    assert [batch.advantages for batch in learner.batches] == [[], [], []], "an empty batch is a step all the same"
    for record in records:
        assert (len(record.groups), len(record.discarded)) == (0, 6) and record.metrics["empty_slots"] == 2
        assert (record.metrics["groups"], record.metrics["signal_share"]) == (6, 0.0)
        assert [(one.slot % 2, one.turn, one.kept) for one in record.outcomes] == [
            (slot, turn, False) for slot in (0, 1) for turn in (0, 1, 2)
        ]
    assert [group.group_id for group in records[0].discarded] == ["0", "0.1", "0.2", "1", "1.1", "1.2"]
    assert records[-1].metrics["generated_tokens"] == 3 * 6 * 2 == sum(r.metrics["discarded_tokens"] for r in records)
    assert sum(loop.curriculum.difficulty.passes) == 36 and loop.curriculum.sampled.total() == 18


def test_what_is_screened_is_part_of_the_group_and_what_is_screened_out_still_teaches():
    asked = []

    class Recording(LevelGenerator):
        async def sample(self, request):
            asked.append((request.request_id, request.prompt_ids[0], request.num_samples, request.seed))
            return await super().sample(request)

    learner = CountingLearner()
    records, _, loop = run(Recording(), learner, steps=6, cells=5, gate="speed", sampler="uniform", group_size=6,
                           screen=2, rare_answers=0.0, max_resamples=20)  # fmt: skip
    assert {size for _, level, size, _ in asked if level != 3} == {2}
    assert {size for _, level, size, _ in asked if level == 3} == {2, 4}
    assert len({seed for *_, seed in asked}) == len(asked), "the rest of a group repeats its beginning"
    for record, batch in zip(records, learner.batches):
        assert all(len(group.rollouts) == 6 and group.task.level == 3 for group in record.groups)
        assert len(batch.advantages) == 12 and batch.advantages.count(batch.advantages[0]) == 6
        assert all(len(group.rollouts) == 2 for group in record.discarded)
    outcomes = [one for record in records for one in record.outcomes]
    assert records[-1].metrics["generated_tokens"] == sum(one.tokens for one in outcomes)
    for entry in range(5):
        seen = [one for one in outcomes if one.choice.entry == f"maths/{entry + 1}"]
        assert loop.curriculum.difficulty.passes[entry] == sum(one.passes for one in seen)
        assert loop.curriculum.difficulty.fails[entry] == sum(one.total - one.passes for one in seen)


def test_a_group_whose_rest_nobody_could_grade_keeps_its_beginning():
    """Sampled again with the same seed the rest would be the same, and the run would end for one stubborn answer."""
    seen = []

    def grade(task, text):
        seen.append(text)
        return Ungraded("took too long") if len(seen) > 4 else Score(float(len(seen) % 2), "ok")  # 2 slots × 2 screened

    records, _, _ = run(EchoGenerator(), CountingLearner(), grade=grade, steps=1, max_staleness=0, gate="speed",
                        group_size=3, screen=2)  # fmt: skip
    assert [[rollout.score for rollout in group.rollouts] for group in records[0].groups] == [[1.0, 0.0, None]] * 2
    assert len(seen) == 6 and records[0].metrics["ungraded"] == 2


def test_a_generator_that_dies_with_the_rest_of_a_group_leaves_its_beginning():
    asked = []

    class Dying(LevelGenerator):
        async def sample(self, request):
            asked.append((request.request_id, request.num_samples))
            if len(asked) == 3:  # both screens are there
                raise GeneratorGone("killed")
            return await super().sample(request)

    records, events, _ = run(Dying(), CountingLearner(), steps=1, max_staleness=0, cells=3, gate="speed", group_size=5,
                             screen=2, rare_answers=99.0, max_resamples=0)  # fmt: skip
    assert events.count("generator_died") == 1
    sizes = [size for _, size in asked]
    assert sizes[:2] == [2, 2] and set(sizes[2:]) == {3}, "what was screened is not sampled again"
    assert all(len(group.rollouts) == 5 for group in (*records[0].groups, *records[0].discarded))


@pytest.mark.parametrize("gate", ["dapo", "speed"])
def test_without_staleness_a_run_does_not_depend_on_which_of_a_wave_ends_first(gate):
    """The engine's numbers depend on what it samples together, as a real one's do in their last bits."""

    class Batching(LevelGenerator):
        def __init__(self, order):
            super().__init__()
            self.order, self.waiting, self.batches = order, {}, []

        async def sample(self, request):
            answers = await super().sample(request)
            name, size = request.together
            batch = self.waiting.setdefault(name, {})
            batch[request.request_id] = request
            done = asyncio.Event()
            batch.setdefault("all here", []).append(done)
            if len(batch) == size + 1:
                for event in batch["all here"]:
                    event.set()
                together = tuple(sorted((one, batch[one].seed) for one in batch if one != "all here"))
                self.batches.append(together)
            await done.wait()
            noise = hash(tuple(sorted(batch[one].seed for one in batch if one != "all here"))) % 1000 / 1000
            for _ in range(self.order.randrange(50)):
                await asyncio.sleep(0)
            return [dataclasses.replace(answer, logprobs=[-1.0 - noise]) for answer in answers]

    def whole_run(seed):
        engine, learner = Batching(random.Random(seed)), CountingLearner()
        records, _, loop = run(engine, learner, steps=8, max_staleness=0, cells=5, gate=gate, group_size=4,
                               sampler="uniform", rare_answers=4.0, explore_share=0.1, park_below=0.2)  # fmt: skip
        return learner.batches, engine.batches, [record.outcomes for record in records], loop.curriculum.state()

    first, *others = [whole_run(seed) for seed in range(4)]
    assert all(other == first for other in others)
    assert len(first[1]) > 8, "there was but one wave a step"


@pytest.mark.parametrize("max_staleness, save_every", [(0, 1), (0, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("gate", ["none", "speed"])
def test_a_run_that_is_killed_again_and_again_trains_on_every_group_once_and_in_order(
    tmp_path, max_staleness, save_every, gate
):
    """Every life dies at its third step; what was trained after the last state is undone, and done again."""

    class Dying(CountingLearner):
        async def step(self, batch, publish_to=None):
            if len(self.batches) == save_every + 1 and batch.version < 7:
                raise ConnectionError("killed")
            return await super().step(batch, publish_to)

    decay = 1.0 if max_staleness else 0.9  # at what version a slot is leased again is a matter of when it was killed
    how = dict(steps=8, max_staleness=max_staleness, cells=5, gate=gate, group_size=4, rare_answers=2.0, decay=decay,
               explore_share=0.2, park_below=0.2, retire_above=0.8, retest_every=3, allocator="knapsack")  # fmt: skip
    states, history, drawn, lives, records = RunStates(tmp_path / "state"), {}, {}, 0, []
    while True:
        lives += 1
        learner = Dying()
        try:
            _, _, loop = run(LevelGenerator(), learner, states=states, save_every=save_every, drawn=drawn,
                             records=records, **how)  # fmt: skip
        except ConnectionError:
            history |= {batch.version: batch for batch in learner.batches}
            continue
        history |= {batch.version: batch for batch in learner.batches}
        break
    whole = CountingLearner()
    all_records, _, uninterrupted = run(LevelGenerator(), whole, **how)
    assert lives > 1 and sorted(history) == list(range(8))
    assert drawn == uninterrupted.drawn and not loop.places, "what was trained on is kept for ever"

    def told(record):
        return [dataclasses.replace(one, version=0) for one in record.outcomes]

    last = {record.step: record for record in records}
    assert [told(last[step + 1]) for step in range(8)] == [told(record) for record in all_records]
    assert any(record.discarded for record in all_records) == (gate == "speed")
    if max_staleness == 0:
        assert [history[step] for step in range(8)] == whole.batches
        assert loop.curriculum.state() == uninterrupted.curriculum.state()


class OneStepAhead(EchoGenerator):
    """Answers for a step once it holds the weights of the one before: no engine is faster than that."""

    async def sample(self, request):
        step = int(request.request_id.removeprefix("slot").split(".")[0]) // 2
        while self.version < step - 1:
            await asyncio.sleep(0)
        return await super().sample(request)


def test_a_resumed_run_is_judged_by_the_steps_before_it_too(tmp_path):
    """Five first steps without signal end a run; later ones do not, on either side of a kill."""

    class Dying(CountingLearner):
        async def step(self, batch, publish_to=None):
            if batch.version == 6:
                raise ConnectionError("killed")
            return await super().step(batch, publish_to)

    how = dict(steps=12, max_staleness=0, states=RunStates(tmp_path / "state"), save_every=1, records=[])
    with pytest.raises(ConnectionError):
        run(EchoGenerator(), Dying(), **how)
    run(EchoGenerator(), CountingLearner(), grade=lambda task, text: Score(0.0, "wrong"), **how)
    assert [record.metrics["signal_share"] for record in how["records"]] == [1.0] * 6 + [0.0] * 6


def test_a_group_with_signal_is_trained_on_again_until_a_token_of_it_is_too_old():
    learner = CountingLearner()
    records, _, _ = run(OneStepAhead(), learner, steps=6, max_staleness=2, replay_steps=2)
    for step, batch in enumerate(learner.batches):
        oldest = min(version for row in batch.token_versions for version in row)
        assert step - oldest <= 2
        assert len(batch.advantages) == 2 * (2 + records[step].metrics["groups_replayed"])
        assert len(records[step].groups) == 2, "what is replayed is nobody's news"
    replayed = [record.metrics["groups_replayed"] for record in records]
    assert replayed[0] == 0 and all(count >= 2 for count in replayed[1:]), replayed
    assert records[-1].metrics["generated_tokens"] == 6 * 2 * 2


def test_floors_count_what_is_trained_on_again():
    every = lambda task, text: Score(float(task.domain == "maths" and text == "0"), "ok")  # noqa: E731
    records, _, loop = run(OneStepAhead(), CountingLearner(), every, steps=3, max_staleness=2, replay_steps=2)
    again = [record.metrics["groups_replayed"] for record in records]
    trained = [record.metrics["trained_tokens_by_domain"] for record in records]
    assert again[0] == 0 < again[2]
    for count, tokens in zip(again, trained):  # two fresh groups of two answers of a token each
        assert tokens == {"maths": 2 * (2 + count)}
    expected = 0.0
    for tokens in trained:
        expected = 0.8 * expected + tokens["maths"]
    assert loop.curriculum.mix.tokens["maths"] == pytest.approx(expected)


def test_a_group_without_signal_is_not_replayed():
    every = lambda task, text: Score(1.0, "ok")  # noqa: E731
    records, _, _ = run(EchoGenerator(), CountingLearner(), every, steps=4, max_staleness=2, replay_steps=2)
    assert {record.metrics["groups_replayed"] for record in records} == {0}


def test_checkpoints_on_the_way_are_of_the_step_that_they_are_named_after():
    learner = CountingLearner()
    run(EchoGenerator(), learner, steps=5, checkpoint_every=2)
    assert learner.saved == [("step-2", 2), ("step-4", 4)]


def test_an_answer_that_is_begun_for_the_engine_is_graded_whole_and_trained_on_from_there(monkeypatch):
    whole = Curriculum.plan
    monkeypatch.setattr(Curriculum, "plan", lambda self, slots: [
        [dataclasses.replace(choice, prefix=(1, 6, 7)) for choice in turns] for turns in whole(self, slots)
    ])  # fmt: skip
    asked, learner = [], CountingLearner()

    class Recording(EchoGenerator):
        async def sample(self, request):
            asked.append(request)
            return await super().sample(request)

    # "1" is the prefix's first token: every answer would be right, were the prefix all that is graded.
    records, _, loop = run(Recording(), learner, grade=lambda task, text: Score(float(text.split()[-1]), "ok"),
                           decode=lambda ids: " ".join(map(str, ids)))  # fmt: skip
    assert all(request.prompt_ids == [1, 1, 6, 7] and request.max_tokens == 8 - 3 for request in asked)
    assert learner.batches[0].prompt_ids == [[1, 1, 6, 7]] * 4 and learner.batches[0].answer_ids == [[0], [1]] * 2
    assert records[0].groups[0].rollouts[1].text == "1 6 7 1" and records[0].metrics["reused_tokens"] == 3 * 4
    loop.settings = dataclasses.replace(loop.settings, overlong_penalty=1.0, overlong_buffer=8)
    assert loop._shaped(records[0].groups[0].rollouts[1]) == 1.0 - 4 / 8, "four of eight tokens, three of them given"
    assert records[0].outcomes[0].right == (1, 6, 7, 1) and records[0].metrics["generated_tokens"] >= 4


def test_a_number_past_its_limit_is_told_then_engines_get_their_weights_again_then_the_run_stops():
    class Mismatched(CountingLearner):
        async def step(self, batch, publish_to=None):
            report = await super().step(batch, publish_to)
            return dataclasses.replace(report, metrics={"loss": 0.0, "grad_norm": 1.0, "mismatch_k3": 9.0})

    taken, events = [], []

    class Recording(EchoGenerator):
        async def take_weights(self, path, version, expected, repair=False):
            taken.append((version, repair))
            return await super().take_weights(path, version, expected)

    limits = {"mismatch_k3": Limit(warn=0.1, stop=1.0, resync=True)}
    with pytest.raises(HealthStop, match="step 3: mismatch_k3 is 9, above 1 for 3 steps"):
        run(Recording(), Mismatched(), steps=9, max_staleness=0, limits=limits, told=events)
    assert [event["action"] for event in events if "action" in event] == ["resync", "warn", "stop"]
    assert taken == [(0, False), (0, True), (1, False), (2, False)], "what it has is given again, once, as a repair"
