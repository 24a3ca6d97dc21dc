"""A batch as the documents in it, laid end to end; padding is left behind here and no layer ever sees it.

    input_ids [B, S]            one document a row, padded:      a a a · ·        T = 7 real tokens
    attention_mask [B, S]                                        b b b b ·   →    a a a b b b b
    or position_ids [B, S]      several documents a row:         a a a b b b b    positions 0 1 2 0 1 2 3
                                one prompt, many answers:        p p x x y y y    positions 0 1 2 3 2 3 4

A document begins where positions begin at 0. Where they fall back to n > 0, a *branch* begins: other tokens after the
first n of the same document, which see those and themselves. So the answers to one prompt share its computation, and
its gradient is the sum of theirs, as if each had brought a prompt of its own.

Everything but attention works on single tokens, so T tokens is all the work there is. Attention works on *segments*:
whole documents in full attention, documents cut at every multiple of the chunk size in chunked attention. Segments of
like length are padded to one rectangle [segments, longest] and handed to PyTorch's fused causal kernel, which needs no
mask: what is padded lies behind every real query. Those of a branch look at tokens of their prompt before their own:

    keys   ·  p  p │ x  x  ·         a column of holes before a short prompt, masked; the prompt ends where the own
    query            x₀ x₁ ·         tokens begin, so that what is right of the line is causal as ever

Generation with a key/value cache keeps the rectangle [B, S] and builds an explicit mask instead: see `CachedAttention`.
There a row is one document, and positions that say otherwise are refused.

Axes: B rows, S sequence, T real tokens, N segments, L longest segment, P longest prompt part, X keys of a segment,
H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

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
        if attention_mask_BS is not None and attention_mask_BS.shape != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask_BS.shape)}; expected [rows, tokens] = {shape}"
            )
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
    def runs(self) -> list[Run]:
        """The batch as documents and branches, in order. That a row of the batch ends says nothing."""
        position_T = self.position_T
        if not len(position_T):
            return []
        starts = (position_T.diff() != 1).nonzero().squeeze(1).add(1).tolist()
        bounds = [0, *starts, len(position_T)]
        runs: list[Run] = []
        for first, end, position in zip(bounds, bounds[1:], position_T[bounds[:-1]].tolist()):
            trunk = runs[-1].trunk if runs and position else (first, end - first)
            if position > trunk[1] or (position and not runs):
                raise ValueError(
                    f"token {first} of the batch is at position {position}; expected 0, where a document begins, or at "
                    f"most {trunk[1] if runs else 0}, where the one before it can branch"
                )
            runs.append(Run(first, end - first, position, trunk))
        return runs

    @cached_property
    def predecessor_T(self) -> torch.Tensor:
        """The token that each one follows in its document, as an index in T; -1 for a document's first."""
        before_T = torch.arange(-1, len(self.position_T) - 1, device=self.position_T.device)
        for run in self.runs:
            before_T[run.first] = run.trunk[0] + run.position - 1 if run.position else -1
        return before_T


class Run(NamedTuple):
    """Neighbouring tokens of the batch with neighbouring positions: a document, or a branch of one."""

    first: int  # index in T
    size: int
    position: int  # of the first token; 0 for a document
    trunk: tuple[int, int]  # first token and size of the document; of itself for a document


class Segment(NamedTuple):
    """Tokens that look at one another, causally, and at `prompt` tokens of the document they branch off."""

    first: int
    size: int
    prompt_first: int = 0
    prompt_size: int = 0


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of like length, as rectangles of queries [N, L] and of the keys they look at, X = L or P + L of them.

    Each place of a rectangle holds a token of the batch; a hole holds token 0, which is masked as a key and dropped as
    a query. `None`: the tokens of the batch are the rectangle, in order.
    """

    shape: tuple[int, int]  # N, L
    query_NL: torch.Tensor | None
    key_NX: torch.Tensor | None
    own_t: torch.Tensor | None  # places in N·L that are no holes …
    tokens_t: torch.Tensor | None  # … and the tokens there
    mask_N1LX: torch.Tensor | None  # added to the scores, 0 or -inf; None: causal

    def __call__(self, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor) -> torch.Tensor:
        """Attention within the segments; [t, H, d], the group's own tokens in order."""
        q = self._rectangle(q_THd, self.query_NL)
        k, v = (self._rectangle(x_TKd, self.key_NX) for x_TKd in (k_TKd, v_TKd))
        mask = None if self.mask_N1LX is None else self.mask_N1LX.to(q.dtype)
        out_NHLd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        flat = out_NHLd.transpose(1, 2).reshape(-1, *q_THd.shape[1:])
        return flat if self.own_t is None else flat.index_select(0, self.own_t)

    def _rectangle(self, x_THd: torch.Tensor, token_NX: torch.Tensor | None) -> torch.Tensor:
        """[T, H, d] → [N, H, X, d]"""
        shape = self.shape if token_NX is None else token_NX.shape
        own = x_THd if token_NX is None else x_THd.index_select(0, token_NX.reshape(-1))
        return own.view(*shape, *x_THd.shape[1:]).transpose(1, 2)


class PackedAttention:
    """Attention over whole documents, all of whose tokens are here: training, scoring, prefill without a cache."""

    def __init__(self, layout: Layout) -> None:
        self.position_T = layout.position_T
        self.runs = layout.runs
        self.longest = max((run.position + run.size for run in self.runs), default=0)
        self.groups: dict[int | None, list[SegmentGroup]] = {}

    def __call__(
        self, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, *, layer: int, chunk: int | None
    ) -> torch.Tensor:
        if chunk is not None and self.longest <= chunk:
            chunk = None  # no document reaches a second chunk
        if chunk not in self.groups:
            self.groups[chunk] = self._grouped(chunk)
        groups = self.groups[chunk]
        if not groups:
            return torch.empty_like(q_THd)  # no token at all: one of several processes may have none
        outputs = [group(q_THd, k_TKd, v_TKd) for group in groups]
        if len(groups) == 1 and groups[0].tokens_t is None:
            return outputs[0]
        return torch.empty_like(q_THd).index_copy(
            0, torch.cat([group.tokens_t for group in groups if group.tokens_t is not None]), torch.cat(outputs)
        )

    def _grouped(self, chunk: int | None) -> list[SegmentGroup]:
        """Segments whose lengths, and those of their prompts, share a power of two go together: a rectangle is then
        less than half holes."""
        brackets: dict[tuple[int, int], list[Segment]] = {}
        for run in self.runs:
            for segment in segments(run, chunk):
                bracket = (segment.size - 1).bit_length(), segment.prompt_size.bit_length()
                brackets.setdefault(bracket, []).append(segment)
        return [self._group(members) for members in brackets.values()]

    def _group(self, members: list[Segment]) -> SegmentGroup:
        longest, device = max(segment.size for segment in members), self.position_T.device
        shape = (len(members), longest)
        if sum(segment.size for segment in members) == len(self.position_T) == len(members) * longest:
            return SegmentGroup(shape, None, None, None, None, None)  # equal documents: a branch's own is never alone
        first_N1, size_N1, prompt_first_N1, prompt_size_N1 = torch.tensor(members, device=device).unsqueeze(2).unbind(1)
        offset_L = torch.arange(longest, device=device)
        real_NL = offset_L < size_N1
        query_NL = (first_N1 + offset_L) * real_NL
        own_t = real_NL.view(-1).nonzero().squeeze(1)
        tokens_t = query_NL.view(-1)[own_t]
        most = int(prompt_size_N1.max())
        if not most:
            return SegmentGroup(shape, query_NL, query_NL, own_t, tokens_t, None)
        offset_NP = torch.arange(most, device=device) - (most - prompt_size_N1)
        seen_NP = offset_NP >= 0
        key_NX = torch.cat([(prompt_first_N1 + offset_NP) * seen_NP, query_NL], dim=1)
        behind_LL = offset_L <= offset_L.unsqueeze(1)
        seen_NLX = torch.cat([seen_NP.unsqueeze(1).expand(-1, longest, -1), behind_LL.expand(*shape, -1)], dim=2)
        mask_NLX = torch.zeros(seen_NLX.shape, device=device).masked_fill_(~seen_NLX, -torch.inf)
        return SegmentGroup(shape, query_NL, key_NX, own_t, tokens_t, mask_NLX.unsqueeze(1))


def segments(run: Run, chunk: int | None) -> Iterator[Segment]:
    """The parts of a run that may look at one another: all of it, or cut at every multiple of `chunk` positions."""
    start, end = run.position, run.position + run.size
    width = chunk or end
    for low in range(start // width * width, end, width):
        first, high = max(low, start), min(low + width, end)
        yield Segment(
            first=run.first + first - start,
            size=high - first,
            prompt_first=run.trunk[0] + low if low < start else 0,
            prompt_size=max(start - low, 0),
        )


def fits_a_cache(
    shape: tuple[int, int],
    attention_mask_BS: torch.Tensor | None,
    position_ids_BS: torch.Tensor | None,
    device: torch.device,
) -> bool:
    """Whether each row is one document: its positions count its real tokens. A cache knows no other rows."""
    if position_ids_BS is None:
        return True
    given, counted = (Layout.of(shape, attention_mask_BS, x_BS, device) for x_BS in (position_ids_BS, None))
    return bool((given.position_T == counted.position_T).all())


class CachedAttention:
    """Attention over a key/value cache: the rectangle [B, S] of new tokens looks at all that came before it.

    Holes of a padded prompt stay in the rectangle (`generate` pads on the left) and are masked as keys. Positions are
    counted from the mask, [B, P] for the P tokens in the cache and in the rectangle. ValueError where those given for
    the new tokens are others: the row would be attended to as a document that it is not.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        attention_mask_BP: torch.Tensor | None,
        position_ids_BS: torch.Tensor | None,
        cache: Cache,
        device: torch.device,
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
        if position_ids_BS is not None:
            self._check(position_ids_BS.expand(shape), past)

    def _check(self, given_BS: torch.Tensor, past: int) -> None:
        """A hole may have any position: nobody looks at it."""
        counted_BS = self.position_BP[:, past:]
        wrong_BS = (given_BS != counted_BS) & self.real_BP[:, past:]
        if not bool(wrong_BS.any()):
            return
        row, column = wrong_BS.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {column}] is {int(given_BS[row, column])}; with {past} tokens in the cache expected "
            f"{int(counted_BS[row, column])}, the number of real tokens before it in its row. Several documents in a "
            "row need use_cache=False and no past_key_values; a padded row needs its padding on the left, and the "
            "attention_mask of all its tokens, those in the cache too"
        )

    def __call__(
        self, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor, *, layer: int, chunk: int | None
    ) -> torch.Tensor:
        q, k, v = (x.view(*self.shape, *x.shape[1:]).transpose(1, 2) for x in (q_THd, k_TKd, v_TKd))
        k, v = self.cache.update(k, v, layer)
        mask_B1SP = self._mask(k.shape[2], chunk).unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SP, enable_gqa=True)
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
