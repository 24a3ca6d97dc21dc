"""How an actor's errors reach its caller: no Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline.cluster import Actor, ActorHost
from pipeline.errors import DataError, GateStopped, InfrastructureError, RecipeError


class Refused(ValueError):
    """As torch, vLLM and rl.weight_sync raise them."""


@pytest.mark.parametrize("error", [Refused, ValueError, ArithmeticError, InfrastructureError])
def test_error_from_an_actor_names_actor_method_cause_and_last_lines(tmp_path: Path, error: type[Exception]) -> None:
    with pytest.raises(InfrastructureError) as caught:
        reply_of_failing_actor(tmp_path, error)
    for words in ("generator-0", "take_weights", error.__name__, "the reason", "last line of the log"):
        assert words in str(caught.value)


@pytest.mark.parametrize("error", [DataError, RecipeError, GateStopped])
def test_error_with_an_exit_code_of_its_own_keeps_its_type_and_words(tmp_path: Path, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        reply_of_failing_actor(tmp_path, error)
    assert str(caught.value) == "the reason"


def reply_of_failing_actor(tmp_path: Path, error: type[Exception]) -> None:
    async def take_weights() -> None:
        raise error("the reason")

    log = tmp_path / "generator-0.log"
    log.write_text("last line of the log")
    host = object.__new__(ActorHost)  # without its process: an async method needs nothing of it
    Actor("generator-0", None, log)._unwrap("take_weights", asyncio.run(host._answer(take_weights)))
