"""How a judge's reply is read: from the probabilities of the rating labels to a verdict, or to none.

Called by `judges.client`. Promises that what cannot be read becomes a `JudgeFailure`, which has no score to mistake
for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LABELS = ("1", "2", "3", "4", "5")  # 1 the easiest; each is one token
MIN_LABEL_MASS = 0.05  # below it the judge was about to say something else, and the labels' ratio is noise


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge said of one prompt."""

    score: float  # difficulty, 1.0 (easiest) to 5.0: the expected rating
    probabilities: tuple[float, ...]  # of each of LABELS, renormalised to sum to 1
    reason: str  # which labels decided, in words


@dataclass(frozen=True, slots=True)
class JudgeFailure:
    """The judge said nothing usable. Counted by `reason`; never a score."""

    reason: str  # one of few: "off-label", "not probabilities", "too long"
    detail: str = ""  # the values seen


def read_verdict(label_logprobs: Sequence[float], min_mass: float = MIN_LABEL_MASS) -> Verdict | JudgeFailure:
    """The expected rating, E[s] = Σ s·p(s) / Σ p(s) over the labels (G-Eval, arXiv 2303.16634, section 2).

    `label_logprobs`: natural log-probability of each of LABELS as the next token, over the whole vocabulary. Unlike
    the paper, which samples, the probabilities are read directly, so one forward pass gives the exact expectation.
    """
    if len(label_logprobs) != len(LABELS) or any(math.isnan(x) or x > 1e-3 for x in label_logprobs):
        return JudgeFailure("not probabilities", f"log-probabilities {list(label_logprobs)}")
    masses = [math.exp(x) for x in label_logprobs]
    total = sum(masses)
    if total > 1.01:  # room for bfloat16 rounding; more means that these are not one distribution's numbers
        return JudgeFailure("not probabilities", f"the labels' total mass is {total:.3f}")
    if total < min_mass:
        return JudgeFailure("off-label", f"the labels' total mass is {total:.3g}, below {min_mass}")
    probabilities = tuple(mass / total for mass in masses)
    score = sum(int(label) * p for label, p in zip(LABELS, probabilities, strict=True))
    return Verdict(score, probabilities, _reason(probabilities))


def _reason(probabilities: Sequence[float]) -> str:
    (first, p_first), (second, p_second) = sorted(zip(LABELS, probabilities, strict=True), key=lambda x: -x[1])[:2]
    return f"mass {p_first:.2f} on {first}, {p_second:.2f} on {second}"
