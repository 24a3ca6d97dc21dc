"""FP8 in the routed experts of one model: switched on, watched, given back layer by layer, and shown to the engine.

Called by the trainers of every stage. What FP8 is: `model/kernels/fp8.py`. Master weights stay in the dtype they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model.fp8_gauges import Fp8Gauges, Fp8Watch, worst_of
from model.kernels.quantise import quantise
from model.moe_layer import MoeBlock
from model.precision import Fp8Settings, fp8_layers

if TYPE_CHECKING:
    import torch

    from model.transformer import MoeForCausalLM


class Fp8Training:
    """ValueError for a model without an MoE layer that the settings leave to FP8, or without one that they name."""

    def __init__(
        self,
        model: MoeForCausalLM,
        settings: Fp8Settings,
        say: Callable[[str], None],
        gather: Callable[[Any], Sequence[Any]] = lambda own: [own],
    ) -> None:
        """`gather` turns one trainer's value into every trainer's: they must leave FP8 together, or they would compute
        different models."""
        self.settings, self.gather = settings, gather
        moe_layers = list(getattr(model.config, "moe_layers", None) or [])
        try:
            chosen = fp8_layers(moe_layers, settings)
        except ValueError as error:
            raise ValueError(f"fp8.{error}") from error
        if not chosen:
            raise ValueError(
                f"fp8: no routed expert is left to run in FP8; {model.config.model_type} has the MoE layers "
                f"{moe_layers}, and keep_first_and_last is {settings.keep_first_and_last}"
            )
        blocks = {layer: model.model.layers[layer].feed_forward for layer in chosen}
        self.experts = {layer: block.experts for layer, block in blocks.items() if isinstance(block, MoeBlock)}
        self.gauges = {layer: Fp8Gauges() for layer in self.experts}
        self.watch = Fp8Watch(settings, say)
        for layer, experts in self.experts.items():
            experts.precision, experts.gauges = settings, self.gauges[layer]

    @property
    def layers(self) -> tuple[int, ...]:
        """Those still in FP8."""
        return tuple(layer for layer in self.experts if layer not in self.watch.fallen_back)

    def metrics(self) -> dict[str, float]:
        """What FP8 did since the last call, `fp8/layer3/gate_up.input/snr_db` and so on; a layer that it hurts too much
        runs in BF16 from now on. Call it between optimiser steps."""
        metrics: dict[str, float] = {"fp8/layers": float(len(self.layers))}
        parts = self.gather({layer: self.gauges[layer].read() for layer in self.layers})
        for layer in self.layers:
            stats = worst_of([part[layer] for part in parts])
            for tensor, seen in stats.items():
                for gauge in ("amax", "saturation_share", "underflow_share", "snr_db"):
                    metrics[f"fp8/layer{layer}/{tensor}/{gauge}"] = getattr(seen, gauge)
            if self.watch.observe(layer, stats):
                self.experts[layer].precision = None
        return metrics

    def give_back(self, fallen_back: Mapping[int, str]) -> None:
        """The layers that an earlier part of this run gave back, with the reasons of then."""
        self.watch.fallen_back = dict(fallen_back)
        for layer in fallen_back:
            self.experts[layer].precision = None

    def as_served(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights as an engine without FP8 needs them to sample what FP8 would: rounded to FP8 and back."""
        rounded = {f"model.layers.{layer}.feed_forward.experts.": layer for layer in self.layers}
        for name, tensor in weights:
            if any(part in name for part in rounded):
                tensor = quantise(tensor, self.settings.recipe, axis=1).dequantise().to(tensor.dtype)
            yield name, tensor
