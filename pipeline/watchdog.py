"""Sees to it that a private Ray and everything below it ends with the run, however the run ends.

`pipeline/cluster` starts this file as a process of its own and tags every process of its cluster through an
environment variable, which all descendants inherit. When the run goes away (or closes our stdin), whatever still wears
the tag is killed and its folders are removed. Only the standard library: it must start in milliseconds.

    python -I -S watchdog.py TAG FOLDER...        stdin: a pipe that the run holds open
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

TAG_VARIABLE = "DROVER_CLUSTER"
KILL_DEADLINE_S = 5.0
POLL_S = 0.02


def start_ticks(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; with the pid it names one process for ever."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def make_tag(prefix: str, pid: int) -> str:
    """`<prefix>.<pid>.<start of pid>`: says whose cluster a process belongs to."""
    return f"{prefix}.{pid}.{start_ticks(pid)}"


def owner_is_alive(tag: str) -> bool:
    _, pid, ticks = tag.rsplit(".", 2)
    return str(start_ticks(int(pid))) == ticks


def tags_by_pid(prefix: str) -> dict[int, str]:
    """The tag of every living process whose tag begins with `prefix`."""
    wanted = f"{TAG_VARIABLE}={prefix}".encode()
    found: dict[int, str] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not entry.isdigit():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        tag = next((line for line in environment if line.startswith(wanted)), None)
        if tag is not None:
            found[int(entry)] = tag.partition(b"=")[2].decode()
    return found


def kill_tagged(tag: str, deadline_s: float = KILL_DEADLINE_S) -> int:
    """SIGKILL every process that wears `tag`, until there is none; returns how many there were."""
    killed: set[int] = set()
    deadline = time.monotonic() + deadline_s
    while (pids := [pid for pid, worn in tags_by_pid(tag).items() if worn == tag]) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.add(pid)
        time.sleep(POLL_S)
    return len(killed)


def main(tag: str, folders: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the run; we outlive it
    owner = int(tag.rsplit(".", 2)[1])
    try:
        owner_ended = [os.pidfd_open(owner)]
    except OSError:  # already gone
        owner_ended = []
    if owner_ended:
        select.select([sys.stdin, *owner_ended], [], [])
    kill_tagged(tag)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
