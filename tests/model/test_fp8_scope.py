"""Which parameters the settings mean, read off a hand-written list."""

import pytest

from model.config import TinyShape, tiny
from model.fp8_scope import fp8_parameters
from model.precision import Fp8Settings

CONFIG = tiny(TinyShape(num_layers=6))  # MoE layers 1, 3, 5
EVERYTHING = ("routed_experts", "shared_expert", "dense_mlp", "attention_v_o", "attention_q_k")


def chosen(**settings):
    """`{layer: names within the layer}`"""
    found = {}
    for spec in fp8_parameters(CONFIG, Fp8Settings(**settings)):
        found.setdefault(spec.layer, []).append(spec.name.removeprefix(f"model.layers.{spec.layer}."))
    return found


def test_by_default_the_routed_experts_of_all_moe_layers_but_the_first_and_the_last():
    experts = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    assert chosen() == {3: experts}
    assert chosen(keep_first_and_last=False) == dict.fromkeys((1, 3, 5), experts)
    assert chosen(layers=(5, 1)) == dict.fromkeys((1, 5), experts), "the last one too, since it is named"


def test_of_each_part_its_own_first_and_last_layer_stay_high():
    assert chosen(scope=("dense_mlp", "attention_v_o")) == {
        1: ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
        2: [
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            *(f"feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")),
        ],
        3: ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
        4: ["self_attn.v_proj.weight", "self_attn.o_proj.weight"],
    }


def test_router_head_and_norms_are_in_no_scope():
    names = {name for names in chosen(scope=EVERYTHING, keep_first_and_last=False).values() for name in names}
    shared = {f"feed_forward.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")}
    dense = {f"feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")}
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    assert names == shared | dense | attention | {f"feed_forward.experts.{part}_proj" for part in ("gate_up", "down")}
    biased = CONFIG | {"attention_bias": True}
    settings = Fp8Settings(scope=EVERYTHING, keep_first_and_last=False)
    assert not [spec.name for spec in fp8_parameters(biased, settings) if spec.name.endswith("bias")]


def test_a_named_layer_must_have_something_of_the_scope():
    shared = ("routed_experts", "shared_expert")
    told = (
        r"\[3, 4\], but \[4\] have nothing of the scope routed_experts, shared_expert; layers that have are \[1, 3, 5\]"
    )
    with pytest.raises(ValueError, match=told):
        chosen(layers=(3, 4), scope=shared)
    assert chosen(layers=(4,), scope=(*shared, "dense_mlp")).keys() == {4}
    two = tiny(TinyShape(num_layers=4))
    assert fp8_parameters(two, Fp8Settings()) == [], "its two MoE layers are the first and the last"
