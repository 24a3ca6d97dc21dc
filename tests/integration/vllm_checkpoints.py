"""Random checkpoints small enough to start an engine on in seconds, with head sizes that vLLM has CPU kernels for."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, intermediate_size_mlp=128, num_hidden_layers=4,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=8, num_experts_per_tok=1,
    interleave_moe_layer_step=2, max_position_embeddings=512, attention_chunk_size=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
    vision_output_dim=24, projector_input_dim=24, projector_output_dim=24,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)  # fmt: skip


def save_llama4(directory: Path, seed: int) -> Path:
    """A Llama 4 mixture of experts, 4 layers (2 of them MoE, 1 without RoPE), attention in chunks of 64 tokens."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(seed)
    return _save(Llama4ForCausalLM(Llama4TextConfig(**TEXT)), directory)


def save_multimodal(directory: Path, seed: int) -> Path:
    """The same as the text part of a multimodal Llama 4, with a vision part of one layer and a tokenizer."""
    import torch
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    from model.tokenizer import build_tokenizer

    torch.manual_seed(seed)
    config = Llama4Config(text_config=TEXT, vision_config=VISION, boi_token_index=7)
    build_tokenizer(["What is 7 + 5 - 3?", "Answer: 9"], vocab_size=300).save_pretrained(directory)
    return _save(Llama4ForConditionalGeneration(config), directory)


def save_dense(directory: Path, seed: int) -> Path:
    """A dense Llama with tied embeddings, as SmolLM2 has: its file holds no lm_head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return _save(LlamaForCausalLM(config), directory)


def _save(model, directory: Path) -> Path:
    for parameter in model.parameters():  # the usual std of .02 gives a nearly uniform output: a weak test
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    model.save_pretrained(directory)
    return directory
