"""The optimisers of a step: AdamW for every parameter, or Muon for the matrices of the layers and AdamW for the rest.

Muon moves a matrix W by the orthogonal factor of its averaged gradient, so by as much in every direction that has a
gradient at all, where AdamW moves by as much in every element:

    B ← μ B + (1 − μ) G              averaged gradient
    U Σ Vᵀ = μ B + (1 − μ) G         Nesterov's look ahead
    W ← (1 − rate · decay) W − rate · 0.2 √max(rows, columns) · U Vᵀ

The last factor gives a step the root mean square of AdamW's, about 0.2 · rate, so a rate of one is a rate of the other
(Moonlight, arXiv 2502.16982, section 2.2). U Vᵀ comes from five steps of Newton and Schulz with the coefficients of
Keller Jordan (kellerjordan.github.io/posts/muon), which leave singular values between 0.7 and 1.2. `torch.optim.Muon`
does the same in bf16 for single matrices; routed experts are stacks [E, K, N], each expert a matrix of its own.

Embedding and head are matrices of rows that are looked up, or scored, one by one: AdamW's, as are vectors and routers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from model.router import router_parameters

Kind = Literal["adamw", "muon"]
Part = Literal["embedding", "head", "vectors", "router", "matrices"]

ADAM_BETAS = (0.9, 0.95)
MOMENTUM = 0.9  # few steps: 0.95, the usual one, averages over twenty
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAM = 0.2


def make_optimizers(
    model: PreTrainedModel,
    kind: Kind,
    learning_rate: float,
    weight_decay: float = 0.0,
    rate_scales: Mapping[Part, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """One, or Muon and AdamW; each trainable parameter of `model` in exactly one group of one of them.

    `rate_scales` multiplies the learning rate of parts of the model. Groups carry `initial_lr`, for a schedule.
    ValueError where it names a part that the model does not have, or does not train.
    """
    scales = dict(rate_scales or {})
    groups: dict[Part, list[nn.Parameter]] = {}
    for part, parameter in parts(model):
        groups.setdefault(part, []).append(parameter)
    if absent := scales.keys() - groups.keys():
        raise ValueError(
            f"rate_scales: {', '.join(sorted(absent))}: this model trains {', '.join(sorted(groups))} "
            "(a head that is tied to the embedding is the embedding)"
        )
    named = [
        {"params": members, "lr": (rate := learning_rate * scales.get(part, 1.0)), "initial_lr": rate, "part": part}
        for part, members in groups.items()
    ]
    of_muon = [group for group in named if kind == "muon" and group["part"] == "matrices"]
    of_adam = [group for group in named if kind != "muon" or group["part"] != "matrices"]
    made: list[torch.optim.Optimizer] = []
    if of_muon:
        made.append(Muon(of_muon, learning_rate, weight_decay=weight_decay))
    if of_adam:
        made.append(torch.optim.AdamW(of_adam, learning_rate, ADAM_BETAS, weight_decay=weight_decay, fused=True))
    return made


def parts(model: PreTrainedModel) -> Iterator[tuple[Part, nn.Parameter]]:
    """Of every trainable parameter, which part of the model it is; a head that is tied to the embedding is that."""
    head = model.get_output_embeddings()
    named: dict[int, Part] = {id(parameter): "router" for parameter in router_parameters(model)}
    named |= {id(head.weight): "head"} if head is not None else {}
    named |= {id(module.weight): "embedding" for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim == 1 or name.endswith("bias")  # biases of a stack of experts are a matrix
            yield named.get(id(parameter), "vectors" if is_vector else "matrices"), parameter


class Muon(torch.optim.Optimizer):
    """Of matrices [K, N], and stacks of them [E, K, N], whole or cut over processes."""

    def __init__(self, params: Any, lr: float, *, momentum: float = MOMENTUM, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                state["average"].lerp_(parameter.grad, 1 - momentum)
                direction = orthogonal(parameter.grad.lerp(state["average"], momentum), moves=parameter.grad)
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(direction, alpha=-rate * RMS_OF_ADAM * max(parameter.shape[-2:]) ** 0.5)


def orthogonal(matrices: torch.Tensor, moves: torch.Tensor | None = None) -> torch.Tensor:
    """About U Vᵀ of each matrix of [..., K, N], in fp32; nought where it is nought, or the same matrix of `moves` is.

    (An expert that no token came to must not go on in its old direction: at full length it would, step after step.)
    Of DTensors, which each process has a share of: its share. What is cut within matrices is gathered first, and then
    every process that has a share of a matrix does the same.
    """
    moves = matrices if moves is None else moves
    if not isinstance(matrices, DTensor):
        return _orthogonal(matrices) * _any_element(moves)
    mesh, cut = matrices.device_mesh, matrices.placements
    between = [place if matrices.ndim > 2 and place == Shard(0) else Replicate() for place in cut]
    whole, moved = (tensor.redistribute(placements=between).to_local() for tensor in (matrices, moves))
    direction = _orthogonal(whole) * _any_element(moved)
    own = DTensor.from_local(
        direction, mesh, between, run_check=False, shape=matrices.shape, stride=matrices.stride()
    )  # fmt: skip
    return own.redistribute(placements=cut)


def _any_element(matrices: torch.Tensor) -> torch.Tensor:
    """[..., 1, 1]: 1 for a matrix that is not nought."""
    return (matrices != 0).flatten(-2).any(-1)[..., None, None].to(torch.float32)


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.float().mT if tall else matrices.float()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-20)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
