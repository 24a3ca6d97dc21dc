"""The one table of tensors against the real model classes, and its pieces against slices cut by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from model.config import SMOLLM2_CONFIG, tiny
from model.tensor_map import (
    LLAMA4_TEXT,
    MULTIMODAL,
    PER_EXPERT,
    DiskFormat,
    count_active_parameters,
    count_lora_parameters,
    count_parameters,
    format_of,
    kv_bytes_per_token,
    parameters,
    pieces,
    text_name,
)

TINY_LLAMA4 = {
    "model_type": "llama4_text",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "interleave_moe_layer_step": 2,
    "tie_word_embeddings": False,
}
TINY_LLAMA = SMOLLM2_CONFIG | {"vocab_size": 100, "num_hidden_layers": 2}
GATE_UP = "model.layers.1.feed_forward.experts.gate_up_proj"
DOWN = "model.layers.1.feed_forward.experts.down_proj"


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in parameters(config)}


@pytest.mark.parametrize(
    "config",
    [
        TINY_LLAMA4,
        TINY_LLAMA4 | {"moe_layers": [0, 3], "attention_bias": True},
        TINY_LLAMA4 | {"moe_layers": [], "tie_word_embeddings": True},
        TINY_LLAMA,
        TINY_LLAMA | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ],
)
def test_names_and_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_the_multimodal_config_is_counted_by_its_text_part() -> None:
    assert shapes({"model_type": "llama4", "text_config": TINY_LLAMA4}) == shapes(TINY_LLAMA4)


def test_parameters_of_smollm2_are_the_published_number() -> None:
    assert count_parameters(SMOLLM2_CONFIG) == 134_515_008


def test_parameters_counted_by_hand() -> None:
    attention = 64 * 64 + 2 * 32 * 64 + 64 * 64
    dense, shared = 3 * 64 * 128, 3 * 64 * 96
    experts, router = 8 * 3 * 64 * 96, 8 * 64
    layers = 4 * (attention + 2 * 64) + 2 * dense + 2 * (experts + router + shared)
    assert count_parameters(TINY_LLAMA4) == 2 * 320 * 64 + layers + 64
    assert count_active_parameters(TINY_LLAMA4) == count_parameters(TINY_LLAMA4) - 2 * 7 * 3 * 64 * 96
    assert count_active_parameters(TINY_LLAMA) == count_parameters(TINY_LLAMA)


def test_lora_counted_by_hand() -> None:
    q, k = 64 + 64, 64 + 32
    assert count_lora_parameters(TINY_LLAMA4, 8, ["q_proj", "k_proj"]) == 4 * 8 * (q + k)
    dense, shared = 3 * (64 + 128), 3 * (64 + 96)  # routed experts are parameters, no linear layers: not adapted
    assert count_lora_parameters(TINY_LLAMA4, 8, ["gate_proj", "up_proj", "down_proj"]) == 8 * 2 * (dense + shared)


def test_cache_of_one_token() -> None:
    assert kv_bytes_per_token(TINY_LLAMA4, 4) == 2 * 4 * 2 * 16 * 4


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "gpt2"}, {"model_type": "llama"}, TINY_LLAMA | {"num_hidden_layers": "x"}]
)
def test_config_that_cannot_be_counted_is_a_value_error(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        count_parameters(config)


def test_fan_in_follows_the_orientation() -> None:
    fan_in = {spec.name.removeprefix("model.layers.1."): spec.fan_in for spec in parameters(TINY_LLAMA4)}
    assert fan_in["self_attn.k_proj.weight"] == 64  # [32, 64], output-major
    assert fan_in["feed_forward.experts.gate_up_proj"] == 64  # [8, 64, 192], input-major
    assert fan_in["feed_forward.experts.down_proj"] == 96
    assert fan_in["feed_forward.shared_expert.down_proj.weight"] == 96
    assert fan_in["model.embed_tokens.weight"] == fan_in["model.norm.weight"] == 1
    assert fan_in["lm_head.weight"] == 64


def test_every_group_of_parameters_is_told_apart() -> None:
    groups = Counter(spec.row.group for spec in parameters(TINY_LLAMA4))
    assert groups == {
        "embedding": 1, "head": 1, "attention": 4 * 4, "norm": 4 * 2 + 1, "router": 2, "expert": 4, "shared": 6,
        "dense": 6,
    }  # fmt: skip
    assert {spec.layer for spec in parameters(TINY_LLAMA4) if spec.row.group == "router"} == {1, 3}


def test_an_expert_is_cut_into_gate_up_and_down_as_by_hand() -> None:
    specs = {spec.name: spec for spec in parameters(TINY_LLAMA4)}
    gate_up, down = torch.randn(specs[GATE_UP].shape), torch.randn(specs[DOWN].shape)
    cut = {piece.name: (piece, piece.view(gate_up)) for piece in pieces(specs[GATE_UP], PER_EXPERT)}
    cut |= {piece.name: (piece, piece.view(down)) for piece in pieces(specs[DOWN], PER_EXPERT)}
    assert len(cut) == 8 * 3
    prefix = "model.layers.1.feed_forward.experts.5"
    by_hand = {"gate_proj": gate_up[5][:, :96].T, "up_proj": gate_up[5][:, 96:].T, "down_proj": down[5].T}
    for part, wanted in by_hand.items():
        piece, tensor = cut[f"{prefix}.{part}.weight"]
        assert torch.equal(tensor, wanted) and piece.shape == wanted.shape
        # Output-major, like any linear layer: x · Wᵀ is what the fused matrix gives in its columns.
        x = torch.randn(3, wanted.shape[1])
        torch.testing.assert_close(torch.nn.functional.linear(x, tensor), x @ wanted.T)
    assert not torch.equal(cut[f"{prefix}.gate_proj.weight"][1], by_hand["up_proj"])


@pytest.mark.parametrize("disk", [LLAMA4_TEXT, MULTIMODAL, PER_EXPERT, DiskFormat("language_model.", False)])
def test_the_pieces_cover_every_value_once_and_tell_their_format(disk: DiskFormat) -> None:
    names = []
    for spec in parameters(tiny()):
        counts = torch.zeros(spec.shape, dtype=torch.int8)
        for piece in pieces(spec, disk):
            view = piece.view(counts)
            assert view.shape == piece.shape and piece.parameter == spec.name
            view += 1
            names.append(piece.name)
        assert counts.min() == counts.max() == 1, spec.name
    assert len(set(names)) == len(names)
    assert format_of(names) == disk


def test_values_on_disk_are_as_many_as_in_memory() -> None:
    for disk in (MULTIMODAL, PER_EXPERT):
        on_disk = sum(math.prod(piece.shape) for spec in parameters(tiny()) for piece in pieces(spec, disk))
        assert on_disk == count_parameters(tiny())


def test_the_text_of_a_multimodal_checkpoint_goes_by_the_names_of_a_text_checkpoint() -> None:
    names = {disk: [piece.name for spec in parameters(tiny()) for piece in pieces(spec, disk)]
             for disk in (LLAMA4_TEXT, MULTIMODAL)}  # fmt: skip
    assert [text_name(name) for name in names[MULTIMODAL]] == names[LLAMA4_TEXT]
    assert [text_name(name) for name in names[LLAMA4_TEXT]] == names[LLAMA4_TEXT]
    assert text_name("vision_model.model.layers.0.mlp.fc1.bias") is None
    assert text_name("multi_modal_projector.linear_1.weight") is None
    assert text_name("language_model.model.vision_model.weight") == "model.vision_model.weight"  # only in front
