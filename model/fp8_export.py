"""A checkpoint whose routed experts, or more, are FP8, as vLLM serves it on GPUs: compressed-tensors, one matrix an
expert.

Weights and scales are those that training with the same recipe multiplies by; activations are quantised by the engine,
as they come. Tested on a CPU: compressed-tensors decompresses the file to the weights of training, and vLLM's loader
puts every tensor, of a text model and of a multimodal one, where its FP8 layers read it
(`tests/integration/test_fp8_served.py`). Not tested: vLLM's FP8 kernels, which need a GPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from model.fp8_scope import fp8_parameters, scope_of
from model.kernels.quantise import TILE, Quantised, input_major, quantise
from model.precision import Fp8Settings, Recipe, Scope
from model.tensor_map import (
    MULTIMODAL,
    NOT_TEXT,
    Config,
    DiskFormat,
    ParameterSpec,
    parameters,
    pieces,
    text_config,
)
from model.weight_files import NamedTensor, passed_through, read_pieces, write_shards

MAX_SHARD_BYTES = 5 * 2**30
SERVED_AS: dict[Recipe, tuple[dict[str, Any], dict[str, Any]]] = {  # how compressed-tensors calls the recipes
    "tensor": ({"strategy": "tensor"}, {"strategy": "tensor"}),
    "row": ({"strategy": "channel"}, {"strategy": "token"}),
    "block128": (
        {"strategy": "block", "block_structure": [TILE, TILE]},
        {"strategy": "group", "group_size": TILE},
    ),
}


# The linear layers that a word of `fp8.scope` means, below `layers.N.`, as regular expressions.
MODULES: dict[Scope, str] = {
    "routed_experts": r"feed_forward\.experts.*",
    "shared_expert": r"feed_forward\.shared_expert\..*",
    "dense_mlp": r"feed_forward\.\w+_proj$",
    "attention_v_o": r"self_attn\.[vo]_proj$",
    "attention_q_k": r"self_attn\.[qk]_proj$",
}


def export_fp8(
    source: Path, target: Path, settings: Fp8Settings, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, int]:
    """Write `source`, a Llama 4 in BF16 or fp32, to `target` in FP8 where the settings say; returns bytes before and
    after.

    `progress(done, total)` counts parameters. ValueError where there is nothing to quantise, where the source is no
    Llama 4 with fused experts or has not what the settings name, where blocks of 128 would straddle two
    projections, or where vLLM would refuse them or serve other weights.
    """
    config: Config = json.loads((source / "config.json").read_text())
    multimodal = config.get("model_type") == "llama4"
    text = text_config(config)
    try:
        specs = fp8_parameters(text, settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    _check_served(source, specs, settings)
    disk = DiskFormat(MULTIMODAL.prefix if multimodal else "", fused_experts=False)
    target.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(source, text, multimodal, disk, specs, settings.recipe, progress)
    write_shards(target, tensors, MAX_SHARD_BYTES)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model") and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    config["quantization_config"] = quantization_config(text, specs, settings.recipe)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return {"bytes_before": _bytes_in(source), "bytes_after": _bytes_in(target)}


def _check_served(source: Path, specs: Collection[ParameterSpec], settings: Fp8Settings) -> None:
    """vLLM multiplies by gate and up, and by q, k and v, as one matrix each, and reorders the outputs of q and k."""
    attention = [word for word in settings.scope if word.startswith("attention")]  # in the same layers
    if len(attention) == 1:
        raise ValueError(
            f"{source}: scope {attention[0]} alone can be trained, not served: vLLM keeps q, k and v as one matrix, "
            "all FP8 or none; name attention_q_k and attention_v_o, or neither"
        )
    if attention and settings.recipe == "block128":
        raise ValueError(
            f"{source}: recipe block128 with scope {attention[0]} can be trained, not served: vLLM reorders the "
            "outputs of q and k, across blocks; use the recipe row, or leave attention out of the scope"
        )
    if settings.recipe == "tensor" and (linear := [spec.name for spec in specs if spec.row.group != "expert"]):
        raise ValueError(
            f"{source}: recipe tensor with {linear[0]}: vLLM gives the matrices that it keeps as one a single scale, "
            "so they would not be those of training; use the recipe row"
        )
    if settings.recipe == "block128":
        for spec in specs:
            sizes = spec.shape[-2], spec.shape[-1] // max(len(spec.row.parts), 1)
            if sizes[0] % TILE or sizes[1] % TILE:
                raise ValueError(
                    f"{source}: blocks of {TILE} do not fit {spec.name} of {sizes[0]} × {sizes[1]}; use the recipe row"
                )


def quantization_config(config: Config, specs: Collection[ParameterSpec], recipe: Recipe) -> dict[str, Any]:
    """What config.json says to engines: these parameters are FP8, every other linear layer is not."""
    weights, inputs = SERVED_AS[recipe]
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": fp8 | weights | {"dynamic": False},
                "input_activations": fp8 | inputs | {"dynamic": True},
            }
        },
        # Dots are escaped: "mlp.gate." once matched "mlp.gate_proj" in another project's list.
        "ignore": [
            r"re:.*lm_head$",
            r"re:.*\.router$",
            *_high_modules(config["num_hidden_layers"], specs),
            *(rf"re:.*{prefix[:-1]}\..*" for prefix in NOT_TEXT),
        ],
    }


def _high_modules(num_layers: int, specs: Collection[ParameterSpec]) -> Iterator[str]:
    """Where each word of the scope stays high: in all layers, or in those named."""
    for scope, modules in MODULES.items():
        low = {spec.layer for spec in specs if scope_of(spec) == scope}
        high = "|".join(str(layer) for layer in range(num_layers) if layer not in low)
        if high:
            yield rf"re:.*\.layers\.({high})\.{modules}" if low else rf"re:.*\.{modules}"


def _tensors(
    source: Path, config: Config, multimodal: bool, disk: DiskFormat, in_fp8: Collection[ParameterSpec], recipe: Recipe,
    progress: Callable[[int, int], None],
) -> Iterator[NamedTensor]:  # fmt: skip
    specs = {spec.name: spec for spec in parameters(config)}
    for done, (piece, tensor) in enumerate(read_pieces(source, config, multimodal), start=1):
        if piece.expert is not None:
            raise ValueError(f"{source}: experts lie one by one ({piece.name}); expected them fused")
        spec = specs[piece.parameter]
        if spec in in_fp8:
            yield from _fp8_pieces(spec, quantise(input_major(tensor).float(), recipe, axis=1), recipe, disk)
        else:
            for part in pieces(spec, disk):
                yield part.name, part.view(tensor).contiguous()
        progress(done, len(specs))
    if multimodal:
        yield from passed_through(source)


def _fp8_pieces(spec: ParameterSpec, stored: Quantised, recipe: Recipe, disk: DiskFormat) -> Iterator[NamedTensor]:
    for piece in pieces(spec, disk):
        matrix = 0 if piece.expert is None else piece.expert  # a linear layer's is stored as that of one expert
        first, last = piece.columns if piece.expert is not None else (0, stored.q.shape[-1])
        q_KN, scale_KN = stored.q[matrix].view(torch.uint8), stored.scale[matrix]
        yield piece.name, q_KN[:, first:last].T.contiguous().view(stored.q.dtype)
        if recipe == "block128":
            first, last = first // TILE, last // TILE
        # tensor: [1] · row: one per output, [out, 1] · block128: [out/128, in/128]
        scale = scale_KN.flatten() if recipe == "tensor" else scale_KN[:, first:last].T
        yield f"{piece.name}_scale", scale.clone(memory_format=torch.contiguous_format)


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
