"""Which expert a token goes to, and how strongly.

Llama 4: logits = x · Wᵀ; the largest wins (top-1 on the raw logits); its sigmoid is the gate, which scales the expert's
*input*. Everything here is fp32 whatever the rest of the network runs in: a rounded logit is another expert.

No selection bias (the "loss-free" balancing): a Llama 4 checkpoint has no place for it, so what is trained with it
could not be served.

Axes: T tokens, D hidden size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_RECORDED = -1  # in a replay: this token's expert is not known; never 0, which is an expert
ROUTER_NAMES = frozenset({"router", "gate"})  # what Llama 4, and other families, call the module


@dataclass(frozen=True)
class Route:
    """Where one MoE layer sent the tokens of a forward pass."""

    logits_TE: torch.Tensor  # fp32, with gradient
    expert_T: torch.Tensor  # int64
    gate_T: torch.Tensor  # fp32 sigmoid of the chosen expert's logit, with gradient
    own_expert_T: torch.Tensor  # what the live logits alone would have chosen; differs only under replay
    replayed: bool = False  # whether `expert_T` comes from a replay
    num_missing: int = 0  # tokens of a replay without a recorded expert, routed by their own logits


class Router(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TD: torch.Tensor, replay_T: torch.Tensor | None = None) -> Route:
        """With `replay_T` (expert ids, or NOT_RECORDED), those experts are used and their gates recomputed from the
        live logits, so that the router still learns. ValueError for an id that is no expert."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = x_TD.float() @ self.weight.float().T
        own_T = logits_TE.argmax(dim=-1)  # the first of equals, every time
        expert_T, num_missing = (own_T, 0) if replay_T is None else self._replayed(own_T, replay_T)
        gate_T = rowwise_sigmoid(logits_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1))
        return Route(logits_TE, expert_T, gate_T, own_T, replay_T is not None, num_missing)

    def _replayed(self, own_T: torch.Tensor, replay_T: torch.Tensor) -> tuple[torch.Tensor, int]:
        replay_T = replay_T.to(own_T)
        wrong = (replay_T < NOT_RECORDED) | (replay_T >= len(self.weight))
        if bool(wrong.any()):
            raise ValueError(
                f"replay names expert {int(replay_T[wrong][0])}; this layer has experts 0 to {len(self.weight) - 1}, "
                f"and {NOT_RECORDED} for a token without a record"
            )
        missing = replay_T == NOT_RECORDED
        return torch.where(missing, own_T, replay_T), int(missing.sum())


def rowwise_sigmoid(x_T: torch.Tensor) -> torch.Tensor:
    """Sigmoid as a softmax against 0. On a CPU the last few elements of a plain one are rounded differently from the
    others, and a token's gate would depend on its place in the batch."""
    return torch.stack([x_T, torch.zeros_like(x_T)], dim=-1).softmax(dim=-1)[:, 0]


def normalised_gates(logits_TE: torch.Tensor) -> torch.Tensor:
    """Sigmoids of a token's logits, divided by their sum: a distribution over experts, [T, E]."""
    gates = logits_TE.sigmoid()
    return gates / gates.sum(dim=-1, keepdim=True)


def expert_counts(route: Route) -> torch.Tensor:
    """Tokens sent to each expert, [E] fp32."""
    return torch.bincount(route.expert_T, minlength=route.logits_TE.shape[1]).float()


def balance_loss(
    routes: Sequence[Route], shares: torch.Tensor | None = None, num_tokens: float | None = None
) -> torch.Tensor:
    """Switch's load-balancing loss E · Σᵢ fᵢ Pᵢ, mean over layers; 1 when perfectly even.

    fᵢ is the share of tokens sent to expert i, Pᵢ the mean over tokens of its normalised sigmoid (a softmax would pull
    at a balance that sigmoid gates do not have). `shares` [layers, E] are the fᵢ of the *global* batch: with those of a
    micro-batch each document would have to use all experts ("Demons in the Detail", arXiv 2501.11873).
    With `num_tokens` of the global batch, the losses of its micro-batches add up to the loss of the whole.
    """
    layers = []
    for layer, route in enumerate(routes):
        tokens, experts = route.logits_TE.shape
        share = expert_counts(route) / max(tokens, 1) if shares is None else shares[layer].to(route.logits_TE)
        mean_gate = normalised_gates(route.logits_TE).sum(0) / (num_tokens or max(tokens, 1))
        layers.append(experts * (share * mean_gate).sum())
    return torch.stack(layers).mean()


def z_loss(routes: Sequence[Route], num_tokens: float | None = None) -> torch.Tensor:
    """ST-MoE's mean (log Σ exp logits)² (arXiv 2202.08906), mean over layers: keeps router logits small."""
    layers = [
        route.logits_TE.logsumexp(-1).square().sum() / (num_tokens or max(len(route.logits_TE), 1)) for route in routes
    ]
    return torch.stack(layers).mean()


class RouterLoss:
    """balance_coef · balance + z_coef · z of one optimiser step, a micro-batch at a time.

    `num_tokens` and `shares` [layers, E] (for the balance loss) are those of the step's whole batch, over all
    micro-batches and learners: no cut of the batch changes the gradient. `sums` are the two losses, before their
    coefficients, of the micro-batches so far.
    """

    def __init__(
        self, *, balance_coef: float, z_coef: float, num_tokens: float, shares: torch.Tensor | None = None
    ) -> None:
        self.balance_coef, self.z_coef = balance_coef, z_coef
        self.num_tokens, self.shares = num_tokens, shares
        self.sums: dict[str, float] = {}

    def __call__(self, routes: Sequence[Route]) -> torch.Tensor:
        """One micro-batch's part, a scalar with gradient."""
        weighted = routes[0].logits_TE.new_zeros(())
        if self.balance_coef:
            assert self.shares is not None, "the balance loss needs the shares of the whole batch"
            balance = balance_loss(routes, self.shares, self.num_tokens)
            weighted = weighted + self._counted("balance", self.balance_coef, balance)
        if self.z_coef:
            weighted = weighted + self._counted("z", self.z_coef, z_loss(routes, self.num_tokens))
        return weighted

    def _counted(self, name: str, coef: float, loss: torch.Tensor) -> torch.Tensor:
        self.sums[name] = self.sums.get(name, 0.0) + loss.item()
        return coef * loss


@torch.no_grad()
def routes_of(
    model: PreTrainedModel,
    ids_BS: torch.Tensor,
    real_BS: torch.Tensor,
    replay_BSM: torch.Tensor | None = None,
    position_BS: torch.Tensor | None = None,
) -> tuple[Route, ...]:
    """Where a forward pass sends its real tokens, without gradient and without the head."""
    from model.parallel import within_forward  # which imports us

    body = model.get_submodule(model.base_model_prefix)
    inputs = dict(input_ids=ids_BS, attention_mask=real_BS, position_ids=position_BS, replay=replay_BSM)
    return within_forward(model, body, **inputs, use_cache=False).routes


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that decides where tokens go, in this definition or another; empty for a dense model."""
    return [parameter for name, parameter in model.named_parameters() if ROUTER_NAMES & set(name.split("."))]


def freeze_routers(model: nn.Module) -> None:
    for parameter in router_parameters(model):
        parameter.requires_grad_(False)


def slow_routers(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Give the routers of `model` groups of their own, at `scale` times the learning rate they had."""
    routers = {id(parameter) for parameter in router_parameters(model)}
    for group in list(optimizer.param_groups):
        mine: list[Any] = [parameter for parameter in group["params"] if id(parameter) in routers]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in routers]
            rates = {key: group[key] * scale for key in ("lr", "initial_lr") if key in group}
            optimizer.add_param_group(group | {"params": mine} | rates)


def initial_router_weight(weight_ED: torch.Tensor) -> None:
    """1/√fan-in: logits of order one."""
    nn.init.normal_(weight_ED, std=1.0 / math.sqrt(weight_ED.shape[1]))
