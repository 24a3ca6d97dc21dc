"""What a training stage does with its model's routers beside training them: auxiliary losses and gauges, step by step.

    begin_step(all micro-batches) ─▶ loss(routes) once per micro-batch ─▶ optimiser ─▶ end_step() → metrics

Called by `rl/learner.py`, `pipeline/sft.py` and `pipeline/dpo.py`. For a model without routers, or one whose forward
does not report its routes, every call is there and does nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from model.router import Route, RouterLoss, routes_of
from model.router_gauges import DriftProbe, RouterLoad, named, recorded_shares
from model.transformer import MoeForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RoutedBatch(NamedTuple):
    """One micro-batch, as far as routing is concerned."""

    ids_BS: torch.Tensor
    real_BS: torch.Tensor  # bool, or 1 and 0
    replay_BSM: torch.Tensor | None = None
    position_BS: torch.Tensor | None = None  # a row that does not begin at 0 is a branch of one above it

    def documents(self) -> list[list[int]]:
        """Token ids of the rows that are whole."""
        whole_B = torch.ones(len(self.ids_BS)).bool() if self.position_BS is None else self.position_BS[:, 0] == 0
        return [ids[real.bool()].tolist() for ids, real, whole in zip(self.ids_BS, self.real_BS, whole_B) if whole]


class RouterWatch:
    def __init__(
        self,
        model: PreTrainedModel,
        *,
        balance_coef: float,
        z_coef: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        gather: Callable[[Any], Sequence[Any]] = lambda own: [own],
    ) -> None:
        """`autocast()` is what training runs its forward passes under. `gather` turns one trainer's value into every
        trainer's."""
        self.model, self.autocast, self.gather = model, autocast, gather
        self.layers = list(model.config.moe_layers) if isinstance(model, MoeForCausalLM) else []
        self.balance_coef, self.z_coef = balance_coef, z_coef
        self.probe: DriftProbe | None = None
        self.router_loss: RouterLoss | None = None
        self.load = RouterLoad()

    def state(self) -> dict[str, Any] | None:
        """What drift is measured from, for a run that goes on later; None before the first step."""
        return vars(self.probe) if self.probe else None

    def restore(self, state: dict[str, Any] | None) -> None:
        self.probe = DriftProbe(**state).to(self.model.device) if state else None

    def begin_step(
        self, batches: Sequence[RoutedBatch], own: Sequence[RoutedBatch] | None = None, num_passes: int = 0
    ) -> None:
        """`batches` make up the step, over all trainers; `own` of them are this trainer's, and every trainer makes
        `num_passes`. The balance loss has to know where the whole batch goes before the first gradient: from a replay,
        or by forward passes that only count."""
        if not self.layers:
            return
        if self.probe is None:
            documents = [document for batch in batches for document in batch.documents()]
            with self.autocast():
                self.probe = DriftProbe.taken(self.model, documents)
        self.load, self.router_loss = RouterLoad(), None
        if self.balance_coef or self.z_coef:
            self.router_loss = RouterLoss(
                balance_coef=self.balance_coef,
                z_coef=self.z_coef,
                num_tokens=float(sum(int(batch.real_BS.sum()) for batch in batches)),
                shares=self._shares(batches, batches if own is None else own, num_passes)
                if self.balance_coef
                else None,
            )

    def loss(self, routes: Sequence[Route]) -> torch.Tensor | float:
        """Count a micro-batch's routes; returns what is added to its loss."""
        self.load.add(routes)
        return self.router_loss(routes) if self.router_loss is not None and routes else 0.0

    def end_step(self) -> dict[str, float]:
        """Metrics of the step, after the optimiser moved the weights: `router/…` of `model/router_gauges.py`, the
        auxiliary losses before their coefficients, and how many tokens of a replay had no record."""
        if not self.layers:
            return {}
        load, losses = RouterLoad(), Counter[str]()
        for other_load, other_losses in self.gather((self.load, self.router_loss.sums if self.router_loss else {})):
            load.join(other_load)
            losses.update(other_losses)
        by_layer = load.by_layer()
        if self.probe is not None:
            with self.autocast():
                drift = self.probe.by_layer(self.model)
            by_layer = [gauges | moved for gauges, moved in zip(by_layer, drift, strict=True)]
        missing = {"router_replay_missing": load.num_missing()} if load.replayed() else {}
        return named(by_layer, self.layers) | {f"router/{name}_loss": value for name, value in losses.items()} | missing

    def _shares(self, batches: Sequence[RoutedBatch], own: Sequence[RoutedBatch], num_passes: int) -> torch.Tensor:
        """Each expert's share of its layer's tokens in the whole batch, [layers, E]."""
        replays = [batch.replay_BSM[batch.real_BS.bool()] for batch in batches if batch.replay_BSM is not None]
        recorded = recorded_shares(replays, self.model.config.num_local_experts) if replays else None
        if recorded is not None:
            return recorded
        load, whole = RouterLoad(), RouterLoad()
        for batch in own:
            with self.autocast():
                load.add(routes_of(self.model, *batch))
        for _ in range(num_passes - len(own)):  # the others wait for us
            with self.autocast():
                routes_of(self.model, *batches[0])
        for part in self.gather(load):
            whole.join(part)
        return whole.shares()
