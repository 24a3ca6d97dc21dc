"""What FP8 does to each tensor it stores, and the rule that gives a layer back to BF16.

`Fp8Gauges` is handed to the products of one layer and only adds up small tensors, without waiting for the device;
`read` waits, once per report. `Fp8Watch` judges what was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from model.kernels.quantise import FORMATS, SMALLEST_SCALE, Quantised
from model.precision import Fp8Settings

NOISE = 1e-5  # a row smaller than this share of the median row is rounding noise, and no signal
SAMPLED_ROWS = 64  # evenly spaced, of each matrix: SNR to a tenth of a dB, at a cost that does not grow
LARGEST = {layout.dtype: layout.largest for layout in FORMATS.values()}

_is_recorded = ContextVar("is_recorded", default=True)


class NothingRecorded:
    """Around what activation checkpointing computes again: it was recorded the first time, and would weigh double. May
    be entered any number of times, as a graph may be gone through."""

    def __enter__(self) -> None:
        self._before = _is_recorded.set(False)

    def __exit__(self, *_: object) -> None:
        _is_recorded.reset(self._before)


@dataclass(frozen=True)
class TensorStats:
    """How well one tensor fits FP8, over all products since the last report."""

    amax: float  # of the whole tensor, not of the sample
    saturation_share: float  # of elements that are stored as the largest number; the amax itself always is
    underflow_share: float  # of non-zero elements that are stored as zero
    snr_db: (
        float  # −10 log₁₀ of the mean over rows of Σ error² / Σ x²: an outlier cannot hide what it does to other rows
    )


class Fp8Gauges:
    """Of one layer. `gauges.named("down")` is what the product `down` records into, as down.input and so on."""

    def __init__(self, sums: dict[str, torch.Tensor] | None = None, prefix: str = "") -> None:
        self._sums: dict[str, torch.Tensor] = {} if sums is None else sums
        self._prefix = prefix

    def named(self, product: str) -> Fp8Gauges:
        return Fp8Gauges(self._sums, f"{self._prefix}{product}.")

    @torch.no_grad()
    def record(self, tensor: str, values_of: Callable[[slice], torch.Tensor], stored: Quantised) -> None:
        """Adds what became of one tensor. `values_of(rows)`: its numbers before they were stored, for these rows."""
        num_rows = stored.q.shape[-2]
        if num_rows == 0 or not _is_recorded.get():
            return
        rows = slice(0, num_rows, math.ceil(num_rows / SAMPLED_ROWS))
        sample, values, largest = stored.rows(rows), values_of(rows).float(), LARGEST[stored.q.dtype]
        kept = sample.dequantise()
        signal, noise = values.square().sum(-1), (kept - values).square().sum(-1)
        scale = stored.scale.max()
        # q's gradient at a document's first token is nought but for rounding: its softmax has one key. A row that holds
        # no number counts, and is the worst.
        noise_level = (NOISE**2 * torch.where(signal > 0, signal, torch.nan).nanmedian()).nan_to_num(0.0, posinf=0.0)
        filled, nonzero = ~(signal <= noise_level), values != 0
        new = torch.stack(
            [
                torch.where(scale == SMALLEST_SCALE, 0.0, scale * largest),
                torch.tensor(float(values.numel()), device=values.device),
                (sample.q.float().abs() == largest).sum(),
                nonzero.sum(),
                (nonzero & (kept == 0)).sum(),
                filled.sum(),
                torch.where(filled, noise / signal, 0.0).sum(),
            ]
        )
        name = f"{self._prefix}{tensor}"
        old = self._sums.get(name)
        self._sums[name] = new if old is None else torch.cat([torch.maximum(old[:1], new[:1]), old[1:] + new[1:]])

    def read(self) -> dict[str, TensorStats]:
        """What was recorded since the last reading, by tensor; begins anew."""
        stats = {}
        for name, sums in self._sums.items():
            amax, elements, saturated, nonzero, lost, rows, ratio = sums.tolist()
            ratio /= max(rows, 1)
            stats[name] = TensorStats(
                amax=amax,
                saturation_share=saturated / elements,
                underflow_share=lost / max(nonzero, 1),
                snr_db=-10 * math.log10(ratio) if ratio != 0 else math.inf,
            )
        self._sums.clear()
        return stats


def worst_of(parts: Sequence[Mapping[str, TensorStats]]) -> dict[str, TensorStats]:
    """Of what several trainers saw of the same tensors: the worst number of each gauge. No number at all is worst."""
    seen: dict[str, list[TensorStats]] = {}
    for part in parts:
        for name, stats in part.items():
            seen.setdefault(name, []).append(stats)
    return {
        name: TensorStats(
            amax=max(one.amax for one in stats),
            saturation_share=max(one.saturation_share for one in stats),
            underflow_share=max(one.underflow_share for one in stats),
            snr_db=min((one.snr_db for one in stats), key=lambda snr_db: -math.inf if math.isnan(snr_db) else snr_db),
        )
        for name, stats in seen.items()
    }


class Fp8Watch:
    """Gives a layer back to BF16 when one of its tensors is stored too badly, and says so once.

    It decides, the caller acts: that layer's modules get `precision = None`. On several ranks the caller shows every
    rank the worst of all, or the ranks would compute different models.
    """

    def __init__(self, settings: Fp8Settings, say: Callable[[str], None]) -> None:
        self._least, self._say = settings.min_snr_db, say
        self.fallen_back: dict[int, str] = {}  # layer → why

    def observe(self, layer: int, stats: Mapping[str, TensorStats]) -> bool:
        """True if the layer must leave FP8 now: an SNR is below the threshold, or no number at all."""
        if layer in self.fallen_back or not stats:
            return False
        worst = min(stats, key=lambda name: -math.inf if math.isnan(stats[name].snr_db) else stats[name].snr_db)
        seen = stats[worst]
        if seen.snr_db >= self._least:
            return False
        self.fallen_back[layer] = (
            f"layer {layer} goes back to BF16: FP8 stores {worst} at {seen.snr_db:.1f} dB, below {self._least:g} dB "
            f"(amax {seen.amax:.3g}, {seen.underflow_share:.1%} of it lost to zero)"
        )
        self._say(self.fallen_back[layer])
        return True
