"""The vLLM engine on a CPU: what it says about its tokens, and what a weight update does to it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_checkpoints import VOCABULARY, save_dense, save_llama4

from rl.generator import VllmGenerator
from rl.types import EngineSettings, Probe, Published, SampledAnswer, SampleRequest
from rl.weight_stream import WeightServer
from rl.weight_sync import WeightsRefused, publish_weights

pytestmark = pytest.mark.timeout(300)
SAVE = {"llama4": save_llama4, "dense": save_dense}


class Engine:
    """A started generator with an event loop of its own, so that tests read straight."""

    def __init__(self, checkpoint: Path) -> None:
        self.runner = asyncio.Runner()
        settings = EngineSettings(checkpoint=str(checkpoint), max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25)
        self.generator = VllmGenerator(settings, "under-test")
        self.seconds = self.run(self.generator.start())

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def greedy(self) -> list[SampledAnswer]:
        """Eight prompts one after the other, so that every batch is the same in every engine."""
        draw = random.Random(0)
        lengths = (1, 3, 17, 40, 64, 65, 100, 150)
        prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
        return [self.sample(prompt, temperature=0.0, max_tokens=24)[0] for prompt in prompts]

    def sample(self, prompt_ids: list[int], **settings) -> list[SampledAnswer]:
        return self.run(self.generator.sample(request(prompt_ids, **settings)))

    def close(self) -> None:
        self.generator.stop()
        self.runner.close()


def request(prompt_ids: list[int], **settings) -> SampleRequest:
    return SampleRequest(**{"request_id": "r", "prompt_ids": prompt_ids, "num_samples": 1, "max_tokens": 24} | settings)


def same_tokens_and_logprobs(one: list[SampledAnswer], other: list[SampledAnswer]) -> bool:
    return [(a.token_ids, a.logprobs) for a in one] == [(a.token_ids, a.logprobs) for a in other]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {f"{kind}-{which}": save(root / f"{kind}-{which}", seed)
            for kind, save in SAVE.items() for seed, which in enumerate("ab")}  # fmt: skip


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(checkpoints["llama4-a"])
    yield engine
    engine.close()


def log_probabilities(checkpoint: Path, token_ids: list[int], temperature: float):
    """transformers' log-probabilities at every position, (T, V) float32: another implementation of the same model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return (model(torch.tensor([token_ids])).logits[0] / temperature).log_softmax(-1)


def test_logprobs_are_those_of_the_distribution_sampled_from(engine: Engine, checkpoints: dict[str, Path]) -> None:
    engine.run(engine.generator.take_weights(str(checkpoints["llama4-a"]), 0))
    prompt = [1, 5, 9, 40, 7]
    (answer,) = engine.sample(prompt, temperature=0.7, max_tokens=100)  # past the attention chunk of 64
    assert len(answer.token_ids) == len(answer.logprobs) == len(answer.versions)
    reference = log_probabilities(checkpoints["llama4-a"], prompt + answer.token_ids, temperature=0.7)
    expected = [float(reference[len(prompt) - 1 + i, token]) for i, token in enumerate(answer.token_ids)]
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)
    untempered = log_probabilities(checkpoints["llama4-a"], prompt + answer.token_ids, temperature=1.0)
    wrong = [float(untempered[len(prompt) - 1 + i, token]) for i, token in enumerate(answer.token_ids)]
    assert max(abs(a - b) for a, b in zip(answer.logprobs, wrong, strict=True)) > 0.05  # the tempting mistake


def test_score_labels_gives_next_token_logprobs_over_the_whole_vocabulary(
    engine: Engine, checkpoints: dict[str, Path]
) -> None:
    engine.run(engine.generator.take_weights(str(checkpoints["llama4-a"]), 0))
    prompts, labels = [[1, 5, 9], [4, 4, 200, 17, 3]], [7, 300, 11]
    scores = engine.run(engine.generator.score_labels(prompts, labels))
    for prompt, row in zip(prompts, scores, strict=True):
        reference = log_probabilities(checkpoints["llama4-a"], prompt, temperature=1.0)[-1]
        assert row == pytest.approx([float(reference[label]) for label in labels], abs=1e-4)


def test_stop_token_ends_the_answer_and_is_part_of_it(engine: Engine) -> None:
    (free,) = engine.sample([1, 5, 9], temperature=0.0, max_tokens=12)
    stop = free.token_ids[4]
    (stopped,) = engine.sample([1, 5, 9], temperature=0.0, max_tokens=12, stop_token_ids=(stop,))
    cut = free.token_ids.index(stop) + 1
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:cut], "stop")
    assert free.finish_reason == "length"


def test_prompt_too_long_is_refused_with_both_numbers_and_the_engine_lives(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"the prompt has 250 tokens; with max_tokens 24 and max_model_len 256"):
        engine.sample([1] * 250)
    assert engine.sample([1] * 232)[0].token_ids


def test_seeded_requests_repeat_and_survive_more_prompt_tokens_than_one_step_computes(engine: Engine) -> None:
    prompts = [[1 + i % 400] * 200 for i in range(60)]  # 12 000 prompt tokens at once

    async def all_at_once() -> list[list[SampledAnswer]]:
        requests = (request(prompt, seed=i, max_tokens=8) for i, prompt in enumerate(prompts))
        return await asyncio.gather(*(engine.generator.sample(one) for one in requests))

    first, again = engine.run(all_at_once()), engine.run(all_at_once())
    assert [a[0].token_ids for a in first] == [a[0].token_ids for a in again]


def test_samples_of_one_request_differ_and_repeat_with_its_seed(engine: Engine) -> None:
    first = [answer.token_ids for answer in engine.sample([1, 5, 9], num_samples=4, seed=3)]
    assert len({tuple(ids) for ids in first}) == 4
    assert [answer.token_ids for answer in engine.sample([1, 5, 9], num_samples=4, seed=3)] == first
    assert [answer.token_ids for answer in engine.sample([1, 5, 9], num_samples=4, seed=4)] != first


def test_unseeded_sampling_restarts_with_seed_and_version(engine: Engine, checkpoints: dict[str, Path]) -> None:
    def draw(version: int, seed: int) -> list[int]:
        engine.run(engine.generator.take_weights(str(checkpoints["llama4-a"]), version, seed=seed))
        return engine.sample([1, 5, 9])[0].token_ids

    first = draw(version=3, seed=11)
    assert draw(version=3, seed=11) == first
    assert draw(version=4, seed=11) != first
    assert draw(version=3, seed=12) != first


@pytest.mark.parametrize("kind", ["llama4", "dense"])
def test_after_an_update_the_engine_equals_a_fresh_one_bit_for_bit(
    kind: str, engine: Engine, checkpoints: dict[str, Path]
) -> None:
    updated = engine if kind == "llama4" else Engine(checkpoints["dense-a"])
    old, new = checkpoints[f"{kind}-a"], checkpoints[f"{kind}-b"]
    updated.run(updated.generator.take_weights(str(old), 0))
    before = updated.greedy()
    report = updated.run(updated.generator.take_weights(str(new / "model.safetensors"), 1))
    after = updated.greedy()
    updated.run(updated.generator.take_weights(str(old), 2))
    assert same_tokens_and_logprobs(updated.greedy(), before)  # there and back
    if updated is not engine:
        updated.close()

    fresh = Engine(new)
    expected = fresh.greedy()
    fresh.close()
    assert same_tokens_and_logprobs(after, expected)
    assert not same_tokens_and_logprobs(before, expected)
    assert {version for answer in after for version in answer.versions} == {1}
    assert report.version == 1 and report.num_tensors > 0


def test_requests_in_flight_go_on_and_carry_both_versions(engine: Engine, checkpoints: dict[str, Path]) -> None:
    generator = engine.generator
    engine.run(generator.take_weights(str(checkpoints["llama4-a"]), 7))

    async def update_in_mid_flight() -> list[SampledAnswer]:
        flying = [asyncio.ensure_future(generator.sample(request([1, 5, 9 + i], max_tokens=240))) for i in range(16)]
        while generator.version == 7:
            await asyncio.sleep(0.15)
            await generator.take_weights(str(checkpoints["llama4-b"]), 8)
        return [answers[0] for answers in await asyncio.gather(*flying)]

    answers = engine.run(update_in_mid_flight())
    assert all(len(answer.token_ids) == 240 or answer.finish_reason == "stop" for answer in answers)
    assert all(len(answer.versions) == len(answer.token_ids) for answer in answers)
    assert all(answer.versions == sorted(answer.versions) for answer in answers)
    assert any(set(answer.versions) == {7, 8} for answer in answers)


def test_the_probe_goes_before_whatever_waits(engine: Engine, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    generator, full = engine.generator, engine.generator.settings.max_num_seqs
    path = tmp_path / "weights.safetensors"
    digest = publish_weights(load_file(checkpoints["llama4-b"] / "model.safetensors").items(), path)
    probe = Probe(prompt_ids=[1], label_ids=[2], logprobs=[-1.0], tolerance=1.0)
    expected = Published(digest=digest, probe=probe, location=str(path))

    async def finished_when_the_probe_is_answered() -> int:
        lengths = [*range(40, 40 + full), *[200] * full]  # as many again as the engine can take wait
        flying = [asyncio.ensure_future(generator.sample(request([1, 5], max_tokens=length))) for length in lengths]
        await asyncio.sleep(0)  # all are asked
        assert (await generator.health())["in_flight"] == 2 * full
        await generator.take_weights(str(path), 9, expected)
        finished = sum(one.done() for one in flying)
        for one in flying:
            one.cancel()
        await asyncio.gather(*flying, return_exceptions=True)
        return finished

    # Last in the queue it would be answered when all of the first, and some of the others, are done.
    assert engine.run(finished_when_the_probe_is_answered()) < full // 2


def test_update_that_is_not_exactly_this_model_is_refused_and_changes_nothing(
    engine: Engine, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    generator = engine.generator
    engine.run(generator.take_weights(str(checkpoints["llama4-a"]), 5))
    before = engine.greedy()
    whole = load_file(checkpoints["llama4-b"] / "model.safetensors")
    name = "model.layers.1.feed_forward.router.weight"
    wrong = {
        rf"1 missing \({name}\)": {key: tensor for key, tensor in whole.items() if key != name},
        r"1 unknown \(model.extra\)": whole | {"model.extra": whole[name].clone()},
        "1 of another shape": whole | {name: whole[name][:-1].contiguous()},
    }
    for message, tensors in wrong.items():
        publish_weights(tensors.items(), tmp_path / "wrong.safetensors")
        with pytest.raises(WeightsRefused, match=message):
            engine.run(generator.take_weights(str(tmp_path / "wrong.safetensors"), 6))
    with pytest.raises(WeightsRefused, match="was announced"):
        probe = Probe(prompt_ids=[1], label_ids=[2], logprobs=[-1.0], tolerance=1.0)
        announced = Published(digest="0" * 64, probe=probe, location=str(checkpoints["llama4-b"]))
        engine.run(generator.take_weights(announced.location, 6, announced))
    with pytest.raises(WeightsRefused, match="no safetensors weights"):
        engine.run(generator.take_weights(str(tmp_path / "absent"), 6))
    after = engine.greedy()
    assert same_tokens_and_logprobs(after, before)
    assert {version for answer in after for version in answer.versions} == {5}
    assert engine.run(generator.health())["version"] == 5

    digest = publish_weights(whole.items(), tmp_path / "right.safetensors")
    expected = Published(digest=digest, probe=probe, location=str(tmp_path / "right.safetensors"))
    report = engine.run(generator.take_weights(expected.location, 6, expected))
    assert report.digest == digest and report.num_tensors == len(whole) and report.probe_distance > 0


def test_weights_from_a_server_are_taken_like_those_of_a_file_or_refused_whole(
    engine: Engine, checkpoints: dict[str, Path]
) -> None:
    server = WeightServer(checkpoints["llama4-b"], "127.0.0.1")
    served, generator = server.location("model.safetensors"), engine.generator
    read = engine.run(generator.take_weights(str(checkpoints["llama4-b"]), 5))
    from_file = engine.greedy()
    engine.run(generator.take_weights(str(checkpoints["llama4-a"]), 6))
    before = engine.greedy()
    assert not same_tokens_and_logprobs(before, from_file)
    for location, message in {
        server.location("absent"): "no safetensors weights",
        served.replace(server.token, "0" * 32): "wrong token",
        served.replace(f":{server.port}", ":1"): "did not arrive whole from 127.0.0.1:1",
    }.items():
        with pytest.raises(WeightsRefused, match=message):
            engine.run(generator.take_weights(location, 7))
    assert same_tokens_and_logprobs(engine.greedy(), before)
    streamed = engine.run(generator.take_weights(served, 7))
    assert (streamed.digest, streamed.num_tensors) == (read.digest, read.num_tensors)
    assert same_tokens_and_logprobs(engine.greedy(), from_file)
    server.stop()


def test_cancelled_request_leaves_the_engine_free(engine: Engine) -> None:
    async def cancel_soon() -> None:
        task = asyncio.ensure_future(engine.generator.sample(request([1, 2, 3], num_samples=8, max_tokens=240)))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    engine.run(cancel_soon())
    assert engine.run(engine.generator.health())["in_flight"] == 0
    assert engine.sample([1, 2, 3])[0].token_ids


def test_kv_cache_too_small_for_one_sequence_is_refused_with_what_is_needed(checkpoints: dict[str, Path]) -> None:
    settings = EngineSettings(checkpoint=str(checkpoints["llama4-a"]), max_model_len=256)
    with pytest.raises(ValueError, match="kv_cache_gib: 0.0001 holds no sequence of max_model_len 256"):
        asyncio.run(VllmGenerator(replace(settings, kv_cache_gib=0.0001), "small").start())
