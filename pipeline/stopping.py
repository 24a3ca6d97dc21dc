"""How a run stops when it is told to: within ten seconds, and with no process left behind.

The first SIGINT or SIGTERM raises KeyboardInterrupt in the main thread, so that every `finally` runs. A second one, or
`GRACE_S` without an end, kills what the run started and leaves at once. Used by `pipeline/runner.py`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

GRACE_S = 8.0  # a stop takes at most ten seconds; the rest is for killing and leaving
REAP_S = 1.5  # longest wait for killed processes to be gone
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"  # the live view hides it
PR_SET_CHILD_SUBREAPER = 36  # prctl: orphans below us become our children, so that we still find them


class StopGuard:
    """A context in which a signal ends the run cleanly. On leaving, every process started inside it is gone.

    Outside the main thread it only cleans up, since Python hands signals to the main thread.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the signal that asked for the stop
        self._watchdog: threading.Timer | None = None
        self._earlier_handlers: dict[int, Any] = {}
        self._earlier_processes: set[int] = set()

    @property
    def exit_code(self) -> int:
        """130 after ctrl-C, 143 after SIGTERM, as a shell would say."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> StopGuard:
        self._earlier_processes = set(descendants())
        _adopt_orphans(True)
        if threading.current_thread() is threading.main_thread():
            self._earlier_handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_what_is_left()
        if self._watchdog is not None:
            self._watchdog.cancel()
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        _adopt_orphans(False)

    def listen(self) -> None:
        """Take the signals (again): Ray puts its own SIGTERM handler, `sys.exit(15)`, in the place of ours."""
        if self._earlier_handlers:
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def begin(self, number: int) -> None:
        """Note that the run is stopping, and see to it that it does."""
        if self.signal is None:
            signal.alarm(0)  # see `put_handlers_back`: should the signal have come before it was called
            self.signal = number
            self._watchdog = threading.Timer(GRACE_S, self._leave_now)
            self._watchdog.daemon = True
            self._watchdog.start()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            self._leave_now()
        self.begin(number)
        raise KeyboardInterrupt

    def _leave_now(self) -> None:
        self._kill_what_is_left()
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), SHOW_CURSOR)
        os._exit(self.exit_code)

    def _kill_what_is_left(self) -> None:
        """SIGKILL and reap every process started since the guard was entered, and those started meanwhile."""
        deadline = time.monotonic() + REAP_S
        while (left := set(descendants()) - self._earlier_processes) and time.monotonic() < deadline:
            for pid in left:
                _kill_and_reap(pid)
            time.sleep(0.01)


def put_handlers_back() -> None:
    """Make Python's handlers those of the process again. Ray's core puts its own beneath them, from any thread: they
    fill the screen with addresses, and abort the process three seconds after a SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) is not None:  # None: not Python's
                signal.signal(number, handler)


def descendants() -> list[int]:
    """The pids of every living process below this one (Linux; elsewhere none are found)."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit() and (parent := _parent_of(int(entry))) is not None:
            children.setdefault(parent, []).append(int(entry))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _kill_and_reap(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # not (yet) a child of ours: its own parent, which dies too, or the next round
        os.waitpid(pid, os.WNOHANG)


def _parent_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])  # the name before it may hold spaces and brackets
    except (FileNotFoundError, ProcessLookupError):
        return None


def _adopt_orphans(adopt: bool) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)
