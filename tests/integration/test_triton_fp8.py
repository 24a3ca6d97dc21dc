"""FP8's Triton kernels under Triton's interpreter, against model/kernels/quantise.py and reference.py; and compiled."""

import pytest
import torch
from triton_process import built_for, checks, compiled, main, outcomes

from model.kernels import reference
from model.kernels.fp8 import PermutedRows, SwiGluRows, _multiply
from model.kernels.quantise import FORMATS, Quantised, quantise

RECIPES = ["tensor", "row", "block128"]
ENDS = torch.tensor([0, 130, 130, 131, 200], dtype=torch.int32)  # two empty experts; tiles of 128, 2, 1 and 69 rows
K, N = 140, 150


def operands():
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(200, K, generator=generator), torch.randn(200, N, generator=generator)
    x[5:15] *= torch.logspace(-12, 6, 10).unsqueeze(1)  # the format's whole range, and past its end
    x[3], x[4, 7] = 0, -0.0
    return x, torch.randn(5, K, N, generator=generator), dy


def same_bytes(got: Quantised, wanted: Quantised) -> None:
    """Scales and bytes equal; of NaN, which IEEE gives either sign, only that it is NaN."""
    assert torch.equal(got.scale, wanted.scale) or got.scale.isnan().any()
    assert torch.equal(got.scale.nan_to_num(), wanted.scale.nan_to_num())
    unsigned = [torch.where(q.float().isnan(), 0x7F, q.contiguous().view(torch.uint8)) for q in (got.q, wanted.q)]
    assert torch.equal(*unsigned)


def check_quantise_bit_for_bit():
    from model.kernels import triton_fp8

    x, w, _ = operands()
    for recipe in RECIPES:
        for tensor, axis in ((x, 1), (x, 0), (w, 1), (w, 2)):
            for fmt, dtype in (("e4m3", torch.bfloat16), ("e5m2", torch.float32)):
                given = tensor.to(dtype)
                got = triton_fp8.quantise("plain", (given,), recipe, axis, fmt, ENDS)
                same_bytes(got, quantise(given, recipe, axis, fmt, ENDS))
                rounded, scale = reference.quantise_loop(given, recipe, axis, fmt, ENDS)
                assert torch.equal(got.q.double(), rounded)
                assert torch.equal(got.dequantise(), rounded.float() * scale)
                assert got.q.stride(axis) == 1 or recipe == "tensor", "the contracted axis is not contiguous"


def check_the_weight_of_a_linear_layer_is_quantised_where_it_lies():
    """Output-major in memory: the same numbers as input-major, and nothing is copied first."""
    from model.kernels import triton_fp8

    w_1KN = operands()[1][:1].mT.contiguous().mT
    for recipe in RECIPES:
        for axis in (1, 2):
            got = triton_fp8.quantise("plain", (w_1KN,), recipe, axis, "e4m3", ENDS)
            same_bytes(got, quantise(w_1KN, recipe, axis, "e4m3", ENDS))
            assert got.q.stride(axis) == 1 or recipe == "tensor", "the contracted axis is not contiguous"


def check_what_is_not_a_number_stays_so():
    from model.kernels import triton_fp8

    _, _, broken = operands()
    broken[7, 3], broken[150, 140] = torch.nan, torch.inf
    for recipe in RECIPES:
        for axis in (0, 1):
            got = triton_fp8.quantise("plain", (broken,), recipe, axis, "e4m3", ENDS)
            same_bytes(got, quantise(broken, recipe, axis, "e4m3", ENDS))
            assert not got.dequantise()[[7, 150], [3, 140]].isfinite().any()


def check_permuted_rows_bit_for_bit():
    from model.kernels import triton_fp8

    x = operands()[0].bfloat16()
    rows = PermutedRows(x, torch.randperm(200), torch.rand(200))
    for recipe in RECIPES:
        for axis in (0, 1):
            got = triton_fp8.quantise(rows.kind, rows.tensors, recipe, axis, "e4m3", ENDS)
            same_bytes(got, quantise(rows.values(), recipe, axis, "e4m3", ENDS))


def check_swiglu_rows_to_the_last_bit_of_the_exponential():
    """Two libraries' exp differ in the last bit of fp32, which once in ten thousand numbers turns an FP8 rounding."""
    from model.kernels import triton_fp8

    rows = SwiGluRows(torch.randn(200, 2 * K, generator=torch.Generator().manual_seed(0)).bfloat16())
    for recipe in RECIPES:
        for axis in (0, 1):
            got = triton_fp8.quantise(rows.kind, rows.tensors, recipe, axis, "e4m3", ENDS)
            wanted = quantise(rows.values(), recipe, axis, "e4m3", ENDS)
            torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-6, atol=0)
            steps = got.q.contiguous().view(torch.uint8).int() - wanted.q.view(torch.uint8).int()
            assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 1e-3


def check_products_within_accumulation_error():
    x, w, dy = operands()
    x[5:15] = 1.0  # here the sums are compared, in which rows of 10⁶ would hide all others
    for fmt in FORMATS:
        for recipe in RECIPES:
            x_q, w_q, dy_q = quantise(x, recipe, 1), quantise(w, recipe, 1), quantise(dy, recipe, 1, fmt)
            wt_q = quantise(w, recipe, 2).transposed()
            x_down, dy_down = quantise(x, recipe, 0, "e4m3", ENDS), quantise(dy, recipe, 0, fmt, ENDS)
            for loop, left, right in (
                (reference.grouped_mm_loop, x_q, w_q),
                (reference.grouped_mm_loop, dy_q, wt_q),
                (reference.grouped_wgrad_loop, x_down, dy_down),
            ):
                # The interpreter cuts fp32 to bf16 instead of rounding it: up to 2⁻⁸, where a GPU keeps within 2⁻⁹.
                for out_dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
                    got = _multiply("triton", left, right, ENDS, recipe, out_dtype)
                    exact = loop(left.dequantise().double(), right.dequantise().double(), ENDS)
                    assert got.dtype == out_dtype
                    assert (got.double() - exact).norm() < limit * exact.norm(), (recipe, fmt, loop)


def check_all_rows_on_one_expert_and_no_rows_at_all():
    from model.kernels import triton_fp8

    x, w, dy = operands()
    for rows, ends in ((200, [0, 0, 200, 200, 200]), (0, [0] * 5)):
        ends_E = torch.tensor(ends, dtype=torch.int32)
        for recipe in RECIPES:

            def stored(tensor, axis):
                return triton_fp8.quantise("plain", (tensor,), recipe, axis, "e4m3", ends_E)  # noqa: B023

            out = _multiply("triton", stored(x[:rows], 1), stored(w, 1), ends_E, recipe, torch.float32)
            left, right = stored(x[:rows], 0), stored(dy[:rows], 0)
            dw = _multiply("triton", left, right, ends_E, recipe, torch.float32)
            assert out.shape == (rows, N) and out.isfinite().all()
            assert dw[[0, 1, 3, 4]].abs().max() == 0 and bool(dw[2].any()) is (rows > 0)


def compile_kernels():
    """How often each product calls Hopper's tensor cores."""
    from model.kernels import triton_fp8, triton_grouped

    quantised = triton_fp8._format_constants(FORMATS["e4m3"]) | {"ROWS": 32, "COLUMNS": 128, "KIND": 1}
    product = {"SCALES": "block", "WIDTH": 128, "DEPTH": 128}
    pointers = {"x_ptr": "*bf16", "token_ptr": "*i64", "gate_ptr": "*fp32", "q_ptr": "*u8", "scale_ptr": "*fp32"}
    bounds = {"starts_ptr": "*i64", "stops_ptr": "*i64", "expert_ptr": "*i64", "out_ptr": "*bf16"}
    fp8 = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "dy_ptr": "*fp8e5"}
    fp8 |= dict.fromkeys(("sx_ptr", "sw_ptr", "sdy_ptr"), "*fp32")
    calls = {}
    for kernel, constants, types in (
        (triton_fp8._quantise_rows, quantised | {"GIVEN": False, "STORE": True, "CHUNKS": 2}, pointers),
        (triton_fp8._quantise_segments, quantised | {"SQUARE": False}, pointers),
        (triton_grouped._grouped_mm, product | {"ROWS": 128}, fp8),
        (triton_grouped._grouped_wgrad, product | {"HEIGHT": 128}, fp8),
    ):
        calls[kernel.__name__] = built_for(90, kernel, constants, bounds | types).asm["ptx"].count("wgmma.mma_async")
    return calls


@pytest.fixture(scope="module")
def outcome():
    return outcomes(__file__)


@pytest.mark.parametrize("check", checks(globals()))
def test_kernels_in_the_interpreter(check, outcome):
    assert outcome[check] == "passed", outcome[check]


def test_kernels_compile_for_hopper_and_use_its_tensor_cores(tmp_path):
    calls = compiled(__file__, tmp_path)
    assert calls["_grouped_mm"] > 0 and calls["_grouped_wgrad"] > 0


if __name__ == "__main__":
    main(globals())
