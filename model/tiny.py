"""A randomly initialised Llama 4 text model small enough to train on a CPU: what `bootstrap` starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerBase

from model.moe_layer import use_routed_experts


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """The sizes of a tiny model; each is described on its field of `BootstrapStage` in pipeline/config.py."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    expert_size: int = 256
    dense_size: int = 512
    num_experts: int = 8
    attention_chunk: int = 256
    max_positions: int = 512


def tiny_llama4(shape: TinyShape, tokenizer: PreTrainedTokenizerBase) -> Llama4ForCausalLM:
    """Interleaved dense and MoE layers, top-1 routing with a shared expert, a NoPE layer every 4th, chunked attention,
    QK norm. Matrices start at 1/sqrt(fan-in), those that write into the residual stream at half of it."""
    config = Llama4TextConfig(
        vocab_size=len(tokenizer), hidden_size=shape.hidden_size, intermediate_size=shape.expert_size,
        intermediate_size_mlp=shape.dense_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        num_local_experts=shape.num_experts, num_experts_per_tok=1, interleave_moe_layer_step=2, use_qk_norm=True,
        no_rope_layer_interval=4, attention_chunk_size=shape.attention_chunk,
        max_position_embeddings=shape.max_positions, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        router_aux_loss_coef=0.0, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = Llama4ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "embed_tokens" in name:
                continue
            fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]  # experts are input-major
            writes_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
            parameter.normal_(0.0, (0.5 if writes_residual else 1.0) / math.sqrt(fan_in))
    use_routed_experts(model)
    return model
