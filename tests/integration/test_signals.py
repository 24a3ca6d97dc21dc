"""The runner as a process of its own: killed, interrupted, and stopped twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from pipeline.runner import Doors, run
    from runner_world import World, make_recipe

    root, how = Path(sys.argv[1]), sys.argv[2]
    world = World(root)

    def slow(context):
        child = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        (context.work / "half_written").write_text("x")
        (root / "pids").write_text(f"{os.getpid()} {child.pid}")
        if how == "ray":
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # what ray.init does to a driver
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                if how != "deaf":
                    raise

    STUBBORN = (
        "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print('up', flush=True); "
        "time.sleep(600)"
    )
    if how != "quick":
        world.behaviour["warm"] = slow
    code = run(make_recipe(root), doors=world.doors())
    print("ran", *world.ran)
    sys.exit(code)
    """
)


def start(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'pipeline'}"}
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path), how],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def wait_until_slow(tmp_path: Path, process: subprocess.Popen[str]) -> list[int]:
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.05)
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_kill_in_the_middle_of_a_stage_then_the_same_command_completes(tmp_path: Path) -> None:
    process = start(tmp_path, "slow")
    pids = wait_until_slow(tmp_path, process)
    process.kill()
    process.wait(timeout=10)
    os.kill(pids[1], signal.SIGKILL)  # the stage's child is Ray's to end; here there is no Ray
    run_dir = RunDir(tmp_path / "run")
    assert (tmp_path / "run/warm.partial/half_written").exists() and run_dir.read_complete("warm") is None
    assert run_dir.holder() is None
    again = start(tmp_path, "quick")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "ran warm climb score" in output, output
    assert run_dir.read_complete("warm", verify=True) and not (tmp_path / "run/warm/half_written").exists()


@pytest.mark.parametrize(
    ("how", "number", "exit_code"),
    [
        ("slow", signal.SIGINT, 130),
        ("slow", signal.SIGTERM, 143),
        ("ray", signal.SIGTERM, 143),
        ("deaf", signal.SIGINT, 130),
    ],
)
def test_signal_stops_within_ten_seconds_and_leaves_no_process(
    tmp_path: Path, how: str, number: signal.Signals, exit_code: int
) -> None:
    process = start(tmp_path, how)
    pids = wait_until_slow(tmp_path, process)
    began = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == exit_code, output
    assert not any(lives(pid) for pid in pids)
    if how != "deaf":
        assert "Resume with" in output
        assert RunDir(tmp_path / "run").read_events()[-1]["exit_code"] == exit_code


def test_second_signal_leaves_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf")
    pids = wait_until_slow(tmp_path, process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - began < 4 and process.returncode == 130
    assert not any(lives(pid) for pid in pids)
