"""Rows of unequal length → padded micro-batches of a bounded number of tokens. Cutting never changes the gradient.

Axes: B rows, S sequence, T answer tokens in row order, M MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.router import NOT_RECORDED

if TYPE_CHECKING:
    from rl.types import TrainBatch


@dataclass(frozen=True)
class MicroBatch:
    """B rows padded on the right to S tokens."""

    ids_BS: torch.Tensor
    real_BS: torch.Tensor  # bool, False on padding
    answer_BS: torch.Tensor  # bool, True on answer tokens
    replay_BSM: torch.Tensor | None  # the engine's expert ids, NOT_RECORDED where it left none; None: no row has any
    generator_logprobs: torch.Tensor  # [T] fp32
    advantages: torch.Tensor  # [T] fp32
    staleness: torch.Tensor  # [T] int64: learner version minus token version


def micro_batches(batch: TrainBatch, max_padded_tokens: int) -> list[MicroBatch]:
    """Rows that carry signal (advantage ≠ 0), alike in length together, each micro-batch within `max_padded_tokens`
    (a single longer row gets one of its own)."""
    lengths = [len(p) + len(a) for p, a in zip(batch.prompt_ids, batch.answer_ids, strict=True)]
    rows = sorted((row for row in range(len(lengths)) if batch.advantages[row] != 0.0), key=lambda row: lengths[row])
    cuts: list[list[int]] = []
    for row in rows:  # lengths rise, so the newest row is the longest of its micro-batch
        if not cuts or (len(cuts[-1]) + 1) * lengths[row] > max_padded_tokens:
            cuts.append([])
        cuts[-1].append(row)
    num_layers = _recorded_layers(batch)
    return [_pad(batch, cut, max(lengths[row] for row in cut), num_layers) for cut in cuts]


def _recorded_layers(batch: TrainBatch) -> int | None:
    """MoE layers that the engine's routes name, None without any; ValueError where rows disagree or are too long."""
    widths = set()
    for prompt, answer, routes in zip(batch.prompt_ids, batch.answer_ids, batch.routes or (), strict=False):
        if routes is not None and len(routes):
            widths.add(len(routes[0]))
            if len(routes) > len(prompt) + len(answer):
                raise ValueError(f"routes of {len(routes)} tokens for a row of {len(prompt) + len(answer)}")
    if len(widths) > 1:
        raise ValueError(f"routes name {sorted(widths)} MoE layers; every row passes the same number")
    return widths.pop() if widths else None


def _pad(batch: TrainBatch, rows: list[int], longest: int, num_layers: int | None) -> MicroBatch:
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    real, answer = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    replay = None if num_layers is None else torch.full((*ids.shape, num_layers), NOT_RECORDED)
    for i, row in enumerate(rows):
        prompt, tokens = batch.prompt_ids[row], batch.answer_ids[row]
        length = len(prompt) + len(tokens)
        ids[i, :length] = torch.tensor(prompt + tokens)
        real[i, :length] = True
        answer[i, len(prompt) : length] = True
        routes = batch.routes[row] if batch.routes is not None else None
        if replay is not None and routes is not None and len(routes):
            replay[i, : len(routes)] = torch.as_tensor(routes)
    return MicroBatch(
        ids_BS=ids,
        real_BS=real,
        answer_BS=answer,
        replay_BSM=replay,
        generator_logprobs=torch.tensor([value for row in rows for value in batch.generator_logprobs[row]]),
        advantages=torch.tensor([batch.advantages[row] for row in rows for _ in batch.answer_ids[row]]),
        staleness=torch.tensor([batch.version - version for row in rows for version in batch.token_versions[row]]),
    )
