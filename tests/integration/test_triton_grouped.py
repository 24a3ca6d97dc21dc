"""Grouped products of 16 bits in Triton: in the interpreter against fp64 products of the same operands, and compiled.

Tiles are 128 rows by 128 columns, and sums go 64 terms at a time: SHAPES lie on both sides of each.
"""

import pytest
import torch
from triton_process import built_for, checks, compiled, main, outcomes

from model.kernels import reference

SHAPES = (  # rows of each expert, K, N
    ([0, 130, 0, 1, 69], 140, 150),  # empty first and between; tiles of 128, 2, 1 and 69 rows; widths past a tile
    ([0, 0, 200, 0, 0], 64, 128),  # all on one expert, whole tiles
    ([128, 128], 128, 64),  # nothing to mask
    ([127, 1, 129, 64, 3, 0], 7, 13),  # less than a tile wide, strides that divide by nothing
    ([1], 1, 1),
    ([0, 0, 0], 20, 12),  # no row at all
)
DTYPES = (torch.bfloat16, torch.float16)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # of a block at most, by compute capability; 8.9 as 8.6


def mend_interpreter():
    """It keeps bf16 as integers of 16 bits, and its dot would multiply those: widened first, which is exact."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        is_bf16 = a.dtype.scalar == tl.bfloat16
        return plain(self, *((self.cast_impl(x, tl.float32) if is_bf16 else x) for x in (a, b)), *rest)

    InterpreterBuilder.create_dot = create_dot


def operands(sizes, k, n, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(sizes), k), (len(sizes), k, n), (sum(sizes), n)
    x, w, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return x, w, dy, torch.tensor(sizes).cumsum(0).to(torch.int32)


def products(x, w, dy, ends, out_dtype):
    """out, dx, dw as model/kernels/grouped_gemm.py asks for them."""
    from model.kernels.triton_grouped import grouped_mm, grouped_wgrad

    return (
        grouped_mm(x, w, ends, out_dtype),
        grouped_mm(dy, w.transpose(1, 2), ends, out_dtype),
        grouped_wgrad(x, dy, ends, out_dtype),
    )


def exact_products(x, w, dy, ends):
    x, w, dy = x.double(), w.double(), dy.double()
    return (
        reference.grouped_mm_loop(x, w, ends),
        reference.grouped_mm_loop(dy, w.transpose(1, 2), ends),
        reference.grouped_wgrad_loop(x, dy, ends),
    )


def sums_of_sizes(x, w, dy, ends):
    """Σ |a| · |b| of each result: what its error is measured by, since what is summed may cancel."""
    return exact_products(x.abs(), w.abs(), dy.abs(), ends)


def check_products_are_exact_but_for_fp32_sums():
    for sizes, k, n in SHAPES:
        for dtype in DTYPES:
            given = operands(sizes, k, n, dtype)
            for got, exact, size in zip(products(*given, torch.float32), exact_products(*given), sums_of_sizes(*given)):
                # 200 additions in fp32, each wrong by 2⁻²⁴ at most; fp16, which numpy adds one by one, comes to 2⁻²¹·⁶.
                assert got.shape == exact.shape and ((got - exact).abs() <= 2**-20 * size).all(), (sizes, dtype)


def check_results_come_in_the_dtype_of_the_operands():
    """fp16 rounded to the nearest; the interpreter cuts bf16 off, where a GPU rounds it."""
    for dtype, last_bit in ((torch.float16, 2**-11), (torch.bfloat16, 2**-7)):
        given = operands(*SHAPES[0], dtype)
        for got, exact, size in zip(products(*given, dtype), exact_products(*given), sums_of_sizes(*given)):
            assert got.dtype == dtype
            assert ((got.double() - exact).abs() <= last_bit * exact.abs() + 2**-20 * size).all(), dtype


def check_an_expert_without_rows_has_a_gradient_of_zeros():
    for sizes, k, n in SHAPES:
        dw = products(*operands(sizes, k, n, torch.bfloat16), torch.bfloat16)[2]
        assert [bool(dw[e].any()) for e in range(len(sizes))] == [rows > 0 for rows in sizes]


def check_autograd_calls_them_on_what_a_model_gives():
    """Through `grouped_mm` of the model, with rows that are a slice and a gradient whose strides are zero."""
    from model.kernels import grouped_gemm

    grouped_gemm._kernel = lambda w: "triton"
    x, w, _, ends = operands([3, 0, 20], 24, 12, torch.float16)
    x_wide = torch.cat([x, x], 1).requires_grad_()
    w.requires_grad_()
    out = grouped_gemm.grouped_mm(x_wide[:, 24:], w, ends)
    out.sum().backward()
    exact = exact_products(x, w.detach(), torch.ones(23, 12), ends)
    for got, wanted in zip((out, x_wide.grad[:, 24:], w.grad), exact):
        torch.testing.assert_close(got, wanted.half(), rtol=2**-10, atol=1e-3)
    assert not w.grad[1].any() and not x_wide.grad[:, :24].any()


def compile_kernels():
    """Of each product and compute capability: tensor-core instructions, Hopper's and older ones, copies that run beside
    them, bytes of shared memory."""
    from model.kernels import triton_grouped

    mm, wgrad = triton_grouped._grouped_mm, triton_grouped._grouped_wgrad
    types = {"starts_ptr": "*i64", "stops_ptr": "*i64", "expert_ptr": "*i64"}
    built = []
    for capability in SHARED_BYTES:
        dtype = "*fp16" if capability == 86 else "*bf16"
        types |= dict.fromkeys(("x_ptr", "w_ptr", "dy_ptr", "out_ptr"), dtype)
        for kernel, side, contiguous in (
            (mm, "ROWS", ("x_stride_k", "w_stride_n")),  # forward
            (mm, "ROWS", ("x_stride_k", "w_stride_k")),  # dgrad
            (wgrad, "HEIGHT", ("x_stride_k", "dy_stride_n")),
        ):
            constants = {"SCALES": "none", side: 128, "WIDTH": 128, "DEPTH": 64} | dict.fromkeys(contiguous, 1)
            scales = [name for name in kernel.arg_names if name.startswith(("sx_", "sw_", "sdy_"))]
            constants |= {name: None if name.endswith("ptr") else 0 for name in scales}
            made = built_for(capability, kernel, constants, types)
            words = map(made.asm["ptx"].count, ("wgmma.mma_async", "mma.sync", "cp.async.cg"))
            built.append((capability, *words, made.metadata.shared))
    return built


@pytest.fixture(scope="module")
def outcome():
    return outcomes(__file__)


@pytest.mark.parametrize("check", checks(globals()))
def test_kernels_in_the_interpreter(check, outcome):
    assert outcome[check] == "passed", outcome[check]


def test_kernels_compile_for_tensor_cores_fed_in_turns_and_fit_into_shared_memory(tmp_path):
    built = compiled(__file__, tmp_path)
    assert len(built) == 3 * len(SHARED_BYTES)
    for capability, of_hopper, of_older, copies, shared_bytes in built:
        assert (of_hopper if capability == 90 else of_older) > 0 < copies, capability
        assert 2 * 2 * 128 * 64 * 2 <= shared_bytes <= SHARED_BYTES[capability], "two tiles of both operands at least"


if __name__ == "__main__":
    mend_interpreter()
    torch.use_deterministic_algorithms(True)  # `torch.empty` holds NaN then: what is not written is seen
    main(globals())
