"""Rows of unequal length → padded micro-batches of a bounded number of tokens. Cutting never changes the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rl.types import TrainBatch


@dataclass(frozen=True)
class MicroBatch:
    """B rows padded on the right to S tokens. The [T] tensors list the answer tokens in row order."""

    ids_BS: torch.Tensor
    answer_BS: torch.Tensor  # bool, True on answer tokens
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
    return [_pad(batch, cut, max(lengths[row] for row in cut)) for cut in cuts]


def _pad(batch: TrainBatch, rows: list[int], longest: int) -> MicroBatch:
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    answer = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        prompt, tokens = batch.prompt_ids[row], batch.answer_ids[row]
        ids[i, : len(prompt) + len(tokens)] = torch.tensor(prompt + tokens)
        answer[i, len(prompt) : len(prompt) + len(tokens)] = True
    return MicroBatch(
        ids_BS=ids,
        answer_BS=answer,
        generator_logprobs=torch.tensor([value for row in rows for value in batch.generator_logprobs[row]]),
        advantages=torch.tensor([batch.advantages[row] for row in rows for _ in batch.answer_ids[row]]),
        staleness=torch.tensor([batch.version - version for row in rows for version in batch.token_versions[row]]),
    )
