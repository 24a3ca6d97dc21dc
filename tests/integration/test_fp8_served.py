"""Does vLLM take an FP8 checkpoint for what it is? Its parser of the config is asked, and its loader is given the file;
no engine is started. Not asked: its FP8 kernels, which need a GPU.
"""

import dataclasses
import json
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4TextConfig
from vllm_checkpoints import save_multimodal
from vllm_loader import loaded_by_vllm

from model.config import TinyShape, tiny
from model.fp8_export import export_fp8, quantization_config
from model.fp8_scope import fp8_parameters
from model.kernels.quantise import quantise
from model.precision import Fp8Settings
from model.tensor_map import MULTIMODAL, NOT_TEXT, parameters

SHAPE = TinyShape(hidden_size=128, num_layers=6, num_heads=2, num_kv_heads=1, head_dim=32, expert_size=256,
                  dense_size=64, num_experts=4)  # fmt: skip
MOE_LAYERS = (1, 3, 5)
LAYER = 3


EVERYTHING = ("routed_experts", "shared_expert", "dense_mlp", "attention_v_o", "attention_q_k")
# What vLLM keeps as one matrix: what it belongs to, in which layers it is, and of which of ours it is made.
MATRICES = {
    "self_attn.qkv_proj": ("attention", range(6), [f"self_attn.{part}_proj" for part in "qkv"]),
    "self_attn.o_proj": ("attention", range(6), ["self_attn.o_proj"]),
    "feed_forward.gate_up_proj": ("dense", (0, 2, 4), [f"feed_forward.{part}_proj" for part in ("gate", "up")]),
    "feed_forward.down_proj": ("dense", (0, 2, 4), ["feed_forward.down_proj"]),
    "feed_forward.shared_expert.gate_up_proj": (
        "shared", MOE_LAYERS, [f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up")]
    ),
    "feed_forward.shared_expert.down_proj": ("shared", MOE_LAYERS, ["feed_forward.shared_expert.down_proj"]),
}  # fmt: skip


def save_random(directory, shape=SHAPE):
    """A tiny Llama 4 in BF16; returns its tensors."""
    config = Llama4TextConfig(**tiny(shape, vocab_size=64)).to_dict() | {"architectures": ["Llama4ForCausalLM"]}
    torch.manual_seed(0)
    weights = {spec.name: torch.randn(spec.shape).to(torch.bfloat16) for spec in parameters(config)}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights


def dequantised(weight_ENK, scale):
    """A parameter of vLLM's FP8 experts times its scale, which stands for a whole matrix, a row or a block."""
    scale = scale.reshape(len(weight_ENK), -1, scale.shape[2] if scale.ndim == 3 else 1)
    for axis in (1, 2):
        scale = scale.repeat_interleave(weight_ENK.shape[axis] // scale.shape[axis], axis)
    return weight_ENK.float() * scale


@pytest.mark.parametrize(("recipe", "layers"), [("tensor", None), ("row", None), ("block128", None), ("row", (1, 5))])
def test_the_loader_of_vllm_puts_every_tensor_where_its_fp8_experts_read_it(tmp_path, recipe, layers):
    weights = save_random(tmp_path / "source")
    export_fp8(tmp_path / "source", tmp_path / "fp8", Fp8Settings(recipe=recipe, layers=layers))
    loaded = loaded_by_vllm(tmp_path / "fp8", tmp_path)
    for layer in MOE_LAYERS:
        ours, theirs = f"model.layers.{layer}.feed_forward", f"model.layers.{layer}.feed_forward.experts.routed_experts"
        assert torch.equal(loaded[f"{ours}.router.weight"], weights[f"{ours}.router.weight"])
        for fused, name in (("gate_up_proj", "w13_weight"), ("down_proj", "w2_weight")):
            whole_EKN = weights[f"{ours}.experts.{fused}"]
            stored_ENK = loaded[f"{theirs}.{name}"]
            if layer in (layers or (LAYER,)):
                assert stored_ENK.dtype == torch.float8_e4m3fn
                multiplied_EKN = quantise(whole_EKN.float(), recipe, axis=1).dequantise()
                stored_ENK = dequantised(stored_ENK, loaded[f"{theirs}.{name}_scale"])
                assert torch.equal(stored_ENK, multiplied_EKN.transpose(1, 2))
            else:
                assert f"{theirs}.{name}_scale" not in loaded
                assert torch.equal(stored_ENK, whole_EKN.transpose(1, 2))


def reordered(weight_NK, heads):
    """vLLM turns the two halves of a head, Llama 4 every second number: rows are put in vLLM's order."""
    return weight_NK.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight_NK.shape)


@pytest.mark.parametrize(("recipe", "scope"), [("row", EVERYTHING), ("block128", EVERYTHING[:3])])
def test_the_loader_of_vllm_puts_linear_layers_of_the_scope_where_its_fp8_layers_read_them(
    tmp_path, recipe, scope, monkeypatch
):
    """As `keep_first_and_last` says: attention of layers 1 to 4, the dense layer 2, the shared expert of 3.

    vLLM looks for a kernel when it makes a layer, and has none for these on a CPU."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8

    monkeypatch.setattr(compressed_tensors_w8a8_fp8, "init_fp8_linear_kernel", Mock())
    weights = save_random(tmp_path / "source", dataclasses.replace(SHAPE, head_dim=128, dense_size=256))
    export_fp8(tmp_path / "source", tmp_path / "fp8", Fp8Settings(recipe=recipe, scope=scope))
    loaded = loaded_by_vllm(tmp_path / "fp8", tmp_path)
    low = {"attention": (1, 2, 3, 4) if "attention_q_k" in scope else (), "shared": (3,), "dense": (2,)}
    heads = {"q_proj": SHAPE.num_heads, "k_proj": SHAPE.num_kv_heads}
    found = 0
    for theirs, (group, layers, parts) in MATRICES.items():
        for layer in layers:
            expected = []
            for part in parts:
                weight_NK = weights[f"model.layers.{layer}.{part}.weight"]
                if layer in low[group]:
                    weight_NK = quantise(weight_NK.float().T.unsqueeze(0), recipe, axis=1).dequantise()[0].T
                name = part.rpartition(".")[2]
                expected.append(reordered(weight_NK, heads[name]) if name in heads else weight_NK)
            stored_NK = loaded[f"model.layers.{layer}.{theirs}.weight"]
            assert (stored_NK.dtype == torch.float8_e4m3fn) == (layer in low[group]), (layer, theirs)
            if layer in low[group]:
                scale = loaded[f"model.layers.{layer}.{theirs}.weight_scale"]
                stored_NK = dequantised(stored_NK.unsqueeze(0), scale.unsqueeze(0))[0]
                found += 1
            assert torch.equal(stored_NK, torch.cat(expected)), (layer, theirs)
    assert found == 2 * sum(map(len, low.values()))


@pytest.mark.parametrize("with_vision", [True, False], ids=["vLLM's own class", "our engines' class"])
def test_a_multimodal_checkpoint_lands_whole_in_vllms_own_class_and_its_text_in_our_engines(tmp_path, with_vision):
    source = save_multimodal(tmp_path / "source", seed=0)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    export_fp8(source, tmp_path / "fp8", Fp8Settings(layers=(LAYER,)))
    loaded = loaded_by_vllm(tmp_path / "fp8", tmp_path, with_vision=with_vision)
    for layer in (1, LAYER):
        ours = f"{MULTIMODAL.prefix}model.layers.{layer}.feed_forward.experts"
        theirs = f"{ours if with_vision else ours.removeprefix(MULTIMODAL.prefix)}.routed_experts"
        for fused, name in (("gate_up_proj", "w13_weight"), ("down_proj", "w2_weight")):
            whole_EKN, stored_ENK = weights[f"{ours}.{fused}"], loaded[f"{theirs}.{name}"]
            assert (stored_ENK.dtype == torch.float8_e4m3fn) == (layer == LAYER)
            if layer == LAYER:
                whole_EKN = quantise(whole_EKN.float(), "row", axis=1).dequantise()
                stored_ENK = dequantised(stored_ENK, loaded[f"{theirs}.{name}_scale"])
            assert torch.equal(stored_ENK, whole_EKN.transpose(1, 2))
    vision = {name: tensor for name, tensor in weights.items() if name.startswith(NOT_TEXT)}
    for name in [name for name in vision if ".q_proj." in name]:  # vLLM keeps the three as one
        parts = [vision.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        vision[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    assert {name for name in loaded if name.startswith(NOT_TEXT)} == (vision.keys() if with_vision else set())
    assert not with_vision or all(torch.equal(loaded[name], tensor) for name, tensor in vision.items())


def test_the_loader_of_vllm_misses_a_scale_and_refuses_a_name_of_another_format(tmp_path):
    """What the test above rests on."""
    save_random(tmp_path / "source")
    export_fp8(tmp_path / "source", tmp_path / "fp8", Fp8Settings())
    file = tmp_path / "fp8" / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is written over
    scales = [name for name in stored if name.endswith("_scale")]
    save_file({name: tensor for name, tensor in stored.items() if name not in scales}, file)
    with pytest.raises(ValueError, match=r"not initialized.*layers\.3\.feed_forward\.experts.*_weight_scale"):
        loaded_by_vllm(tmp_path / "fp8", tmp_path)
    save_file({name.replace("weight_scale", "weight_scale_inv"): tensor for name, tensor in stored.items()}, file)
    with pytest.raises(KeyError, match="weight_scale_inv"):
        loaded_by_vllm(tmp_path / "fp8", tmp_path)


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128"])
def test_vllm_reads_fp8_for_exactly_these_experts(recipe):
    """vLLM's own parser of the config, asked about every linear layer of the network."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = Llama4TextConfig(**tiny(SHAPE, vocab_size=32)).to_dict()
    chosen = fp8_parameters(config, Fp8Settings(layers=(LAYER,)))
    theirs = CompressedTensorsConfig.from_config(quantization_config(config, chosen, recipe))
    linear = torch.nn.Linear(1, 1)
    for layer in range(SHAPE.num_layers):
        for expert_part in ("gate_proj", "up_proj", "down_proj"):
            if layer % 2:
                name = f"model.layers.{layer}.feed_forward.experts.0.{expert_part}"
                scheme = theirs.get_scheme_dict(linear, name)
                assert (scheme is not None) == (layer == LAYER), name
                if scheme is not None:
                    assert theirs._is_fp8_w8a8(scheme["weights"], scheme["input_activations"])
            inner = "shared_expert." if layer % 2 else ""
            assert theirs.get_scheme_dict(linear, f"model.layers.{layer}.feed_forward.{inner}{expert_part}") is None
        for part in ("self_attn.q_proj", "self_attn.o_proj", *(["feed_forward.router"] if layer % 2 else [])):
            assert theirs.get_scheme_dict(linear, f"model.layers.{layer}.{part}") is None
    for name in ("lm_head", "language_model.lm_head", "vision_model.model.layers.0.self_attn.q_proj",
                 "multi_modal_projector.linear_1", "language_model.model.layers.0.feed_forward.up_proj"):  # fmt: skip
        assert theirs.get_scheme_dict(linear, name) is None
