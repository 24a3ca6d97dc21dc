"""Numbers that say whether a run of stage 2 still trains the model it means to, and what is done about them. No torch.

Each metric of a step may have a `warn` and a `stop` limit. Past `warn`: the run says so. Past `stop`: metrics that a
fresh set of weights could mend (what engine and learner disagree on) first ask for a resync, once; those that stay past
it, and all others after `PATIENCE` steps in a row, end the run. A number that is not finite ends it at once.

Two kinds of disagreement are kept apart. *Mismatch* is between engine and learner with the same weights: numerics, a
wrong mask, a broken sync. *Staleness* is between versions, and grows with max_staleness by design.

A run that cannot learn is found in its first steps: see `dead` and `without_signal`. Whether groups have signal is
judged over FEWEST_GROUPS at least, which may be many steps: with a few slots, left empty where a task is hopeless, a
step without any is no news.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PATIENCE = 3  # steps in a row
DEAD_STEPS = 5  # the first ones, all of them
FEWEST_GROUPS = 50  # a pool on which one group in thirty has signal can be learnt from
LONGEST_PERIOD = 8  # tokens of what is said again and again
TIMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """`warn` and `stop` as upper limits, or lower ones with `below`; None: never."""

    warn: float | None = None
    stop: float | None = None
    below: bool = False
    resync: bool = False  # a fresh set of weights may mend it

    def passed(self, value: float, limit: float | None) -> bool:
        return limit is not None and (value < limit if self.below else value > limit)


# metric of a step → limits. What others see: k3 about 1e-3 in bf16, mean exp|Δ| 1.01 to 1.05; an effective sample size
# below 0.3 is worth a warning.
DEFAULT_LIMITS: dict[str, Limit] = {
    "mismatch_k3": Limit(warn=5e-3, stop=0.1, resync=True),
    "mismatch_max": Limit(warn=3.0, stop=15.0, resync=True),
    "mean_exp_abs_diff": Limit(warn=1.05, stop=1.5, resync=True),
    "staleness_k3": Limit(warn=0.1, stop=10.0),
    "ess": Limit(warn=0.3, stop=0.02, below=True),
    "mask_share": Limit(warn=0.3, stop=0.9),
    "clip_share": Limit(warn=0.3, stop=0.9),
    "dropped_share_positive": Limit(warn=0.5, stop=0.95),
    "dropped_share_negative": Limit(warn=0.5, stop=0.95),
    "answer_tokens_mean": Limit(),  # what is too long or too short is the recipe's to say
    "truncated_share": Limit(warn=0.5, stop=0.98),
    "repetition_share": Limit(warn=0.3, stop=0.9),
    "entropy": Limit(warn=0.01, stop=1e-4, below=True),
    "signal_share": Limit(warn=0.1, below=True),
    "router/agreement": Limit(warn=0.9, stop=0.5, below=True, resync=True),
    "router/max_vio": Limit(),  # how uneven a load is too uneven depends on the number of experts
    "loop_lag_s": Limit(warn=1.0, stop=30.0),
    "learner_wait_share": Limit(),  # high by design without staleness
    "generator_wait_share": Limit(),
}


@dataclass(frozen=True, slots=True)
class Finding:
    action: Literal["warn", "resync", "stop"]
    metric: str
    text: str


class HealthMonitor:
    """Judges the metrics of one step after another."""

    def __init__(self, limits: Mapping[str, Limit]) -> None:
        self.limits = limits
        self.past_stop: Counter[str] = Counter()  # metric → steps in a row
        self.resynced: set[str] = set()
        self.warned: set[str] = set()
        self.first_steps: list[Mapping[str, Any]] | None = []  # until they have been judged
        self.recent: deque[tuple[int, float]] = deque()  # groups, and those with signal, of the latest steps

    def observe(self, metrics: Mapping[str, Any]) -> list[Finding]:
        """What is wrong with this step, the gravest last."""
        judged = {**metrics, "signal_share": self._recent_signal(metrics)}
        findings = [finding for name in self.limits if (finding := self._judge(name, judged.get(name)))]
        if self.first_steps is not None:
            self.first_steps.append(metrics)
            seen, groups = len(self.first_steps), sum(map(groups_of, self.first_steps))
            why = dead(self.first_steps) if seen == DEAD_STEPS else ""
            if seen >= DEAD_STEPS and groups >= FEWEST_GROUPS:
                why = why or without_signal(self.first_steps)
                self.first_steps = None
            if why:
                findings.append(Finding("stop", "signal", why))
        return sorted(findings, key=lambda finding: ("warn", "resync", "stop").index(finding.action))

    def _recent_signal(self, metrics: Mapping[str, Any]) -> float | None:
        """The share of the last FEWEST_GROUPS or a few more; None while there are fewer."""
        groups = groups_of(metrics)
        self.recent.append((groups, groups * metrics.get("signal_share", 0.0)))
        while sum(some for some, _ in self.recent) - self.recent[0][0] >= FEWEST_GROUPS:
            self.recent.popleft()
        total = sum(some for some, _ in self.recent)
        return sum(with_signal for _, with_signal in self.recent) / total if total >= FEWEST_GROUPS else None

    def _judge(self, name: str, value: float | None) -> Finding | None:
        if value is None:
            return None
        limit = self.limits[name]
        if not math.isfinite(value):
            return Finding("stop", name, f"{name} is {value}")
        said = f"{name} is {value:.4g}, {'below' if limit.below else 'above'}"
        if not limit.passed(value, limit.stop):
            self.past_stop.pop(name, None)
            if not limit.passed(value, limit.warn):
                self.warned.discard(name)
                return None
            if name in self.warned:  # once for each time that it goes wrong
                return None
            self.warned.add(name)
            return Finding("warn", name, f"{said} {limit.warn:g}")
        self.past_stop[name] += 1
        if limit.resync and name not in self.resynced:
            self.resynced.add(name)
            return Finding("resync", name, f"{said} {limit.stop:g}: every engine is given the weights again")
        if self.past_stop[name] >= PATIENCE:
            return Finding("stop", name, f"{said} {limit.stop:g} for {self.past_stop[name]} steps")
        return Finding("warn", name, f"{said} {limit.stop:g}")


def groups_of(step: Mapping[str, Any]) -> int:
    groups: int = step.get("groups", 0)
    return groups


def is_looping(token_ids: Sequence[int]) -> bool:
    """Does it end by saying the same thing, of at most LONGEST_PERIOD tokens, TIMES times in a row?"""
    return any(
        len(token_ids) >= TIMES * period and list(token_ids[-TIMES * period :]) == list(token_ids[-period:]) * TIMES
        for period in range(1, LONGEST_PERIOD + 1)
    )


def without_signal(steps: Sequence[Mapping[str, Any]]) -> str:
    """Why a run whose first steps have no signal will never learn; empty if one had."""
    if not always(steps, "signal_share", 0.0):
        return ""
    rate = sum(step.get("pass_rate", 0.0) for step in steps) / len(steps)
    return (
        f"no group has both right and wrong answers (pass rate {rate:.2f}): choose "
        f"{'harder' if rate > 0.5 else 'easier'} tasks, or look at the verifier"
    )


def dead(steps: Sequence[Mapping[str, Any]]) -> str:
    """Why else a run whose first steps look like this will never learn; empty if it may."""
    if always(steps, "truncated_share", 1.0):
        return "every answer is cut off: raise max_answer_tokens, or the policy never ends an answer"
    if always(steps, "mask_share", 1.0):
        return "the mismatch correction masks every token: engine and learner do not compute the same distribution"
    learnt_from = [step for step in steps if step.get("signal_share") != 0.0]
    if len(learnt_from) >= PATIENCE and always(learnt_from, "grad_norm", 0.0):
        return "the gradient is zero though groups have signal: nothing reaches the parameters"
    if any(step.get("weights_moved") is False and step["grad_norm"] > 0 for step in steps):
        return "the gradient is not zero, but the published weights do not change: the optimiser moves nothing"
    return ""


def always(steps: Sequence[Mapping[str, Any]], name: str, value: float) -> bool:
    return all(step.get(name) == value for step in steps)
