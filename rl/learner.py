"""The trainer's side of stage 2: takes a batch, makes one optimiser step, publishes the weights.

A plain class, so that a test can build one; the cluster makes it an actor. Promises: a step changes nothing but
weights and optimiser; a batch without signal still counts as a version, with unchanged weights.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl.types import StepReport, TrainBatch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """The few settings a learner reads; each is described on its field in `pipeline/config.py`."""

    checkpoint: str
    dtype: str
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    micro_batch_tokens: int
    temperature: float
    train_router: bool
    clip_low: float
    clip_high: float
    mismatch_cap: float
    seed: int


class PolicyLearner:
    def __init__(self, settings: LearnerSettings) -> None:
        self.settings = settings
        self.version = 0

    def start(self) -> dict[str, float]:
        """Load model and optimiser; returns seconds by part."""
        begin = time.perf_counter()
        import torch

        from model.checkpoint import load_policy
        from model.tokenizer import load_tokenizer

        imported = time.perf_counter()
        torch.manual_seed(self.settings.seed)
        self.model = load_policy(self.settings.checkpoint, self.settings.dtype)
        self.model.train()
        self.tokenizer = load_tokenizer(self.settings.checkpoint)
        if not self.settings.train_router:
            for name, parameter in self.model.named_parameters():
                if ".router." in name:
                    parameter.requires_grad_(False)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, betas=(0.9, 0.95)
        )
        return {"import_s": imported - begin, "load_s": time.perf_counter() - imported}

    def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport:
        """One optimiser step; with `publish_to`, the new weights are written there and their digest reported."""
        if batch.version != self.version:
            raise RuntimeError(f"a batch for version {batch.version} reached a learner at version {self.version}")
        begin = time.perf_counter()
        metrics, tokens = self._update(batch)
        staleness = Counter(str(batch.version - version) for versions in batch.token_versions for version in versions)
        self.version += 1
        stepped = time.perf_counter()
        digest = self.publish(publish_to) if publish_to else ""
        metrics["learner_step_s"] = stepped - begin
        metrics["publish_ms"] = (time.perf_counter() - stepped) * 1e3
        return StepReport(
            version=self.version, metrics=metrics, trained_tokens=tokens, seconds=stepped - begin,
            extras={"digest": digest, "staleness_counts": dict(staleness)},
        )

    def publish(self, path: str) -> str:
        """Write the weights where engines can read them; returns their digest."""
        from rl.weight_sync import publish_weights

        return publish_weights(self.model.state_dict().items(), path)

    def save(self, directory: str) -> None:
        """Write a complete checkpoint."""
        from model.checkpoint import save_policy

        save_policy(self.model, self.tokenizer, directory)

    def _update(self, batch: TrainBatch) -> tuple[dict[str, float], int]:
        import torch

        from rl.batcher import micro_batches

        settings = self.settings
        cuts = micro_batches(batch, settings.micro_batch_tokens)
        denominator = float(sum(len(cut.advantages) for cut in cuts))
        if denominator == 0:
            return {"loss": 0.0, "grad_norm": 0.0}, 0
        gauges = Gauges()
        for cut in cuts:
            gauges.add(cut, *self._backward(cut, denominator))
        warmup = min(1.0, (self.version + 1) / max(1, settings.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warmup
        norm = torch.nn.utils.clip_grad_norm_(self.trained, settings.max_grad_norm)
        if not math.isfinite(norm.item()):
            raise RuntimeError(f"gradient norm is {norm.item()} at version {self.version}: the step was not taken")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rates = {"grad_norm": norm.item(), "learning_rate": settings.learning_rate * warmup}
        return gauges.metrics() | rates, int(denominator)

    def _backward(self, cut: Any, denominator: float) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds one micro-batch's gradient; returns (its share of the loss, log-probabilities, entropies, clipped)."""
        from model.logprobs import token_logprobs
        from rl.losses import policy_loss

        settings = self.settings
        logprobs, entropy = token_logprobs(self.model, cut.ids_BS, cut.answer_BS, settings.temperature)
        loss, clipped = policy_loss(
            logprobs, cut.generator_logprobs, cut.advantages, denominator=denominator,
            clip_low=settings.clip_low, clip_high=settings.clip_high, cap=settings.mismatch_cap,
        )
        loss.backward()
        return loss.item(), logprobs.detach(), entropy, clipped


class Gauges:
    """Sums over micro-batches. Mismatch counts tokens at the learner's own version only; staleness counts all."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.log_ratios: list[Any] = []  # log π - log μ, every trained token
        self.staleness: list[Any] = []
        self.entropy: list[Any] = []
        self.clipped: list[Any] = []

    def add(self, cut: Any, loss: float, logprobs: Any, entropy: Any, clipped: Any) -> None:
        self.loss += loss
        self.log_ratios.append(logprobs - cut.generator_logprobs)
        self.staleness.append(cut.staleness)
        self.entropy.append(entropy)
        self.clipped.append(clipped)

    def metrics(self) -> dict[str, float]:
        import torch

        log_ratio, staleness = torch.cat(self.log_ratios), torch.cat(self.staleness)
        weight = log_ratio.exp()
        metrics = {
            "loss": self.loss,
            "entropy": torch.cat(self.entropy).mean().item(),
            "clip_share": torch.cat(self.clipped).float().mean().item(),
            "is_weight_mean": weight.mean().item(),
            "staleness_mean": staleness.float().mean().item(),
            "staleness_max": float(staleness.max()),
        }
        fresh = log_ratio[staleness == 0]
        if len(fresh):  # the same weights on both sides: what is left is numerics
            metrics["mismatch_k3"] = (fresh.exp() - 1 - fresh).mean().item()
            metrics["mismatch_max"] = fresh.abs().max().item()
            metrics["mean_exp_abs_diff"] = fresh.abs().exp().mean().item()
        return metrics
