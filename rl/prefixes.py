"""Beginnings of right answers to prompts that are still too hard, for new answers to go on from. No torch, ray or vllm.

    a right answer to a prompt whose pass rate is below the band ──▶ kept, the shortest of late
    a share of all choices ──▶ such a prompt, with a beginning of that answer behind it: a quarter to three quarters

What the verifier called right is not decoded again: answers begin behind it, where some go right and some wrong, and
only what they add is generated and trained on. So the log-probabilities are those of what was sampled, whatever policy
wrote the beginning. How often a begun answer ends well says nothing about the prompt alone, and no posterior learns
from it. (Backward curricula: Florensa et al. 2017; from prefixes of language models' own answers: BREAD 2025.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rl.difficulty import Difficulty, Ids

SHORTEST_PREFIX, LONGEST_PREFIX = 0.25, 0.75  # of the answer
KEPT_FOR = 50  # versions: by then the policy has other ways


class Prefixes:
    """Of the entries of one pool."""

    def __init__(self, hard_below: float) -> None:
        self.hard_below = hard_below  # pass rate
        self.known: dict[str, tuple[int, tuple[int, ...]]] = {}  # entry → version, token ids of a right answer

    def learn(self, version: int, right: Mapping[str, tuple[int, ...]], difficulty: Difficulty) -> None:
        """`right`: entry → a right answer of the last step's. Those no longer hard, and old ones, are forgotten."""
        for entry, token_ids in right.items():
            before = self.known.get(entry)
            if before is None or len(token_ids) <= len(before[1]):
                self.known[entry] = version, token_ids
        names = list(self.known)
        ids = np.array([difficulty.entries.id_of[name] for name in names], np.int64)
        for name, rate in zip(names, difficulty.mean(ids) if names else ()):
            if rate >= self.hard_below or version - self.known[name][0] > KEPT_FOR:
                del self.known[name]

    def among(self, ids: Ids, names: list[str]) -> Ids:
        """Those of these entries that an answer can be begun for."""
        return np.array([i for i in ids if names[i] in self.known], np.int64)

    def draw(self, entry: str, rng: np.random.Generator) -> tuple[int, ...]:
        """A beginning of the entry's answer, never all of it."""
        _, token_ids = self.known[entry]
        share = rng.uniform(SHORTEST_PREFIX, LONGEST_PREFIX)
        return token_ids[: min(len(token_ids) - 1, max(1, round(share * len(token_ids))))]

    def state(self) -> dict[str, Any]:
        return {entry: [version, list(token_ids)] for entry, (version, token_ids) in self.known.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.known = {entry: (version, tuple(token_ids)) for entry, (version, token_ids) in state.items()}
