"""Which kernel computes an FP8 product: one table, read from top to bottom; the first row that can, does.

A row that cannot do exactly what is asked says why, and where no row can, all reasons are in the error. Nothing is
ever done approximately instead.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from model.precision import Format, Recipe

Product = Literal["forward", "dgrad", "wgrad"]
Capability = tuple[int, int]


@dataclass(frozen=True)
class Wanted:
    """What a product asks of a kernel."""

    product: Product
    recipe: Recipe
    gradients: Format  # dgrad and wgrad take a gradient; everything else is e4m3
    out_dtype: torch.dtype
    widths: tuple[int, int]  # K and N, elements
    device: str  # "cpu", "cuda", …
    capability: Capability | None = None  # of a CUDA device
    has_triton: bool = False


@dataclass(frozen=True)
class Kernel:
    """One row of the table. None means: no limit."""

    name: str
    device: str
    lowest: Capability | None = None
    highest: Capability | None = None
    recipes: tuple[Recipe, ...] = ("tensor", "row", "block128")
    products: tuple[Product, ...] = ("forward", "dgrad", "wgrad")
    gradients: tuple[Format, ...] = ("e4m3", "e5m2")
    out_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    width_multiple: int = 1
    needs_triton: bool = False

    def refusal(self, wanted: Wanted) -> str | None:
        """Why this kernel cannot do what is wanted; None if it can."""
        capability = wanted.capability or (0, 0)
        for cannot, reason in (
            (wanted.device != self.device, f"runs on {self.device}"),
            (self.lowest and capability < self.lowest, f"needs compute capability {self.lowest} or later"),
            (self.highest and capability > self.highest, f"knows compute capability up to {self.highest}"),
            (self.needs_triton and not wanted.has_triton, "needs triton, which is not installed"),
            (wanted.recipe not in self.recipes, f"knows the recipes {self.recipes}"),
            (wanted.product not in self.products, f"knows the products {self.products}"),
            (
                wanted.product != "forward" and wanted.gradients not in self.gradients,
                f"knows gradients in {self.gradients}",
            ),
            (wanted.out_dtype not in self.out_dtypes, f"writes {self.out_dtypes}"),
            (
                any(w % self.width_multiple for w in wanted.widths),
                f"needs widths in multiples of {self.width_multiple}",
            ),
        ):
            if cannot:
                return reason
        return None


# torch's kernel is CUTLASS for Hopper alone; its wgrad wants every expert's rows padded to 16, so ours does that one.
# Rows for CUDA are not measured on a GPU.
TABLE = (
    Kernel("emulated", "cpu"),  # the same FP8 numbers, multiplied in fp32
    Kernel(
        "torch._scaled_grouped_mm", "cuda", lowest=(9, 0), highest=(9, 0), recipes=("row",),
        products=("forward", "dgrad"), gradients=("e4m3",), out_dtypes=(torch.bfloat16,), width_multiple=16,
        needs_triton=True,  # for the quantisation
    ),
    Kernel("triton", "cuda", lowest=(8, 9), needs_triton=True),
)  # fmt: skip


def choose_kernel(wanted: Wanted) -> str:
    """Name of the first kernel that does exactly what is wanted. ValueError with every kernel's reason if none does."""
    refusals = []
    for kernel in TABLE:
        if (reason := kernel.refusal(wanted)) is None:
            return kernel.name
        refusals.append(f"{kernel.name} {reason}")
    raise ValueError(f"no FP8 kernel for {wanted}: {'; '.join(refusals)}. Run these experts in BF16, without fp8")


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
