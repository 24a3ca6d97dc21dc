"""The compiled products: against a loop, whatever the shapes and the width of a register; same rows, same bits."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from model.kernels import grouped_gemm
from model.kernels.compiled import compiled, processor
from model.kernels.reference import grouped_mm_loop, grouped_wgrad_loop

SOURCE = Path(grouped_gemm.__file__).with_suffix(".cpp")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")

# rows of each expert, K, N: nothing, less, and more than a tile, a vector, a block
SHAPES = (
    ([3, 0, 20, 67], 37, 50),
    ([8, 16, 32], 8, 16),
    ([1, 6], 1, 1),
    ([40, 0], 130, 33),
    ([300, 2], 12, 96),
    ([5, 0, 12, 40], 16, 64),  # the first and third without a tile, in forward
)


WIDER_THAN_MOST = ("-O0", "-Wno-psabi")  # optimised, it takes minutes to compile
BUILDS = {
    "this machine's": None,
    "no vectors": ("-DFLOATS_IN_A_REGISTER=4", *WIDER_THAN_MOST),
    "wider vectors": ("-DFLOATS_IN_A_REGISTER=16", *WIDER_THAN_MOST),
    "this machine's, every gradient past the cache": ("-O1", "-march=native", "-DLARGE_FROM=0"),
    "AVX2, every gradient past the cache": ("-O1", "-mavx2", "-mfma", "-DLARGE_FROM=0"),
}


@pytest.fixture(scope="session", params=BUILDS, ids=str)
def library(request, tmp_path_factory) -> ctypes.CDLL:
    """Of any width a machine's registers may have, and either way to write."""
    flags = BUILDS[request.param]
    if flags is None:
        made = compiled(SOURCE)
        assert made is not None
        return made
    if "-mavx2" in flags and "avx2" not in processor("flags").split():
        pytest.skip("a processor without AVX2")
    made = tmp_path_factory.mktemp("kernels") / "products.so"
    subprocess.run(
        ["g++", "-std=c++17", "-shared", "-fPIC", "-pthread", *flags, str(SOURCE), "-o", str(made)], check=True
    )
    return ctypes.CDLL(str(made))


def operands(sizes: list[int], k: int, n: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    ends_E = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return torch.randn(sum(sizes), k), torch.randn(len(sizes), k, n), torch.randn(sum(sizes), n), ends_E


def products(library: ctypes.CDLL, x_RK, w_EKN, dy_RN, ends_E, threads: int = 1) -> tuple[torch.Tensor, ...]:
    """out, dx, dw; memory full of NaN before, so that what is not written is seen."""
    out_RN, dx_RK, dw_EKN = (torch.full_like(tensor, torch.nan) for tensor in (dy_RN, x_RK, w_EKN))
    calls = (
        (library.grouped_forward, x_RK, w_EKN, out_RN),
        (library.grouped_dgrad, dy_RN, w_EKN, dx_RK),
        (library.grouped_wgrad, x_RK, dy_RN, dw_EKN),
    )
    for function, a, b, to in calls:
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, to, ends_E))
        function(*pointers, *map(ctypes.c_int64, w_EKN.shape), threads)
    return out_RN, dx_RK, dw_EKN


@pytest.mark.parametrize("sizes, k, n", SHAPES)
def test_equal_to_a_loop_over_experts(library, sizes, k, n):
    x_RK, w_EKN, dy_RN, ends_E = operands(sizes, k, n)
    out_RN, dx_RK, dw_EKN = products(library, x_RK, w_EKN, dy_RN, ends_E)
    tolerances = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(out_RN, grouped_mm_loop(x_RK, w_EKN, ends_E), **tolerances)
    torch.testing.assert_close(dx_RK, grouped_mm_loop(dy_RN, w_EKN.transpose(1, 2), ends_E), **tolerances)
    torch.testing.assert_close(dw_EKN, grouped_wgrad_loop(x_RK, dy_RN, ends_E), **tolerances)
    assert all(not dw_EKN[e].any() for e, rows in enumerate(sizes) if not rows)


@pytest.mark.parametrize("k, n", [(70, 45), (64, 48)], ids=["ragged", "few rows go their own way"])
def test_a_row_has_the_same_bits_whatever_is_beside_it_and_for_any_number_of_threads(library, k, n):
    x_RK, w_EKN, dy_RN, ends_E = operands([29, 5, 11], k, n)
    out_RN, dx_RK, dw_EKN = products(library, x_RK, w_EKN, dy_RN, ends_E)
    for together, threaded in zip((out_RN, dx_RK, dw_EKN), products(library, x_RK, w_EKN, dy_RN, ends_E, 3)):
        assert torch.equal(together, threaded)
    for row in (0, 7, 28):  # all of expert 0
        alone = products(library, x_RK[row : row + 1], w_EKN[:1], dy_RN[row : row + 1], torch.tensor([1]).int())
        assert torch.equal(alone[0][0], out_RN[row])
        assert torch.equal(alone[1][0], dx_RK[row])


# rows of two experts, dtype, whether MKL is outrun here, threads
@pytest.mark.parametrize(
    "rows, dtype, outrun, threads, expected",
    [
        (255, torch.float32, False, 1, 3),
        (256, torch.float32, False, 1, 0),
        (256, torch.float32, True, 1, 3),
        (256, torch.float32, True, 2, 0),  # MKL's two threads against one an expert
        (255, torch.float32, True, 2, 3),
        (9, torch.bfloat16, True, 1, 0),
    ],
)
def test_fp32_goes_through_it_where_it_is_faster_and_nothing_else(monkeypatch, rows, dtype, outrun, threads, expected):
    calls = []
    real = grouped_gemm._call
    monkeypatch.setattr(grouped_gemm, "_call", lambda *args: (calls.append(args[0].__name__), real(*args)))
    monkeypatch.setattr(grouped_gemm, "outruns_mkl", lambda: outrun)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x_RK = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    w_EKN = torch.randn(2, 8, 16, dtype=dtype, requires_grad=True)
    grouped_gemm.grouped_mm(x_RK, w_EKN, torch.tensor([3, rows], dtype=torch.int32)).sum().backward()
    assert len(calls) == expected
    assert sorted(calls) == sorted(f"grouped_{name}" for name in ("forward", "dgrad", "wgrad"))[:expected]


@pytest.mark.parametrize(
    "vendor, flags, expected",
    [
        ("GenuineIntel", "avx2 avx512f", False),
        ("AuthenticAMD", "avx2 avx512f", True),
        ("AuthenticAMD", "avx2", False),
        ("", "", False),  # a system without /proc
    ],
)
def test_mkl_is_outrun_where_it_leaves_half_of_a_register_empty(monkeypatch, vendor, flags, expected):
    monkeypatch.setattr(grouped_gemm, "processor", lambda field: {"flags": flags, "vendor_id": vendor}[field])
    assert grouped_gemm.outruns_mkl.__wrapped__() is expected
