"""Arithmetic that the TRL stages share; the integration tests train with it."""

from __future__ import annotations

import pytest

from pipeline.config import TrainSettings
from pipeline.trainer_actor import trainer_arguments


@pytest.mark.parametrize(
    ("share", "epochs", "num_examples", "steps"),
    [
        (1.0, 1.0, 320, 10),  # the whole training, where 1.0 taken as a number would be one step
        (0.1, 1.0, 320, 1),
        (0.5, 2.0, 100, 4),  # 3 full batches and a small one, twice
        (0.5, 1.5, 100, 3),
        (0.0, 1.0, 320, 0),
        (1.0, 1.0, 5, 1),  # fewer examples than a batch
    ],
)
def test_warmup_share_is_a_share_of_the_steps(share: float, epochs: float, num_examples: int, steps: int) -> None:
    train = TrainSettings(warmup_share=share, epochs=epochs, batch_examples=32)
    warmup = trainer_arguments(train, num_examples, 0, "out")["warmup_steps"]
    assert warmup == steps and isinstance(warmup, int)


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_is_as_the_recipe_says_and_not_trls_default(on: bool) -> None:
    train = TrainSettings(activation_checkpointing=on)
    assert trainer_arguments(train, 320, 0, "out")["gradient_checkpointing"] is on
