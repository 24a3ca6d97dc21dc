"""The routed-experts layer against transformers' own, which runs every expert on every token."""

import pytest
import torch
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from model.moe_layer import RoutedMoe


def layers(top_k=1):
    config = Llama4TextConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=top_k, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = Llama4TextMoe(config)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    routed = Llama4TextMoe(config)
    routed.load_state_dict(reference.state_dict())
    routed.__class__ = RoutedMoe
    return reference, routed


@pytest.mark.parametrize("top_k", [1, 2])
def test_output_and_gradients_equal_the_reference(top_k):
    reference, routed = layers(top_k)
    x = torch.randn(3, 7, 16)
    results = []
    for layer in (reference, routed):
        inputs = x.clone().requires_grad_()
        out, logits = layer(inputs)
        out.square().sum().backward()
        results.append((out, logits, inputs.grad, {name: p.grad for name, p in layer.named_parameters()}))
    for wanted, got in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    for name, gradient in results[0][3].items():
        torch.testing.assert_close(results[1][3][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_all_tokens_on_one_expert_and_none_on_the_others():
    reference, routed = layers()
    with torch.no_grad():
        for layer in (reference, routed):
            layer.router.weight.zero_()
            layer.router.weight[2] = 1.0
    x = torch.rand(1, 5, 16)  # positive: expert 2 wins everywhere
    torch.testing.assert_close(routed(x)[0], reference(x)[0], atol=1e-5, rtol=1e-4)


def test_scaling_the_output_instead_of_the_input_would_be_seen():
    reference, routed = layers()
    x = torch.randn(1, 6, 16)
    scores, logits = routed.router(x[0])
    chosen = logits.argmax(-1, keepdim=True)
    unscaled = torch.stack([
        (lambda gate, up: (routed.experts.act_fn(gate) * up) @ routed.experts.down_proj[e])(
            *(row @ routed.experts.gate_up_proj[e]).chunk(2)
        )
        for row, e in zip(x[0], chosen[:, 0], strict=True)
    ])
    tempting = routed.shared_expert(x[0]) + unscaled * scores.gather(1, chosen)
    assert (tempting - reference(x)[0]).abs().max() > 1e-2
