"""Log-probabilities and entropy of given tokens: the one definition that SFT, RL, DPO and evaluation share.

The head runs in fp32 and only on the positions that are asked for, slice by slice: `[tokens, vocabulary]` of a whole
batch never exists, neither forward nor backward.

Axes: B rows, S sequence, T tokens asked for, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from model.packing import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from model.router import Route

SLICE_TOKENS = 4096


class TokenStatistics(NamedTuple):
    """Of T tokens, fp32 [T] each. Only the log-probability carries a gradient."""

    logprob_T: torch.Tensor  # natural logarithm
    entropy_T: torch.Tensor  # of the whole distribution, nats
    is_top1_T: torch.Tensor  # bool: the token is the most probable one
    mean_logit_T: torch.Tensor  # before the temperature


def token_logprobs(
    model: PreTrainedModel,
    ids_BS: torch.Tensor,
    wanted_BS: torch.Tensor,
    temperature: float = 1.0,
    attention_mask_BS: torch.Tensor | None = None,
    replay_BSM: torch.Tensor | None = None,
    position_BS: torch.Tensor | None = None,
) -> tuple[TokenStatistics, tuple[Route, ...]]:
    """Of the tokens where `wanted_BS` is True, row by row, at `temperature`; and where the forward pass sent the real
    tokens, one `Route` per MoE layer (none for a model that does not say).

    Without a mask `ids_BS` is padded on the right (causal attention never looks there). `wanted_BS` [B, S] bool must
    not mark a document's first token, which nothing predicts. `replay_BSM` holds expert ids, see `model/router.py`.
    `position_BS` may hold several documents, and branches of them, as `model/packing.py` explains; only our own
    definition of the model understands branches."""
    layout = Layout.of(tuple(ids_BS.shape), attention_mask_BS, position_BS, ids_BS.device)
    wanted_t = layout.flatten(wanted_BS).nonzero().squeeze(1)
    before_t = layout.predecessor_T[wanted_t]
    if bool((before_t < 0).any()):
        raise ValueError("wanted_BS marks a first token; nothing predicts it")
    optional = {"replay": replay_BSM, "position_ids": position_BS}
    outputs = model.get_submodule(model.base_model_prefix)(
        input_ids=ids_BS, attention_mask=attention_mask_BS, use_cache=False,
        **{name: value for name, value in optional.items() if value is not None},
    )  # fmt: skip
    hidden_tD = layout.flatten(outputs.last_hidden_state)[before_t]
    head_VD = model.get_output_embeddings().weight
    stats = token_statistics(hidden_tD, layout.flatten(ids_BS)[wanted_t], head_VD, temperature)
    return stats, getattr(outputs, "routes", None) or ()


def token_statistics(
    hidden_TD: torch.Tensor, target_T: torch.Tensor, head_VD: torch.Tensor, temperature: float = 1.0
) -> TokenStatistics:
    """What the head says of each target token, given the hidden state before it."""
    slices = zip(hidden_TD.split(SLICE_TOKENS), target_T.split(SLICE_TOKENS), strict=True)
    if len(target_T) <= SLICE_TOKENS:  # one slice: keeping its logits is cheaper than computing them twice
        return _slice_statistics(hidden_TD, target_T, head_VD, temperature)
    parts = [
        checkpoint(_slice_statistics, hidden, target, head_VD, temperature, use_reentrant=False)
        for hidden, target in slices
    ]
    return TokenStatistics(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _slice_statistics(
    hidden_TD: torch.Tensor, target_T: torch.Tensor, head_VD: torch.Tensor, temperature: float
) -> TokenStatistics:
    with torch.autocast(hidden_TD.device.type, enabled=False):  # or the product would be rounded to bf16 again
        logits_TV = hidden_TD.float() @ head_VD.float().T
        logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    logprob_T = logprobs_TV.gather(1, target_T.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
        return TokenStatistics(logprob_T, entropy_T, logprobs_TV.argmax(-1) == target_T, logits_TV.mean(-1))
