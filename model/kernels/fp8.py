"""FP8: a matrix product on numbers of eight bits, and what must be done so that a model still learns from it.

    e4m3   s eeee mmm     largest   448, full precision down to 2^-6,  the last step is 2^-9
    e5m2   s eeeee mm     largest 57344, full precision down to 2^-14, the last step is 2^-16

Three mantissa bits leave eight numbers between one power of two and the next, so storing a number moves it by 2.6 %
(rms; 5.3 % in e5m2), large or small. Where full precision ends it fades, and below half the last step there is only
zero. So numbers are first moved to where the format is good, and a **scale** remembers by how much:

    scale = amax / 448          amax: largest |x| of the numbers that share the scale
    q     = round(x / scale)    one byte; to the nearest, ties to even, never past ±448
    x     ≈ q · scale           the scale is fp32

The scale comes from the very numbers it is for: *current* scaling. Reusing the amax of earlier steps (*delayed*) saves
a read and clips whatever has grown; after a weight sync, or with a new kind of prompt, that is every tensor at once.

How many share a scale? From 448 to the last step it is 18 powers of two. What lies further than that below its amax
is lost, so an outlier harms exactly those it shares a scale with:

    tensor      ┌───────────┐   row         ┌───────────┐   block128    ┌───┬───┬───┐
                │           │               ├───────────┤               ├───┼───┼───┤    activations: 1 × 128
                │   scale   │               ├───scale───┤               ├───┼─s─┼───┤    weights:   128 × 128
                │           │               ├───────────┤               ├───┼───┼───┤
                └───────────┘               └───────────┘               └───┴───┴───┘

Llama 4 makes this matter: a token is multiplied by its gate *before* the expert, so the tokens of one batch differ by
orders of magnitude. And a scale must come out of the sum it is in: it may not vary along the axis that a product sums
over, unless the sum is cut there. So each of a layer's three products wants scales along its own axis, and quantises
the original numbers anew:

    forward   y[R, N]  = x[R, K] · w[e][K, N]     sums over K       x: a scale per row, w: per column
    dgrad     dx[R, K] = dy[R, N] · w[e]ᵀ         sums over N       dy: per row,        w: per row
    wgrad     dw[e]    = x[e]ᵀ · dy[e]            sums over rows    both: per column, never across two experts

block128 cuts every sum each 128 terms: a partial sum is multiplied by the scales of its two blocks, then added up.

**Accumulation is in fp32.** Hopper's tensor cores keep about 14 bits while they sum FP8 products, and over K = 5120 the
small ones vanish. So sums move to fp32 registers every 128 terms, and torch's kernel is called without its "fast" mode.

What stays in BF16 or fp32: the router (a rounded logit is another expert), head and norms (their errors reach the
log-probability of every token), master weights and summed gradients (an update is smaller than an FP8 step). By default
also q and k (a softmax amplifies them), the rest of attention, shared experts and dense layers, and the first and last
MoE layer (outliers live there): the routed experts between are most of the FLOPs. `fp8.scope` asks for more of it.

On a CPU the same FP8 numbers are multiplied in fp32: slower than BF16, but learning meets FP8's errors exactly. On CUDA
model/kernels/choice.py says which kernel runs. Not measured on a GPU.

Axes: T tokens, R rows sorted by expert, E experts, K contracted and N output width of the forward product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.fp8_gauges import Fp8Gauges
from model.kernels import reference
from model.kernels.choice import Product, WantedFp8, choose_fp8_kernel, has_triton
from model.kernels.quantise import Quantised, input_major, quantise
from model.precision import Format, Fp8Settings, Recipe


class Rows:
    """What stands left in the forward product: rows as they are, or made of other tensors whenever they are needed and
    never stored. On CUDA they are made and quantised in one kernel, and so cross memory once, in bytes."""

    kind = "plain"

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors[0].shape[-2], self.tensors[0].shape[-1]

    def values(self, rows: slice = slice(None)) -> torch.Tensor:
        return self.tensors[0][rows]


class PermutedRows(Rows):
    """Tokens in the order of their experts, each times its gate, once. Of x_TK, token_R, gate_R."""

    kind = "permuted"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.tensors[1]), self.tensors[0].shape[1]

    def values(self, rows: slice = slice(None)) -> torch.Tensor:
        x_TK, token_R, gate_R = self.tensors
        return x_TK[token_R[rows]].float() * gate_R[rows].float().unsqueeze(-1)


class SwiGluRows(Rows):
    """silu(gate) · up in fp32. Of h_R2K, whose rows are gate and up side by side."""

    kind = "swiglu"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.tensors[0]), self.tensors[0].shape[1] // 2

    def values(self, rows: slice = slice(None)) -> torch.Tensor:
        gate_RK, up_RK = self.tensors[0][rows].float().chunk(2, dim=-1)
        return F.silu(gate_RK) * up_RK


def fp8_grouped_mm(
    x_RK: torch.Tensor,
    w_EKN: torch.Tensor,
    ends_E: torch.Tensor,
    settings: Fp8Settings,
    gauges: Fp8Gauges | None = None,
) -> torch.Tensor:
    """out[r] = x[r] · w[e] in FP8 for the rows r of expert e, [R, N] in the dtype of x; `ends_E` int32, the last is R.

    All three products are FP8; the gradient leaves in the dtype of what it belongs to. `gauges` sees input, weight and
    gradient. ValueError if `ends_E` does not fit (read on CPU only) or no kernel can do it exactly.
    """
    return _GroupedMm.apply(Rows, settings, gauges, ends_E, w_EKN, x_RK)


def fp8_linear(
    x_RK: torch.Tensor, w_NK: torch.Tensor, settings: Fp8Settings, gauges: Fp8Gauges | None = None
) -> torch.Tensor:
    """x · wᵀ in FP8, [R, N], of a linear layer's weight: one expert that has all rows. Under autocast, as any linear
    layer, on x in its dtype."""
    device = x_RK.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_RK.dtype
    ends_1 = torch.full((1,), len(x_RK), dtype=torch.int32, device=x_RK.device)
    return fp8_grouped_mm(x_RK.to(dtype), input_major(w_NK), ends_1, settings, gauges)


def fp8_permuted_grouped_mm(
    x_TK: torch.Tensor, token_R: torch.Tensor, gate_R: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor,
    settings: Fp8Settings, gauges: Fp8Gauges | None = None,
) -> torch.Tensor:  # fmt: skip
    """`fp8_grouped_mm(x_TK[token_R] * gate_R[:, None], …)` without storing the product; gradients to x and gate."""
    return _GroupedMm.apply(PermutedRows, settings, gauges, ends_E, w_EKN, x_TK, token_R, gate_R)


def fp8_swiglu_grouped_mm(
    h_R2K: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor, settings: Fp8Settings,
    gauges: Fp8Gauges | None = None,
) -> torch.Tensor:  # fmt: skip
    """`fp8_grouped_mm(silu(gate) * up, …)` of h = [gate, up] without storing the activation."""
    return _GroupedMm.apply(SwiGluRows, settings, gauges, ends_E, w_EKN, h_R2K)


class _GroupedMm(torch.autograd.Function):
    """The three products. Nothing in FP8 outlives its product: backward wants other scales anyway, and the bytes of the
    weights, kept from forward to backward, would be half as much memory again as the weights."""

    @staticmethod
    def forward(
        ctx: Any, made_of: type[Rows], settings: Fp8Settings, gauges: Fp8Gauges | None, ends_E: torch.Tensor,
        w_EKN: torch.Tensor, *tensors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        left, recipe = made_of(*tensors), settings.recipe
        _check(left, w_EKN, ends_E)
        ctx.made_of, ctx.settings, ctx.gauges = made_of, settings, gauges
        ctx.save_for_backward(ends_E, w_EKN, *tensors)
        kernel = _kernel("forward", settings, w_EKN, out_dtype=tensors[0].dtype)
        x_q, w_q = _quantise(left, recipe, axis=1), _quantise(Rows(w_EKN), recipe, axis=1)
        if gauges is not None:
            gauges.record("input", left.values, x_q)
            gauges.record("weight", lambda rows: w_EKN[:, rows], w_q)
        return _multiply(kernel, x_q, w_q, ends_E, recipe, out_dtype=tensors[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ends_E, w_EKN, *tensors = ctx.saved_tensors
        settings, recipe, fmt = ctx.settings, ctx.settings.recipe, ctx.settings.gradients
        wants_dw, wants = ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        dw_EKN, grads = None, [None] * len(tensors)
        if any(wants):
            kernel = _kernel("dgrad", settings, w_EKN, out_dtype=tensors[0].dtype)
            dy_q, w_q = _quantise(Rows(dy_RN), recipe, axis=1, fmt=fmt), _quantise(Rows(w_EKN), recipe, axis=2)
            if ctx.gauges is not None:
                ctx.gauges.record("gradient", lambda rows: dy_RN[rows], dy_q)
            dx_RK = _multiply(kernel, dy_q, w_q.transposed(), ends_E, recipe, out_dtype=tensors[0].dtype)
            grads = _through(ctx.made_of, tensors, wants, dx_RK)
        if wants_dw:
            kernel = _kernel("wgrad", settings, w_EKN, out_dtype=w_EKN.dtype)
            x_q = _quantise(ctx.made_of(*tensors), recipe, axis=0, ends_E=ends_E)
            dy_q = _quantise(Rows(dy_RN), recipe, axis=0, fmt=fmt, ends_E=ends_E)
            dw_EKN = _multiply(kernel, x_q, dy_q, ends_E, recipe, out_dtype=w_EKN.dtype)
        return None, None, None, None, dw_EKN, *grads


def _kernel(product: Product, settings: Fp8Settings, w_EKN: torch.Tensor, out_dtype: torch.dtype) -> str:
    on_cuda = w_EKN.device.type == "cuda"
    return choose_fp8_kernel(
        WantedFp8(
            product=product,
            recipe=settings.recipe,
            gradients=settings.gradients,
            out_dtype=out_dtype,
            widths=(w_EKN.shape[1], w_EKN.shape[2]),
            device="rocm" if torch.version.hip else w_EKN.device.type,  # AMD's e4m3 is another format
            capability=torch.cuda.get_device_capability(w_EKN.device) if on_cuda else None,
            has_triton=has_triton(),
        )
    )


def _quantise(
    rows: Rows, recipe: Recipe, axis: int, fmt: Format = "e4m3", ends_E: torch.Tensor | None = None
) -> Quantised:
    if rows.tensors[0].device.type == "cpu":
        return quantise(rows.values(), recipe, axis, fmt, ends_E)
    from model.kernels import triton_fp8

    return triton_fp8.quantise(rows.kind, rows.tensors, recipe, axis, fmt, ends_E)


def _multiply(
    kernel: str, left: Quantised, right: Quantised, ends_E: torch.Tensor, recipe: Recipe, out_dtype: torch.dtype
) -> torch.Tensor:
    """Rows of the left by the matrix of their expert, or for two matrices of rows: wgrad."""
    is_wgrad = right.q.dim() == 2
    if kernel == "emulated":
        loop = reference.grouped_wgrad_loop if is_wgrad else reference.grouped_mm_loop
        with torch.autocast("cpu", enabled=False):  # autocast would round the dequantised numbers once more
            return loop(left.dequantise(), right.dequantise(), ends_E).to(out_dtype)
    if kernel == "torch._scaled_grouped_mm":
        return torch._scaled_grouped_mm(
            left.q, right.q, left.scale.flatten(), right.scale.squeeze(1).contiguous(), offs=ends_E,
            out_dtype=out_dtype, use_fast_accum=False,
        )  # fmt: skip
    from model.kernels import triton_grouped

    product = triton_grouped.grouped_wgrad if is_wgrad else triton_grouped.grouped_mm
    scales = triton_grouped.Scales(left.scale, right.scale, per_block=recipe == "block128")
    return product(left.q, right.q, ends_E, out_dtype, scales)


def _through(
    made_of: type[Rows], tensors: list[torch.Tensor], wants: Sequence[bool], dx_RK: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradient of the left rows, carried on to the tensors it was made of."""
    if made_of is Rows:
        return [dx_RK]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wants)]
        values_RK = made_of(*leaves).values()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = iter(torch.autograd.grad(values_RK, wanted, dx_RK.to(values_RK.dtype)))
    return [next(grads) if want else None for want in wants]


def _check(left: Rows, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> None:
    num_rows, width = left.shape
    experts, contracted = w_EKN.shape[:2]
    if len(ends_E) != experts or width != contracted:
        raise ValueError(f"{len(ends_E)} groups of rows of width {width} do not fit weights {tuple(w_EKN.shape)}")
    if ends_E.device.type == "cpu" and int(ends_E[-1]) != num_rows:
        raise ValueError(f"the last group ends at row {int(ends_E[-1])} of {num_rows}")
