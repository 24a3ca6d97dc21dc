"""A worker extension that breaks a weight sync on purpose, inside the engine's own process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rl import worker_extension
from rl.worker_extension import WorkerExtension

repack = worker_extension.repack_for_cpu


class FaultyExtension(WorkerExtension):
    happened = 0

    def inject(self, fault: str) -> None:
        """From now on until `inject("")`. `faults_happened` counts what was really broken."""
        FaultyExtension.happened = 0
        model = self.weight_transfer_engine.model
        model.__dict__.pop("load_weights", None)
        worker_extension.repack_for_cpu = repack
        if fault == "experts not packed again":

            def skip(model: torch.nn.Module) -> None:
                FaultyExtension.happened += 1

            worker_extension.repack_for_cpu = skip
        elif fault:
            whole = model.load_weights
            model.load_weights = lambda stream: whole(broken(stream, fault))

    def poison_cache(self) -> int:
        """What a broken model may leave behind: infinities in every block. Returns how many numbers it overwrote."""
        for cache in self.model_runner.kv_caches:
            cache.fill_(float("inf"))
        return sum(cache.numel() for cache in self.model_runner.kv_caches)

    def faults_happened(self) -> int:
        return FaultyExtension.happened


def broken(stream: Iterable[tuple[str, torch.Tensor]], fault: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        bad: Any = tensor
        if fault == "a tensor is dropped" and name.endswith("experts.down_proj"):
            bad = None
        elif fault == "experts transposed" and name.endswith("experts.down_proj"):
            bad = tensor.transpose(1, 2).reshape(tensor.shape).contiguous()
        elif fault == "w1 and w3 swapped" and name.endswith("experts.gate_up_proj"):
            bad = torch.cat(tensor.chunk(2, dim=2)[::-1], dim=2).contiguous()
        FaultyExtension.happened += bad is not tensor
        if bad is not None:
            yield name, bad
