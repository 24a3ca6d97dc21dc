"""A linear layer in FP8 against operands rounded one by one; FP8's own tests are in kernels/test_fp8.py."""

import pytest
import torch
from torch import nn

from model.fp8_gauges import Fp8Gauges
from model.kernels import reference
from model.linear import Linear
from model.precision import Fp8Settings

ENDS = torch.tensor([40], dtype=torch.int32)


def layer_and_input():
    torch.manual_seed(0)
    return Linear(140, 150), torch.randn(40, 140), torch.randn(40, 150)


def test_without_fp8_it_is_pytorchs():
    layer, x, _ = layer_and_input()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128"])
def test_in_fp8_each_product_is_that_of_operands_stored_along_its_own_axis(recipe):
    layer, x, dy = layer_and_input()
    layer.precision, layer.gauges = Fp8Settings(recipe), Fp8Gauges()
    x.requires_grad_()
    out = layer(x)
    out.backward(dy)

    def stored(tensor, axis):
        rounded, scale = reference.quantise_loop(tensor.detach(), recipe, axis, "e4m3", ENDS)
        return rounded * scale.double()

    w_1KN = layer.weight.T.unsqueeze(0)
    expected = [
        (out - layer.bias, stored(x, 1) @ stored(w_1KN, 1)[0]),
        (x.grad, stored(dy, 1) @ stored(w_1KN, 2)[0].T),
        (layer.weight.grad, stored(dy, 0).T @ stored(x, 0)),
    ]
    for got, wanted in expected:
        assert (got - wanted).norm() / wanted.norm() < 1e-6
    assert torch.equal(layer.bias.grad, dy.sum(0))
    assert set(layer.gauges.read()) == {"input", "weight", "gradient"}


def test_under_autocast_it_gives_what_any_linear_layer_gives():
    layer, x, _ = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        layer.precision = Fp8Settings()
        rounded = layer(x)
    assert rounded.dtype == plain.dtype == torch.bfloat16
    assert 0.01 < (rounded - plain).norm() / plain.norm() < 0.05
