"""Tiny random checkpoints of two kinds, for tests that need a policy and not a good one."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS = ["What is 7 + 5 - 3?", "7 + 5 = 12. 12 - 3 = 9.", "Answer: 9", "def f(x):\n    return x + 1"]
KINDS = ("llama4", "dense")


def save_tiny(kind: str, directory: Path, seed: int = 0) -> Path:
    """A complete Hugging Face directory: Llama 4 MoE in float32, or a dense Llama in bfloat16 with tied embeddings."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

    from model.tokenizer import build_tokenizer

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(TEXTS, vocab_size=300)
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if kind == "llama4":
        config = Llama4TextConfig(
            **shape, intermediate_size=32, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
            interleave_moe_layer_step=2, attention_chunk_size=32, use_qk_norm=True, no_rope_layer_interval=4,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = Llama4ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64, tie_word_embeddings=True)).bfloat16()
    for parameter in model.parameters():  # std .02 is nearly uniform output: a weak test
        if parameter.dim() > 1:
            parameter.data.mul_(5.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load_plain(directory: Path):
    """The checkpoint through plain transformers, in float32, with nothing missing and nothing left over."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def config_of(directory: Path) -> dict:
    """config.json without the two keys that `load_policy` sets for the trainers."""
    config = json.loads((directory / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in ("num_experts", "use_cache")}
