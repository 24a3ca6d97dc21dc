"""Which matrix products run in FP8, and how: settings that a recipe or a test can build without torch.

What the words mean is explained in model/kernels/fp8.py, which carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Recipe = Literal["tensor", "row", "block128"]
Format = Literal["e4m3", "e5m2"]
# What may be asked for. Router, head and norms may not: a rounded logit is another expert, another probability.
Scope = Literal["routed_experts", "shared_expert", "dense_mlp", "attention_v_o", "attention_q_k"]


@dataclass(frozen=True)
class Fp8Settings:
    """By default FP8 of the routed experts alone; `model/fp8_scope.py` says which parameters the settings mean."""

    recipe: Recipe = "row"  # how many elements share a scale: finer costs scales and buys room for outliers
    gradients: Format = (
        "e4m3"  # e5m2 has 128 times the range for half the precision; weights and inputs are always e4m3
    )
    # Gaussian data are stored at about 31 dB in e4m3 and 25 dB in e5m2. 20 dB is an error of a tenth of the signal.
    # Raise it to give layers back to BF16 sooner.
    min_snr_db: float = 20.0
    keep_first_and_last: bool = True  # of each part of the scope; Meta's own FP8 checkpoints keep those MoE layers
    layers: tuple[int, ...] | None = None  # exactly these layers, whatever keep_first_and_last says
    scope: tuple[Scope, ...] = ("routed_experts",)  # most of the FLOPs; everything else stays high

    def __post_init__(self) -> None:
        asked = [("recipe", self.recipe), ("gradients", self.gradients), *(("scope", word) for word in self.scope)]
        accepted = {"recipe": get_args(Recipe), "gradients": get_args(Format), "scope": get_args(Scope)}
        for key, word in asked:
            if word not in accepted[key]:
                raise ValueError(f"fp8 {key} is {word!r}; accepted: {', '.join(accepted[key])}")
        if not self.scope or len(set(self.scope)) < len(self.scope):
            raise ValueError(f"fp8 scope is {list(self.scope)}; name at least one part, and each once")
