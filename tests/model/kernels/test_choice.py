"""Which kernel is chosen: the first that does exactly what is wanted, and why not where none does."""

import pytest
import torch

from model.kernels.choice import WantedFp8, choose_fp8_kernel


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
