"""The objective, as arithmetic: numbers and tensors in, a scalar out. No recipe, no device, no collectives.

Three distributions, always at the sampling temperature and never mixed:

    μ   behaviour   the engine that sampled, with the weights it had then
    π₀  proximal    where the trust region is centred: the learner at the start of the step, or a stand-in for it
    π   current     the learner now, the only one with a gradient

and two ratios: r = π/π₀, which the trust region bounds, and w = π₀/μ, the rest of the importance weight: what engine
and learner disagree on at the same version, and the staleness of older tokens. Every variant of the literature then is
a choice of one weight a token,

    ∇L = - Σ_t  c_t · region(r_t, A_t) · correction(w_t) · A_t · ∇ log π_t        c_t: the aggregation

written as the loss  -Σ_t c_t · sg(weight_t) · A_t · log π_t.  Its gradient is that of the surrogate of each paper; its
value is not.

    region      none    r
                ppo     r where it may still move: 0 if A > 0, r > 1 + high or A < 0, r < 1 - low (Schulman et al. 2017;
                        asymmetric: DAPO, Yu et al. 2025); min(r, ratio_cap) bounds what is left open, A < 0, r large
                cispo   r clamped to [1 - low, 1 + high], nothing dropped (MiniMax-M1 2025)
                aipo    min(r, ratio_cap), nothing dropped (LlamaRL, Wu et al. 2025; its r is π/μ: proximal rollout)
                dppo    r where the *probability* has not moved by more than high up, low down (DPPO 2026)
    ratio       token   r_t as it is
                sequence  exp(mean log r) of its answer for every token (GSPO, Zheng et al. 2025)
    correction  none    w
                tis     min(w, mismatch_high)                                          (Yao et al. 2025)
                icepop  w inside [mismatch_low, mismatch_high], else 0                 (Ling team 2025)
                sequence_mask  min(w, 2) for answers whose exp(mean log w) lies inside those bounds, else 0
    proximal    recomputed  π at the start of the step. In its first update π₀ = sg(π), so r is 1
                rollout     μ: then w is 1 and r holds mismatch and staleness together
                log_linear  log π₀ = log μ + α (log π - log μ), α = (s - 1)/s at staleness s >= 1, else 0 (A-3PO 2025)
    aggregation token_mean      c = 1/N, N the tokens with signal of the whole batch
                sequence_mean   c = 1/(M · length of its answer), M the answers with signal
                constant        c = 1/(M · longest answer allowed)                     (Dr. GRPO, Liu et al. 2025)

Two more terms, each off at 0:

    entropy  + β Σ c_t (-log π_t - H_t): its expected gradient is that of β·H, with H_t as baseline, at no extra pass
    kl       + κ Σ c_t ½ (log π_t - log μ_t)²: on policy the gradient of KL(π‖μ) (k2 of Schulman's note)

N and M count over all micro-batches and learners, so no cut of a batch changes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Advantage = Literal["rloo", "grpo", "dr_grpo", "max_rl", "pass_at_k"]
LOG_RATIO_LIMIT = 20.0  # keeps exp finite in fp32; a ratio of e^20 is far outside every trust region
SEQUENCE_CAP = 2.0  # of w under sequence_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The switches, each described above."""

    ratio: Literal["token", "sequence"] = "token"
    trust_region: Literal["none", "ppo", "cispo", "aipo", "dppo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    ratio_cap: float = 2.0
    mismatch: Literal["none", "tis", "icepop", "sequence_mask"] = "none"
    mismatch_low: float = 0.5
    mismatch_high: float = 2.0
    proximal: Literal["recomputed", "rollout", "log_linear"] = "rollout"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    entropy_coef: float = 0.0
    kl_coef: float = 0.0


# --- advantages ---------------------------------------------------------------------------------------------------


def group_advantages(scores: Sequence[float | None], kind: Advantage, k: int = 1) -> list[float]:
    """Advantages of one group's answers; an ungraded answer (None) gets 0 and does not enter the mean.

    With n graded answers and their mean m:
      rloo       n/(n-1)·(r_i - m)   leave-one-out baseline, unbiased (Ahmadian et al. 2024, eq. 6)
      grpo       (r_i - m)/std       (Shao et al. 2024)
      dr_grpo    r_i - m             (Liu et al. 2025: no std, which over-weights near-solved prompts)
      max_rl     (r_i - m)/m         weighs a prompt by about 1/(its pass rate) (MaxRL 2026); 0 where m is 0
      pass_at_k  mean best of k with i - mean best of k without it: unbiased for the gradient of pass@k, or of the best
                 of k where scores are not 0 and 1 (PKPO, Walder and Karkhanis 2025); k = 1 is rloo, k < n
    """
    graded = [score for score in scores if score is not None]
    if len(graded) < 2 or max(graded) == min(graded):
        return [0.0] * len(scores)
    n, mean = len(graded), sum(graded) / len(graded)
    if kind == "pass_at_k":
        with_i = iter(_best_of_k_advantages(graded, min(k, n - 1)))
        return [0.0 if score is None else next(with_i) for score in scores]
    if kind == "rloo":
        scale = n / (n - 1)
    elif kind == "grpo":
        scale = 1.0 / math.sqrt(sum((score - mean) ** 2 for score in graded) / n)
    elif kind == "dr_grpo":
        scale = 1.0
    elif kind == "max_rl":
        scale = 1.0 / mean if mean > 0 else 0.0
    else:
        raise ValueError(f"advantage: {kind!r} is none of rloo, grpo, dr_grpo, max_rl, pass_at_k")
    return [0.0 if score is None else scale * (score - mean) for score in scores]


def _best_of_k_advantages(scores: Sequence[float], k: int) -> list[float]:
    advantages = []
    for i, score in enumerate(scores):
        others = sorted(other for j, other in enumerate(scores) if j != i)
        with_i = mean_best_of(others, k - 1, floor=score)
        advantages.append(with_i - mean_best_of(others, k))
    return advantages


def mean_best_of(ascending: Sequence[float], k: int, floor: float = -math.inf) -> float:
    """Mean over all subsets of size k of max(floor, best score): the j-th smallest is best in C(j, k-1) of them."""
    if k == 0:
        return floor
    total = math.comb(len(ascending), k)
    return sum(math.comb(j, k - 1) * max(floor, score) for j, score in enumerate(ascending)) / total


def overlong_penalty(length: int, limit: int, buffer: int, penalty: float, truncated: bool) -> float:
    """What an answer's length takes from its score: `penalty` where it was cut off; within the last `buffer` tokens
    before `limit`, a share of it that grows linearly (DAPO, eq. 13)."""
    if truncated:
        return penalty
    return penalty * max(0.0, length - (limit - buffer)) / buffer if buffer else 0.0


# --- policy loss --------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """T tokens with signal, answers one after the other."""

    current: torch.Tensor  # log π, fp32 [T], with gradient
    behaviour: torch.Tensor  # log μ, [T]
    advantage: torch.Tensor  # [T]
    staleness: torch.Tensor  # versions, int64 [T]
    answer: torch.Tensor  # which answer of this micro-batch, int64 [T], 0, 0, 0, 1, 1, …
    entropy: torch.Tensor  # of π, nats, [T]; read only with entropy_coef
    at_start: torch.Tensor | None = None  # log π at the start of the step, [T]; None: this is its first update


class Denominators(NamedTuple):
    """Of the whole batch, over all micro-batches and learners; rows without signal are not counted."""

    tokens: float
    answers: float
    longest: float  # tokens an answer may have


class PolicyLoss(NamedTuple):
    loss: torch.Tensor
    clipped: torch.Tensor  # bool [T]: the trust region stopped it, or bounded its ratio
    masked: torch.Tensor  # bool [T]: the mismatch correction dropped or bounded it


def policy_loss(tokens: Tokens, denominators: Denominators, objective: Objective) -> PolicyLoss:
    """See the top of this file. No answer may be cut over two micro-batches."""
    log_pi = tokens.current.detach()
    log_pi0 = _proximal(log_pi, tokens, objective)
    log_r, log_w = _bounded(log_pi - log_pi0), _bounded(log_pi0 - tokens.behaviour)
    if objective.ratio == "sequence":
        log_r = _answer_mean(log_r, tokens.answer)
    region, clipped = _region(log_r.exp(), log_pi.exp() - log_pi0.exp(), tokens.advantage, objective)
    correction, masked = _correction(log_w, tokens.answer, objective)
    scale = _aggregation(tokens, denominators, objective)
    loss = -(scale * region * correction * tokens.advantage * tokens.current).sum()
    if objective.entropy_coef:
        surprise = -log_pi - tokens.entropy.detach()
        loss = loss - objective.entropy_coef * (scale * surprise * tokens.current).sum()
    if objective.kl_coef:
        loss = loss + objective.kl_coef * (scale * (tokens.current - tokens.behaviour).square() / 2).sum()
    return PolicyLoss(loss, clipped, masked)


def _proximal(log_pi: torch.Tensor, tokens: Tokens, objective: Objective) -> torch.Tensor:
    at_start = log_pi if tokens.at_start is None else tokens.at_start
    if objective.proximal == "recomputed":
        return at_start
    if objective.proximal == "rollout":
        return tokens.behaviour
    stale = tokens.staleness.clamp(min=1)
    return tokens.behaviour + (stale - 1) / stale * (at_start - tokens.behaviour)


def _region(
    r: torch.Tensor, moved: torch.Tensor, advantage: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """`moved`: how far the token's probability is from the proximal policy's."""
    low, high = objective.clip_low, objective.clip_high
    if objective.trust_region == "none":
        return r, r.new_zeros(r.shape).bool()
    if objective.trust_region == "cispo":
        return r.clamp(1 - low, 1 + high), (r < 1 - low) | (r > 1 + high)
    if objective.trust_region == "aipo":
        return r.clamp(max=objective.ratio_cap), r > objective.ratio_cap
    up, down = (moved > high, moved < -low) if objective.trust_region == "dppo" else (r > 1 + high, r < 1 - low)
    stopped = ((advantage > 0) & up) | ((advantage < 0) & down)
    return r.clamp(max=objective.ratio_cap) * ~stopped, stopped


def _correction(log_w: torch.Tensor, answer: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    w, low, high = log_w.exp(), objective.mismatch_low, objective.mismatch_high
    if objective.mismatch == "none":
        return w, w.new_zeros(w.shape).bool()
    if objective.mismatch == "tis":
        return w.clamp(max=high), w > high
    if objective.mismatch == "icepop":
        outside = (w < low) | (w > high)
        return w * ~outside, outside
    mean = _answer_mean(log_w, answer).exp()
    outside = (mean < low) | (mean > high)
    return w.clamp(max=SEQUENCE_CAP) * ~outside, outside


def _aggregation(tokens: Tokens, denominators: Denominators, objective: Objective) -> torch.Tensor | float:
    if objective.aggregation == "token_mean":
        return 1 / denominators.tokens
    if objective.aggregation == "constant":
        return 1 / (denominators.answers * denominators.longest)
    return 1 / (denominators.answers * _lengths(tokens.answer)[tokens.answer])


def _lengths(answer: torch.Tensor) -> torch.Tensor:
    return answer.bincount().to(answer.device)


def _answer_mean(values: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Of each token's answer, [T]."""
    lengths = _lengths(answer)
    return (values.new_zeros(len(lengths)).index_add(0, answer, values) / lengths)[answer]


def _bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
