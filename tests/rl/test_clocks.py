"""Idle seconds of a generator, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rl.clocks import IdleClock


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr("rl.clocks.time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_only_time_without_any_lease_is_idle(at: Callable[[float], None]) -> None:
    clock = IdleClock()
    at(2)  # 2 s with nothing to do
    with clock:
        at(5)
        with clock:  # a second lease of the same generator
            at(6)
        at(9)  # still one lease
    at(10)  # 1 s more
    with clock:
        at(14)
    assert clock.taken() == 3


def test_what_was_taken_is_not_taken_again_even_while_it_idles(at: Callable[[float], None]) -> None:
    clock = IdleClock()
    at(2)
    assert clock.taken() == 2
    at(5)
    assert clock.taken() == 3 and clock.taken() == 0
    with clock:
        at(7)
        assert clock.taken() == 0
    at(8)
    assert clock.taken() == 1


def test_a_lease_that_fails_ends_too(at: Callable[[float], None]) -> None:
    clock = IdleClock()
    with pytest.raises(ValueError), clock:
        at(3)
        raise ValueError
    at(4)
    assert clock.taken() == 1
