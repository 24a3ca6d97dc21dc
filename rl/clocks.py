"""How long each party of the loop waits, and for what. Used by `rl/loop.py`; read from `steps.jsonl`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Timings:
    """Seconds each party waited, and what was generated, since the last step."""

    generated_tokens: int = 0
    sync_ms: float = 0.0
    loop_lag_s: float = 0.0  # longest that this process's event loop was kept from its work
    last_step_end: float = field(default_factory=time.perf_counter)


class IdleClock:
    """Seconds in which a generator had nothing to sample."""

    def __init__(self) -> None:
        self._num_leases, self._seconds, self._idle_since = 0, 0.0, time.perf_counter()

    def __enter__(self) -> None:
        if not self._num_leases:
            self._seconds += time.perf_counter() - self._idle_since
        self._num_leases += 1

    def __exit__(self, *_: object) -> None:
        self._num_leases -= 1
        self._idle_since = time.perf_counter()

    def taken(self) -> float:
        """What was not taken yet."""
        now = time.perf_counter()
        if not self._num_leases:
            self._seconds += now - self._idle_since
            self._idle_since = now
        seconds, self._seconds = self._seconds, 0.0
        return seconds
