"""Ray for real: actors, their errors and deadlines, shared engines, and what is left when a run is killed (nothing)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_checkpoints import save_dense, save_llama4

from pipeline import watchdog
from pipeline.cluster import Cluster
from pipeline.cluster.ray_process import memory_root, tag_prefix
from pipeline.config import ClusterSettings
from pipeline.errors import DataError, InfrastructureError
from rl.types import EngineSettings, SampleRequest

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """What a stage might put into an actor."""

    def __init__(self, number: int) -> None:
        print("built with", number, flush=True)
        self.number = number

    def add(self, other: int) -> tuple[int, int, str]:
        return self.number + other, os.getpid(), os.environ["OMP_NUM_THREADS"]

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    async def nap(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    def hang_here(self) -> None:
        time.sleep(600)

    def fail(self, kind: str) -> None:
        raise {"data": DataError, "value": ValueError}[kind]("the reason")

    def die(self) -> None:
        print("about to leave", flush=True)
        os._exit(3)


class Refuses:
    def __init__(self) -> None:
        raise DataError("this file has no column 'answer'")


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]]) -> Iterator[Cluster]:
    def emit(event: str, **fields: Any) -> None:
        events.append({"event": event} | fields)

    cluster = Cluster(ClusterSettings(), tmp_path_factory.mktemp("run"), emit)
    yield cluster
    begin = time.monotonic()
    cluster.shutdown()
    assert time.monotonic() - begin < 10
    assert not watchdog.tags_by_pid(tag_prefix(cluster.run_dir))
    assert not list(memory_root().glob(f"{tag_prefix(cluster.run_dir)}.*"))


def test_actor_is_another_process_with_its_threads_environment_and_log(
    cluster: Cluster, events: list[dict[str, Any]]
) -> None:
    actor = cluster.start("adder", Worker, 40, num_threads=3, env={"MINE": "yes"})
    total, pid, threads = actor.call("add", 2, timeout_s=20)
    assert (total, threads) == (42, "3") and pid != os.getpid()
    assert actor.call("variable", "MINE", timeout_s=20) == "yes"
    assert "built with 40" in (cluster.run_dir / "logs" / "adder.log").read_text()
    assert [event["event"] for event in events if event.get("actor") == "adder"] == ["actor_started"]
    cluster.stop(actor)
    cluster.stop(actor)  # harmless
    with pytest.raises(InfrastructureError, match="actor adder died during add"):
        actor.call("add", 2, timeout_s=20)


def test_async_calls_overlap(cluster: Cluster) -> None:
    actor = cluster.start("napper", Worker, 0)

    async def ten_naps() -> list[float]:
        return await asyncio.gather(*(actor.call_async("nap", 0.5, timeout_s=20) for _ in range(10)))

    begin = time.monotonic()
    assert asyncio.run(ten_naps()) == [0.5] * 10
    assert time.monotonic() - begin < 3
    cluster.stop(actor)


def test_known_errors_keep_their_type_and_others_become_infrastructure_errors(cluster: Cluster) -> None:
    actor = cluster.start("failing", Worker, 0)
    with pytest.raises(DataError, match="the reason"):
        actor.call("fail", "data", timeout_s=20)
    for call in (
        lambda: actor.call("fail", "value", timeout_s=20),
        lambda: asyncio.run(actor.call_async("fail", "value", timeout_s=20)),
    ):
        with pytest.raises(InfrastructureError, match="actor failing: fail failed: ValueError: the reason") as caught:
            call()
        assert "in fail" in str(caught.value)  # the traceback's last lines, from the actor's log
    assert actor.call("add", 1, timeout_s=20)[0] == 1  # it goes on
    cluster.stop(actor)


def test_error_while_building_keeps_its_type_and_leaves_no_actor(cluster: Cluster) -> None:
    with pytest.raises(DataError, match="no column 'answer'"):
        cluster.start("refuses", Refuses)
    assert all(actor.name != "refuses" for actor in cluster._actors)


def test_passed_deadline_names_actor_method_and_where_it_hangs(cluster: Cluster) -> None:
    actor = cluster.start("slow", Worker, 0)
    for call in (
        lambda: actor.call("hang_here", timeout_s=1),
        lambda: asyncio.run(actor.call_async("hang_here", timeout_s=1)),
    ):
        begin = time.monotonic()
        with pytest.raises(InfrastructureError, match="actor slow: hang_here did not answer within 1 s"):
            call()
        assert time.monotonic() - begin < 5
    assert "in hang_here" in actor.log.read_text()
    cluster.stop(actor)


def test_dead_actor_is_named_with_its_last_lines(cluster: Cluster) -> None:
    for number, blocking in enumerate((True, False)):
        actor = cluster.start(f"mortal-{number}", Worker, 0)
        with pytest.raises(InfrastructureError, match=f"actor mortal-{number} died during die") as caught:
            if blocking:
                actor.call("die", timeout_s=30)
            else:
                asyncio.run(actor.call_async("die", timeout_s=30))
        assert "about to leave" in str(caught.value) and str(actor.log) in str(caught.value)


def test_cancelled_call_is_cancelled_inside_the_actor(cluster: Cluster) -> None:
    actor = cluster.start("cancelled", Worker, 0)

    async def cancel_soon() -> None:
        task = asyncio.ensure_future(actor.call_async("nap", 60.0, timeout_s=90))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begin = time.monotonic()
    asyncio.run(cancel_soon())
    assert actor.call("add", 1, timeout_s=20)[0] == 1
    assert time.monotonic() - begin < 10
    cluster.stop(actor)


def test_engines_are_reused_restarted_in_place_and_shared(
    cluster: Cluster, events: list[dict[str, Any]], tmp_path: Path
) -> None:
    paths = {name: save(tmp_path / name, seed) for name, save, seed in (
        ("moe-a", save_llama4, 0), ("moe-b", save_llama4, 1), ("dense", save_dense, 0))}  # fmt: skip

    def settings(name: str) -> EngineSettings:
        return EngineSettings(checkpoint=str(paths[name]), max_model_len=256, max_num_seqs=16, kv_cache_gib=0.1)

    def greedy(actor: Any) -> tuple[list[int], list[int]]:
        request = SampleRequest(request_id="r", prompt_ids=[1, 5, 9], num_samples=1, max_tokens=8, temperature=0.0)
        (answer,) = actor.call("sample", request, timeout_s=60)
        return answer.token_ids, answer.versions

    def starts() -> int:
        return sum(event["event"] == "actor_started" and event["actor"].startswith("generator") for event in events)

    cluster.prestart_generators(settings("moe-a"), "moe")
    (first,) = cluster.generators(settings("moe-a"), "moe")
    pid, answer_a = first._pid, greedy(first)
    (again,) = cluster.generators(settings("moe-b"), "moe")  # the same shape: new weights in the same engine
    answer_b = greedy(again)
    assert again is first and starts() == 1
    assert answer_b[0] != answer_a[0] and set(answer_b[1]) == {0}
    begin = time.monotonic()
    (dense,) = cluster.generators(settings("dense"), "dense")  # another shape: a new engine in the same process
    assert dense is first and dense._pid == pid and starts() == 2
    assert greedy(dense)[0] and time.monotonic() - begin < 30
    (back,) = cluster.generators(settings("moe-a"), "moe")
    assert greedy(back) == answer_a

    os.kill(back._pid, signal.SIGKILL)  # a dead engine is replaced, not handed out
    time.sleep(1)
    (replaced,) = cluster.generators(settings("moe-a"), "moe")
    assert replaced._pid != pid and greedy(replaced) == answer_a
    with pytest.raises(InfrastructureError, match="sample failed: ValueError: .* the prompt has 300 tokens"):
        replaced.call(
            "sample", SampleRequest(request_id="r", prompt_ids=[1] * 300, num_samples=1, max_tokens=8), timeout_s=60
        )


# --- runs of their own: killed, interrupted, attached ---------------------------------------------------------------

RUN = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
from pipeline.cluster import Cluster
from pipeline.config import ClusterSettings
from rl.types import EngineSettings
from test_cluster import Worker
{prelude}
cluster = Cluster(ClusterSettings(address={address!r}), Path({run_dir!r}), lambda *_, **__: None)
try:
    actor = cluster.start("worker", Worker, 1)
    {engine}
    print("ready", actor.call("add", 1, timeout_s=30)[0], flush=True)
    {wait}
finally:
    begin = time.monotonic()
    cluster.shutdown()
    print("shut down in", time.monotonic() - begin, flush=True)
"""
WAIT = 'actor.call("hang_here", timeout_s=600)'


def run_process(
    tmp_path: Path,
    *,
    checkpoint: Path | None = None,
    address: str | None = None,
    wait: str = WAIT,
    prelude: str = "",
    **env: str,
) -> subprocess.Popen[str]:
    """A driver of its own, with an empty home, up to the moment it says it is ready."""
    engine = "pass"
    if checkpoint is not None:
        engine = f'cluster.generators(EngineSettings(checkpoint={str(checkpoint)!r}, max_model_len=128), "x")'
    program = RUN.format(
        root=str(ROOT), here=str(Path(__file__).parent), run_dir=str(tmp_path / "run"), engine=engine, wait=wait,
        address=address, prelude=prelude,
    )  # fmt: skip
    (tmp_path / "home").mkdir(exist_ok=True)
    run = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"HOME": str(tmp_path / "home")} | env,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None and run.stdout.readline() == "ready 2\n"
    return run


def left_after(run_dir: Path, deadline_s: float) -> list[int]:
    """Processes of the run that are still there when the deadline passes; returns as soon as there is none."""
    end = time.monotonic() + deadline_s
    while (left := sorted(watchdog.tags_by_pid(tag_prefix(run_dir)))) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def test_killed_run_leaves_no_process_no_folder_and_nothing_in_the_home_directory(tmp_path: Path) -> None:
    run = run_process(tmp_path, checkpoint=save_dense(tmp_path / "dense", 0))
    assert len(watchdog.tags_by_pid(tag_prefix(tmp_path / "run"))) > 8  # Ray's, the actors', the engine core's
    run.kill()
    run.communicate()
    assert left_after(tmp_path / "run", 10) == []
    time.sleep(0.5)  # the watchdog removes folders last
    prefix = tag_prefix(tmp_path / "run")
    assert not list(memory_root().glob(f"{prefix}*")) and not list(Path("/tmp").glob(f"{prefix}*"))
    assert not (tmp_path / "home" / ".ray").exists()


SLOW_START = """
from pipeline.cluster.ray_process import PrivateRay

start, starts = PrivateRay._start, []

def times_out(*_):
    raise Exception("The current node timed out during startup")

def first_is_slow(self, ray):
    services = ray._private.services
    real = services.get_node
    starts.append(self)
    if len(starts) == 1:
        services.get_node = times_out
    try:
        start(self, ray)
    finally:
        services.get_node = real

PrivateRay._start = first_is_slow
"""


def test_ray_that_is_not_up_in_its_own_time_is_started_once_more(tmp_path: Path) -> None:
    run = run_process(tmp_path, prelude=SLOW_START)
    commands = [
        Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
        for pid in watchdog.tags_by_pid(tag_prefix(tmp_path / "run"))
    ]
    assert sum(Path(command).name == "raylet" for command in commands) == 1  # of the first start nothing is left
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=30)
    assert left_after(tmp_path / "run", 1) == []


def test_ctrl_c_during_a_call_ends_the_run_within_ten_seconds(tmp_path: Path) -> None:
    run = run_process(tmp_path)
    begin = time.monotonic()
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert time.monotonic() - begin < 10
    assert "shut down in" in output and run.returncode != 0
    assert left_after(tmp_path / "run", 1) == []


def test_attached_cluster_outlives_the_run(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    port = 20_000 + os.getpid() % 20_000
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=4",
               "--include-dashboard=false", f"--temp-dir=/tmp/ray-{port}", "--node-ip-address=127.0.0.1"]  # fmt: skip
    head = subprocess.Popen(command, env=os.environ | auth, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(6)
        for _ in range(2):  # the second finds the cluster that the first left running
            run = run_process(tmp_path, address="auto", wait="pass", RAY_ADDRESS=f"127.0.0.1:{port}", **auth)
            output, _ = run.communicate(timeout=60)
            assert run.returncode == 0 and "shut down in" in output
            assert head.poll() is None
    finally:
        head.terminate()
        head.wait(timeout=30)
        subprocess.run(["rm", "-rf", f"/tmp/ray-{port}"], check=False)
