"""Which of a model's parameters are multiplied in FP8: the one place that trainers, exports and checks of recipes ask.

Imports no torch, so that a recipe is checked at once.
"""

from __future__ import annotations

from model.precision import Fp8Settings, Scope
from model.tensor_map import Config, Group, ParameterSpec, parameters

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
    """The parameters of a Llama 4 whose products run in FP8, layer by layer; none where the settings leave none.

    Without `layers`, `keep_first_and_last` leaves out the first and the last layer that has a part, for each word of
    the scope alone. ValueError for a chosen layer that has nothing of the scope.
    """
    layers_of: dict[Scope, list[int]] = {scope: [] for scope in settings.scope}
    in_scope = []
    for spec in parameters(config):
        scope = scope_of(spec)
        if scope in layers_of and spec.layer is not None:
            in_scope.append((scope, spec.layer, spec))
            layers_of[scope].append(spec.layer)
    having = {layer for layers in layers_of.values() for layer in layers}
    if settings.layers is not None and (others := sorted(set(settings.layers) - having)):
        raise ValueError(
            f"layers: {list(settings.layers)}, but {others} have nothing of the scope {', '.join(settings.scope)}; "
            f"layers that have are {sorted(having)}: name some of these"
        )

    def is_chosen(scope: Scope, layer: int) -> bool:
        if settings.layers is not None:
            return layer in settings.layers
        return not settings.keep_first_and_last or min(layers_of[scope]) < layer < max(layers_of[scope])

    return [spec for scope, layer, spec in in_scope if is_chosen(scope, layer)]
