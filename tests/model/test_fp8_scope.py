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
            *(f"feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")),
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
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
    assert chosen(layers=(3, 4), scope=(*shared, "dense_mlp")).keys() == {3, 4}


@pytest.mark.parametrize(
    ("layers", "settings", "told"),
    [
        (
            4,
            {},
            r"keep_first_and_last: true leaves no routed_experts for FP8; this model has it in the layers \[1, 3\]: n",
        ),
        (4, {"scope": ("routed_experts", "attention_v_o")}, "keep_first_and_last: true leaves no routed_experts"),
        (
            6,
            {"layers": (2,), "scope": ("dense_mlp", "shared_expert")},
            r"layers: \[2\] leaves no shared_expert .* or leave",
        ),
    ],
)
def test_a_word_that_would_mean_nothing_is_refused(layers, settings, told):
    with pytest.raises(ValueError, match=told):
        fp8_parameters(tiny(TinyShape(num_layers=layers)), Fp8Settings(**settings))


def test_a_model_without_such_a_part_is_told_what_it_has():
    all_moe = CONFIG | {"interleave_moe_layer_step": 1, "moe_layers": list(range(6))}
    with pytest.raises(ValueError, match="^scope: this model has no dense_mlp; it has attention_q_k, attention_v_o, "):
        fp8_parameters(all_moe, Fp8Settings(scope=("routed_experts", "dense_mlp"), keep_first_and_last=False))
    with pytest.raises(ValueError, match="^scope: a llama has no FP8 products"):
        fp8_parameters({"model_type": "llama"}, Fp8Settings())
