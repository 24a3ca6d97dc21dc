"""The published shapes: the model class really built, on the meta device, against the published parameter counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import Llama4TextConfig

from model.config import PRESETS, TinyShape, behemoth_like, maverick, scout, tiny
from model.tensor_map import Config, count_active_parameters, count_parameters, parameters
from model.transformer import MoeForCausalLM, rope_frequencies

BILLION = 1e9


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_the_model_has_exactly_the_parameters_of_the_table(preset: Callable[[], Config]) -> None:
    with torch.device("meta"):
        model = MoeForCausalLM(Llama4TextConfig(**preset()))
    assert {spec.name: spec.shape for spec in parameters(preset())} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert count_parameters(preset()) == sum(parameter.numel() for parameter in model.parameters())
    assert not list(model.buffers())  # what a checkpoint does not hold would stay on the meta device


@pytest.mark.parametrize("preset, total, active", [(scout, 107.8, 17.2), (maverick, 400.7, 17.2)])
def test_parameters_are_as_many_as_published(preset: Callable[[], Config], total: float, active: float) -> None:
    assert count_parameters(preset()) / BILLION == pytest.approx(total, abs=0.05)
    assert count_active_parameters(preset()) / BILLION == pytest.approx(active, abs=0.05)


def test_the_guess_at_behemoth_meets_what_is_known_of_it() -> None:
    assert count_active_parameters(behemoth_like()) / BILLION == pytest.approx(288, rel=0.01)
    assert count_parameters(behemoth_like()) / BILLION == pytest.approx(2000, rel=0.01)
    assert behemoth_like()["num_local_experts"] == 16


def test_which_layers_are_routed_and_which_know_positions() -> None:
    for preset, routed in ((scout, range(48)), (maverick, range(1, 48, 2))):
        config = Llama4TextConfig(**preset())
        assert config.moe_layers == list(routed)
        assert [layer for layer, rope in enumerate(config.no_rope_layers) if not rope] == list(range(3, 48, 4))
        assert config.layer_types[:4] == ["chunked_attention"] * 3 + ["full_attention"]
    assert scout()["use_qk_norm"] and not maverick()["use_qk_norm"]


def test_scouts_slow_rotations_are_sixteen_times_slower_and_fast_ones_are_kept() -> None:
    scaled, _ = rope_frequencies(Llama4TextConfig(**scout()))
    plain, _ = rope_frequencies(Llama4TextConfig(**maverick()))
    # Factors low = high = 1: a rotation is slow when one turn is longer than the 8192 positions it was trained on.
    slow = 2 * torch.pi / plain > 8192
    assert slow.any() and not slow.all()
    torch.testing.assert_close(scaled, torch.where(slow, plain / 16, plain))


def test_tiny_is_the_shape_it_is_given() -> None:
    assert count_parameters(tiny()) == 2_755_712  # what the shipped base model's manifest states
    config = Llama4TextConfig(**tiny(TinyShape(num_layers=2, num_experts=4), vocab_size=100))
    assert (config.num_hidden_layers, config.num_local_experts, config.vocab_size) == (2, 4, 100)
    assert config.moe_layers == [1]
