"""Which matrix products run in FP8, and how: settings that a recipe or a test can build without torch.

What the words mean is explained in model/kernels/fp8.py, which carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Recipe = Literal["tensor", "row", "block128"]
Format = Literal["e4m3", "e5m2"]


@dataclass(frozen=True)
class Fp8Settings:
    """FP8 of the routed experts. Router, head, norms, attention and shared experts never pass through here."""

    recipe: Recipe = "row"  # how many elements share a scale: finer costs scales and buys room for outliers
    gradients: Format = (
        "e4m3"  # e5m2 has 128 times the range for half the precision; weights and inputs are always e4m3
    )
    # Gaussian data are stored at about 31 dB in e4m3 and 25 dB in e5m2. 20 dB is an error of a tenth of the signal.
    # Raise it to give layers back to BF16 sooner.
    min_snr_db: float = 20.0
    keep_first_and_last: bool = True  # the first and the last MoE layer stay BF16, as in Meta's own FP8 checkpoints
    layers: tuple[int, ...] | None = None  # exactly these MoE layers, whatever keep_first_and_last says

    def __post_init__(self) -> None:
        for key, accepted in (("recipe", get_args(Recipe)), ("gradients", get_args(Format))):
            if getattr(self, key) not in accepted:
                raise ValueError(f"fp8 {key} is {getattr(self, key)!r}; accepted: {', '.join(accepted)}")


def fp8_layers(moe_layers: Sequence[int], settings: Fp8Settings) -> tuple[int, ...]:
    """Of the model's MoE layers (their numbers, ascending), those whose routed experts run in FP8: the one place that
    trainers, exports and checks of recipes ask. ValueError for a chosen layer that has no routed experts."""
    if settings.layers is None:
        return tuple(moe_layers[1:-1] if settings.keep_first_and_last else moe_layers)
    if others := sorted(set(settings.layers) - set(moe_layers)):
        raise ValueError(
            f"layers: {list(settings.layers)}, but {others} have no routed experts; the MoE layers are "
            f"{list(moe_layers)}: name some of these"
        )
    return tuple(layer for layer in moe_layers if layer in settings.layers)
