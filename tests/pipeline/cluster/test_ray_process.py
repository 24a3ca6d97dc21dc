"""How what a killed run left behind is found and ended: no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline import watchdog
from pipeline.cluster.ray_process import memory_root, shared_dir, sweep, tag_prefix, temp_dir


def sleeper(tag: str) -> subprocess.Popen[bytes]:
    """A process that wears the tag, and whose child wears it too."""
    program = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('up', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", program], env=os.environ | {watchdog.TAG_VARIABLE: tag},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_ray_s_folder_leaves_room_for_the_path_of_its_sockets() -> None:
    tag = f"{tag_prefix(Path('/a/very/long/run/directory'))}.4194304.99999999999"
    longest = temp_dir(tag) / "session_2026-11-23_12-51-07_123456_4194304" / "sockets" / "plasma_store"
    assert len(str(longest)) <= 107


def test_sweep_kills_what_a_dead_run_left_and_spares_a_living_one(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    dead_tag, living_tag = (watchdog.make_tag(tag_prefix(tmp_path), pid) for pid in (ended.pid, os.getpid()))
    other_tag = watchdog.make_tag(tag_prefix(tmp_path / "other"), ended.pid)
    left, mine, others = sleeper(dead_tag), sleeper(living_tag), sleeper(other_tag)
    folders = [shared_dir(dead_tag), temp_dir(dead_tag)]
    try:
        for folder in folders:
            folder.mkdir()
        assert sweep(tmp_path) == 0  # its run is alive: input() still waits
        ended.communicate()
        assert sweep(tmp_path) == 2  # the process and its child
        assert gone(left.pid) and not gone(mine.pid) and not gone(others.pid)
        assert not any(folder.exists() for folder in folders)
        assert not list(memory_root().glob(f"{tag_prefix(tmp_path)}.*"))
    finally:
        for tag in (living_tag, other_tag, dead_tag):
            watchdog.kill_tagged(tag)
        for process in (left, mine, others):
            process.communicate()


def test_pid_of_another_process_is_not_taken_for_the_run() -> None:
    tag = watchdog.make_tag("drover-x", os.getpid())
    assert watchdog.owner_is_alive(tag)
    prefix, pid, ticks = tag.rsplit(".", 2)
    assert not watchdog.owner_is_alive(f"{prefix}.{pid}.{int(ticks) - 1}")  # the same pid, used again


def test_watchdog_ends_everything_when_its_run_is_killed(tmp_path: Path) -> None:
    run = subprocess.Popen(["sleep", "60"])
    tag = watchdog.make_tag(tag_prefix(tmp_path), run.pid)
    left, folder = sleeper(tag), tmp_path / "shared"
    folder.mkdir()
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, tag, str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        time.sleep(0.5)
        assert guard.poll() is None and not gone(left.pid)
        run.kill()
        run.wait()
        assert guard.wait(timeout=10) == 0
        assert not watchdog.tags_by_pid(tag) and not folder.exists()
    finally:
        watchdog.kill_tagged(tag)
        guard.kill()
        guard.communicate()
        left.communicate()
