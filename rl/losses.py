"""The objective, as arithmetic: numbers and tensors in, scalar and metrics out. No config, no device, no collectives.

Three distributions, never mixed: μ, the engine that sampled (`generator_logprobs`); π, the learner now
(`learner_logprobs`); both at the sampling temperature. ρ = π/μ holds the mismatch of engine and learner at the same
version and the staleness of older tokens together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOG_RATIO_LIMIT = 20.0  # keeps exp finite in fp32; a ratio of e^20 is far outside every trust region


def group_advantages(scores: Sequence[float | None], kind: str) -> list[float]:
    """Advantages of one group's answers; an ungraded answer (None) gets 0 and does not enter the mean.

    With n graded answers and their mean m:
      rloo     A_i = n/(n-1)·(r_i - m)      leave-one-out baseline, unbiased (Ahmadian et al. 2024, eq. 6)
      grpo     A_i = (r_i - m)/std          (Shao et al. 2024)
      dr_grpo  A_i = r_i - m                (Liu et al. 2025: no std, which over-weights near-solved prompts)
    """
    graded = [score for score in scores if score is not None]
    if len(graded) < 2 or max(graded) == min(graded):
        return [0.0] * len(scores)
    n, mean = len(graded), sum(graded) / len(graded)
    if kind == "rloo":
        scale = n / (n - 1)
    elif kind == "grpo":
        scale = 1.0 / math.sqrt(sum((score - mean) ** 2 for score in graded) / n)
    elif kind == "dr_grpo":
        scale = 1.0
    else:
        raise ValueError(f"advantage: {kind!r} is none of rloo, grpo, dr_grpo")
    return [0.0 if score is None else scale * (score - mean) for score in scores]


def policy_loss(
    learner_logprobs: torch.Tensor,
    generator_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    denominator: float,
    clip_low: float,
    clip_high: float,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-mean policy gradient with truncated importance weights inside a trust region.

        L = -(1/N) Σ_t m_t · sg(min(ρ_t, cap)) · A_t · log π_t
        m_t = 0 where A_t > 0 and ρ_t > 1 + clip_high, or A_t < 0 and ρ_t < 1 - clip_low, else 1

    The mask is PPO's clip (Schulman et al. 2017; asymmetric as in DAPO, Yu et al. 2025) with the proximal policy taken
    to be the one that sampled; `cap` bounds what is left unbounded there, ρ > 1 with A < 0 (TIS, Yao et al. 2025).

    All arguments [T] fp32, one entry a token. `denominator` N is the number of trained tokens of the *whole* batch over
    all micro-batches, so that no cut of the batch changes the gradient. Returns (loss, clipped [T] bool).
    """
    log_ratio = (learner_logprobs.detach() - generator_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    weight = ratio.clamp(max=cap) * ~clipped
    return -(weight * advantages * learner_logprobs).sum() / denominator, clipped
