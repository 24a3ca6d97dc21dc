"""The Triton kernels under Triton's interpreter, against model/kernels/quantise.py and reference.py; then compiled.

The interpreter is chosen by TRITON_INTERPRET when triton is first imported, which some other test may have done by now.
So the checks below run in a process of their own, all in one, and each is reported as a test.
"""

import inspect
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from model.kernels import reference
from model.kernels.fp8 import PermutedRows, SwiGluRows
from model.kernels.quantise import FORMATS, Quantised, quantise

ROOT = Path(__file__).resolve().parents[2]
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
    from model.kernels import triton_fp8

    x, w, dy = operands()
    x[5:15] = 1.0  # here the sums are compared, in which rows of 10⁶ would hide all others
    for fmt in FORMATS:
        for recipe in RECIPES:
            x_q, w_q, dy_q = quantise(x, recipe, 1), quantise(w, recipe, 1), quantise(dy, recipe, 1, fmt)
            wt_q = quantise(w, recipe, 2).transposed()
            x_down, dy_down = quantise(x, recipe, 0, "e4m3", ENDS), quantise(dy, recipe, 0, fmt, ENDS)
            for product, loop, left, right in (
                (triton_fp8.grouped_mm, reference.grouped_mm_loop, x_q, w_q),
                (triton_fp8.grouped_mm, reference.grouped_mm_loop, dy_q, wt_q),
                (triton_fp8.grouped_wgrad, reference.grouped_wgrad_loop, x_down, dy_down),
            ):
                # The interpreter cuts fp32 to bf16 instead of rounding it: up to 2⁻⁸, where a GPU keeps within 2⁻⁹.
                for out_dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
                    got = product(left, right, ENDS, recipe, out_dtype)
                    exact = loop(left.dequantise().double(), right.dequantise().double(), ENDS)
                    assert got.dtype == out_dtype
                    assert (got.double() - exact).norm() < limit * exact.norm(), (recipe, fmt, product)


def check_all_rows_on_one_expert_and_no_rows_at_all():
    from model.kernels import triton_fp8

    x, w, dy = operands()
    for rows, ends in ((200, [0, 0, 200, 200, 200]), (0, [0] * 5)):
        ends_E = torch.tensor(ends, dtype=torch.int32)
        for recipe in RECIPES:

            def stored(tensor, axis):
                return triton_fp8.quantise("plain", (tensor,), recipe, axis, "e4m3", ends_E)  # noqa: B023

            out = triton_fp8.grouped_mm(stored(x[:rows], 1), stored(w, 1), ends_E, recipe, torch.float32)
            left, right = stored(x[:rows], 0), stored(dy[:rows], 0)
            dw = triton_fp8.grouped_wgrad(left, right, ends_E, recipe, torch.float32)
            assert out.shape == (rows, N) and out.isfinite().all()
            assert dw[[0, 1, 3, 4]].abs().max() == 0 and bool(dw[2].any()) is (rows > 0)


def compile_for_hopper():
    """The interpreter accepts what the compiler may not. Prints the tensor-core instructions of each product."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.kernels import triton_fp8 as kernels

    formats = kernels._format_constants(FORMATS["e4m3"])
    tile = {"ROWS": 32, "COLUMNS": 128, "KIND": 1} | formats
    pointers = {"x_ptr": "*bf16", "token_ptr": "*i64", "gate_ptr": "*fp32", "q_ptr": "*u8", "scale_ptr": "*fp32"}
    bounds = {"starts_ptr": "*i64", "stops_ptr": "*i64", "expert_ptr": "*i64", "out_ptr": "*bf16"}
    fp8 = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "dy_ptr": "*fp8e5", "sx_ptr": "*fp32", "sw_ptr": "*fp32"}
    for kernel, constants in (
        (kernels._quantise_rows, tile | {"GIVEN": False, "STORE": True, "CHUNKS": 2}),
        (kernels._quantise_segments, tile | {"SQUARE": False}),
        (kernels._grouped_mm, {"BLOCK": True, "ROWS": 128, "WIDTH": 128, "DEPTH": 128}),
        (kernels._grouped_wgrad, {"BLOCK": True, "HEIGHT": 128, "WIDTH": 128, "DEPTH": 128}),
    ):
        types = pointers | bounds | (fp8 | {"sdy_ptr": "*fp32"} if "BLOCK" in constants else {})
        signature = {
            parameter.name: "constexpr" if parameter.name in constants else types.get(parameter.name, "i32")
            for parameter in kernel.params
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        print(kernel.__name__, compiled.asm["ptx"].count("wgmma.mma_async"))


CHECKS = [name for name in dict(globals()) if name.startswith("check_")]


def in_another_process(argument, **environment):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, __file__, argument],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes():
    done = in_another_process("interpret", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_in_the_interpreter(check, outcomes):
    assert outcomes[check] == "passed", outcomes[check]


def test_kernels_compile_for_hopper_and_use_its_tensor_cores(tmp_path):
    done = in_another_process("compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    instructions = dict(line.split() for line in done.stdout.splitlines() if line.startswith("_"))
    assert int(instructions["_grouped_mm"]) > 0 and int(instructions["_grouped_wgrad"]) > 0


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_for_hopper()
    else:
        results = {}
        for name in CHECKS:
            assert not inspect.signature(globals()[name]).parameters
            try:
                globals()[name]()
                results[name] = "passed"
            except Exception:
                results[name] = traceback.format_exc()
        print(json.dumps(results))
