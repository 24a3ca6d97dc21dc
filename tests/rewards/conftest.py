"""One sandbox for all tests of the graders: real processes, with short limits so that a hang costs a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rewards.sandbox import Limits, Sandbox


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2, limits=Limits(cpu_s=1, wall_s=20.0)) as running:
        yield running
