"""A checkpoint whose routed experts are FP8, as vLLM serves it on GPUs: compressed-tensors, one matrix an expert.

Weights and scales are those that training with the same recipe multiplies by; activations are quantised by the engine,
as they come. Tested on a CPU: compressed-tensors decompresses the file to the weights of training, and vLLM's loader
puts every tensor, of a text model and of a multimodal one, where its FP8 experts read it
(`tests/integration/test_fp8_served.py`). Not tested: vLLM's FP8 kernels, which need a GPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from model.kernels.quantise import TILE, Quantised, quantise
from model.precision import Fp8Settings, Recipe, fp8_layers
from model.tensor_map import (
    MULTIMODAL,
    NOT_TEXT,
    Config,
    DiskFormat,
    ParameterSpec,
    Piece,
    moe_layers,
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


def export_fp8(
    source: Path, target: Path, settings: Fp8Settings, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, int]:
    """Write `source`, a Llama 4 in BF16 or fp32, to `target` with FP8 experts; returns bytes before and after.

    `progress(done, total)` counts parameters. ValueError where there is nothing to quantise, where the source is no
    Llama 4 with fused experts, where a chosen layer has no experts, or where blocks of 128 would straddle an expert's
    gate and up projections.
    """
    config: Config = json.loads((source / "config.json").read_text())
    multimodal = config.get("model_type") == "llama4"
    if not multimodal and config.get("model_type") != "llama4_text":
        raise ValueError(
            f"{source}: model_type is {config.get('model_type')!r}; FP8 experts need llama4 or llama4_text"
        )
    text = text_config(config)
    try:
        layers = fp8_layers(moe_layers(text), settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if not layers:
        raise ValueError(
            f"{source}: of the MoE layers {moe_layers(text)} none is left for FP8 with keep_first_and_last="
            f"{settings.keep_first_and_last}"
        )
    if settings.recipe == "block128" and (text["intermediate_size"] % TILE or text["hidden_size"] % TILE):
        raise ValueError(
            f"{source}: blocks of {TILE} do not fit experts of {text['hidden_size']} × {text['intermediate_size']}; "
            "use the recipe row"
        )
    disk = DiskFormat(MULTIMODAL.prefix if multimodal else "", fused_experts=False)
    target.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(source, text, multimodal, disk, layers, settings.recipe, progress)
    write_shards(target, tensors, MAX_SHARD_BYTES)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model") and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    config["quantization_config"] = quantization_config(text, layers, settings.recipe)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return {"bytes_before": _bytes_in(source), "bytes_after": _bytes_in(target)}


def quantization_config(config: Config, layers: Collection[int], recipe: Recipe) -> dict[str, Any]:
    """What config.json says to engines: the experts of `layers` are FP8, every other linear layer is not."""
    weights, inputs = SERVED_AS[recipe]
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    high = "|".join(str(layer) for layer in range(config["num_hidden_layers"]) if layer not in layers)
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
            r"re:.*\.self_attn\..*",
            r"re:.*\.router$",
            r"re:.*\.shared_expert\..*",
            *([rf"re:.*\.layers\.({high})\.feed_forward\..*"] if high else []),
            *(rf"re:.*{prefix[:-1]}\..*" for prefix in NOT_TEXT),
        ],
    }


def _tensors(
    source: Path, config: Config, multimodal: bool, disk: DiskFormat, layers: Collection[int], recipe: Recipe,
    progress: Callable[[int, int], None],
) -> Iterator[NamedTensor]:  # fmt: skip
    specs = {spec.name: spec for spec in parameters(config)}
    for done, (piece, tensor) in enumerate(read_pieces(source, config, multimodal), start=1):
        if piece.expert is not None:
            raise ValueError(f"{source}: experts lie one by one ({piece.name}); expected them fused")
        spec = specs[piece.parameter]
        if spec.row.group == "expert" and spec.layer in layers:
            yield from _fp8_pieces(spec, quantise(tensor.float(), recipe, axis=1), recipe, disk)
        else:
            for part in pieces(spec, disk):
                yield part.name, part.view(tensor).contiguous()
        progress(done, len(specs))
    if multimodal:
        yield from passed_through(source)


def _fp8_pieces(spec: ParameterSpec, stored: Quantised, recipe: Recipe, disk: DiskFormat) -> Iterator[NamedTensor]:
    for piece in pieces(spec, disk):
        yield piece.name, piece.view(stored.q.view(torch.uint8)).contiguous().view(stored.q.dtype)
        yield f"{piece.name}_scale", _scale_of(piece, stored, recipe).clone(memory_format=torch.contiguous_format)


def _scale_of(piece: Piece, stored: Quantised, recipe: Recipe) -> torch.Tensor:
    """tensor: [1] · row: one per output, [out, 1] · block128: [out/128, in/128]."""
    scale_KN = stored.scale[piece.expert]
    if recipe == "tensor":
        return scale_KN.flatten()
    first, last = piece.columns if recipe == "row" else (column // TILE for column in piece.columns)
    return scale_KN[:, first:last].T


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
