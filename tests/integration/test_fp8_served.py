"""Does vLLM take an FP8 checkpoint for what it is? Its parser of the config is asked; the kernels need a GPU."""

import pytest
import torch
from transformers import Llama4TextConfig

from model.config import TinyShape, tiny
from model.fp8_export import quantization_config

SHAPE = TinyShape(num_layers=6)
LAYER = 3


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128"])
def test_vllm_reads_fp8_for_exactly_these_experts(recipe):
    """vLLM's own parser of the config, asked about every linear layer of the network."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = Llama4TextConfig(**tiny(SHAPE, vocab_size=32)).to_dict()
    theirs = CompressedTensorsConfig.from_config(quantization_config(config, (LAYER,), recipe))
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
