"""Which task comes next.

Difficulty is measured, not declared: each cell — a (domain, level), or a prompt of a fixed data set — carries a Beta
posterior of the current policy's pass rate. Old evidence decays with the policy version that gave it. A cell is chosen
by Thompson sampling: draw a pass rate from every posterior of a domain, take the cell whose draw lies nearest the band.
Domains take turns, so none starves. No torch, ray or vllm.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PRIOR = 1.0  # Beta(1, 1): any pass rate is as likely as any other


@dataclass
class Posterior:
    """Beta posterior of a pass rate whose evidence fades: α ← 1 + decay^Δversion·(α - 1) + passes, β likewise."""

    alpha: float = PRIOR
    beta: float = PRIOR
    version: int = 0  # of the last observation

    def observe(self, passes: float, total: int, version: int, decay: float) -> None:
        kept = decay ** max(0, version - self.version)
        self.alpha = PRIOR + kept * (self.alpha - PRIOR) + passes
        self.beta = PRIOR + kept * (self.beta - PRIOR) + total - passes
        self.version = max(self.version, version)

    @property
    def mean(self) -> float:
        return self.alpha / (self.alpha + self.beta)


class Curriculum:
    """Chooses cells and learns from how their groups went.

    `cells` maps a cell's name to its domain. `kind` "uniform" ignores the posteriors (the control arm);
    "thompson" aims at `band`, and draws uniformly all the same with probability `explore_share`.
    """

    def __init__(
        self,
        cells: Mapping[str, str],
        *,
        kind: str,
        band: tuple[float, float],
        decay: float,
        explore_share: float,
        seed: int,
    ) -> None:
        self.kind, self.band, self.decay, self.explore_share = kind, band, decay, explore_share
        self.posteriors = {cell: Posterior() for cell in cells}
        self.cells_of: dict[str, list[str]] = {}
        for cell, domain in cells.items():
            self.cells_of.setdefault(domain, []).append(cell)
        self.sampled: Counter[str] = Counter()
        self._turn = 0
        self._rng = random.Random(f"curriculum/{seed}")

    def choose(self) -> str:
        """The next cell."""
        domains = list(self.cells_of)
        cells = self.cells_of[domains[self._turn % len(domains)]]
        self._turn += 1
        if self.kind == "uniform" or self._rng.random() < self.explore_share:
            cell = self._rng.choice(cells)
        else:
            cell = min(cells, key=self._drawn_distance)
        self.sampled[cell] += 1
        return cell

    def observe(self, cell: str, passes: float, total: int, version: int) -> None:
        """`passes` of `total` answers of one group were right, sampled at `version`."""
        self.posteriors[cell].observe(passes, total, version, self.decay)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to draw on as if nothing had happened; JSON."""
        version, numbers, gauss = self._rng.getstate()
        return {
            "posteriors": {cell: asdict(one) for cell, one in self.posteriors.items() if one != Posterior()},
            "sampled": dict(self.sampled),
            "turn": self._turn,
            "rng": [version, list(numbers), gauss],
        }

    def restore(self, state: dict[str, Any]) -> None:
        for cell, numbers in state["posteriors"].items():
            self.posteriors[cell] = Posterior(**numbers)
        self.sampled, self._turn = Counter(state["sampled"]), state["turn"]
        version, numbers, gauss = state["rng"]
        self._rng.setstate((version, tuple(numbers), gauss))

    def _drawn_distance(self, cell: str) -> tuple[float, float]:
        """Distance of one posterior draw from the band; a second number breaks ties within it at random."""
        posterior = self.posteriors[cell]
        rate = self._rng.betavariate(posterior.alpha, posterior.beta)
        low, high = self.band
        return max(low - rate, rate - high, 0.0), self._rng.random()
