"""A dense Llama checkpoint, read a layer at a time: what `model/upcycle.py` starts from.

Promises that a `DenseLlama` in hand is one that Llama 4 can express, with every tensor there and of the right shape.

Axes: B rows, S sequence, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from model.tensor_map import parameters
from model.weight_files import WeightsMismatch, check_tensors, stored_tensors

DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "llama3")  # those that transformers, vLLM and our model compute alike for Llama 4
CALIBRATION_ROWS, CALIBRATION_ROW_TOKENS = 16, 256


class UpcycleRefused(ValueError):
    """The source is no dense Llama that Llama 4 can express, or an argument is out of range: what was seen, and what is
    accepted."""


class DenseLlama:
    """The checkpoint to start from: its config, checked, and its tensors, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.config = dense_config(directory)
        self.stored = {name: tensor for name, tensor in stored_tensors(directory).items() if "rotary_emb" not in name}
        self._files = contextlib.ExitStack()
        self._file_of: dict[Path, Any] = {}
        if self.config.tie_word_embeddings and "lm_head.weight" in self.stored:
            # As transformers does it: a head beside the embedding is tied only if it is the same.
            same = torch.equal(self.read("lm_head.weight"), self.read("model.embed_tokens.weight"))
            self.config.tie_word_embeddings = same
            if same:
                del self.stored["lm_head.weight"]
        try:
            wanted = {spec.name: spec.shape for spec in parameters(self.config.to_dict())}
            check_tensors(wanted, {name: tensor.shape for name, tensor in self.stored.items()}, str(directory))
        except WeightsMismatch as error:
            raise UpcycleRefused(str(error)) from error
        self.dtype = self.read("model.norm.weight").dtype
        if str(self.dtype).removeprefix("torch.") not in DTYPES:
            raise UpcycleRefused(f"{directory}: weights are {self.dtype}; accepted are {', '.join(DTYPES)}")

    def read(self, name: str) -> torch.Tensor:
        file = self.stored[name].file
        if file not in self._file_of:
            self._file_of[file] = self._files.enter_context(safe_open(file, "pt"))
        return self._file_of[file].get_tensor(name)

    def read_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's tensors by their names within the layer."""
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): self.read(name) for name in self.stored if name.startswith(prefix)}

    def close(self) -> None:
        self._files.close()


def dense_config(directory: Path) -> LlamaConfig:
    """The config of a dense Llama; UpcycleRefused, with everything that stands against it, where it is none."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UpcycleRefused(f"{path} cannot be read ({error}); accepted is a Hugging Face directory") from error
    if raw.get("model_type") != "llama":
        raise UpcycleRefused(f"{path}: model_type is {raw.get('model_type')!r}; accepted is 'llama', a dense Llama")
    try:
        config = LlamaConfig.from_pretrained(directory, local_files_only=True)
    except (StrictDataclassError, ValueError) as error:
        raise UpcycleRefused(f"{path} is no config of a Llama: {error}") from error
    rope = config.rope_parameters
    checks = (
        ("attention_bias", config.attention_bias, not config.attention_bias, "false; vLLM's Llama 4 has no biases"),
        ("mlp_bias", config.mlp_bias, not config.mlp_bias, "false; Llama 4 has no biases"),
        ("hidden_act", config.hidden_act, config.hidden_act == "silu", "'silu'"),
        ("rope_type", rope["rope_type"], rope["rope_type"] in ROPE_TYPES, ", ".join(ROPE_TYPES)),
        ("partial_rotary_factor", rope.get("partial_rotary_factor"), rope.get("partial_rotary_factor", 1) == 1, "1"),
        ("quantization_config", raw.get("quantization_config"), not raw.get("quantization_config"),
         f"none, and weights in {', '.join(DTYPES)}"),
    )  # fmt: skip
    problems = [f"{key} is {seen!r}, accepted is {accepted}" for key, seen, is_fine, accepted in checks if not is_fine]
    if problems:
        raise UpcycleRefused(f"{path}: " + "; ".join(problems))
    return config


class CalibrationText:
    """A text on its way through the dense model, a layer at a time, in fp32: what the routers are going to see."""

    def __init__(self, source: Path, dense: DenseLlama, text: str) -> None:
        ids = AutoTokenizer.from_pretrained(source, local_files_only=True)(text)["input_ids"]
        rows = min(len(ids) // CALIBRATION_ROW_TOKENS, CALIBRATION_ROWS)
        if not rows:
            raise UpcycleRefused(
                f"the calibration text has {len(ids)} tokens; accepted are {CALIBRATION_ROW_TOKENS} or more"
            )
        self.num_tokens = rows * CALIBRATION_ROW_TOKENS
        ids_BS = torch.tensor(ids[: self.num_tokens]).view(rows, CALIBRATION_ROW_TOKENS)
        self.config = copy.deepcopy(dense.config)
        self.config._attn_implementation = "sdpa"
        self.x_BSD = dense.read("model.embed_tokens.weight")[ids_BS].float()
        self.rotation = LlamaRotaryEmbedding(self.config)(self.x_BSD, torch.arange(CALIBRATION_ROW_TOKENS).unsqueeze(0))

    @torch.no_grad()
    def through(self, layer: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Send the text through the next layer; returns what its feed-forward is given, [T, D]."""
        with torch.device("meta"):
            module = LlamaDecoderLayer(self.config, layer)
        module.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
        seen: list[torch.Tensor] = []
        module.post_attention_layernorm.register_forward_hook(lambda _, __, out: seen.append(out))
        self.x_BSD = module.eval()(self.x_BSD, position_embeddings=self.rotation)
        return seen[0].flatten(0, 1)
