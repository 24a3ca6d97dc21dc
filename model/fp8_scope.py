"""Which of a model's parameters are multiplied in FP8: the one place that trainers, exports and checks of recipes ask.

Imports no torch, so that a recipe is checked at once.
"""

from __future__ import annotations

from model.precision import Fp8Settings, Scope
from model.tensor_map import Config, Group, ParameterSpec, parameters, text_config

SCOPE_OF_GROUP: dict[Group, Scope] = {"expert": "routed_experts", "shared": "shared_expert", "dense": "dense_mlp"}


def scope_of(spec: ParameterSpec) -> Scope | None:
    """The word of `fp8.scope` that means a parameter; None for what is never FP8: router, head, embedding, norms and
    biases."""
    if spec.row.orientation == "vector":
        return None
    if spec.row.group == "attention":
        return "attention_q_k" if spec.name.endswith(("q_proj.weight", "k_proj.weight")) else "attention_v_o"
    return SCOPE_OF_GROUP.get(spec.row.group)


def fp8_parameters(config: Config, settings: Fp8Settings) -> list[ParameterSpec]:
    """The parameters of a Llama 4 whose products run in FP8, part by part.

    Without `layers`, `keep_first_and_last` leaves out the first and the last layer that has a part, for each word of
    the scope alone. ValueError, opening with the key of `fp8` that is wrong, for a model of another kind, for a word
    that would mean nothing and for a layer that has nothing of the scope.
    """
    kind = text_config(config).get("model_type")
    if kind != "llama4_text":
        raise ValueError(f"scope: a {kind} has no FP8 products, Llama 4 (llama4_text) has; leave fp8 out")
    of_scope: dict[Scope, list[ParameterSpec]] = {}
    for spec in parameters(config):
        if scope := scope_of(spec):
            of_scope.setdefault(scope, []).append(spec)
    if absent := [scope for scope in settings.scope if scope not in of_scope]:
        raise ValueError(f"scope: this model has no {absent[0]}; it has {', '.join(of_scope)}")
    layers_of = {scope: sorted({spec.layer for spec in of_scope[scope] if spec.layer is not None})
                 for scope in settings.scope}  # fmt: skip
    having = {layer for layers in layers_of.values() for layer in layers}
    if others := sorted(set(settings.layers or ()) - having):
        raise ValueError(
            f"layers: {list(settings.layers or ())}, but {others} have nothing of the scope "
            f"{', '.join(settings.scope)}; layers that have are {sorted(having)}: name some of these"
        )
    chosen = {scope: _chosen(layers, settings) for scope, layers in layers_of.items()}
    for scope, layers in layers_of.items():
        if not chosen[scope]:
            key = "keep_first_and_last: true" if settings.layers is None else f"layers: {list(settings.layers)}"
            raise ValueError(
                f"{key} leaves no {scope} for FP8; this model has it in the layers {layers}: name some of these in "
                "layers, " + ("set it to false, " if settings.layers is None else "") + "or leave the word out of scope"
            )
    return [spec for scope, layers in chosen.items() for spec in of_scope[scope] if spec.layer in layers]


def _chosen(layers: list[int], settings: Fp8Settings) -> list[int]:
    if settings.layers is not None:
        return [layer for layer in layers if layer in settings.layers]
    return layers[1:-1] if settings.keep_first_and_last else layers
