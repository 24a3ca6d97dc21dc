"""FP8 checkpoints against compressed-tensors' own decompression; vLLM's reading is in test_fp8_served.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4TextConfig

from model.config import TinyShape, tiny
from model.fp8_export import SERVED_AS, export_fp8
from model.kernels.quantise import quantise
from model.precision import Fp8Settings
from model.tensor_map import parameters

SHAPE = TinyShape(hidden_size=128, num_layers=6, num_heads=2, num_kv_heads=1, head_dim=16, expert_size=256,
                  dense_size=64, num_experts=4)  # fmt: skip
EVERYTHING = ("routed_experts", "shared_expert", "dense_mlp", "attention_v_o", "attention_q_k")
LAYER = 3  # of the MoE layers 1, 3, 5 the one that is neither first nor last
EXPERTS = f"model.layers.{LAYER}.feed_forward.experts"


@pytest.fixture
def checkpoint(tmp_path):
    """A random tiny Llama 4 in BF16, and its tensors."""
    config = Llama4TextConfig(**tiny(SHAPE, vocab_size=32)).to_dict()
    torch.manual_seed(0)
    weights = {spec.name: torch.randn(spec.shape).to(torch.bfloat16) for spec in parameters(config)}
    weights[f"{EXPERTS}.gate_up_proj"][1, 5, 300] = 100.0  # an outlier in one column of one expert's up projection
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source, weights


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128"])
def test_decompressed_by_compressed_tensors_are_the_weights_that_training_multiplies_by(tmp_path, checkpoint, recipe):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    source, weights = checkpoint
    sizes = export_fp8(source, tmp_path / "fp8", Fp8Settings(recipe=recipe))
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    arguments = QuantizationArgs(num_bits=8, type="float", **SERVED_AS[recipe][0])
    for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        whole = weights[f"{EXPERTS}.{fused}"].float()
        ours = quantise(whole, recipe, axis=1).dequantise()
        for expert in range(SHAPE.num_experts):
            for part, ours_KN in zip(parts, ours[expert].chunk(len(parts), dim=-1), strict=True):
                name = f"{EXPERTS}.{expert}.{part}.weight"
                assert stored[name].dtype == torch.float8_e4m3fn
                theirs_NK = dequantize(stored[name], stored[f"{name}_scale"], args=arguments, dtype=torch.float32)
                assert torch.equal(theirs_NK.T, ours_KN)
    assert sizes["bytes_after"] < sizes["bytes_before"]
    assert (tmp_path / "fp8" / "tokenizer.json").read_text() == "{}"


def test_what_stays_high_is_bit_for_bit_the_same(tmp_path, checkpoint):
    source, weights = checkpoint
    export_fp8(source, tmp_path / "fp8", Fp8Settings())
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    for name, tensor in weights.items():
        if ".experts." not in name:
            assert torch.equal(stored[name], tensor)
    first = weights["model.layers.1.feed_forward.experts.down_proj"]
    for expert in range(SHAPE.num_experts):  # the first MoE layer: cut per expert, not quantised
        assert torch.equal(stored[f"model.layers.1.feed_forward.experts.{expert}.down_proj.weight"], first[expert].T)


def test_exactly_the_chosen_layers_are_fp8_in_the_file_and_in_its_config(tmp_path, checkpoint):
    """The first and the last of the three MoE layers, which are left out unless they are named."""
    source, _ = checkpoint
    export_fp8(source, tmp_path / "fp8", Fp8Settings(layers=(5, 1)))
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    fp8 = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {int(name.split(".")[2]) for name in fp8} == {1, 5} and {f"{name}_scale" for name in fp8} <= stored.keys()
    assert len(fp8) == 2 * SHAPE.num_experts * 3
    ignored = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["ignore"]
    assert r"re:.*\.layers\.(0|2|3|4)\.feed_forward\.experts.*" in ignored
    assert r"re:.*\.self_attn\.[qk]_proj$" in ignored


@pytest.mark.parametrize("recipe", ["row", "block128"])
def test_linear_layers_are_those_of_training_too(tmp_path, checkpoint, recipe):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    source, weights = checkpoint
    if recipe == "block128":
        source, weights = wider(source, tmp_path)
    scope = EVERYTHING if recipe == "row" else EVERYTHING[:3]
    export_fp8(source, tmp_path / "fp8", Fp8Settings(recipe=recipe, scope=scope))
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    arguments = QuantizationArgs(num_bits=8, type="float", **SERVED_AS[recipe][0])
    low = {name for name in stored if f"{name}_scale" in stored and ".experts." not in name}
    attention = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (1, 2, 3, 4) for part in "qkvo"}
    parts = ("gate_proj", "up_proj", "down_proj")
    dense = {f"model.layers.2.feed_forward.{part}.weight" for part in parts}
    shared = {f"model.layers.3.feed_forward.shared_expert.{part}.weight" for part in parts}
    assert low == dense | shared | (attention if recipe == "row" else set())
    for name in low:
        theirs_NK = dequantize(stored[name], stored[f"{name}_scale"], args=arguments, dtype=torch.float32)
        ours_KN = quantise(weights[name].float().T.unsqueeze(0), recipe, axis=1).dequantise()[0]
        assert stored[name].dtype == torch.float8_e4m3fn and torch.equal(theirs_NK.T, ours_KN)


def wider(source, tmp_path):
    """The same with dense layers that blocks of 128 fit."""
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size_mlp": 256}
    weights = {spec.name: torch.randn(spec.shape).to(torch.bfloat16) for spec in parameters(config)}
    source = tmp_path / "wider"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source, weights


def test_what_vllm_would_serve_otherwise_than_it_was_trained_is_refused(tmp_path, checkpoint):
    for scope, recipe, message in (
        (("routed_experts", "attention_v_o"), "row", "scope attention_v_o alone can be trained, not served"),
        (("attention_q_k",), "row", "scope attention_q_k alone"),
        (("attention_q_k", "attention_v_o"), "block128", "block128 with scope attention_q_k .* leave attention out"),
        (("shared_expert",), "tensor", r"recipe tensor with model\.layers\.3\.feed_forward\.shared_expert\.gate_proj"),
        (("dense_mlp",), "block128", r"do not fit model\.layers\.2\.feed_forward\.gate_proj\.weight of 64 × 128"),
    ):
        with pytest.raises(ValueError, match=message):
            export_fp8(checkpoint[0], tmp_path / "fp8", Fp8Settings(recipe=recipe, scope=scope))


def test_a_multimodal_checkpoint_keeps_its_vision_part_and_its_text_part_is_that_of_the_text_alone(
    tmp_path, checkpoint
):
    source, weights = checkpoint
    vision = {
        "vision_model.model.layers.3.feed_forward.experts.weight": torch.randn(5, 7),  # whatever it is called
        "vision_model.class_embedding": torch.randn(3).half(),
        "multi_modal_projector.linear_1.weight": torch.randn(2, 3).to(torch.bfloat16),
    }
    text = json.loads((source / "config.json").read_text())
    whole = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 3}, "boi_token_index": 7}
    multimodal = tmp_path / "multimodal"
    multimodal.mkdir()
    (multimodal / "config.json").write_text(json.dumps(whole))
    (multimodal / "preprocessor_config.json").write_text('{"image_size": 8}')
    save_file(
        {f"language_model.{name}": tensor for name, tensor in weights.items()} | vision,
        multimodal / "model.safetensors",
    )
    export_fp8(multimodal, tmp_path / "fp8", Fp8Settings())
    export_fp8(source, tmp_path / "text-fp8", Fp8Settings())

    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    alone = load_file(tmp_path / "text-fp8" / "model.safetensors")
    wanted = {f"language_model.{name}": tensor for name, tensor in alone.items()} | vision
    assert stored.keys() == wanted.keys() and any(t.dtype == torch.float8_e4m3fn for t in alone.values())
    for name, tensor in wanted.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    quantised = json.loads((tmp_path / "text-fp8" / "config.json").read_text())["quantization_config"]
    assert config == whole | {"quantization_config": quantised}
    assert (tmp_path / "fp8" / "preprocessor_config.json").read_text() == '{"image_size": 8}'


def test_refusals_name_what_was_seen(tmp_path, checkpoint):
    source, _ = checkpoint
    config = json.loads((source / "config.json").read_text())
    for changes, recipe, message in (
        ({"model_type": "llama"}, "row", "source: scope: a llama has no FP8 products"),
        (
            {"moe_layers": [1, 3]},
            "row",
            r"source: keep_first_and_last: true leaves no routed_experts .* \[1, 3\]: name",
        ),
        ({"intermediate_size": 192}, "block128", r"do not fit \S+experts.gate_up_proj of 128 × 192"),
    ):
        (source / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            export_fp8(source, tmp_path / "fp8", Fp8Settings(recipe=recipe))
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"source: layers: \[4\], but \[4\] have nothing .* have are \[1, 3, 5\]"):
        export_fp8(source, tmp_path / "fp8", Fp8Settings(layers=(4,)))
