"""A dense Llama as a Llama-4-style mixture of experts that computes, at the start, exactly the same function.

Called by `drover upcycle`. What the result is made of:

    dense Llama                          Llama 4
    q_proj, k_proj                   →   the same rows in another order: Llama turns coordinate i of a head together
                                         with i + d/2, Llama 4 with its neighbour
    MLP of every `moe_step`th layer  →   the shared expert; beside it a router, and routed experts whose down_proj is
                                         zero: whatever the router says, they add nothing yet
    MLP of the other layers          →   dense feed-forward, unchanged
    embedding, norms, head           →   unchanged; a tied head stays tied and is not written

A routed expert's gate_up_proj is the dense MLP's, and a little noise. Behind trained features a zero down_proj has a
useful gradient from the first step on; behind random ones it would first learn to undo their randomness. The noise
lets experts part even where they see the same tokens. Router and gate_up_proj have no gradient while down_proj is
zero, and have one from the second step on. (Sparse Upcycling, arXiv 2212.05055, copies down_proj too; beside a shared
expert that would change the function.)

Both widths of Llama 4's config, `intermediate_size` (shared *and* routed experts) and `intermediate_size_mlp` (dense
layers), are that of the dense MLP: routed experts narrower than the shared one cannot be written in this format.

Axes: D hidden, d head, E experts, F width of the MLP and of every expert, O rows of a projection, T tokens.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig

from model.dense_llama import DTYPES, CalibrationText, DenseLlama, UpcycleRefused
from model.tensor_map import LLAMA4_TEXT, count_active_parameters, count_parameters
from model.weight_files import NamedTensor, cut_for_disk, write_shards

# Relative to the dense matrix. Far above what bfloat16 rounds away (1/256), far below what would spoil a feature.
EXPERT_NOISE = 0.1
# Spread of a token's router logits. Switch Transformer's reduced start, √0.1 for inputs of order one (arXiv 2101.03961,
# section 2.4): gates begin near a half, and a few steps of training can change a token's expert.
LOGIT_STD = 0.3
# Of the attention chunk: vLLM wants a multiple of its KV block, which is a power of two up to this.
CHUNK_MULTIPLE = 128
SHARD_BYTES = 10**9
CONFIG_KEPT = (  # means the same in both networks
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "attention_dropout", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Upcycled:
    """What was made. Parameters are counted with a tied head once."""

    dense_parameters: int
    total_parameters: int
    active_parameters: int  # that work on one token: all but the experts that it is not sent to
    num_layers: int
    num_moe_layers: int
    num_experts: int
    calibration_tokens: int  # 0: the routers were drawn blindly


def upcycle(
    source: Path,
    target: Path,
    *,
    num_experts: int = 8,
    moe_step: int = 2,
    seed: int = 0,
    dtype: str | None = None,
    calibration_text: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Upcycled:
    """Write the checkpoint directory `source`, upcycled, to `target`, which must not exist or be empty.

    The last layer of every `moe_step` becomes MoE. `dtype` is one of DTYPES; None keeps the source's. With
    `calibration_text` the routers are fitted to it (see `router_weight`), at the price of one forward pass over at most
    4096 tokens. `on_progress` gets (parameters written, parameters in all). In memory at a time: one dense layer, one
    expert tensor and one shard of the target. Killed half-way, it leaves nothing at `target`. Raises UpcycleRefused.
    """
    _check_arguments(target, num_experts, moe_step, dtype)
    with contextlib.closing(DenseLlama(source)) as dense:
        if moe_step > dense.config.num_hidden_layers:
            raise UpcycleRefused(f"moe_step: {moe_step}; {source} has {dense.config.num_hidden_layers} layers")
        config = llama4_config(dense.config, num_experts, moe_step)
        torch_dtype = getattr(torch, dtype) if dtype else None
        config.dtype = torch_dtype or dense.dtype
        calibration = None if calibration_text is None else CalibrationText(source, dense, calibration_text)
        shape = config.to_dict()
        total = count_parameters(shape)

        def counted(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
            written = 0
            for name, tensor in tensors:
                yield name, tensor
                written += tensor.numel()
                if on_progress is not None:
                    on_progress(written, total)

        with _published(target) as folder:
            _copy_companions(source, folder)
            config.save_pretrained(folder)
            tensors = _tensors(dense, config, torch.Generator().manual_seed(seed), calibration)
            write_shards(folder, counted(cut_for_disk(tensors, shape, LLAMA4_TEXT, torch_dtype)), SHARD_BYTES)
    return Upcycled(
        dense_parameters=count_parameters(dense.config.to_dict()),
        total_parameters=total,
        active_parameters=count_active_parameters(shape),
        num_layers=config.num_hidden_layers,
        num_moe_layers=len(config.moe_layers),
        num_experts=num_experts,
        calibration_tokens=0 if calibration is None else calibration.num_tokens,
    )


def llama4_config(dense: LlamaConfig, num_experts: int, moe_step: int) -> Llama4TextConfig:
    """The dense network in Llama 4's words: RoPE and full attention in every layer, neither QK norm nor temperature.

    "Full" is said twice. transformers and our model go by `layer_types`; vLLM goes by the chunk size alone, and would
    take null, but transformers refuses that. So the chunk is as long as the longest context: it ends nowhere.
    """
    layers = dense.num_hidden_layers
    return Llama4TextConfig(
        architectures=[Llama4ForCausalLM.__name__],
        **{key: getattr(dense, key) for key in CONFIG_KEPT},
        intermediate_size_mlp=dense.intermediate_size,
        num_experts_per_tok=1,
        num_local_experts=num_experts,
        interleave_moe_layer_step=moe_step,  # vLLM reads the step, and transformers makes its list of layers from it
        use_qk_norm=False,
        router_aux_loss_coef=0.0,
        no_rope_layers=[1] * layers,  # the key says "no rope"; its 1 means that there is
        layer_types=["full_attention"] * layers,
        attention_chunk_size=math.ceil(dense.max_position_embeddings / CHUNK_MULTIPLE) * CHUNK_MULTIPLE,
        attn_temperature_tuning=False,
        attention_bias=False,
    )


def _tensors(
    dense: DenseLlama, config: Llama4TextConfig, random: torch.Generator, calibration: CalibrationText | None
) -> Iterator[NamedTensor]:
    """Every tensor of the target, in the order of a forward pass."""
    yield "model.embed_tokens.weight", dense.read("model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        weights = dense.read_layer(layer)
        x_TD = calibration.through(layer, weights) if calibration else None
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj"):
            yield f"{prefix}.{name}.weight", weights[f"{name}.weight"]
        for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            weight_OD = with_neighbouring_pairs(weights[f"self_attn.{name}.weight"], heads)
            yield f"{prefix}.self_attn.{name}.weight", weight_OD
        gate_FD, up_FD, down_DF = (weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        is_moe = layer in config.moe_layers
        mlp = f"{prefix}.feed_forward.shared_expert" if is_moe else f"{prefix}.feed_forward"
        yield f"{mlp}.gate_proj.weight", gate_FD
        yield f"{mlp}.up_proj.weight", up_FD
        yield f"{mlp}.down_proj.weight", down_DF
        if is_moe:
            experts = config.num_local_experts
            norm_D = weights["post_attention_layernorm.weight"]
            router_ED = router_weight(experts, norm_D, random, x_TD).to(gate_FD.dtype)
            yield f"{prefix}.feed_forward.router.weight", router_ED
            yield f"{prefix}.feed_forward.experts.gate_up_proj", noisy_copies(gate_FD, up_FD, experts, random)
            yield f"{prefix}.feed_forward.experts.down_proj", gate_FD.new_zeros(experts, *gate_FD.shape)
    yield "model.norm.weight", dense.read("model.norm.weight")
    if not config.tie_word_embeddings:
        yield "lm_head.weight", dense.read("lm_head.weight")


def with_neighbouring_pairs(weight_OD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q_proj or k_proj, [O, D], within each head from 0 1 2 … d-1 to 0 d/2 1 d/2+1 …: what Llama turns together
    becomes neighbours. q · k does not notice, for both are permuted alike. vLLM undoes this when it loads a Llama 4."""
    return weight_OD.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight_OD.shape)


def noisy_copies(gate_FD: torch.Tensor, up_FD: torch.Tensor, num_experts: int, random: torch.Generator) -> torch.Tensor:
    """gate_up_proj [E, D, 2F], gate first: for each expert the dense MLP's two matrices with noise of their own."""
    width, hidden = gate_FD.shape
    out_EDG = gate_FD.new_empty(num_experts, hidden, 2 * width)
    for columns, weight_FD in ((slice(0, width), gate_FD), (slice(width, None), up_FD)):
        weight_DF = weight_FD.float().T
        noise_std = EXPERT_NOISE * float(weight_DF.square().mean().sqrt())
        for expert in range(num_experts):
            noise_DF = torch.randn(hidden, width, generator=random).mul_(noise_std)
            out_EDG[expert, :, columns] = noise_DF.add_(weight_DF)
    return out_EDG


def router_weight(
    num_experts: int, norm_D: torch.Tensor, random: torch.Generator, x_TD: torch.Tensor | None
) -> torch.Tensor:
    """Random rows [E, D] fp32 whose logits have a standard deviation of about LOGIT_STD.

    The norm before the router ends in a multiplication by `norm_D`, in a trained model far from 1, which scales the
    logits too. Its outputs have much in common (on SmolLM2 their mean is about half as long as they are), and with it
    the logits: most tokens would go to the few experts that the mean happens to like. With `x_TD`, what the router
    will see of a text, each row is made orthogonal to that mean and scaled to exactly LOGIT_STD, so that no expert
    begins with an advantage.
    """
    hidden = len(norm_D)
    weight_ED = torch.randn(num_experts, hidden, generator=random)
    if x_TD is None:
        norm_rms = float(norm_D.float().square().mean().sqrt())
        return weight_ED * (LOGIT_STD / (math.sqrt(hidden) * max(norm_rms, torch.finfo(torch.float32).tiny)))
    mean_D = x_TD.mean(0)
    weight_ED -= torch.outer(weight_ED @ mean_D, mean_D) / mean_D.square().sum()
    return weight_ED * (LOGIT_STD / (x_TD @ weight_ED.T).std(0).unsqueeze(1))


def _check_arguments(target: Path, num_experts: int, moe_step: int, dtype: str | None) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UpcycleRefused(f"{target} is there already; accepted is a path where nothing is, or an empty directory")
    if num_experts < 2:
        raise UpcycleRefused(f"num_experts: {num_experts}; accepted are 2 or more")
    if moe_step < 1:
        raise UpcycleRefused(f"moe_step: {moe_step}; accepted are 1 (every layer is MoE), 2 (every second) or more")
    if dtype not in (None, *DTYPES):
        raise UpcycleRefused(f"dtype: {dtype!r}; accepted are {', '.join(DTYPES)}")


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it, on the disk with all its files, if the block does not fail."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_companions(source: Path, folder: Path) -> None:
    """What a checkpoint holds beside config and weights: tokenizer, chat template, generation config, licence."""
    for path in sorted({path for pattern in COPIED for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
