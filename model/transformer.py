"""The Llama 4 text model: the policy that every stage trains.

    ids ─ embed ─ [ norm ─ attention ─ + ─ norm ─ SwiGLU or MoE ─ + ] × layers ─ norm ─ head ─ logits

What makes it Llama 4:
  - every `interleave_moe_layer_step`-th feed-forward is an MoE: it adds one routed expert (top-1) to a shared one, and
    scales the routed expert's *input* by the router's sigmoid (`model/moe_layer.py`);
  - three layers of four rotate queries and keys by position (RoPE, interleaved pairs) and look only within their own
    chunk of `attention_chunk_size` positions; the fourth knows no positions (NoPE) and looks at everything before it;
  - on RoPE layers Scout normalises each head's query and key, after the rotation, without a weight; Maverick does not;
  - on NoPE layers queries grow with the logarithm of their position, so that attention stays sharp over long contexts.

Names, shapes and orientations of all parameters are those of transformers' `Llama4ForCausalLM`: TRL, PEFT, vLLM and
`generate` meet nothing new. Inside, a batch is its T real tokens laid end to end (`model/packing.py`): padding costs
nothing, several documents may share a row, positions and chunks restart with each.

Axes: B rows, S sequence, T real tokens, D hidden size, H query heads, K key/value heads, d head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, Llama4TextConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.experts import Experts
from model.fp8_gauges import NothingRecorded
from model.linear import Linear
from model.logprobs import token_statistics
from model.moe_layer import MoeBlock, SwiGlu
from model.norm import RmsNorm, rms_norm
from model.packing import Attention, CachedAttention, Layout, PackedAttention, fits_a_cache
from model.router import Route, Router, balance_loss, initial_router_weight

IGNORED = -100  # a label that is not trained on, as everywhere in PyTorch


class MoeAttention(nn.Module):
    """Grouped-query attention of one layer: with RoPE and chunks, or with neither."""

    def __init__(self, config: Llama4TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.rotates = bool(config.no_rope_layers[layer])  # the key says "no rope"; its 1 means that there is
        self.chunk = config.attention_chunk_size if config.layer_types[layer] == "chunked_attention" else None
        self.norm_eps = config.rms_norm_eps if config.use_qk_norm and self.rotates else None
        self.grows = config.attn_temperature_tuning and not self.rotates
        self.growth, self.growth_floor = config.attn_scale, config.floor_scale
        bias, queries = config.attention_bias, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=bias)
        self.o_proj.writes_residual = True

    def forward(self, x_TD: torch.Tensor, rotation: Rotation, attention: Attention) -> torch.Tensor:
        q_THd, k_TKd, v_TKd = (
            projection(x_TD).unflatten(-1, (projection.out_features // self.head_dim, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotates:
            q_THd, k_TKd = rotation(q_THd), rotation(k_TKd)
        if self.norm_eps is not None:
            q_THd, k_TKd = unit_heads(q_THd, self.norm_eps), unit_heads(k_TKd, self.norm_eps)
        if self.grows:
            q_THd = q_THd * temperature(attention.position_T, self.growth, self.growth_floor).to(q_THd.dtype)
        out_THd = attention(q_THd, k_TKd, v_TKd, layer=self.layer, chunk=self.chunk)
        return self.o_proj(out_THd.flatten(1))


def unit_heads(x_THd: torch.Tensor, eps: float) -> torch.Tensor:
    """Each head's vector divided by its root mean square, in fp32."""
    return rms_norm(x_THd.float(), None, eps).to(x_THd.dtype)


def temperature(position_T: torch.Tensor, growth: float, floor: float) -> torch.Tensor:
    """Scale of the queries on NoPE layers, 1 + growth · ln(1 + ⌊(position + 1) / floor⌋), as [T, 1, 1] fp32
    (scalable softmax, arXiv 2501.19399): 1.0 up to position 8190 with Llama 4's constants, 1.283 at 131,071."""
    return (1.0 + growth * torch.log1p(((position_T + 1.0) / floor).floor())).view(-1, 1, 1)


class Rotation:
    """RoPE of the tokens of one forward pass: coordinates (2i, 2i+1) of a head are a complex number, turned by
    position · frequencyᵢ, in fp32. Computed once and used by every layer."""

    def __init__(self, position_T: torch.Tensor, frequency_i: torch.Tensor, scale: float) -> None:
        angle_Ti = position_T.float().unsqueeze(1) * frequency_i
        self.turn_T1i = torch.polar(torch.full_like(angle_Ti, scale), angle_Ti).unsqueeze(1)

    def __call__(self, x_THd: torch.Tensor) -> torch.Tensor:
        pairs_THi = torch.view_as_complex(x_THd.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs_THi * self.turn_T1i).flatten(-2).to(x_THd.dtype)


def rope_frequencies(config: Llama4TextConfig) -> tuple[torch.Tensor, float]:
    """(radians per position of each coordinate pair [head_dim / 2], scale of the rotated vectors)."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=torch.device("cpu"))
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return rope["rope_theta"] ** -exponent, 1.0


class MoeLayer(nn.Module):
    def __init__(self, config: Llama4TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MoeAttention(config, layer)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: MoeBlock | SwiGlu = (
            MoeBlock(config) if layer in config.moe_layers else SwiGlu(config.hidden_size, config.intermediate_size_mlp)
        )

    def forward(
        self,
        x_TD: torch.Tensor,
        rotation: Rotation,
        attention: Attention,
        replay_T: torch.Tensor | None,
        recompute: Callable[..., Any],
    ) -> tuple[torch.Tensor, Route | None]:
        x_TD = recompute(self._attend, x_TD, rotation, attention)
        h_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.feed_forward, MoeBlock):
            out_TD, route = self.feed_forward(h_TD, replay_T, recompute)
            return x_TD + out_TD, route
        return x_TD + recompute(self.feed_forward, h_TD), None

    def _attend(self, x_TD: torch.Tensor, rotation: Rotation, attention: Attention) -> torch.Tensor:
        return x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, attention)


@dataclass
class MoeModelOutput(MoeModelOutputWithPast):
    """transformers' output and, beside it, where every MoE layer sent every real token."""

    routes: tuple[Route, ...] | None = None


class MoePreTrainedModel(PreTrainedModel):
    config_class = Llama4TextConfig
    config: Llama4TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoeLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with 1/√fan-in, so that every layer keeps the size of what it is given; what writes into the residual
        stream at half of it."""
        if isinstance(module, nn.Linear):
            size = 0.5 if getattr(module, "writes_residual", False) else 1.0
            nn.init.normal_(module.weight, std=size / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Router):
            initial_router_weight(module.weight)
        elif isinstance(module, Experts):
            module.initialise()


class MoeTransformer(MoePreTrainedModel):
    """Everything but the head."""

    def __init__(self, config: Llama4TextConfig) -> None:
        super().__init__(config)
        if config.num_experts_per_tok != 1:
            raise ValueError(f"num_experts_per_tok is {config.num_experts_per_tok}; Llama 4 sends a token to 1 expert")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoeLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._rope: tuple[torch.Tensor, float] | None = None
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        replay: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **_: Any,
    ) -> MoeModelOutput:
        """`input_ids` [B, S], `attention_mask` [B, S] 1 on real tokens, `position_ids` [B, S] restarting at 0 with each
        document of a row, `replay` [B, S, MoE layers] expert ids or NOT_RECORDED. Returns hidden states [B, S, D], zero
        where there is no token; router logits [T, E] and routes per MoE layer.

        With `use_cache` or `past_key_values` a row is one document, and other positions are a ValueError. Where only
        the config's default allows a cache, they are packed as without one, and none is returned."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shape, device = (x_BSD.shape[0], x_BSD.shape[1]), x_BSD.device
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
            if use_cache and past_key_values is None:  # nobody asked for a cache: what none can hold goes without
                use_cache = fits_a_cache(shape, attention_mask, position_ids, device)
        attention: Attention
        if use_cache or past_key_values is not None:
            past_key_values = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            attention = CachedAttention(shape, attention_mask, position_ids, past_key_values, device)
            layout = Layout(shape, None, attention.position_T)
        else:
            layout = Layout.of(shape, attention_mask, position_ids, device)
            attention = PackedAttention(layout)
        rotation = Rotation(layout.position_T, *self._rope_on(device))
        replay_TM = None if replay is None else self._checked(replay, layout)

        x_TD = layout.flatten(x_BSD)
        routes: list[Route] = []
        hidden: list[torch.Tensor] = []
        for layer in self.layers:
            hidden.append(x_TD)
            replay_T = None if replay_TM is None else replay_TM[:, len(routes)]
            x_TD, route = layer(x_TD, rotation, attention, replay_T, self._recompute)
            routes += [] if route is None else [route]
        x_TD = self.norm(x_TD)
        return MoeModelOutput(
            last_hidden_state=layout.unflatten(x_TD),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(map(layout.unflatten, [*hidden, x_TD])) if output_hidden_states else None,
            router_logits=tuple(route.logits_TE for route in routes) if output_router_logits else None,
            routes=tuple(routes),
        )

    def _recompute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it; under activation checkpointing forget what is inside and call it again in the backward pass."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            contexts = nullcontext(), NothingRecorded()  # of the first call, of the second
            return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: contexts)
        return function(*args)

    def _rope_on(self, device: torch.device) -> tuple[torch.Tensor, float]:
        if self._rope is None or self._rope[0].device != device:
            frequency, scale = rope_frequencies(self.config)
            self._rope = frequency.to(device), scale
        return self._rope

    def _checked(self, replay: torch.Tensor, layout: Layout) -> torch.Tensor:
        expected = (*layout.shape, len(self.config.moe_layers))
        if replay.shape != expected:
            raise ValueError(
                f"replay has shape {tuple(replay.shape)}; expected [rows, tokens, MoE layers] = {expected}"
            )
        return layout.flatten(replay)


@dataclass
class MoeOutput(MoeCausalLMOutputWithPast):
    routes: tuple[Route, ...] | None = None


class MoeForCausalLM(MoePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Llama4TextConfig) -> None:
        super().__init__(config)
        self.model = MoeTransformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        replay: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> MoeOutput | tuple[Any, ...]:
        """As any causal LM of transformers. With `labels` [B, S] (IGNORED where nothing is learned) the loss is the sum
        of -log p over `num_items_in_batch`, or their mean, and while training no logits are built. Where router logits
        are asked for, `aux_loss` is the balance loss of `model/router.py`, and the loss contains it times the config's
        `router_aux_loss_coef`."""
        wants_routes = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, replay=replay,
            output_hidden_states=output_hidden_states, output_router_logits=wants_routes,
        )  # fmt: skip
        hidden_BSD = outputs.last_hidden_state
        loss, logits, aux_loss = None, None, None
        if labels is not None:
            wanted_BS = labels[:, 1:] != IGNORED
            stats = token_statistics(hidden_BSD[:, :-1][wanted_BS], labels[:, 1:][wanted_BS], self.lm_head.weight)
            loss = -stats.logprob_T.sum() / (wanted_BS.sum() if num_items_in_batch is None else num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_BSD[:, kept])
        if wants_routes and outputs.routes:
            aux_loss = balance_loss(outputs.routes)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * aux_loss
        result = MoeOutput(
            loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, router_logits=outputs.router_logits, routes=outputs.routes,
        )  # fmt: skip
        return result.to_tuple() if return_dict is False else result
