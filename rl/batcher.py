"""Rows of unequal length → padded micro-batches of a bounded number of tokens. Cutting never changes the gradient.

With `share_prompts` the answers to one prompt share its computation: the first brings the prompt along, the others are
branches of it, as model/packing.py explains. Only our own definition of the model understands that.

    row 0   p p p a a a ·     positions 0 1 2 3 4 5
    row 1   b b b b · · ·               3 4 5 6
    row 2   q q c c c c c               0 1 2 3 4 5 6

Axes: B rows, S sequence, T answer tokens in row order, M MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    position_BS: torch.Tensor  # of each token in its prompt and answer
    replay_BSM: torch.Tensor | None  # the engine's expert ids, NOT_RECORDED where it left none; None: no row has any
    generator_logprobs: torch.Tensor  # [T] fp32
    advantages: torch.Tensor  # [T] fp32
    staleness: torch.Tensor  # [T] int64: learner version minus token version
    answer: torch.Tensor  # [T] int64: the row of the token

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return MicroBatch(**{name: None if x is None else x.to(device) for name, x in tensors.items()})


def micro_batches(batch: TrainBatch, max_tokens: int, share_prompts: bool = False) -> list[MicroBatch]:
    """Rows that carry signal (advantage ≠ 0), each micro-batch within `max_tokens` (a single longer row gets one of its
    own): padded ones, rows alike in length together, or, where prompts are shared, real ones, rows of one prompt
    together. A prompt whose answers do not fit one micro-batch is computed in each."""
    rows = [row for row in range(len(batch.advantages)) if batch.advantages[row] != 0.0]
    num_layers = _recorded_layers(batch)
    cuts = _by_prompt(batch, rows, max_tokens) if share_prompts else _by_length(batch, rows, max_tokens)
    return [_pad(batch, cut, num_layers) for cut in cuts]


@dataclass(frozen=True)
class _Row:
    """One row of a micro-batch: a row of the batch, all of it or from token `start` on."""

    row: int
    start: int = 0


def _by_length(batch: TrainBatch, rows: list[int], max_padded_tokens: int) -> list[list[_Row]]:
    lengths = {row: len(batch.prompt_ids[row]) + len(batch.answer_ids[row]) for row in rows}
    cuts: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: lengths[row]):  # the newest row is the longest of its micro-batch
        if not cuts or (len(cuts[-1]) + 1) * lengths[row] > max_padded_tokens:
            cuts.append([])
        cuts[-1].append(_Row(row))
    return cuts


def _by_prompt(batch: TrainBatch, rows: list[int], max_real_tokens: int) -> list[list[_Row]]:
    together: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        together.setdefault(tuple(batch.prompt_ids[row]), []).append(row)
    cuts: list[list[_Row]] = []
    used = 0
    for prompt, members in together.items():
        present = False  # the prompt, in the newest micro-batch
        for row in members:
            size = len(batch.answer_ids[row]) + (0 if present else len(prompt))
            if not cuts or used + size > max_real_tokens:
                cuts.append([])
                used, present, size = 0, False, len(prompt) + len(batch.answer_ids[row])
            cuts[-1].append(_Row(row, start=len(prompt) if present else 0))
            used, present = used + size, True
    return cuts


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


def _pad(batch: TrainBatch, cut: list[_Row], num_layers: int | None) -> MicroBatch:
    rows = [part.row for part in cut]
    lengths = [len(batch.prompt_ids[part.row]) + len(batch.answer_ids[part.row]) - part.start for part in cut]
    ids = torch.zeros((len(cut), max(lengths)), dtype=torch.long)
    real, answer = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    replay = None if num_layers is None else torch.full((*ids.shape, num_layers), NOT_RECORDED)
    for i, (part, length) in enumerate(zip(cut, lengths)):
        prompt, tokens = batch.prompt_ids[part.row], batch.answer_ids[part.row]
        ids[i, :length] = torch.tensor((prompt + tokens)[part.start :])
        real[i, :length] = True
        answer[i, len(prompt) - part.start : length] = True
        routes = None if batch.routes is None else batch.routes[part.row]
        if replay is not None and routes is not None and len(routes) > part.start:
            replay[i, : len(routes) - part.start] = torch.as_tensor(routes[part.start :])
    return MicroBatch(
        ids_BS=ids,
        real_BS=real,
        answer_BS=answer,
        position_BS=torch.tensor([part.start for part in cut]).unsqueeze(1) + torch.arange(ids.shape[1]),
        replay_BSM=replay,
        generator_logprobs=torch.tensor([value for row in rows for value in batch.generator_logprobs[row]]),
        advantages=torch.tensor([batch.advantages[row] for row in rows for _ in batch.answer_ids[row]]),
        staleness=torch.tensor([batch.version - version for row in rows for version in batch.token_versions[row]]),
        answer=torch.tensor([i for i, row in enumerate(rows) for _ in batch.answer_ids[row]]),
    )
