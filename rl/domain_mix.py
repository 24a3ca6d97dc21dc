"""Which domain each slot of a step belongs to: all in turn, and none that teaches anything below its share of what is
really trained on.

Turns are smooth weighted round robin, so the domains of a batch are interleaved whatever their weights. They come alike
or as often as the domains are large, times a weight for the sake of the floor. That is 1 as long as every domain gets
its floor: a share of *trained tokens*, counted after groups without signal have fallen away. A domain below it gains
weight step by step, up to MOST times the others', and loses it again when it is above. One that has given no trained
token for as long as is remembered has its plain turn: more of nothing is nothing, and where half of the domains are
hopeless, four times their turns would leave the others a fifth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST = 4.0  # weight of a domain whose floor cannot be reached: it leaves the others most of their slots
MEMORY = 0.8  # of the trained tokens, per step
GAIN = 0.5  # of the step towards the floor, in the exponent: news are some steps old, a full step would overshoot
FASTEST = 1.5  # change of a weight in one step: the share of a step of few groups says little


class DomainMix:
    def __init__(self, domains: Sequence[str], floor: float) -> None:
        """`floor`: share of trained tokens that each domain gets at least that gives any; 0: none."""
        if floor * len(domains) > 1.0:
            raise ValueError(f"a floor of {floor:g} for each of {len(domains)} domains is more than there is")
        self.domains, self.floor = list(domains), floor
        self.sizes = dict.fromkeys(domains, 1)  # turns are in proportion to these
        self.weights = dict.fromkeys(domains, 1.0)
        self.credit = dict.fromkeys(domains, 0.0)
        self.tokens = dict.fromkeys(domains, 0.0)  # trained, fading

    def assign(self, count: int) -> list[str]:
        """The domains of the next `count` slots."""
        shares = {domain: self.sizes[domain] * self.weights[domain] for domain in self.domains}
        total = sum(shares.values())
        turns = []
        for _ in range(count):
            for domain in self.domains:
                self.credit[domain] += shares[domain] / total
            turn = max(self.domains, key=lambda domain: round(self.credit[domain], 9))  # equal: the first
            self.credit[turn] -= 1.0
            turns.append(turn)
        return turns

    def learn(self, trained_tokens: Mapping[str, int]) -> None:
        """One step trained on so many tokens of each domain."""
        for domain in self.domains:
            self.tokens[domain] = MEMORY * self.tokens[domain] + trained_tokens.get(domain, 0)
        total = sum(self.tokens.values())
        if not total:
            return
        for domain in self.domains:
            share = self.tokens[domain] / total
            change = (self.floor / share) ** GAIN if self.tokens[domain] >= 1.0 else 0.0
            wanted = self.weights[domain] * min(FASTEST, max(1.0 / FASTEST, change))
            self.weights[domain] = min(MOST, max(1.0, wanted))

    def shares(self) -> dict[str, float]:
        """Of the trained tokens of late."""
        total = sum(self.tokens.values())
        return {domain: tokens / total if total else 0.0 for domain, tokens in self.tokens.items()}

    def state(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "credit": dict(self.credit), "tokens": dict(self.tokens)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.weights, self.credit = dict(state["weights"]), dict(state["credit"])
        self.tokens = dict(state["tokens"])
