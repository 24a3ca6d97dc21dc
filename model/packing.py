"""A batch as the documents in it, laid end to end; padding is left behind here and no layer ever sees it.

    input_ids [B, S]            one document a row, padded:      a a a · ·        T = 7 real tokens
    attention_mask [B, S]                                        b b b b ·   →    a a a b b b b
    or position_ids [B, S]      several documents a row:         a a a b b b b    positions 0 1 2 0 1 2 3

Everything but attention works on single tokens, so T tokens is all the work there is. Attention works on *segments*:
whole documents in full attention, documents cut at every multiple of the chunk size in chunked attention. Segments of
like length are padded to one rectangle [segments, longest] and handed to PyTorch's fused causal kernel, which needs no
mask: what is padded lies behind every real query.

Generation with a key/value cache keeps the rectangle [B, S] and builds an explicit mask instead: see `CachedAttention`.

Axes: B rows, S sequence, T real tokens, N segments, L longest segment, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import Cache


class Attention(Protocol):
    """How the tokens of one forward pass may look at each other."""

    position_T: torch.Tensor  # place of each token in its own document

    def __call__(
        self, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, *, layer: int, chunk: int | None
    ) -> torch.Tensor:
        """Causal attention within a document or, with `chunk`, within blocks of `chunk` positions; [T, H, d]."""
        ...


@dataclass(frozen=True)
class Layout:
    """Where the real tokens of a [B, S] batch lie."""

    shape: tuple[int, int]
    real_T: torch.Tensor | None  # flat index in B·S of each real token; None: all are real, in order
    position_T: torch.Tensor

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        attention_mask_BS: torch.Tensor | None,
        position_ids_BS: torch.Tensor | None,
        device: torch.device,
    ) -> Layout:
        """A mask says which tokens are real; positions restart wherever a new document begins in a row."""
        if attention_mask_BS is not None and attention_mask_BS.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask_BS.shape)}; expected [rows, tokens]")
        real_BS = None if attention_mask_BS is None else attention_mask_BS.bool()
        if real_BS is not None and bool(real_BS.all()):
            real_BS = None
        if position_ids_BS is None:
            ones = real_BS if real_BS is not None else torch.ones(shape, dtype=torch.long, device=device)
            position_ids_BS = ones.cumsum(1) - 1
        position = position_ids_BS.expand(shape).reshape(-1)
        if real_BS is None:
            return cls(shape, None, position)
        real_T = real_BS.reshape(-1).nonzero().squeeze(1)
        return cls(shape, real_T, position[real_T])

    def flatten(self, x_BSx: torch.Tensor) -> torch.Tensor:
        """[B, S, …] → [T, …]"""
        flat = x_BSx.reshape(-1, *x_BSx.shape[2:])
        return flat if self.real_T is None else flat[self.real_T]

    def unflatten(self, x_Tx: torch.Tensor) -> torch.Tensor:
        """[T, …] → [B, S, …], zero where there is no token."""
        if self.real_T is None:
            return x_Tx.view(*self.shape, *x_Tx.shape[1:])
        flat = x_Tx.new_zeros(self.shape[0] * self.shape[1], *x_Tx.shape[1:])
        return flat.index_copy(0, self.real_T, x_Tx).view(*self.shape, *x_Tx.shape[1:])

    @cached_property
    def document_lengths(self) -> list[int]:
        """Tokens in each document, in order. One begins at position 0; that a row ends says nothing."""
        starts = (self.position_T == 0).nonzero().squeeze(1).tolist()
        if not len(self.position_T):
            return []
        if not starts or starts[0] != 0:
            raise ValueError(f"the first token is at position {int(self.position_T[0])}, not 0")
        return [end - start for start, end in zip(starts, [*starts[1:], len(self.position_T)], strict=True)]


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of like length. Token `tokens_t[i]` of the batch lies at `places_t[i]` of the rectangle [N·L]."""

    shape: tuple[int, int]  # N, L
    tokens_t: torch.Tensor | None  # None: every token of the batch, in order, and the rectangle has no hole
    places_t: torch.Tensor | None

    def pad(self, x_THd: torch.Tensor) -> torch.Tensor:
        """[T, H, d] → [N, H, L, d]"""
        if self.tokens_t is None or self.places_t is None:
            return x_THd.view(*self.shape, *x_THd.shape[1:]).transpose(1, 2)
        own = x_THd if len(self.tokens_t) == len(x_THd) else x_THd[self.tokens_t]
        rectangle = x_THd.new_zeros(self.shape[0] * self.shape[1], *x_THd.shape[1:])
        return rectangle.index_copy(0, self.places_t, own).view(*self.shape, *x_THd.shape[1:]).transpose(1, 2)

    def unpad(self, x_NHLd: torch.Tensor) -> torch.Tensor:
        """[N, H, L, d] → [t, H, d], the group's own tokens in order."""
        flat = x_NHLd.transpose(1, 2).reshape(-1, x_NHLd.shape[1], x_NHLd.shape[3])
        return flat if self.places_t is None else flat[self.places_t]


class PackedAttention:
    """Attention over whole documents, all of whose tokens are here: training, scoring, prefill without a cache."""

    def __init__(self, layout: Layout) -> None:
        self.position_T = layout.position_T
        self.lengths = layout.document_lengths
        self.groups: dict[int | None, list[SegmentGroup]] = {}

    def __call__(
        self, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, *, layer: int, chunk: int | None
    ) -> torch.Tensor:
        if chunk is not None and max(self.lengths, default=0) <= chunk:
            chunk = None  # no document reaches a second chunk
        if chunk not in self.groups:
            self.groups[chunk] = self._grouped(chunk)
        groups = self.groups[chunk]
        outputs = [group.unpad(_causal(group.pad(q_THd), group.pad(k_TKd), group.pad(v_TKd))) for group in groups]
        if len(groups) == 1:
            return outputs[0]
        out_THd = torch.empty_like(q_THd)
        for group, output in zip(groups, outputs, strict=True):
            assert group.tokens_t is not None
            out_THd = out_THd.index_copy(0, group.tokens_t, output)
        return out_THd

    def _grouped(self, chunk: int | None) -> list[SegmentGroup]:
        """Segments whose lengths share a power of two go together: the rectangle is then less than half holes."""
        segments: dict[int, list[tuple[int, int]]] = {}  # bracket → [(first token, length)]
        start = 0
        for length in self.lengths:
            for offset in range(0, length, chunk or max(length, 1)):
                size = min(chunk or length, length - offset)
                segments.setdefault((size - 1).bit_length(), []).append((start + offset, size))
            start += length
        return [self._group(members, start) for members in segments.values()]

    def _group(self, members: list[tuple[int, int]], num_tokens: int) -> SegmentGroup:
        longest = max(size for _, size in members)
        shape = (len(members), longest)
        if sum(size for _, size in members) == num_tokens == len(members) * longest:
            return SegmentGroup(shape, None, None)
        device = self.position_T.device
        sizes = torch.tensor([size for _, size in members], device=device)
        offset_NL = torch.arange(longest, device=device).expand(shape)
        real_NL = offset_NL < sizes.unsqueeze(1)
        first_N1 = torch.tensor([first for first, _ in members], device=device).unsqueeze(1)
        return SegmentGroup(shape, (first_N1 + offset_NL)[real_NL], real_NL.view(-1).nonzero().squeeze(1))


class CachedAttention:
    """Attention over a key/value cache: the rectangle [B, S] of new tokens looks at all that came before it.

    Holes of a padded prompt stay in the rectangle (`generate` pads on the left) and are masked as keys.
    """

    def __init__(
        self, shape: tuple[int, int], attention_mask_BP: torch.Tensor | None, cache: Cache, device: torch.device
    ) -> None:
        num_rows, num_new = shape
        past = cache.get_seq_length()
        real_BP = torch.ones(num_rows, past + num_new, dtype=torch.bool, device=device)
        if attention_mask_BP is not None:
            if attention_mask_BP.shape != real_BP.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask_BP.shape)}; with {past} tokens in the cache "
                    f"expected {tuple(real_BP.shape)}"
                )
            real_BP = attention_mask_BP.bool()
        self.shape, self.cache, self.real_BP = shape, cache, real_BP
        self.position_BP = (real_BP.cumsum(1) - 1).clamp(min=0)
        self.position_T = self.position_BP[:, past:].reshape(-1)

    def __call__(
        self, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, *, layer: int, chunk: int | None
    ) -> torch.Tensor:
        q, k, v = (x.view(*self.shape, *x.shape[1:]).transpose(1, 2) for x in (q_THd, k_TKd, v_TKd))
        k, v = self.cache.update(k, v, layer)
        mask_B1SP = self._mask(k.shape[2], chunk).unsqueeze(1)
        k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SP)
        return out.transpose(1, 2).reshape(q_THd.shape)

    def _mask(self, num_keys: int, chunk: int | None) -> torch.Tensor:
        """[B, S, P] bool. A cache layer may have let go of old keys: it holds the newest `num_keys`."""
        key_BP = self.position_BP[:, -num_keys:].unsqueeze(1)
        query_BS = self.position_T.view(self.shape).unsqueeze(2)
        columns = torch.arange(num_keys, device=key_BP.device)
        behind = columns <= columns[-self.shape[1] :].unsqueeze(1)
        allowed = behind & self.real_BP[:, -num_keys:].unsqueeze(1)
        if chunk is not None:
            allowed = allowed & (key_BP // chunk == query_BS // chunk)
        # A hole may look at itself, lest its row be empty and softmax give nan.
        return allowed | (columns == columns[-self.shape[1] :].unsqueeze(1))


def _causal(q_NHLd: torch.Tensor, k_NKLd: torch.Tensor, v_NKLd: torch.Tensor) -> torch.Tensor:
    k, v = (_repeat_heads(x, q_NHLd.shape[1]) for x in (k_NKLd, v_NKLd))
    return F.scaled_dot_product_attention(q_NHLd, k, v, is_causal=True)


def _repeat_heads(x_NKLd: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Each key/value head serves num_heads / K query heads."""
    groups = num_heads // x_NKLd.shape[1]
    return x_NKLd if groups == 1 else x_NKLd.repeat_interleave(groups, dim=1)
