"""Every tensor of a Llama 4 text model, and of a dense Llama: name, shape, orientation, and how it lies on disk.

One table. Reading and writing checkpoints (`model/checkpoint.py`), the stream to the engine, parameter groups, and the
counts that `pipeline/plan.py` prints all come from it. Imports nothing, so that a plan needs no torch.

Axes: V vocabulary, D hidden, Q query heads · head size, K key/value heads · head size, E experts, F expert width,
M width of a dense feed-forward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

Shape = tuple[int, ...]
Config = dict[str, Any]  # config.json, parsed

# output-major: [out, in], as in nn.Linear; input-major: [in, out]; lookup: a row per token; vector: norms and biases.
Orientation = Literal["output-major", "input-major", "lookup", "vector"]
Group = Literal["embedding", "attention", "router", "expert", "shared", "dense", "norm", "head"]


@dataclass(frozen=True, slots=True)
class Row:
    name: str  # in memory and in a llama4_text checkpoint; {layer} counts from 0
    axes: str  # outermost first
    orientation: Orientation
    group: Group
    layers: Literal["once", "all", "dense", "moe"]
    parts: tuple[str, ...] = ()  # the linear layers fused along a routed expert's last axis, in this order
    only_if: str = ""  # a config key that must be true
    not_if: str = ""  # a config key that must not be true


# fmt: off
EMBEDDING = (
    Row("model.embed_tokens.weight", "V D", "lookup", "embedding", "once"),
)
ATTENTION = (
    Row("model.layers.{layer}.self_attn.q_proj.weight", "Q D", "output-major", "attention", "all"),
    Row("model.layers.{layer}.self_attn.k_proj.weight", "K D", "output-major", "attention", "all"),
    Row("model.layers.{layer}.self_attn.v_proj.weight", "K D", "output-major", "attention", "all"),
    Row("model.layers.{layer}.self_attn.o_proj.weight", "D Q", "output-major", "attention", "all"),
    Row("model.layers.{layer}.self_attn.q_proj.bias", "Q", "vector", "attention", "all", only_if="attention_bias"),
    Row("model.layers.{layer}.self_attn.k_proj.bias", "K", "vector", "attention", "all", only_if="attention_bias"),
    Row("model.layers.{layer}.self_attn.v_proj.bias", "K", "vector", "attention", "all", only_if="attention_bias"),
    Row("model.layers.{layer}.self_attn.o_proj.bias", "D", "vector", "attention", "all", only_if="attention_bias"),
)
LLAMA4_FEED_FORWARD = (
    Row("model.layers.{layer}.feed_forward.router.weight", "E D", "output-major", "router", "moe"),
    Row("model.layers.{layer}.feed_forward.experts.gate_up_proj", "E D 2F", "input-major", "expert", "moe",
        parts=("gate_proj", "up_proj")),
    Row("model.layers.{layer}.feed_forward.experts.down_proj", "E F D", "input-major", "expert", "moe",
        parts=("down_proj",)),
    Row("model.layers.{layer}.feed_forward.shared_expert.gate_proj.weight", "F D", "output-major", "shared", "moe"),
    Row("model.layers.{layer}.feed_forward.shared_expert.up_proj.weight", "F D", "output-major", "shared", "moe"),
    Row("model.layers.{layer}.feed_forward.shared_expert.down_proj.weight", "D F", "output-major", "shared", "moe"),
    Row("model.layers.{layer}.feed_forward.gate_proj.weight", "M D", "output-major", "dense", "dense"),
    Row("model.layers.{layer}.feed_forward.up_proj.weight", "M D", "output-major", "dense", "dense"),
    Row("model.layers.{layer}.feed_forward.down_proj.weight", "D M", "output-major", "dense", "dense"),
)
LLAMA_FEED_FORWARD = (
    Row("model.layers.{layer}.mlp.gate_proj.weight", "M D", "output-major", "dense", "dense"),
    Row("model.layers.{layer}.mlp.up_proj.weight", "M D", "output-major", "dense", "dense"),
    Row("model.layers.{layer}.mlp.down_proj.weight", "D M", "output-major", "dense", "dense"),
    Row("model.layers.{layer}.mlp.gate_proj.bias", "M", "vector", "dense", "dense", only_if="mlp_bias"),
    Row("model.layers.{layer}.mlp.up_proj.bias", "M", "vector", "dense", "dense", only_if="mlp_bias"),
    Row("model.layers.{layer}.mlp.down_proj.bias", "D", "vector", "dense", "dense", only_if="mlp_bias"),
)
LAYER_NORMS = (
    Row("model.layers.{layer}.input_layernorm.weight", "D", "vector", "norm", "all"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", "D", "vector", "norm", "all"),
)
OUTPUT = (
    Row("model.norm.weight", "D", "vector", "norm", "once"),
    Row("lm_head.weight", "V D", "output-major", "head", "once", not_if="tie_word_embeddings"),
)
# fmt: on

TABLE = {
    "llama4_text": EMBEDDING + ATTENTION + LLAMA4_FEED_FORWARD + LAYER_NORMS + OUTPUT,
    "llama": EMBEDDING + ATTENTION + LLAMA_FEED_FORWARD + LAYER_NORMS + OUTPUT,
}


# --- parameters in memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of one model: a row of the table with numbers for its letters."""

    name: str
    shape: Shape
    row: Row
    layer: int | None

    @property
    def fan_in(self) -> int:
        """How many inputs one output sums over; 1 for a lookup and for a vector."""
        return {"output-major": self.shape[-1], "input-major": self.shape[-2:][0]}.get(self.row.orientation, 1)


def text_config(config: Config) -> Config:
    """The text model's part of a config.json: of the multimodal `llama4` its `text_config`, else the whole."""
    inner = config.get("text_config")
    return inner if config.get("model_type") == "llama4" and isinstance(inner, dict) else config


def parameters(config: Config) -> list[ParameterSpec]:
    """Every parameter of the text model behind a llama4, llama4_text or llama config, layer by layer.

    ValueError for another model_type, and where the config lacks or misstates a size.
    """
    config = text_config(config)
    kind = config.get("model_type")
    if kind not in TABLE:
        raise ValueError(f"model_type {kind!r} is not mapped; mapped are llama4, {', '.join(TABLE)}")
    try:
        return list(_parameters(config, TABLE[kind]))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json lacks or misstates {error}") from error


def _parameters(config: Config, table: tuple[Row, ...]) -> Iterator[ParameterSpec]:
    sizes, moe = _axis_sizes(config), set(moe_layers(config))
    present = [row for row in table if (not row.only_if or config.get(row.only_if)) and not config.get(row.not_if)]
    for once, rows in groupby(present, key=lambda row: row.layers == "once"):
        together = list(rows)
        for layer in [None] if once else range(config["num_hidden_layers"]):
            here = ("once",) if layer is None else ("all", "moe" if layer in moe else "dense")
            for row in together:
                if row.layers in here:
                    shape = tuple(_size(axis, sizes) for axis in row.axes.split())
                    yield ParameterSpec(row.name.format(layer=layer), shape, row, layer)


def _axis_sizes(config: Config) -> dict[str, int]:
    heads, kv_heads, head_dim = head_shape(config)
    sizes = {"V": config["vocab_size"], "D": config["hidden_size"], "Q": heads * head_dim, "K": kv_heads * head_dim}
    if config["model_type"] == "llama":
        return sizes | {"M": config["intermediate_size"]}
    experts = {"E": config["num_local_experts"], "F": config["intermediate_size"]}
    return sizes | experts | {"M": config["intermediate_size_mlp"]}


def _size(axis: str, sizes: dict[str, int]) -> int:
    """Size of an axis; that of `2F` is twice the size of F."""
    return int(axis[:-1] or 1) * sizes[axis[-1]]


def moe_layers(config: Config) -> list[int]:
    """Layers whose feed-forward is routed: those listed, or every `interleave_moe_layer_step`-th; none in a Llama."""
    if config["model_type"] == "llama":
        return []
    if config.get("moe_layers") is not None:
        return list(config["moe_layers"])
    step = config.get("interleave_moe_layer_step", 1)
    return list(range(step - 1, config["num_hidden_layers"], step))


def head_shape(config: Config) -> tuple[int, int, int]:
    """(query heads, key/value heads, head size)."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


# --- counts -------------------------------------------------------------------------------------------------------


def count_parameters(config: Config) -> int:
    """Number of parameters of the text model, tied embeddings counted once."""
    return sum(math.prod(spec.shape) for spec in parameters(config))


def count_active_parameters(config: Config) -> int:
    """Parameters that work on one token: all, with `num_experts_per_tok` of each layer's routed experts."""
    idle = 0
    for spec in parameters(config):
        if spec.row.group == "expert":
            experts = spec.shape[0]
            idle += math.prod(spec.shape) // experts * (experts - text_config(config).get("num_experts_per_tok", 1))
    return count_parameters(config) - idle


def count_lora_parameters(config: Config, rank: int, targets: list[str]) -> int:
    """Parameters of a LoRA on every linear layer whose last name is in `targets`: rank · (in + out) each."""
    wanted = tuple(f".{target}.weight" for target in targets)
    return sum(rank * sum(spec.shape) for spec in parameters(config) if spec.name.endswith(wanted))


def kv_bytes_per_token(config: Config, bytes_per_value: int) -> int:
    """Key and value of every layer for one token."""
    config = text_config(config)
    _, kv_heads, head_dim = head_shape(config)
    return 2 * config["num_hidden_layers"] * kv_heads * head_dim * bytes_per_value


# --- tensors on disk ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DiskFormat:
    """How a checkpoint names and cuts the text model's tensors. vLLM reads every one of these."""

    prefix: str = ""  # before every name
    fused_experts: bool = True  # else a gate, up and down matrix for each expert, output-major like any linear layer


LLAMA4_TEXT = DiskFormat()  # transformers' Llama4ForCausalLM
MULTIMODAL = DiskFormat(prefix="language_model.")  # the text part of Llama4ForConditionalGeneration
PER_EXPERT = DiskFormat(fused_experts=False)  # compressed-tensors; transformers does not read it
# The rest of a multimodal checkpoint. We neither train nor know these tensors: they pass through as they are.
NOT_TEXT = ("vision_model.", "multi_modal_projector.")
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor on disk: the whole of a parameter, or one linear layer of one routed expert."""

    name: str  # on disk
    shape: Shape  # on disk
    parameter: str  # the name in memory
    expert: int | None = None
    columns: tuple[int, int] = (0, 0)  # from, to on the last axis: the outputs of the expert's fused matrix

    def view(self, tensor: Any) -> Any:
        """This piece of the parameter `tensor`, in the shape it has on disk; a view, to be read or written."""
        return tensor if self.expert is None else tensor[self.expert, :, slice(*self.columns)].T


def pieces(spec: ParameterSpec, disk: DiskFormat) -> Iterator[Piece]:
    """The tensors on disk that together are one parameter."""
    if disk.fused_experts or not spec.row.parts:
        yield Piece(disk.prefix + spec.name, spec.shape, spec.name)
        return
    experts, fan_in, fused = spec.shape
    width, module = fused // len(spec.row.parts), spec.name.rpartition(".")[0]
    for expert in range(experts):
        for index, part in enumerate(spec.row.parts):
            name = f"{disk.prefix}{module}.{expert}.{part}.weight"
            yield Piece(name, (width, fan_in), spec.name, expert, (index * width, (index + 1) * width))


def format_of(names: Iterable[str]) -> DiskFormat:
    """The format of a checkpoint that holds tensors of these names."""
    names = list(names)
    multimodal = any(name.startswith(MULTIMODAL.prefix) for name in names)
    fused = not any(EXPERT_NUMBER.search(name) for name in names)
    return DiskFormat(MULTIMODAL.prefix if multimodal else "", fused)


def text_name(name: str) -> str | None:
    """What a text checkpoint calls a tensor of a multimodal one; None for a tensor of the vision part.

    >>> text_name("language_model.lm_head.weight"), text_name("multi_modal_projector.linear_1.weight")
    ('lm_head.weight', None)
    """
    return None if name.startswith(NOT_TEXT) else name.removeprefix(MULTIMODAL.prefix)
