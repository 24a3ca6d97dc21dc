"""Which kernel computes a grouped product: two tables, read from top to bottom; the first row that can, does.

A row that cannot do exactly what is asked says why, and where no row can, all reasons are in the error. Nothing is
ever done approximately instead. Rows for CUDA are not measured on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from model.precision import Format, Recipe

Product = Literal["forward", "dgrad", "wgrad"]
Capability = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What products ask of a kernel. Operands that are not FP8 are of `out_dtype` too."""

    out_dtype: torch.dtype
    widths: tuple[int, int]  # K and N, elements
    device: str  # "cpu", "cuda", "rocm" (which torch calls cuda), …
    capability: Capability | None = None  # of a CUDA device
    has_triton: bool = False


@dataclass(frozen=True, kw_only=True)
class WantedFp8(Wanted):
    product: Product
    recipe: Recipe
    gradients: Format  # dgrad and wgrad take a gradient; everything else is e4m3


@dataclass(frozen=True)
class Kernel:
    """One row of a table. None means: no limit."""

    name: str
    device: str
    lowest: Capability | None = None
    highest: Capability | None = None
    out_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    width_multiple: int = 1
    needs_triton: bool = False

    def refusal(self, wanted: Any) -> str | None:
        """Why this kernel cannot do what is wanted; None if it can."""
        return next((reason for cannot, reason in self._limits(wanted) if cannot), None)

    def _limits(self, wanted: Any) -> list[tuple[Any, str]]:
        capability = wanted.capability or (0, 0)
        return [
            (wanted.device != self.device, f"runs on {self.device}"),
            (self.lowest and capability < self.lowest, f"needs compute capability {self.lowest} or later"),
            (self.highest and capability > self.highest, f"knows compute capability up to {self.highest}"),
            (self.needs_triton and not wanted.has_triton, "needs triton, which is not installed"),
            (wanted.out_dtype not in self.out_dtypes, f"writes {self.out_dtypes}"),
            (
                any(w % self.width_multiple for w in wanted.widths),
                f"needs widths in multiples of {self.width_multiple}",
            ),
        ]


@dataclass(frozen=True)
class Fp8Kernel(Kernel):
    recipes: tuple[Recipe, ...] = ("tensor", "row", "block128")
    products: tuple[Product, ...] = ("forward", "dgrad", "wgrad")
    gradients: tuple[Format, ...] = ("e4m3", "e5m2")

    def _limits(self, wanted: WantedFp8) -> list[tuple[Any, str]]:
        return [
            *super()._limits(wanted),
            (wanted.recipe not in self.recipes, f"knows the recipes {self.recipes}"),
            (wanted.product not in self.products, f"knows the products {self.products}"),
            (
                wanted.product != "forward" and wanted.gradients not in self.gradients,
                f"knows gradients in {self.gradients}",
            ),
        ]


# torch's kernel is CUTLASS for Hopper alone; its wgrad wants every expert's rows padded to 16, so ours does that one.
FP8 = (
    Fp8Kernel("emulated", "cpu"),  # the same FP8 numbers, multiplied in fp32
    Fp8Kernel(
        "torch._scaled_grouped_mm", "cuda", lowest=(9, 0), highest=(9, 0), recipes=("row",),
        products=("forward", "dgrad"), gradients=("e4m3",), out_dtypes=(torch.bfloat16,), width_multiple=16,
        needs_triton=True,  # for the quantisation
    ),
    Fp8Kernel("triton", "cuda", lowest=(8, 9), needs_triton=True),
)  # fmt: skip

# torch's function is one kernel for bf16 on 9.x and 10.x, and wants rows of whole 16 bytes; elsewhere it is a loop that
# waits for the routing (pytorch/pytorch#194227). Triton compiles for 8.0 and later. fp32 is for the loop: tensor cores
# would round its operands to TF32, and without them cuBLAS does as well.
UNSCALED = (
    Kernel("torch", "cuda", lowest=(9, 0), highest=(10, 9), out_dtypes=(torch.bfloat16,), width_multiple=8),
    Kernel("triton", "cuda", lowest=(8, 0), out_dtypes=(torch.bfloat16, torch.float16), needs_triton=True),
    Kernel("loop", "cuda"),
    Kernel("loop", "rocm"),
)


def choose_fp8_kernel(wanted: WantedFp8) -> str:
    """Name of the first kernel that does exactly what is wanted. ValueError with every kernel's reason if none does."""
    return _first_that_can(FP8, wanted, "Run these products in BF16, without fp8")


def choose_kernel(wanted: Wanted, named: str | None = None) -> str:
    """The same for all three products of operands that are not FP8; of kernels called `named`, if that is given."""
    names = ", ".join(dict.fromkeys(kernel.name for kernel in UNSCALED))
    asked = [kernel for kernel in UNSCALED if named in (None, kernel.name)]
    return _first_that_can(asked, wanted, f"{named!r} was asked for, of {names}")


def _first_that_can(table: Iterable[Kernel], wanted: Wanted, advice: str) -> str:
    refusals = []
    for kernel in table:
        if (reason := kernel.refusal(wanted)) is None:
            return kernel.name
        refusals.append(f"{kernel.name} {reason}")
    raise ValueError(f"no kernel for {wanted}: {'; '.join(refusals) or 'none of that name'}. {advice}")


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
