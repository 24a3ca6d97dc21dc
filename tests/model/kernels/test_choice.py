"""Which kernel is chosen: the first that does exactly what is wanted, and why not where none does."""

import pytest
import torch
from pretended_gpu import pretended_gpu

from model.kernels.choice import Wanted, WantedFp8, choose_fp8_kernel, choose_kernel
from model.kernels.grouped_gemm import NAMED_BY, PRODUCTS, Products, grouped_mm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def wanted_fp8(**changes):
    basis = dict(
        product="forward", recipe="row", gradients="e4m3", out_dtype=torch.bfloat16, widths=(256, 512), device="cuda",
        capability=(9, 0), has_triton=True,
    )  # fmt: skip
    return WantedFp8(**(basis | changes))


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "torch._scaled_grouped_mm"),
        ({"product": "dgrad"}, "torch._scaled_grouped_mm"),
        ({"product": "wgrad"}, "triton"),
        ({"gradients": "e5m2"}, "torch._scaled_grouped_mm"),  # forward holds no gradient
        ({"product": "dgrad", "gradients": "e5m2"}, "triton"),
        ({"recipe": "tensor"}, "triton"),
        ({"recipe": "block128"}, "triton"),
        ({"out_dtype": torch.float32}, "triton"),
        ({"widths": (256, 500)}, "triton"),
        ({"capability": (8, 9)}, "triton"),
        ({"capability": (10, 0)}, "triton"),
        ({"device": "cpu", "capability": None, "has_triton": False, "recipe": "block128"}, "emulated"),
    ],
)
def test_the_first_fp8_kernel_that_does_exactly_what_is_wanted(changes, kernel):
    assert choose_fp8_kernel(wanted_fp8(**changes)) == kernel


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"capability": (8, 0)}, r"triton needs compute capability \(8, 9\) or later"),
        ({"has_triton": False}, "triton needs triton, which is not installed"),
        ({"device": "rocm"}, "emulated runs on cpu"),
        ({"device": "mps", "capability": None}, "recipe='row'"),
    ],
)
def test_fp8_that_no_kernel_does_exactly_is_refused_with_reasons(changes, told):
    with pytest.raises(ValueError, match=told):
        choose_fp8_kernel(wanted_fp8(**changes))


def wanted(capability=(9, 0), dtype=BF16, widths=(256, 512), has_triton=True, device="cuda"):
    return Wanted(out_dtype=dtype, widths=widths, device=device, capability=capability, has_triton=has_triton)


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ({}, "torch"),
        ({"capability": (10, 0), "has_triton": False}, "torch"),
        ({"capability": (12, 0)}, "triton"),
        ({"device": "rocm"}, "loop"),
        ({"widths": (256, 500)}, "triton"),  # torch's function asks for rows of whole 16 bytes
        ({"dtype": FP16}, "triton"),
        ({"capability": (8, 0)}, "triton"),
        ({"capability": (8, 9), "dtype": FP16}, "triton"),
        ({"capability": (7, 5)}, "loop"),
        ({"capability": (8, 0), "has_triton": False}, "loop"),
        ({"dtype": FP32}, "loop"),
        ({"capability": (8, 0), "dtype": FP32}, "loop"),
    ],
)
def test_the_kernel_of_operands_that_are_not_fp8(given, kernel):
    assert choose_kernel(wanted(**given)) == kernel


def test_a_kernel_asked_for_by_name_is_taken_or_refused_with_its_reason():
    assert [choose_kernel(wanted(), named) for named in PRODUCTS] == list(PRODUCTS)
    with pytest.raises(ValueError, match=r"torch needs compute capability \(9, 0\) or later"):
        choose_kernel(wanted(capability=(8, 0)), "torch")
    with pytest.raises(ValueError, match="triton writes .*bfloat16"):
        choose_kernel(wanted(dtype=FP32), "triton")
    with pytest.raises(ValueError, match="none of that name. 'cublas' was asked for, of torch, triton, loop"):
        choose_kernel(wanted(), "cublas")


@pytest.mark.parametrize(
    ("capability", "dtype", "named", "kernel"),
    [
        ((9, 0), BF16, None, "torch"),
        ((8, 0), BF16, None, "triton"),
        ((9, 0), FP32, None, "loop"),
        ((9, 0), BF16, "triton", "triton"),
    ],
)
def test_all_three_products_on_a_gpu_are_the_chosen_kernels(monkeypatch, capability, dtype, named, kernel):
    monkeypatch.delenv(NAMED_BY, raising=False)
    if named is not None:
        monkeypatch.setenv(NAMED_BY, named)
    called = []

    def told(product):  # a loop computes it: there is no GPU here
        loop = getattr(PRODUCTS["loop"], product)
        return lambda *operands: (called.append(product), loop(*operands))[1]

    monkeypatch.setitem(PRODUCTS, kernel, Products(*map(told, Products._fields)))
    with pretended_gpu(capability):
        x = torch.ones(3, 8, dtype=dtype, device="cuda", requires_grad=True)
        w = torch.ones(2, 8, 16, dtype=dtype, device="cuda", requires_grad=True)
        grouped_mm(x, w, torch.tensor([1, 3], dtype=torch.int32, device="cuda")).sum().backward()
    assert called == ["forward", "dgrad", "wgrad"]
