"""The Llama 4 MoE block, doing the routed work only.

transformers' reference runs every expert on every token (E/top_k times the needed work) and lets zero scores cancel
the rest. Here tokens are sorted by their expert and one grouped matrix product does each projection. Parameters and
their names are those of `Llama4ForCausalLM`, so checkpoints, vLLM and TRL see no difference.

Axes: T tokens, D hidden size, E experts, F expert width, R = T·top_k routed rows.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe


class RoutedMoe(Llama4TextMoe):
    """Same function and parameters as `Llama4TextMoe`; swapped in by class, so that weights stay where they are."""

    def forward(self, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the block's output [T, D] and the router's logits [T, E]."""
        x_TD = hidden_BSD.reshape(-1, self.hidden_dim)
        scores_TE, logits_TE = self.router(x_TD)
        expert_TK = logits_TE.topk(self.top_k, dim=-1).indices
        expert_R = expert_TK.flatten()
        order_R = expert_R.argsort(stable=True)  # stable: equal experts keep the tokens' order, every time
        token_R = order_R // self.top_k
        gate_R1 = scores_TE.gather(1, expert_TK).flatten()[order_R].unsqueeze(-1)
        # Llama 4 scales the expert's input, not its output: SwiGLU is not linear, so the two differ.
        routed_RD = x_TD[token_R] * gate_R1
        ends_E = torch.bincount(expert_R, minlength=self.num_experts).cumsum(0).to(torch.int32)
        out_RD = self._run_experts(routed_RD, ends_E)
        out_TD = self.shared_expert(x_TD)
        return out_TD.index_add(0, token_R, out_RD.to(out_TD.dtype)), logits_TE

    def _run_experts(self, x_RD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """SwiGLU of every expert on its own rows; `ends_E[e]` is one past the last row of expert e."""
        gate_RF, up_RF = F.grouped_mm(x_RD, self.experts.gate_up_proj, offs=ends_E).chunk(2, dim=-1)
        return F.grouped_mm(self.experts.act_fn(gate_RF) * up_RF, self.experts.down_proj, offs=ends_E)


def use_routed_experts(model: nn.Module) -> int:
    """Make every Llama 4 MoE block of `model` a `RoutedMoe`; returns how many there were."""
    blocks = [module for module in model.modules() if type(module) is Llama4TextMoe]
    for block in blocks:
        block.__class__ = RoutedMoe
    return len(blocks)
