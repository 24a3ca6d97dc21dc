"""Shared by all tests: environment set before any heavy import, and which tests are integration tests.

A test is an integration test exactly when it lies in tests/integration; those run last, after every cheap one passed.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("drover", deadline=None)  # no timed assertions: a busy machine is no fault
hypothesis.settings.load_profile("drover")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP processes on one core collapse
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub is wrong: fail at once, not after retries

# A script's background jobs ignore Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

UNIT_TIMEOUT_S = 180  # a hang guard; a unit test takes well under a second
INTEGRATION = Path(__file__).parent / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker(pytest.mark.integration)
        elif item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(UNIT_TIMEOUT_S))
    items.sort(key=lambda item: INTEGRATION in item.path.parents)  # stable: order within each kind is kept


@pytest.fixture(scope="module")
def memory_path() -> Iterator[Path]:
    """A folder in memory where there is one, for tests that write and sync by the thousand."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=root, prefix="drover-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]
