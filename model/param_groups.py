"""Initial scale, learning rate, weight decay and Adam eps of every parameter, so that what was tuned on a small model
holds for a wide and deep one.

Meta set "per-layer learning rates and initialization scales" of Llama 4 by a technique it calls MetaP and has not
published. Standing in for it: µP for the width and CompleteP for the depth (arXiv 2505.01618, table 1, α = 1; AdamW).

A rule is a power of two growths over a `base` model, the one that was tuned:
    m_N  width: of the tensor's fan-in for std, rate and decay, of the hidden size for eps
    m_L  depth: the number of layers
At the base's own size all factors are 1, and the initialisation is that of `model/transformer.py`.

Multipliers in the forward pass. CompleteP multiplies the logits by 1/m_N and what each block adds to the residual
stream by 1/m_L. A Llama 4 checkpoint has no place for either, so they are folded into the weights. Where the network
uses W = a·w, and AdamW trains w, drawn with `std`, at `rate`, `decay` and `eps`, it may as well train W itself, with
    a·std,  a·rate,  decay / a,  eps / a,
because an Adam step has the size of its rate whatever that of the gradient: ΔW = a·Δw. The gradient of W is that of w
over a, hence eps; rate · decay is the share of a weight that one step removes, and stays. So
    head:                    a = 1/m_N. CompleteP has 1, 1, 1 and an eps of 1/m_N; folded: 1/m_N, 1/m_N, m_N and 1
    o_proj, every down_proj: a = 1/m_L. They are the last matrices of their blocks, and linear: std and rate gain a
                             factor 1/m_L, decay and eps a factor m_L
Training is then the same, step by step, and the exported model is a plain Llama 4 (tests/model/test_param_groups.py
trains both).

Attention needs nothing. µP wants scores over d instead of √d because heads grow; Llama 4 has more heads of one size.

The router reads a hidden state and answers with E numbers, E fixed: it is a small head. With logits of order one at any
width (std 1/√D) its gradient into the residual stream would outgrow all others like √m_N. Only the largest logit
counts, so that smaller ones at the start route as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from model.tensor_map import Config, Group, ParameterSpec, parameters, text_config

Powers = tuple[float, float]  # of m_N and m_L
Role = Literal["embedding", "inward", "outward", "router", "layer norm", "final norm", "head"]
ADAM_EPS = 1e-8  # PyTorch's default


@dataclass(frozen=True, slots=True)
class Rule:
    std: Powers  # of the initial weights; norms start at 1
    rate: Powers  # learning rate
    decay: Powers  # weight decay, which AdamW multiplies by the rate; norms have none
    eps: Powers  # Adam's, follows the size of the gradient


# inward: reads the residual stream (q, k, v, gate, up); outward: writes into it (o, down). An expert's matrices are
# like any other's, with a fan-in of D for gate and up and F for down.
COMPLETE_P: dict[Role, Rule] = {
    #                  std         rate      decay    eps
    "embedding":  Rule((0, 0),     (0, 0),   (0, 0),  (-1, 0)),
    "inward":     Rule((-0.5, 0),  (-1, 0),  (1, 0),  (-1, -1)),
    "outward":    Rule((-0.5, -1), (-1, -1), (1, 1),  (-1, 0)),
    "router":     Rule((-1, 0),    (-1, 0),  (1, 0),  (0, -1)),
    "layer norm": Rule((0, 0),     (0, 0),   (0, 0),  (-1, -1)),
    "final norm": Rule((0, 0),     (0, 0),   (0, 0),  (-1, 0)),
    "head":       Rule((-1, 0),    (-1, 0),  (1, 0),  (0, 0)),
}  # fmt: skip
# The parametrisation that everybody means who names none: fan-in initialisation, one rate, one decay, one eps.
STANDARD: dict[Role, Rule] = {
    role: Rule((-0.5 if rule.std[0] else 0, 0), (0, 0), (0, 0), (0, 0)) for role, rule in COMPLETE_P.items()
}
Rules = Mapping[Role, Rule]


@dataclass(frozen=True, slots=True)
class Scale:
    """What one parameter starts from and trains with."""

    role: Role
    group: Group
    std: float  # of the initial weights; 0 for norms, which start at 1
    rate: float  # factor on the learning rate
    decay: float  # factor on the weight decay
    eps: float  # factor on Adam's eps

    @property
    def name(self) -> str:
        return f"{self.group} {self.role}" if self.role in ("inward", "outward") else self.role


def scales(config: Config, base: Config, rules: Rules = COMPLETE_P) -> dict[str, Scale]:
    """The scale of every parameter, by name, of the model behind `config` (a config.json), tuned as `base`.

    ValueError where the two differ in more than sizes, or where a tensor has two roles or none.
    """
    config, base = text_config(config), text_config(base)
    if config.get("tie_word_embeddings"):
        raise ValueError("tie_word_embeddings: embedding and head follow different rules and cannot be one tensor")
    base_fan_in = {spec.row.name: spec.fan_in for spec in parameters(base)}
    width = config["hidden_size"] / base["hidden_size"]
    depth = config["num_hidden_layers"] / base["num_hidden_layers"]

    def scale(spec: ParameterSpec) -> Scale:
        if spec.row.name not in base_fan_in:
            raise ValueError(f"the base model has no {spec.row.name}: there is nothing to scale from")
        role, fan_in = role_of(spec), base_fan_in[spec.row.name]
        rule, fan = rules[role], spec.fan_in / fan_in
        start = {"embedding": 1.0, "outward": 0.5 / fan_in**0.5, "layer norm": 0.0, "final norm": 0.0}
        return Scale(
            role=role,
            group=spec.row.group,
            std=start.get(role, 1.0 / fan_in**0.5) * fan ** rule.std[0] * depth ** rule.std[1],
            rate=fan ** rule.rate[0] * depth ** rule.rate[1],
            decay=0.0 if "norm" in role else fan ** rule.decay[0] * depth ** rule.decay[1],
            eps=width ** rule.eps[0] * depth ** rule.eps[1],
        )

    return {spec.name: scale(spec) for spec in parameters(config)}


def role_of(spec: ParameterSpec) -> Role:
    axes = spec.row.axes.split()
    match spec.row.group, spec.row.orientation:
        case "norm", _:
            return "final norm" if spec.layer is None else "layer norm"
        case _, "vector":
            raise ValueError(f"there is no rule for {spec.name}: Llama 4 has no biases")
        case ("embedding" | "router" | "head") as group, _:
            return group
        case _, orientation:
            output = axes[0] if orientation == "output-major" else axes[-1]
            return "outward" if output == "D" else "inward"


@torch.no_grad()
def initialise(
    model: PreTrainedModel, base: Config, rules: Rules = COMPLETE_P, generator: torch.Generator | None = None
) -> None:
    """Draw every weight of `model` anew, in the order of its parameters."""
    wanted = scales(model.config.to_dict(), base, rules)
    for name, parameter in _named(model, wanted):
        if wanted[name].std:
            nn.init.normal_(parameter, std=wanted[name].std, generator=generator)
        else:
            nn.init.ones_(parameter)


def parameter_groups(
    model: PreTrainedModel,
    learning_rate: float,
    weight_decay: float = 0.0,
    base: Config | None = None,
    rules: Rules = COMPLETE_P,
    *,
    eps: float = ADAM_EPS,
    rate_scales: Mapping[Group, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW: each trainable parameter of `model` in exactly one, with `lr`, `weight_decay`, `eps`, `name`.

    `learning_rate`, `weight_decay` and `eps` are those of `base` (a config.json); without one the model is its own.
    `rate_scales` multiplies the rates of whole parts, for fine-tuning: {"router": 0.1} is the router policy low_lr.
    """
    if wrong := set(rate_scales or {}) - set(get_args(Group)):
        raise ValueError(f"rate_scales names {sorted(wrong)}; the parts of a model are {', '.join(get_args(Group))}")
    config = model.config.to_dict()
    wanted = scales(config, config if base is None else base, rules)
    groups: dict[Scale, dict[str, Any]] = {}
    for name, parameter in _named(model, wanted):
        if not parameter.requires_grad:
            continue
        scale = wanted[name]
        if scale not in groups:
            groups[scale] = {
                "params": [],
                "name": scale.name,
                "lr": learning_rate * scale.rate * (rate_scales or {}).get(scale.group, 1.0),
                "weight_decay": weight_decay * scale.decay,
                "eps": eps * scale.eps,
            }
        groups[scale]["params"].append(parameter)
    return list(groups.values())


def _named(model: PreTrainedModel, known: Mapping[str, Scale]) -> list[tuple[str, nn.Parameter]]:
    named = list(model.named_parameters())
    if unknown := sorted({name for name, _ in named} ^ set(known)):
        raise ValueError(f"the model and the table of its tensors differ in {', '.join(unknown[:3])}")
    return named
