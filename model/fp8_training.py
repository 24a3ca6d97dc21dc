"""FP8 in the products of one model: switched on, watched, given back layer by layer, and shown to the engine.

Called by the trainers of every stage. What FP8 is: `model/kernels/fp8.py`. Master weights stay in the dtype they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model.experts import Experts
from model.fp8_gauges import Fp8Gauges, Fp8Watch, worst_of
from model.fp8_scope import fp8_parameters
from model.kernels.quantise import input_major, quantise
from model.linear import Linear
from model.precision import Fp8Settings

if TYPE_CHECKING:
    import torch

    from model.transformer import MoeForCausalLM


class Fp8Training:
    """ValueError for a model that has not what the settings name (`fp8_parameters`)."""

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
        self.watch = Fp8Watch(settings, say)
        self.modules: dict[int, list[Experts | Linear]] = {}
        self.gauges: dict[int, Fp8Gauges] = {}
        self.layer_of: dict[str, int] = {}  # of each parameter that is multiplied in FP8
        try:
            specs = fp8_parameters(model.config.to_dict(), settings)
        except ValueError as error:
            raise ValueError(f"fp8.{error}") from error
        for spec in specs:
            assert spec.layer is not None
            self.layer_of[spec.name] = spec.layer
            self._switch_on(spec.layer, *self._module_of(model, spec.name))

    @staticmethod
    def _module_of(model: MoeForCausalLM, parameter: str) -> tuple[str, Experts | Linear]:
        """The module that multiplies by a parameter, and what its gauges are called within its layer."""
        path = parameter.rpartition(".")[0]
        module = model.get_submodule(path)
        assert isinstance(module, Experts | Linear), path
        within = path.split(".", 3)[3].removeprefix("feed_forward.")
        return ("" if isinstance(module, Experts) else within), module

    def _switch_on(self, layer: int, name: str, module: Experts | Linear) -> None:
        gauges = self.gauges.setdefault(layer, Fp8Gauges())
        module.precision, module.gauges = self.settings, gauges.named(name) if name else gauges
        self.modules.setdefault(layer, []).append(module)

    @property
    def layers(self) -> tuple[int, ...]:
        """Those still in FP8."""
        return tuple(layer for layer in self.modules if layer not in self.watch.fallen_back)

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
                self._switch_off(layer)
        return metrics

    def give_back(self, fallen_back: Mapping[int, str]) -> None:
        """The layers that an earlier part of this run gave back, with the reasons of then."""
        self.watch.fallen_back = dict(fallen_back)
        for layer in fallen_back:
            self._switch_off(layer)

    def _switch_off(self, layer: int) -> None:
        for module in self.modules[layer]:
            module.precision = None

    def as_served(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights as an engine without FP8 needs them to sample what FP8 would: rounded to FP8 and back."""
        for name, tensor in weights:
            if self.layer_of.get(name) in self.layers:
                served = quantise(input_major(tensor), self.settings.recipe, axis=1).dequantise().to(tensor.dtype)
                tensor = served if tensor.dim() == 3 else served[0].T
            yield name, tensor
