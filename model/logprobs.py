"""Log-probabilities of given tokens, the one definition that RL and evaluation share.

The head runs in fp32 and only on the positions that are asked for, in slices: `[tokens, vocabulary]` of a whole batch
never exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLICE_TOKENS = 4096


def token_logprobs(
    model: PreTrainedModel, ids_BS: torch.Tensor, wanted_BS: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of the tokens where `wanted_BS` is True, at `temperature`, row by row: two [T] fp32.

    `ids_BS` is padded on the right (causal attention never looks there). `wanted_BS` [B, S] bool must not mark a row's
    first token, which nothing predicts. The entropy carries no gradient."""
    if bool(wanted_BS[:, 0].any()):
        raise ValueError("wanted_BS marks a first token; nothing predicts it")
    decoder = model.get_submodule(model.base_model_prefix)
    hidden_BSD = decoder(input_ids=ids_BS, use_cache=False).last_hidden_state
    hidden_TD = hidden_BSD[:, :-1][wanted_BS[:, 1:]]
    target_T = ids_BS[:, 1:][wanted_BS[:, 1:]]
    head = model.get_output_embeddings().weight
    slices = zip(hidden_TD.split(SLICE_TOKENS), target_T.split(SLICE_TOKENS), strict=True)
    if len(target_T) <= SLICE_TOKENS:  # one slice: keeping its logits is cheaper than computing them twice
        parts = [_slice_logprobs(hidden, target, head, temperature) for hidden, target in slices]
    else:
        parts = [
            checkpoint(_slice_logprobs, hidden, target, head, temperature, use_reentrant=False)
            for hidden, target in slices
        ]
    return torch.cat([logprob for logprob, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _slice_logprobs(
    hidden_TD: torch.Tensor, target_T: torch.Tensor, head_VD: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(hidden_TD.device.type, enabled=False):  # or the product would be rounded to bf16 again
        logprobs_TV = torch.log_softmax(hidden_TD.float() @ head_VD.float().T / temperature, dim=-1)
    with torch.no_grad():
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(1, target_T.unsqueeze(1)).squeeze(1), entropy_T
