"""The routed experts of one MoE layer: each token through the one SwiGLU that the router chose for it.

    tokens ─ sort by expert ─ × gate ─ gate_up product ─ silu(gate) ∘ up ─ down product ─ back in order

Only routed work is done: transformers' reference runs every expert on every token, E times as much. Top-1 makes the
sort a permutation, so bringing the rows back is a gather too.

Axes: T tokens, R = T rows sorted by expert, D hidden size, E experts, F expert width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from model.kernels.grouped_gemm import grouped_mm
from model.kernels.routed_rows import gated, inverse, permuted, swiglu
from model.precision import Fp8Settings

if TYPE_CHECKING:
    from model.fp8_gauges import Fp8Gauges


class Experts(nn.Module):
    """Parameters as transformers has them, input-major: gate_up_proj [E, D, 2F] (gate first), down_proj [E, F, D]."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.precision: Fp8Settings | None = None  # None: the dtype of what comes in
        self.gauges: Fp8Gauges | None = None

    def initialise(self) -> None:
        """1/√fan-in; half of it for what writes into the residual stream."""
        nn.init.normal_(self.gate_up_proj, std=1.0 / math.sqrt(self.gate_up_proj.shape[1]))
        nn.init.normal_(self.down_proj, std=0.5 / math.sqrt(self.down_proj.shape[1]))

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [E, D, 2F] and down [E, F, D] of the experts that are here."""
        return self.gate_up_proj, self.down_proj

    def forward(self, x_TD: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor) -> torch.Tensor:
        """[T, D] in the order of the tokens. `expert_T` int64, `gate_T` the router's sigmoid."""
        order_R = expert_T.argsort(stable=True)  # stable: equal experts keep the tokens' order, every time
        inverse_T = inverse(order_R)
        gate_up_ED2F, down_EFD = self.weights()
        ends_E = torch.bincount(expert_T, minlength=len(down_EFD)).cumsum(0).to(torch.int32)
        # Llama 4 scales the expert's input, not its output: SwiGLU is not linear, so the two differ.
        if self.precision is not None:
            out_RD = self._in_fp8(self.precision, x_TD, gate_T, order_R, ends_E)
            return permuted(out_RD, inverse_T, order_R)
        rows_RD = gated(x_TD, gate_T, order_R, inverse_T)
        hidden_R2F = grouped_mm(rows_RD, gate_up_ED2F, ends_E)
        out_RD = grouped_mm(swiglu(hidden_R2F), down_EFD, ends_E)
        return permuted(out_RD, inverse_T, order_R)

    def _in_fp8(
        self,
        settings: Fp8Settings,
        x_TD: torch.Tensor,
        gate_T: torch.Tensor,
        order_R: torch.Tensor,
        ends_E: torch.Tensor,
    ) -> torch.Tensor:
        """The same rows: what is quantised is made on the way, in the same pass over memory."""
        from model.kernels.fp8 import fp8_permuted_grouped_mm, fp8_swiglu_grouped_mm

        gate_up_ED2F, down_EFD = self.weights()
        first, second = (self.gauges.named(name) if self.gauges else None for name in ("gate_up", "down"))
        hidden_R2F = fp8_permuted_grouped_mm(x_TD, order_R, gate_T[order_R], gate_up_ED2F, ends_E, settings, first)
        return fp8_swiglu_grouped_mm(hidden_R2F, down_EFD, ends_E, settings, second)
