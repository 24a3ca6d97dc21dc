"""The arithmetic of the cluster, how an actor's errors reach its caller, and how leftovers are found: no Ray."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import watchdog
from pipeline.cluster import (
    Actor,
    ActorHost,
    _memory_root,
    _shared_dir,
    _tag_prefix,
    _temp_dir,
    plan_actors,
    sweep,
    thread_environment,
)
from pipeline.config import ClusterSettings
from pipeline.stage import DataError, GateStopped, InfrastructureError, RecipeError


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


def test_plan_counts_generators_and_one_learner() -> None:
    plan = plan_actors(ClusterSettings(generators=3, cpus_per_actor=2.0, gpus_per_actor=0.5))
    assert (plan.num_cpus, plan.num_gpus) == (8.0, 2.0)  # (3 + 1) x 2, (3 + 1) x 0.5


def test_plan_counts_the_engines_of_the_stage_that_asks_for_most() -> None:
    settings = ClusterSettings(generators=2, cpus_per_actor=2.0, gpus_per_actor=1.0)
    assert plan_actors(settings, most_engines=4).num_gpus == 5.0
    assert plan_actors(settings, most_engines=1).num_gpus == 3.0  # the RL stage still has two


class Refused(ValueError):
    """As torch, vLLM and rl.weight_sync raise them."""


@pytest.mark.parametrize("error", [Refused, ValueError, ArithmeticError, InfrastructureError])
def test_error_from_an_actor_names_actor_method_cause_and_last_lines(tmp_path: Path, error: type[Exception]) -> None:
    with pytest.raises(InfrastructureError) as caught:
        reply_of_failing_actor(tmp_path, error)
    for words in ("generator-0", "take_weights", error.__name__, "the reason", "last line of the log"):
        assert words in str(caught.value)


@pytest.mark.parametrize("error", [DataError, RecipeError, GateStopped])
def test_error_with_an_exit_code_of_its_own_keeps_its_type_and_words(tmp_path: Path, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        reply_of_failing_actor(tmp_path, error)
    assert str(caught.value) == "the reason"


def reply_of_failing_actor(tmp_path: Path, error: type[Exception]) -> None:
    async def take_weights() -> None:
        raise error("the reason")

    log = tmp_path / "generator-0.log"
    log.write_text("last line of the log")
    host = object.__new__(ActorHost)  # without its process: an async method needs nothing of it
    Actor("generator-0", None, log)._unwrap("take_weights", asyncio.run(host._answer(take_weights)))


def test_plan_says_what_a_node_lacks() -> None:
    plan = plan_actors(ClusterSettings(generators=3, cpus_per_actor=2.0, gpus_per_actor=0.5))
    assert plan.lacking({"CPU": 8.0, "GPU": 2.0}) == []
    assert plan.lacking({"CPU": 7.0}) == [
        "CPU: 3 generator + 1 learner or trainer ask for 8, this node has 7",
        "GPU: 3 generator + 1 learner or trainer ask for 2, this node has 0",
    ]


def test_every_thread_pool_gets_the_same_number() -> None:
    environment = thread_environment(3)
    assert {environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}


def test_ray_s_folder_leaves_room_for_the_path_of_its_sockets() -> None:
    tag = f"{_tag_prefix(Path('/a/very/long/run/directory'))}.4194304.99999999999"
    longest = _temp_dir(tag) / "session_2026-11-23_12-51-07_123456_4194304" / "sockets" / "plasma_store"
    assert len(str(longest)) <= 107


def test_sweep_kills_what_a_dead_run_left_and_spares_a_living_one(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    dead_tag, living_tag = (watchdog.make_tag(_tag_prefix(tmp_path), pid) for pid in (ended.pid, os.getpid()))
    other_tag = watchdog.make_tag(_tag_prefix(tmp_path / "other"), ended.pid)
    left, mine, others = sleeper(dead_tag), sleeper(living_tag), sleeper(other_tag)
    folders = [_shared_dir(dead_tag), _temp_dir(dead_tag)]
    try:
        for folder in folders:
            folder.mkdir()
        assert sweep(tmp_path) == 0  # its run is alive: input() still waits
        ended.communicate()
        assert sweep(tmp_path) == 2  # the process and its child
        assert gone(left.pid) and not gone(mine.pid) and not gone(others.pid)
        assert not any(folder.exists() for folder in folders)
        assert not list(_memory_root().glob(f"{_tag_prefix(tmp_path)}.*"))
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
    tag = watchdog.make_tag(_tag_prefix(tmp_path), run.pid)
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


def test_generators_go_where_most_room_is_left_beside_the_learners() -> None:
    settings = ClusterSettings(generators=4, learners=2, cpus_per_actor=2, gpus_per_actor=1)
    nodes = {"a": {"CPU": 16, "GPU": 3}, "b": {"CPU": 6, "GPU": 8}, "c": {"CPU": 64}}
    # Beside two learners a has room for one more; b for three, by its CPUs; c has no GPU.
    assert plan_actors(settings).nodes_of_generators(nodes, here="a") == ["b", "b", "a", "b"]
    crowded = plan_actors(settings.model_copy(update={"generators": 9}))
    assert len(crowded.nodes_of_generators(nodes, here="a")) == 4
    assert plan_actors(settings).nodes_of_generators({"a": nodes["a"]}, here="a") == ["a"]
