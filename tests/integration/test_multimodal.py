"""A multimodal Llama 4 in stage 2: the engine runs its text model, and what is streamed and saved stays the whole."""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm_checkpoints import TEXT, VOCABULARY, save_multimodal
from vllm_loader import loaded_by_vllm

from model.checkpoint import load_policy, stored_weights
from model.tensor_map import MULTIMODAL, NOT_TEXT, parameters
from rl.generator import VllmGenerator
from rl.learner import LearnerSettings, PolicyLearner
from rl.losses import Objective
from rl.types import EngineSettings, Published, SampledAnswer, SampleRequest, SyncReport, TrainBatch
from rl.weight_sync import WeightFiles, WeightsRefused, publish_weights, weights_digest

pytestmark = pytest.mark.timeout(300)
ANSWER_TOKENS = 24


@dataclass
class Pair:
    """An engine and a learner of one multimodal checkpoint."""

    checkpoint: Path
    generator: VllmGenerator
    learner: PolicyLearner
    runner: asyncio.Runner

    def take(self, location: Path, version: int, expected: Published | None = None) -> SyncReport:
        return self.runner.run(self.generator.take_weights(str(location), version, expected))

    def batch(self) -> TrainBatch:
        """Answers of the engine, greedy and drawn in turn, before and behind the first chunk of 64 tokens; with their
        routes."""
        draw = random.Random(0)
        prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in (1, 9, 40, 60, 64, 65, 100)]

        async def answers() -> list[SampledAnswer]:
            requests = (
                SampleRequest(
                    request_id=f"{i}",
                    prompt_ids=prompt,
                    num_samples=1,
                    max_tokens=ANSWER_TOKENS,
                    temperature=i % 2,
                    seed=i,
                )  # fmt: skip
                for i, prompt in enumerate(prompts)
            )
            return [answer for one in requests for answer in await self.generator.sample(one)]

        rows = self.runner.run(answers())
        return TrainBatch(
            version=self.generator.version,
            prompt_ids=prompts,
            answer_ids=[answer.token_ids for answer in rows],
            generator_logprobs=[answer.logprobs for answer in rows],
            token_versions=[answer.versions for answer in rows],
            advantages=[(-1.0) ** row for row in range(len(rows))],
            routes=[answer.routes for answer in rows],
        )

    def distances(self, batch: TrainBatch) -> list[float]:
        """|Δ log-probability| of every answer token, the learner's against the engine's."""
        from model.logprobs import token_logprobs

        found = []
        for prompt, answer, theirs in zip(batch.prompt_ids, batch.answer_ids, batch.generator_logprobs):
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                ours, _ = token_logprobs(self.learner.model, ids, (torch.arange(ids.shape[1]) >= len(prompt))[None])
            found += [abs(a - b) for a, b in zip(ours.logprob_T.tolist(), theirs, strict=True)]
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    checkpoint = save_multimodal(tmp_path_factory.mktemp("multimodal") / "policy", seed=0)
    settings = EngineSettings(
        checkpoint=str(checkpoint), max_model_len=256, max_num_seqs=16, kv_cache_gib=0.1, record_routes=True
    )
    generator = VllmGenerator(settings, "under-test")
    learner = PolicyLearner(LearnerSettings(
        checkpoint=str(checkpoint), dtype="float32", learning_rate=1e-2, warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, micro_batch_tokens=4096, temperature=1.0, router_policy="train",
        router_learning_rate_scale=1.0, balance_coef=0.0, z_coef=0.0, objective=Objective(),
        longest_answer=ANSWER_TOKENS, seed=0,
    ))  # fmt: skip
    with asyncio.Runner() as runner:
        try:
            runner.run(generator.start())
            learner.start()
            yield Pair(checkpoint, generator, learner, runner)
        finally:
            generator.stop()


def test_engine_and_learner_agree_before_and_after_a_step_and_what_is_saved_is_what_the_engine_has(
    pair: Pair, tmp_path: Path
) -> None:
    architectures = pair.generator._engine.model_config.architectures
    assert architectures == ["TextOfMultimodalLlama4"]
    first = pair.batch()
    assert max(pair.distances(first)) < 1e-5

    report = pair.learner.step(first, str(tmp_path / "v1.safetensors"))
    assert report.metrics["mismatch_k3"] < 1e-6
    assert report.metrics["router_replay_missing"] == len(first.answer_ids)  # nobody routes an answer's last token
    assert report.published is not None
    assert max(pair.distances(first)) > 0.05  # the step is seen
    sync = pair.take(tmp_path / "v1.safetensors", 1, report.published)
    assert sync.digest == report.published.digest and sync.probe_distance < 1e-4

    second = pair.batch()
    assert second.token_versions[0][0] == 1
    assert max(pair.distances(second)) < 1e-5

    pair.learner.save(str(tmp_path / "saved"))
    with WeightFiles(tmp_path / "saved") as saved:
        assert weights_digest(iter(saved)) == sync.digest
        vision = {name: tensor for name, tensor in saved if name.startswith(NOT_TEXT)}
    before = load_file(pair.checkpoint / "model.safetensors")
    assert vision.keys() == {name for name in before if name.startswith(NOT_TEXT)} and len(vision) > 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in vision.items())
    assert pair.take(tmp_path / "saved", 2).digest == sync.digest  # as `evaluate` does
    assert pair.batch().answer_ids == second.answer_ids


def test_text_alone_or_under_other_names_is_refused_and_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    """The tempting short cuts: digests would then be of other bytes than those saved and shipped."""
    pair.take(pair.checkpoint, 5)
    before = pair.batch()
    whole = load_file(pair.checkpoint / "model.safetensors")
    text = {name: tensor for name, tensor in whole.items() if not name.startswith(NOT_TEXT)}
    renamed = {name.removeprefix(MULTIMODAL.prefix): tensor for name, tensor in text.items()}
    for tensors, message in ((text, "missing .*multi_modal_projector"), (renamed, "unknown .*model.embed_tokens")):
        publish_weights(tensors.items(), tmp_path / "wrong.safetensors")
        with pytest.raises(WeightsRefused, match=message):
            pair.take(tmp_path / "wrong.safetensors", 6)
    assert pair.batch().generator_logprobs == before.generator_logprobs


def test_every_streamed_tensor_lands_whole_where_the_class_of_the_engine_reads_it(tmp_path: Path) -> None:
    """No engine: vLLM's loader, and a number for each tensor that is streamed."""
    checkpoint = save_multimodal(tmp_path / "policy", seed=0)
    policy = load_policy(checkpoint)
    numbers = {name: number for number, (name, _) in enumerate(stored_weights(policy, torch.bfloat16), start=1)}
    assert numbers.keys() == load_file(checkpoint / "model.safetensors").keys() and len(numbers) < 256  # exact in BF16
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.fill_(numbers[MULTIMODAL.prefix + name])
    streamed = dict(stored_weights(policy, torch.bfloat16))
    landed = loaded_by_vllm(checkpoint, tmp_path, streamed)

    by_number = {number: name for name, number in numbers.items()}
    found = {
        (by_number[int(number)], theirs): int(count)
        for theirs, parameter in landed.items()
        for number, count in zip(*parameter.unique(return_counts=True), strict=True)
    }
    assert found == {
        (MULTIMODAL.prefix + spec.name, in_vllm(spec.name)): math.prod(spec.shape)
        for spec in parameters({"model_type": "llama4_text", **TEXT})
    }


def in_vllm(name: str) -> str:
    """What vLLM's text model calls the parameter that holds ours."""
    for ours, theirs in {
        r"\.[qkv]_proj\.": ".qkv_proj.",
        r"\.(gate|up)_proj\.": ".gate_up_proj.",
        r"\.experts\.gate_up_proj$": ".experts.routed_experts.w13_weight",
        r"\.experts\.down_proj$": ".experts.routed_experts.w2_weight",
    }.items():
        name = re.sub(ours, theirs, name)
    return name
