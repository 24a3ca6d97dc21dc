"""Our RMS norm against PyTorch's, values and gradients, and against finite differences."""

import pytest
import torch
from torch.nn import functional as F

from model.norm import RmsNorm, _RmsNorm, rms_norm

EPS = 1e-5


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 32)])
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_pytorchs_forward_and_backward(shape, weighted):
    torch.manual_seed(0)
    values, weights, dy = torch.randn(shape) * 3, torch.randn(shape[-1]) + 1, torch.randn(shape)
    seen = []
    for function in (rms_norm, lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps)):
        x = values.clone().requires_grad_()
        w = weights.clone().requires_grad_() if weighted else None
        y = function(x, w, EPS)
        y.backward(dy)
        seen.append([y, x.grad] + ([w.grad] if weighted else []))
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RmsNorm.apply(x, w, EPS), (x, w))
    assert torch.autograd.gradcheck(lambda x: _RmsNorm.apply(x, None, EPS), (x,))


def test_a_frozen_weight_gets_no_gradient_and_x_does():
    norm = RmsNorm(8, EPS)
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None


def test_other_dtypes_are_left_to_pytorch():
    x, norm = torch.randn(3, 8).bfloat16(), RmsNorm(8, EPS).bfloat16()
    assert torch.equal(norm(x), F.rms_norm(x, (8,), norm.weight, EPS))
