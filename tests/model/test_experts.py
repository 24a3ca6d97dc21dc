"""The routed experts against a loop over tokens, and the grouped product against its slow twin."""

import pytest
import torch
from torch.nn import functional as F

from model.experts import Experts
from model.kernels.grouped_gemm import grouped_mm
from model.kernels.reference import grouped_mm_loop, grouped_wgrad_loop

NUM_EXPERTS, HIDDEN, WIDTH, TOKENS = 4, 8, 16, 32


def experts() -> Experts:
    torch.manual_seed(0)
    module = Experts(NUM_EXPERTS, HIDDEN, WIDTH)
    module.initialise()
    return module


def one_by_one(module: Experts, x_TD: torch.Tensor, expert_T: torch.Tensor, gate_T: torch.Tensor) -> torch.Tensor:
    rows = []
    for x_D, expert, gate in zip(x_TD, expert_T.tolist(), gate_T, strict=True):
        a_F, b_F = ((x_D * gate) @ module.gate_up_proj[expert]).chunk(2)
        rows.append((F.silu(a_F) * b_F) @ module.down_proj[expert])
    return torch.stack(rows)


ROUTINGS = {
    "mixed": torch.arange(TOKENS) * 7 % NUM_EXPERTS,
    "one expert takes all": torch.full((TOKENS,), 2),
    "two experts are empty": torch.arange(TOKENS) % 2 * 3,
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_same_function_and_gradients_as_a_loop_over_tokens(routing):
    module, expert_T = experts(), ROUTINGS[routing]
    leaves = [torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS)]
    seen = []
    for function in (module.__call__, lambda *args: one_by_one(module, *args)):
        x_TD, gate_T = (leaf.clone().requires_grad_() for leaf in leaves)
        module.zero_grad()
        out_TD = function(x_TD, expert_T, gate_T)
        (out_TD * torch.arange(HIDDEN)).sum().backward()
        seen.append([out_TD, x_TD.grad, gate_T.grad, module.gate_up_proj.grad.clone(), module.down_proj.grad.clone()])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_scaling_the_output_instead_of_the_input_is_another_function():
    module, expert_T = experts(), ROUTINGS["mixed"]
    x_TD, gate_T = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS)
    output_scaled = module(x_TD, expert_T, torch.ones(TOKENS)) * gate_T.unsqueeze(1)
    assert (module(x_TD, expert_T, gate_T) - output_scaled).abs().max() > 1e-2


def test_no_token_at_all():
    out = experts()(torch.empty(0, HIDDEN), torch.empty(0, dtype=torch.long), torch.empty(0))
    assert out.shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_grouped_product_and_both_gradients(dtype, tolerance):
    torch.manual_seed(0)
    ends_E = torch.tensor([3, 3, 10, 12], dtype=torch.int32)  # expert 1 has no row
    x_RK = torch.randn(12, 8, dtype=dtype, requires_grad=True)
    w_EKN = torch.randn(4, 8, 16, dtype=dtype, requires_grad=True)
    out_RN = grouped_mm(x_RK, w_EKN, ends_E)
    torch.testing.assert_close(out_RN, grouped_mm_loop(x_RK, w_EKN, ends_E), atol=tolerance, rtol=tolerance)
    out_RN.sum().backward()  # a gradient whose strides are all zero
    ones_RN = torch.ones(12, 16, dtype=dtype)
    dx_RK = grouped_mm_loop(ones_RN, w_EKN.detach().transpose(1, 2), ends_E)
    torch.testing.assert_close(x_RK.grad, dx_RK, atol=tolerance, rtol=tolerance)
    dw_EKN = grouped_wgrad_loop(x_RK.detach(), ones_RN, ends_E)
    torch.testing.assert_close(w_EKN.grad, dw_EKN, atol=tolerance, rtol=tolerance)
    assert not w_EKN.grad[1].any()


def test_a_dtype_without_a_kernel_is_refused():
    ends_E = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"no grouped product of torch\.float64 rows"):
        grouped_mm(torch.zeros(2, 4, dtype=torch.float64), torch.zeros(1, 4, 4, dtype=torch.float64), ends_E)
