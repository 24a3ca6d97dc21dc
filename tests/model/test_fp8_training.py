"""Switching FP8 on for a model's experts; what it does to a step is in tests/rl/test_learner.py."""

import math
from typing import get_args

import pytest
import torch
from transformers import Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from model.fp8_gauges import TensorStats, worst_of
from model.fp8_training import Fp8Training
from model.kernels.quantise import quantise
from model.precision import Fp8Settings, Recipe, Scope
from model.transformer import MoeForCausalLM


def tiny_moe() -> MoeForCausalLM:
    """Random, with the MoE layers 1 and 3."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, intermediate_size_mlp=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=4, interleave_moe_layer_step=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    return MoeForCausalLM(config).train()


def pass_and_back(model: MoeForCausalLM) -> None:
    model(torch.randint(3, 32, (2, 9)), labels=torch.randint(3, 32, (2, 9))).loss.backward()


def test_a_model_without_a_layer_for_fp8_is_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="llama has no FP8 products"):
        Fp8Training(dense, Fp8Settings(), print)
    with pytest.raises(ValueError, match=r"fp8\.layers: \[2, 3\], but \[2\] have nothing .* are \[1, 3\]: name some"):
        Fp8Training(tiny_moe(), Fp8Settings(layers=(2, 3)), print)
    with pytest.raises(ValueError, match=r"fp8\.keep_first_and_last: true leaves no routed_experts .* layers \[1, 3\]"):
        Fp8Training(tiny_moe(), Fp8Settings(), print)


def test_gauges_and_what_engines_get_follow_the_chosen_layers():
    """Layer 3 is the last one, which keep_first_and_last would leave out."""
    model, settings = tiny_moe(), Fp8Settings(layers=(3,))
    fp8 = Fp8Training(model, settings, print)
    assert model.model.layers[1].feed_forward.experts.precision is None
    assert model.model.layers[3].feed_forward.experts.precision is settings
    pass_and_back(model)
    metrics = fp8.metrics()
    assert metrics["fp8/layers"] == 1.0 and metrics["fp8/layer3/gate_up.weight/snr_db"] > 25
    assert not any(key.startswith("fp8/layer1/") for key in metrics)

    exact = dict(model.named_parameters())
    served = dict(fp8.as_served(exact.items()))
    chosen = {f"model.layers.3.feed_forward.experts.{part}" for part in ("gate_up_proj", "down_proj")}
    assert {name for name in exact if not torch.equal(served[name], exact[name])} == chosen
    for name in chosen:
        assert torch.equal(served[name], quantise(exact[name].detach(), "row", axis=1).dequantise())


def test_the_scope_may_be_more_than_experts():
    model = tiny_moe()
    scope: tuple[Scope, ...] = ("routed_experts", "shared_expert", "dense_mlp", "attention_v_o")
    fp8 = Fp8Training(model, Fp8Settings(layers=(2, 3), scope=scope), print)
    pass_and_back(model)
    gauges = {key.removesuffix("/snr_db") for key, value in fp8.metrics().items() if key.endswith("snr_db")}
    attention = {f"self_attn.{part}_proj" for part in "vo"}
    mlp = {f"{part}_proj" for part in ("gate", "up", "down")}
    named = {f"layer2/{name}" for name in attention | mlp}
    named |= {f"layer3/{name}" for name in attention | {f"shared_expert.{part}" for part in mlp} | {"gate_up", "down"}}
    assert gauges == {f"fp8/{name}.{tensor}" for name in named for tensor in ("input", "weight", "gradient")}

    exact = dict(model.named_parameters())
    served = dict(fp8.as_served(exact.items()))
    rounded = {name for name in exact if not torch.equal(served[name], exact[name])}
    assert rounded == set(fp8.layer_of) and len(rounded) == 5 + 2 + 3 + 2
    v_proj = exact["model.layers.2.self_attn.v_proj.weight"].detach()
    stored = quantise(v_proj.T.unsqueeze(0), "row", axis=1).dequantise()[0].T
    assert torch.equal(served["model.layers.2.self_attn.v_proj.weight"], stored)

    fp8.give_back({2: "too coarse"})
    attention_of = [layer.self_attn for layer in model.model.layers]
    assert attention_of[2].v_proj.precision is None and attention_of[3].v_proj.precision is fp8.settings
    assert attention_of[3].q_proj.precision is None, "a softmax amplifies its errors, and nobody asked"


def test_a_layer_that_fp8_hurts_leaves_the_chosen_ones_only():
    model, said = tiny_moe(), []
    fp8 = Fp8Training(model, Fp8Settings(layers=(3,), min_snr_db=100.0), said.append)
    pass_and_back(model)
    fp8.metrics()
    assert fp8.layers == () and len(said) == 1 and said[0].startswith("layer 3 goes back to BF16")
    assert fp8.metrics() == {"fp8/layers": 0.0}
    exact = dict(model.named_parameters())
    assert all(torch.equal(tensor, exact[name]) for name, tensor in fp8.as_served(exact.items()))


def test_the_worst_of_several_trainers_counts():
    near = TensorStats(amax=1.0, saturation_share=0.0, underflow_share=0.2, snr_db=30.0)
    far = TensorStats(amax=2.0, saturation_share=0.1, underflow_share=0.1, snr_db=10.0)
    nothing = TensorStats(amax=math.inf, saturation_share=0.0, underflow_share=0.0, snr_db=math.nan)
    worst = worst_of([{"down.input": near, "gate_up.input": near}, {"down.input": far}])
    assert worst["down.input"] == TensorStats(amax=2.0, saturation_share=0.1, underflow_share=0.2, snr_db=10.0)
    assert worst["gate_up.input"] == near
    assert math.isnan(worst_of([{"x": near}, {"x": nothing}, {"x": far}])["x"].snr_db)


def test_two_trainers_leave_fp8_together():
    """The other one saw a bad layer 1: this one, whose own tensors are fine, leaves it too."""
    model = tiny_moe()
    bad = TensorStats(amax=1.0, saturation_share=0.0, underflow_share=0.9, snr_db=1.0)
    said: list[str] = []
    settings = Fp8Settings(keep_first_and_last=False)
    fp8 = Fp8Training(model, settings, said.append, gather=lambda own: [own, {1: {"down.input": bad}, 3: {}}])
    pass_and_back(model)
    metrics = fp8.metrics()
    assert fp8.layers == (3,) and len(said) == 1 and said[0].startswith("layer 1 goes back to BF16")
    assert metrics["fp8/layer1/down.input/snr_db"] == 1.0 and metrics["fp8/layer3/down.input/snr_db"] > 25
    assert model.model.layers[1].feed_forward.experts.precision is None
    assert model.model.layers[3].feed_forward.experts.precision is settings


@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_rounding_noise_gives_no_layer_back(recipe):
    """q's gradient at a document's first token is nought but for rounding, since its softmax has one key: stored as
    zero beside the others under one scale, it would be an error of the whole of itself."""
    model, said = tiny_moe(), []
    settings = Fp8Settings(recipe, keep_first_and_last=False, scope=get_args(Scope))
    fp8 = Fp8Training(model, settings, said.append)
    pass_and_back(model)
    assert fp8.metrics()["fp8/layers"] == 4 and said == []
