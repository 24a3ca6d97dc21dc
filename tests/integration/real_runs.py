"""Starting, watching and killing real runs: shared by the end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 420


def drover(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *words]


def start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    """A `drover` process in a session of its own, its output appended to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(drover(*words), cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def complete(*words: str, log: Path) -> int:
    """Run `drover` to its end; returns the exit code."""
    return start(*words, log=log).wait(timeout=DEADLINE_S)


def events(run_dir: Path) -> Iterator[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the last line of a killed process


def wait_for(
    process: subprocess.Popen[bytes],
    run_dir: Path,
    wanted: Callable[[dict[str, Any]], bool],
    *,
    after: float,
    log: Path,
) -> dict[str, Any]:
    """The first event since `after` (unix seconds) that is wanted; fails when the process ends before it."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for event in events(run_dir):
            if event["time"] >= after and wanted(event):
                return event
        if process.poll() is not None:
            raise AssertionError(f"the run ended ({process.returncode}) before the event:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)  # a poll, not a guess: the loop ends with the event
    raise AssertionError(f"no such event within {DEADLINE_S} s")


def at_step(number: int) -> Callable[[dict[str, Any]], bool]:
    """For `wait_for`: that many optimiser steps, or more, are done."""
    return lambda event: event["event"] == "progress" and event.get("done", 0) >= number


def processes_of(run_dir: Path) -> list[str]:
    """Live processes that belong to a run: by its folder in their command line, environment or open files."""
    import psutil

    found, needle = [], str(run_dir)
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            texts = [*process.cmdline(), *process.environ().values()]
            if any(needle in text for text in texts):
                found.append(f"{process.pid} {process.name()}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
