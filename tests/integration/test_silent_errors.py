"""Errors that raise nothing, injected into a real engine and a real learner: each must be seen within three steps.

Every one of them leaves a run that goes on, with plausible rewards, and trains on lies. Each test says that its fault
really happened. What sees it: the digest, the probe after every sync, or the mismatch of engine and learner at the same
version, through the same monitor that stops a run.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import rl.batcher
import rl.generator
from rl.generator import VllmGenerator
from rl.health import DEFAULT_LIMITS, HealthMonitor
from rl.learner import LearnerSettings, PolicyLearner
from rl.losses import Objective
from rl.types import EngineSettings, SampledAnswer, SampleRequest, TrainBatch

pytestmark = pytest.mark.timeout(600)
STEPS = 3  # within which every fault must be seen
BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_base"


@dataclass
class Pair:
    """An engine and a learner, and one step of stage 2 between them."""

    generator: VllmGenerator
    runner: asyncio.Runner
    folder: Path
    learner: PolicyLearner

    def renew(self) -> None:
        """Both as the shipped checkpoint has them."""
        self.inject("")
        self.learner = PolicyLearner(SETTINGS)
        self.learner.start()
        report = self.sync()
        assert report < 1e-4, "the pair is not sound to begin with"

    def restart(self) -> None:
        """Another engine: infinities that a broken one has left in its cache are masked, and still multiplied."""
        self.runner.run(self.generator.restart(self.generator.settings))

    def inject(self, fault: str) -> None:
        self.runner.run(self.generator._engine.collective_rpc("inject", args=(fault,)))

    def happened(self) -> int:
        return self.runner.run(self.generator._engine.collective_rpc("faults_happened"))[0]

    def sync(self, repair: bool = False) -> float:
        """The distance of the engine from the learner on the probe."""
        path = self.folder / f"v{self.learner.version}.safetensors"
        published = self.learner.publish(str(path))
        report = self.runner.run(self.generator.take_weights(str(path), self.learner.version, published, repair))
        assert report.digest == published.digest
        return report.probe_distance / published.probe.tolerance

    def sample(self, temperature: float = 1.0, replay: bool = False) -> TrainBatch:
        prompts = [[1, 5 + i, 9, 40 + i, 7, 30] for i in range(8)]

        requests = [
            SampleRequest(request_id=f"{i}", prompt_ids=prompt, num_samples=4, max_tokens=24, temperature=temperature)
            for i, prompt in enumerate(prompts)
        ]

        async def answers() -> list[list[SampledAnswer]]:
            return await asyncio.gather(*map(self.generator.sample, requests))

        rows = [(p, answer) for p, group in zip(prompts, self.runner.run(answers())) for answer in group]
        return TrainBatch(
            version=self.learner.version,
            prompt_ids=[prompt for prompt, _ in rows],
            answer_ids=[answer.token_ids for _, answer in rows],
            generator_logprobs=[answer.logprobs for _, answer in rows],
            token_versions=[answer.versions for _, answer in rows],
            advantages=[1.0 if row % 2 else -1.0 for row in range(len(rows))],
            routes=[answer.routes for _, answer in rows] if replay else None,
        )


SETTINGS = LearnerSettings(
    checkpoint=str(BASE), dtype="float32", learning_rate=2e-3, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
    micro_batch_tokens=4096, temperature=1.0, router_policy="train", router_learning_rate_scale=1.0, balance_coef=0.0,
    z_coef=0.0, objective=Objective(), longest_answer=24, seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    patch = pytest.MonkeyPatch()
    patch.setattr(rl.generator, "EXTENSION", "faulty_extension.FaultyExtension")
    # A cache, as judges have it: salted by version, so that it does no harm unless a test breaks the salt.
    settings = EngineSettings(
        checkpoint=str(BASE), max_num_seqs=32, kv_cache_gib=0.25, prefix_caching=True, record_routes=True
    )
    generator = VllmGenerator(settings, "under-test")
    with asyncio.Runner() as runner:
        try:
            runner.run(generator.start())
            learner = PolicyLearner(SETTINGS)
            learner.start()
            yield Pair(generator, runner, tmp_path_factory.mktemp("weights"), learner)
        finally:
            generator.stop()
            patch.undo()


def first_seen(pair: Pair, corrupt: Callable[[TrainBatch], TrainBatch] = lambda batch: batch, **sample: Any) -> str:
    """What saw something within STEPS steps, and in which; empty if nothing did."""
    monitor = HealthMonitor(DEFAULT_LIMITS)
    for step in range(1, STEPS + 1):
        if pair.sync() > 1:
            return f"probe, step {step}"
        report = pair.learner.step(corrupt(pair.sample(**sample)))
        found = [one for one in monitor.observe(report.metrics) if one.action != "warn"]
        if found:
            return f"{found[-1].metric}, step {step}"
    return ""


def test_a_sound_pair_is_left_alone(pair: Pair) -> None:
    pair.renew()
    assert first_seen(pair) == ""


@pytest.mark.parametrize(
    "fault", ["a tensor is dropped", "experts transposed", "w1 and w3 swapped", "experts not packed again"]
)
def test_a_sync_that_goes_wrong_inside_the_engine_is_seen_by_the_probe(pair: Pair, fault: str) -> None:
    pair.renew()
    pair.learner.step(pair.sample())  # weights that are not the engine's yet
    pair.inject(fault)
    seen = first_seen(pair)
    assert pair.happened() > 0, "the fault did not happen"
    print(f"{fault}: {seen}")
    pair.restart()
    assert seen


def test_a_cache_that_outlives_its_weights_is_seen_by_the_probe(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.renew()
    monkeypatch.setattr(pair.generator, "_cache_salt", lambda: "always the same")
    pair.sync()  # leaves the probe's keys and values in the cache
    pair.learner.step(pair.sample())
    seen = first_seen(pair)
    print(f"stale cache: {seen}")
    assert seen.startswith("probe")


def test_what_a_broken_engine_left_in_its_cache_goes_when_it_is_given_its_weights_again(pair: Pair) -> None:
    """Infinities of a block's unused places are masked, and multiplied with zero all the same."""
    pair.renew()
    assert pair.runner.run(pair.generator._engine.collective_rpc("poison_cache"))[0] > 0
    pair.sync()
    assert not pair.learner.step(pair.sample()).metrics["mismatch_k3"] < 1e-6, "the cache does no harm"
    pair.learner = PolicyLearner(SETTINGS)
    pair.learner.start()
    assert pair.sync(repair=True) < 1
    assert pair.learner.step(pair.sample()).metrics["mismatch_k3"] < 1e-6


def shifted(batch: TrainBatch) -> TrainBatch:
    return dataclasses.replace(batch, generator_logprobs=[row[1:] + row[:1] for row in batch.generator_logprobs])


def test_log_probabilities_that_are_off_by_one_token_are_seen_by_the_mismatch(pair: Pair) -> None:
    pair.renew()
    seen = first_seen(pair, corrupt=shifted)
    print(f"shifted log-probabilities: {seen}")
    assert seen.startswith(("mismatch", "mean_exp"))


def test_another_temperature_than_the_learner_believes_is_seen_by_the_mismatch(pair: Pair) -> None:
    pair.renew()
    seen = first_seen(pair, temperature=0.5)
    print(f"wrong temperature: {seen}")
    assert seen.startswith(("mismatch", "mean_exp"))


def test_a_mask_that_is_off_by_one_token_is_seen_by_the_mismatch(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real, moved = rl.batcher.micro_batches, []

    def wrong(batch: TrainBatch, max_tokens: int, **_: Any) -> list[rl.batcher.MicroBatch]:
        cuts = real(batch, max_tokens)
        moved.extend(cuts)
        return [dataclasses.replace(cut, answer_BS=cut.answer_BS.roll(-1, dims=1)) for cut in cuts]

    pair.renew()
    monkeypatch.setattr(rl.batcher, "micro_batches", wrong)
    seen = first_seen(pair)
    print(f"wrong mask: {seen}")
    assert moved and seen.startswith(("mismatch", "mean_exp"))


def delayed(batch: TrainBatch) -> TrainBatch:
    assert batch.routes is not None
    routes = [[row[0], *row[:-1]] for row in batch.routes if row]
    assert routes != batch.routes
    return dataclasses.replace(batch, routes=routes)


def test_routes_that_are_replayed_off_by_one_token_are_seen_by_the_agreement(pair: Pair) -> None:
    pair.renew()
    batch = pair.sample(replay=True)
    assert batch.routes is not None
    for prompt, answer, routes in zip(batch.prompt_ids, batch.answer_ids, batch.routes):
        assert routes and len(routes) == len(prompt) + len(answer) - 1 and len(routes[0]) == 2
    sound = pair.learner.step(batch).metrics
    assert sound["router/agreement"] > 0.999, "the engine's routes are not the learner's"
    assert sound["router_replay_missing"] == sum(1 for row in batch.routes) and sound["mismatch_k3"] < 1e-6
    pair.renew()
    seen = first_seen(pair, corrupt=delayed, replay=True)
    print(f"replay off by one: {seen}")
    assert seen.startswith(("router/agreement", "mismatch", "mean_exp"))
