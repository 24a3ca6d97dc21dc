"""Stage 2 in a Ray cluster of two nodes, both of them here: the generator on the other one than the learner."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from real_runs import ROOT, complete, events
from test_submit import free_ports

NODES_UP_S = 90.0


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """Their address. Each has one CPU to give: the learner's node has none left for the generator."""
    folder = Path(tempfile.mkdtemp(prefix="drs", dir="/tmp"))  # short: Ray's socket paths may have 107 characters
    ray = str(Path(sys.executable).with_name("ray"))
    ports = free_ports(3)
    common = ("--block", "--disable-usage-stats", "--num-cpus=1", f"--object-store-memory={200_000_000}")
    address = f"127.0.0.1:{ports[0]}"
    head = (
        *("--head", "--node-ip-address=127.0.0.1", f"--port={ports[0]}", "--include-dashboard=false"),
        *(f"--temp-dir={folder}/ray", f"--ray-client-server-port={ports[1]}"),
    )
    processes = []
    with (folder / "log").open("w") as log:
        for place in (head, (f"--address={address}", "--node-ip-address=127.0.0.1")):
            processes.append(subprocess.Popen([ray, "start", *place, *common], stdout=log, stderr=log))
            wait_for_nodes(ray, address, len(processes), folder / "log")
    try:
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(ray: str, address: str, number: int, log: Path) -> None:
    deadline = time.monotonic() + NODES_UP_S
    while True:
        status = subprocess.run([ray, "status", f"--address={address}"], capture_output=True, text=True).stdout
        if f"/{number}.0 CPU" in status:
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def test_weights_reach_a_generator_on_another_node(two_nodes: str, tmp_path: Path) -> None:
    climb = {
        "name": "climb", "kind": "online_rl", "policy": f"{ROOT / 'recipes' / 'tiny_base'}/",
        "tasks": {"domains": ["maths"], "levels": [1, 3]}, "steps": 4, "groups_per_step": 2, "group_size": 8,
        "max_staleness": 1, "max_answer_tokens": 32, "save_every_steps": 0,
    }  # fmt: skip
    recipe = {
        "run": {"name": "two_nodes", "dir": str(tmp_path / "run"), "seed": 5},
        "cluster": {"address": two_nodes, "weight_transfer": "network"},
        "stages": [climb],
    }
    path, log = tmp_path / "recipe.yaml", tmp_path / "log.txt"
    path.write_text(yaml.safe_dump(recipe))
    assert complete("run", str(path), log=log) == 0, log.read_text()[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run/climb/steps.jsonl").read_text().splitlines()]
    assert [step["version"] for step in steps] == [1, 2, 3, 4] and any(step["weights_moved"] for step in steps[:-1])
    # With the same weights engine and learner say the same; with those of any other version they do not (docs/log.md).
    assert all(step["mismatch_k3"] < 1e-4 for step in steps if "mismatch_k3" in step)
    nodes = {event["actor"]: event["node"] for event in events(tmp_path / "run") if event["event"] == "actor_started"}
    assert nodes["generator-0"] != nodes["climb-learner-0"]
