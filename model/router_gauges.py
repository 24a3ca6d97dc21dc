"""What the routers of a model do, in a few numbers per layer and optimiser step, cheap enough to leave on.

    max_vio       (largest expert's tokens − mean) / mean; 0 when perfectly even
    load_entropy  entropy of the shares of the load over ln E; 1 when perfectly even, 0 when one expert has it all
    dead_share    share of experts that got less than a tenth of the mean
    agreement     share of replayed tokens that the live router would send where the engine sent them
    drift         Jensen-Shannon divergence, nats, of normalised sigmoids now and when the stage began; mean over a
                  fixed probe of tokens, at most ln 2
    moved         share of the probe's tokens that go to another expert than when the stage began

A metric is called `router/layer3/max_vio`; `router/max_vio` is that of the worst layer.

Axes: B rows, S sequence, T tokens, E experts, M MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.router import NOT_RECORDED, Route, expert_counts, normalised_gates, routes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORST = {"max_vio": max, "load_entropy": min, "dead_share": max, "agreement": min, "drift": max, "moved": max}
DEAD = 0.1  # of the mean load
PROBE_TOKENS = 512
RECORDED_ENOUGH = 0.9  # of a batch's tokens; with fewer their shares are counted anew
SPREAD = 0.6180339887  # multiples of the golden ratio, modulo 1, never crowd together


class RouterLoad:
    """Where the real tokens of a batch went: sums over micro-batches and, joined, over learners."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None  # [M, E + 3] fp64: each expert's tokens; replayed, agreed, missing

    def add(self, routes: Sequence[Route]) -> None:
        """Count a forward pass once. Activation checkpointing routes outside of what it recomputes."""
        if routes:
            rows = [torch.cat([expert_counts(route), _replay_counts(route)]) for route in routes]
            self._add(torch.stack(rows).double().cpu())

    def join(self, other: RouterLoad) -> None:
        if other.sums is not None:
            self._add(other.sums)

    def shares(self) -> torch.Tensor:
        """Of every expert in its layer's tokens, [M, E] fp32."""
        assert self.sums is not None, "nothing was counted"
        counts_ME = self.sums[:, :-3]
        return (counts_ME / counts_ME.sum(1, keepdim=True)).float()

    def by_layer(self) -> list[dict[str, float]]:
        layers = []
        for row in [] if self.sums is None else self.sums:
            replayed, agreed, _ = row[-3:].tolist()
            layers.append(load_gauges(row[:-3]) | ({"agreement": agreed / replayed} if replayed else {}))
        return layers

    def replayed(self) -> bool:
        """Whether any token came with a record, or should have."""
        return self.sums is not None and bool(self.sums[:, -3:].any())

    def num_missing(self) -> float:
        """Tokens without a recorded expert, in the layer that lacks most."""
        return 0.0 if self.sums is None else float(self.sums[:, -1].max())

    def _add(self, sums: torch.Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums


def _replay_counts(route: Route) -> torch.Tensor:
    """Tokens that took a recorded expert, those of them whose own expert is the same, tokens without a record; [3]."""
    if not route.replayed:
        return route.logits_TE.new_zeros(3)
    same = int((route.own_expert_T == route.expert_T).sum())  # counts every token without a record
    counts = [len(route.expert_T) - route.num_missing, same - route.num_missing, route.num_missing]
    return route.logits_TE.new_tensor(counts)


def load_gauges(counts_E: torch.Tensor) -> dict[str, float]:
    """MaxVio, normalised entropy and dead share of one layer's counts."""
    counts_E = counts_E.double()
    mean, share_E = counts_E.mean(), counts_E / counts_E.sum()
    entropy = -torch.xlogy(share_E, share_E).sum() / math.log(max(len(counts_E), 2))
    return {
        "max_vio": float((counts_E.max() - mean) / mean),
        "load_entropy": float(entropy),
        "dead_share": float((counts_E < DEAD * mean).double().mean()),
    }


def recorded_shares(replays: Iterable[torch.Tensor], num_experts: int) -> torch.Tensor | None:
    """Shares of the experts [M, E] as `replays`, each [T, M] of real tokens, record them; None if too few are."""
    replay_TM = torch.cat(list(replays))
    recorded_TM = replay_TM != NOT_RECORDED
    if float(recorded_TM.double().mean()) < RECORDED_ENOUGH:
        return None
    layers = zip(replay_TM.T, recorded_TM.T, strict=True)
    counts = [torch.bincount(ids_T[known_T], minlength=num_experts) for ids_T, known_T in layers]
    return torch.stack([counts_E / counts_E.sum() for counts_E in counts])


@dataclass
class DriftProbe:
    """A few hundred tokens, and where the weights that a stage began with sent them."""

    ids_BS: torch.Tensor
    real_BS: torch.Tensor
    logits_LTE: list[torch.Tensor]
    expert_LT: list[torch.Tensor]

    @classmethod
    def taken(cls, model: PreTrainedModel, documents: Sequence[Sequence[int]]) -> DriftProbe:
        rows = probe_rows(documents, PROBE_TOKENS)
        ids_BS = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long, device=model.device)
        real_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids_BS[i, : len(row)] = torch.tensor(row)
            real_BS[i, : len(row)] = True
        start = routes_of(model, ids_BS, real_BS)
        return cls(ids_BS, real_BS, [route.logits_TE for route in start], [route.own_expert_T for route in start])

    def to(self, device: torch.device) -> DriftProbe:
        logits_LTE, expert_LT = ([x.to(device) for x in layers] for layers in (self.logits_LTE, self.expert_LT))
        return DriftProbe(self.ids_BS.to(device), self.real_BS.to(device), logits_LTE, expert_LT)

    def by_layer(self, model: PreTrainedModel) -> list[dict[str, float]]:
        now = routes_of(model, self.ids_BS, self.real_BS)
        return [
            {
                "drift": float(jensen_shannon(normalised_gates(logits_TE), normalised_gates(route.logits_TE)).mean()),
                "moved": float((expert_T != route.own_expert_T).double().mean()),
            }
            for logits_TE, expert_T, route in zip(self.logits_LTE, self.expert_LT, now, strict=True)
        ]


def probe_rows(documents: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Documents from all over a batch, whose neighbours are often alike. The last one is cut where tokens run out,
    which changes nothing before the cut."""
    rows: list[list[int]] = []
    for i in sorted(range(len(documents)), key=lambda i: i * SPREAD % 1):
        rows.append(list(documents[i][:max_tokens]))
        max_tokens -= len(rows[-1])
        if max_tokens == 0:
            break
    return rows


def jensen_shannon(p_TE: torch.Tensor, q_TE: torch.Tensor) -> torch.Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q)/2, in nats, [T]."""
    middle_TE = ((p_TE + q_TE) / 2).clamp(min=torch.finfo(p_TE.dtype).tiny)
    terms_TE = torch.xlogy(p_TE, p_TE / middle_TE) + torch.xlogy(q_TE, q_TE / middle_TE)
    return terms_TE.sum(-1).clamp(min=0.0) / 2


def named(by_layer: Sequence[Mapping[str, float]], layers: Sequence[int]) -> dict[str, float]:
    """Flat metrics: every layer's, and the worst of each gauge. `layers` are the layers' numbers in the model."""
    metrics = {
        f"router/layer{layer}/{gauge}": value
        for layer, gauges in zip(layers, by_layer, strict=True)
        for gauge, value in gauges.items()
    }
    for gauge, worst in WORST.items():
        values = [gauges[gauge] for gauges in by_layer if gauge in gauges]
        if values:
            metrics[f"router/{gauge}"] = worst(values)
    return metrics
