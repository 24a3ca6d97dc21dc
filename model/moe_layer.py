"""The feed-forward half of a layer: a SwiGLU, or a router with its experts and the shared one.

    x ──┬── shared expert ───────────────────────────┐
        └── router ── one expert per token, × gate ──┴── + ── out        out = shared(x) + expert(gate · x)

Routing is decided before, and outside of, whatever activation checkpointing recomputes: a recomputed router could send
a token elsewhere than the first time, and its load would be counted twice.

Axes: T tokens, D hidden size, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Llama4TextConfig

from model.experts import Experts
from model.linear import Linear
from model.router import Route, Router


class SwiGlu(nn.Module):
    """silu(x · gateᵀ) ∘ (x · upᵀ) · downᵀ"""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)
        self.down_proj.writes_residual = True

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class MoeBlock(nn.Module):
    def __init__(self, config: Llama4TextConfig) -> None:
        super().__init__()
        self.router = Router(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config.num_local_experts, config.hidden_size, config.intermediate_size)
        self.shared_expert = SwiGlu(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_TD: torch.Tensor, replay_T: torch.Tensor | None, recompute: Callable[..., Any]
    ) -> tuple[torch.Tensor, Route]:
        """The block's output, and where it sent its tokens. `recompute(f, *args)` calls f: now, or again later."""
        route = self.router(x_TD, replay_T)
        return recompute(self._apply_experts, x_TD, route.expert_T, route.gate_T), route

    def _apply_experts(self, x_TD: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor) -> torch.Tensor:
        return self.shared_expert(x_TD) + self.experts(x_TD, expert_T, gate_T)
