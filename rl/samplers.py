"""Which entries come next: small classes behind one protocol, named in the recipe as `curriculum.sampler`.

    uniform        every entry alike: the control arm
    pools          three difficulty pools by posterior mean, below, inside and above the band, each with a weight
    thompson       draw a pass rate from every posterior, take the entries whose draw lies nearest the band
    module:Class   your own: built with the curriculum's rules, importable where `drover` is started

A sampler is asked once a step and domain, and gets posteriors as they were at the version for which the step is planned
and a generator of random numbers of that step's own. Its choice may depend on these and on its own state alone, so that
a run that is resumed, or whose answers arrive in another order, chooses the same. Numpy over the whole pool: no loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rl.difficulty import Floats, Ids


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What may be chosen in one domain; columns of equal length, at least one row."""

    ids: Ids  # of the entries
    alpha: Floats  # of the Beta posterior of each one's pass rate
    beta: Floats
    tried: Ids  # groups sampled of it so far
    endless: bool  # a row may be chosen more than once; else only where there are fewer rows than wanted

    def __len__(self) -> int:
        return len(self.ids)


class Sampler(Protocol):
    def choose(self, candidates: Candidates, count: int, rng: np.random.Generator) -> Ids:
        """`count` rows of the candidates, the most wanted first."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the newest choices; named in a step's row as `sampler/…`."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON; all that `restore` needs to go on as if nothing had happened."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Uniform:
    def choose(self, candidates: Candidates, count: int, rng: np.random.Generator) -> Ids:
        if candidates.endless:
            return rng.integers(len(candidates), size=count)
        return _without_repeats(len(candidates), count, lambda some: rng.choice(len(candidates), some, replace=False))

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


class Pools:
    """Weights of the pools are prime-rl's (`difficulty_pool`); an entry never tried counts as one inside the band."""

    WEIGHTS = {"hard": 0.2, "inside": 1.0, "easy": 0.2}

    def __init__(self, band: tuple[float, float]) -> None:
        self.band = band
        self.chosen = dict.fromkeys(self.WEIGHTS, 0)

    def choose(self, candidates: Candidates, count: int, rng: np.random.Generator) -> Ids:
        mean = candidates.alpha / (candidates.alpha + candidates.beta)
        pool = np.where(candidates.tried == 0, 1, (mean >= self.band[0]).astype(int) + (mean > self.band[1]))
        weights = np.array(list(self.WEIGHTS.values()))[pool]
        if candidates.endless:
            rows = rng.choice(len(candidates), count, p=weights / weights.sum())
        else:  # the smallest of exponential clocks with these rates: weighted, without replacement (Efraimidis 2006)
            clocks = rng.exponential(size=len(candidates)) / weights
            rows = _without_repeats(len(candidates), count, lambda some: _smallest(clocks, some))
        for name, number in zip(self.WEIGHTS, np.bincount(pool[rows], minlength=3).tolist(), strict=True):
            self.chosen[name] += number
        return rows

    def metrics(self) -> dict[str, float]:
        total = max(1, sum(self.chosen.values()))
        return {f"{name}_share": number / total for name, number in self.chosen.items()}

    def state(self) -> dict[str, Any]:
        return {"chosen": dict(self.chosen)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.chosen = dict(state["chosen"])


class Thompson:
    """One draw an entry, all at once; entries that never run dry are drawn anew for every choice."""

    def __init__(self, band: tuple[float, float]) -> None:
        self.band = band
        self.inside = self.total = 0

    def choose(self, candidates: Candidates, count: int, rng: np.random.Generator) -> Ids:
        if candidates.endless:
            chosen = [self._nearest(candidates, 1, rng)[0] for _ in range(count)]
            return np.array(chosen, dtype=np.int64)
        return _without_repeats(len(candidates), count, lambda some: self._nearest(candidates, some, rng))

    def _nearest(self, candidates: Candidates, count: int, rng: np.random.Generator) -> Ids:
        """Those whose draw lies inside the band, at random where there are more than wanted; then the nearest."""
        low, high = self.band
        rates = rng.beta(candidates.alpha, candidates.beta)
        distance = np.maximum(low - rates, rates - high)
        (inside,) = np.nonzero(distance <= 0.0)
        self.inside += min(count, len(inside))
        self.total += count
        if len(inside) >= count:
            return rng.choice(inside, count, replace=False)
        distance[inside] = np.inf
        return np.concatenate([rng.permutation(inside), _smallest(distance, count - len(inside))])

    def metrics(self) -> dict[str, float]:
        return {"inside_share": self.inside / max(1, self.total)}

    def state(self) -> dict[str, Any]:
        return {"inside": self.inside, "total": self.total}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.inside, self.total = state["inside"], state["total"]


def _smallest(values: Floats, count: int) -> Ids:
    """Places of the `count` smallest, in rising order."""
    if count < len(values):
        some = np.argpartition(values, count)[:count]
        return some[np.argsort(values[some], kind="stable")]
    return np.argsort(values, kind="stable")


def _without_repeats(rows: int, count: int, choose: Callable[[int], Ids]) -> Ids:
    """`count` rows by `choose(at most so many as there are)`; a row comes again only when all were taken."""
    parts = [choose(min(rows, count - begun)) for begun in range(0, count, rows)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
