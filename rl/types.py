"""The vocabulary of the RL room. No torch, ray or vllm: these records cross process borders.

*group* the n answers sampled for one task · *rollout* one answer with token ids, engine log-probabilities and the
policy version of each token · *version* the number of optimiser steps behind a set of weights · *staleness* trainer
version minus a token's version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rewards.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one vLLM engine needs. Two stages with equal `reuse_key` share a running engine."""

    checkpoint: str  # a Hugging Face directory
    dtype: str = "float32"
    max_model_len: int = 512  # tokens, prompt and answer together
    max_num_seqs: int = 128  # sequences decoded at once
    kv_cache_gib: float = 1.0
    num_threads: int = 1
    seed: int = 0
    prefix_caching: bool = False  # for judges: many prompts with one beginning; salted by version where it is on
    max_labels: int = 20  # labels one `score_labels` call may ask for
    record_routes: bool = False  # answers say which expert each token took, for a learner that replays them

    def reuse_key(self, architecture_digest: str) -> tuple[object, ...]:
        """Engines differ by shape and settings, not by weights: weights can be loaded into a running engine."""
        return (
            architecture_digest,
            self.dtype,
            self.max_model_len,
            self.max_num_seqs,
            self.kv_cache_gib,
            self.num_threads,
            self.prefix_caching,
            self.max_labels,
            self.record_routes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Ask an engine for `num_samples` answers to one prompt. Token ids in, token ids out."""

    request_id: str
    prompt_ids: list[int]
    num_samples: int
    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()  # beside the checkpoint's own; the one that ends an answer is part of it
    seed: int | None = None  # None draws from the engine's own generator
    together: tuple[str, int] | None = None  # (name, size) of a batch: the engine begins when it has all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswer:
    """One answer as the engine gave it. The three lists have one entry per generated token."""

    token_ids: list[int]
    logprobs: list[float]  # natural log, at the sampling temperature, of the engine that sampled
    versions: list[int]  # the policy version that produced each token
    finish_reason: str  # "stop" (ended by itself) or "length" (truncated)
    # Expert ids [tokens, MoE layers] of the prompt and all of the answer but its last token, which was never routed.
    routes: list[list[int]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One question whose answer tells whether an engine computes what the learner computes: a digest says which bytes
    arrived, not what became of them in there."""

    prompt_ids: list[int]
    label_ids: list[int]  # the likeliest next tokens, in the learner's eyes
    logprobs: list[float]  # of each, at temperature 1
    tolerance: float  # nats

    def distance(self, seen: Sequence[float]) -> float:
        """Mean |Δ log p| over the labels, each weighed by its probability."""
        weights = [math.exp(logprob) for logprob in self.logprobs]
        gaps = [weight * abs(a - b) for weight, a, b in zip(weights, self.logprobs, seen, strict=True)]
        return sum(gaps) / sum(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Weights that a learner wrote for the engines."""

    digest: str
    probe: Probe
    location: str = field(
        compare=False
    )  # what engines are given: the file's path, or where `rl/weight_stream.py` serves it


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What an engine says after it took a set of weights."""

    version: int
    num_tensors: int
    digest: str  # over every tensor's name, shape, dtype and bytes, as the engine received them
    pause_ms: float
    load_ms: float
    probe_distance: float = 0.0  # from the learner, `Probe.distance`; 0 without a probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One graded answer."""

    task: Task
    group_id: str
    answer: SampledAnswer
    text: str
    score: float | None  # None: ungraded, never trained on
    reason: str
    num_begun: int = 0  # tokens that it was given to go on from: `rl/prefixes.py`


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The answers to one task, sampled together."""

    group_id: str
    task: Task
    prompt_ids: list[int]
    rollouts: list[Rollout]
    leased_at_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What the learner steps on: one row per rollout, lists in the same order."""

    version: int  # the learner's version before the step
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]
    generator_logprobs: list[list[float]]
    token_versions: list[list[int]]
    advantages: list[float]
    # The engine's expert ids [tokens, MoE layers] of each row's first tokens, prompt and answer, -1 where unknown; None
    # for a row without a record. The last token of an answer was sampled and never routed: its id is not known.
    routes: Sequence[Sequence[Sequence[int]] | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What the learner says after one optimiser step."""

    version: int  # after the step
    metrics: dict[str, float]
    trained_tokens: int
    seconds: float = 0.0
    published: Published | None = None
    extras: dict[str, Any] = field(default_factory=dict)


class GeneratorGone(RuntimeError):
    """The engine died, or did not answer within its deadline: what it was asked for will not come."""


class SyncRefused(RuntimeError):
    """The engine refused weights as a whole, and still holds what it held."""


class Generator(Protocol):
    """The place of one engine. `rl/generator.py` is the real one; tests may hand in another. Every method ends within
    the caller's deadline, or raises GeneratorGone."""

    async def sample(self, request: SampleRequest) -> list[SampledAnswer]: ...
    async def take_weights(self, location: str, version: int, expected: Published, repair: bool = False) -> SyncReport:
        """`repair`: nothing that was computed with the weights before may be of use any more. Raises SyncRefused
        too."""
        ...

    async def restart(self) -> None:
        """End what is there, whatever it does, and start another engine; it holds weights of nobody's giving."""
        ...


class Learner(Protocol):
    """The trainer's side. Whatever goes wrong with it ends the run: every method raises within its deadline."""

    async def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport: ...
    async def publish(self, path: str) -> Published:
        """Write the weights as engines shall have them."""
        ...

    async def save(self, directory: str) -> None:
        """Write a complete checkpoint."""
        ...

    async def save_state(self, path: str) -> None:
        """Write all that the next step depends on."""
        ...

    async def load_state(self, path: str) -> None:
        """The state that `save_state` wrote, bit for bit."""
        ...
