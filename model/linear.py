"""A linear layer whose product can run in FP8. It is one expert that every token goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from model.precision import Fp8Settings

if TYPE_CHECKING:
    from model.fp8_gauges import Fp8Gauges


class Linear(nn.Linear):
    """x · weightᵀ + bias of x [T, in]; `model/fp8_training.py` sets what follows."""

    precision: Fp8Settings | None = None  # None: the dtype of what comes in
    gauges: Fp8Gauges | None = None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.precision is None:
            return super().forward(x_TD)
        from model.kernels.fp8 import fp8_linear

        out_TF = fp8_linear(x_TD, self.weight, self.precision, self.gauges)
        return out_TF if self.bias is None else out_TF + self.bias.to(out_TF.dtype)
