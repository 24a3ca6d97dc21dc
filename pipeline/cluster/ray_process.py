"""Ray itself: a private one of this run, or somebody else's that it joins; and what a killed run leaves of its own.

All processes of a private Ray wear the run's tag in their environment. The watchdog kills what wears it when the run is
gone; `sweep` does so where the watchdog was killed too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import watchdog
from pipeline.cluster.resource_plan import ResourcePlan
from pipeline.config import ClusterSettings
from pipeline.errors import InfrastructureError
from pipeline.stopping import put_handlers_back

ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 200 * 2**20  # prompts and answers pass through it; weights do not
SPARE_CPUS = 4  # logical CPUs for actors beyond the plan
SHUTDOWN_S = 6.0
AUTH_TOKEN = secrets.token_hex(32)  # of every private Ray of this process: Ray reads it once


def tag_prefix(run_dir: Path) -> str:
    return "drover-" + hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]


def temp_dir(tag: str) -> Path:
    """Ray's temporary folder. Its path is short: Unix sockets lie deep in it, and theirs may have 107 characters."""
    root = tempfile.gettempdir()
    return Path(root if len(root) < 16 else "/tmp") / "-".join(tag.split(".")[:2])


def memory_root() -> Path:
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())


def shared_dir(tag: str) -> Path:
    return memory_root() / f"{tag}.weights"


def sweep(run_dir: Path) -> int:
    """Kill what an earlier run of this directory left behind and remove its folders; returns the processes killed.

    The watchdog does this at once; this is for when it was killed too. A run that is alive is not touched.
    """
    prefix = tag_prefix(run_dir) + "."
    tags = set(watchdog.tags_by_pid(prefix).values())
    tags |= {folder.name.removesuffix(".weights") for folder in memory_root().glob(f"{prefix}*.weights")}
    dead = [tag for tag in tags if not watchdog.owner_is_alive(tag)]
    killed = sum(watchdog.kill_tagged(tag) for tag in dead)
    for tag in dead:
        for folder in (temp_dir(tag), shared_dir(tag)):
            shutil.rmtree(folder, ignore_errors=True)
    return killed


class PrivateRay:
    """A private Ray on this machine, started in a thread that lives as long as it does.

    The thread is not for speed alone: Ray's processes are tied to the thread that started them and would die with a
    short-lived one, and outside the main thread Ray leaves our signal handlers alone.
    """

    def __init__(self, settings: ClusterSettings, run_dir: Path, plan: ResourcePlan) -> None:
        self.settings, self.run_dir, self.plan = settings, run_dir, plan
        self.tag = watchdog.make_tag(tag_prefix(run_dir), os.getpid())
        self.temp_dir, self.shared_dir = temp_dir(self.tag), shared_dir(self.tag)
        self._up: Future[None] = Future()
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._guard: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._live, name="ray", daemon=True).start()

    def wait(self, deadline_s: float) -> None:
        """Until Ray is up; InfrastructureError when it is not within the deadline, or failed to start."""
        try:
            self._up.result(timeout=deadline_s)
        except FutureTimeout:
            raise InfrastructureError(f"Ray did not start within {deadline_s:g} s; see {self.temp_dir}") from None
        except Exception as error:
            raise InfrastructureError(f"Ray did not start: {type(error).__name__}: {error}") from error
        put_handlers_back()

    def _live(self) -> None:
        try:
            self._guard = self._open()
            self._connect()
        except BaseException as error:
            self._up.set_exception(error)
            self._closed.set()
            return
        self._up.set_result(None)
        self._closing.wait()
        import ray

        with contextlib.suppress(Exception):
            ray.shutdown()
        self._closed.set()

    def _open(self) -> subprocess.Popen[bytes] | None:
        """Folders and the watchdog, before the first process that would need it."""
        for folder in (self.temp_dir, self.shared_dir):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
        command = [sys.executable, "-I", "-S", watchdog.__file__, self.tag, str(self.temp_dir), str(self.shared_dir)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    def _connect(self) -> None:
        token_file = self.temp_dir / "auth_token"
        token_file.write_text(AUTH_TOKEN)
        token_file.chmod(0o600)
        os.environ |= {
            "RAY_AUTH_MODE": "token",  # only this run's processes may talk to this Ray
            "RAY_AUTH_TOKEN_PATH": str(token_file),  # Ray would write one into the home directory
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that asks for no GPU sees none
        }
        inherited = {
            # Large tensors come and go with every step, and each time their pages are handed out anew.
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
            watchdog.TAG_VARIABLE: self.tag,
            "SPT_NOENV": "1",  # a changed process title must not overwrite the tag
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        import logging

        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        with _environment(inherited):
            try:
                self._start(ray)
            except Exception:
                # Ray gives its own processes 30 s, whatever we would; a busy machine may need more.
                watchdog.kill_tagged(self.tag)
                self._start(ray)

    def _start(self, ray: ModuleType) -> None:
        ray.init(
            address="local",  # never someone else's, whatever RAY_ADDRESS says
            num_cpus=int(self.plan.num_cpus) + 1 + SPARE_CPUS,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self.temp_dir),
            _node_ip_address="127.0.0.1",
            # Idle workers started in advance would be in the way of the first actors.
            _system_config={"enable_worker_prestart": False, "prestart_worker_first_driver": False},
        )

    def actor_environment(self) -> dict[str, str]:
        return {"VLLM_RPC_BASE_PATH": str(self.temp_dir)}  # its sockets are removed with the folder

    def lacking(self) -> list[str]:
        import ray

        if self.settings.weight_transfer == "network":
            placed, wanted = len(self.nodes_of_generators()), self.plan.actors[0].count
            return self.plan.lacking(ray.cluster_resources()) or (
                [f"{placed} of {wanted} generators fit beside the learners, which share the driver's node"]
                if placed < wanted
                else []
            )
        here = ray.get_runtime_context().get_node_id()
        return self.plan.lacking(self._nodes()[here])

    def nodes_of_generators(self) -> list[str]:
        import ray

        return self.plan.nodes_of_generators(self._nodes(), ray.get_runtime_context().get_node_id())

    def _nodes(self) -> dict[str, dict[str, float]]:
        import ray

        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def close(self, handles: list[Any]) -> None:
        """Stop Ray, and let the watchdog kill what does not stop. Never waits for an actor to be polite."""
        self._closing.set()
        self._closed.wait(SHUTDOWN_S)
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(watchdog.KILL_DEADLINE_S / 2)


class AttachedRay(PrivateRay):
    """Somebody else's Ray, as in a Ray Job: its actors are ours, the cluster is not, and outlives us."""

    def _open(self) -> None:
        self.shared_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return None

    def _connect(self) -> None:
        import ray

        ray.init(address=self.settings.address, configure_logging=False, log_to_driver=False)
        if lacking := self.lacking():
            ray.shutdown()
            raise RuntimeError(f"{self._room()} is too small: " + "; ".join(lacking))

    def _room(self) -> str:
        return "the cluster" if self.settings.weight_transfer == "network" else "the node of this run"

    def actor_environment(self) -> dict[str, str]:
        return {}

    def close(self, handles: list[Any]) -> None:
        import ray

        for handle in handles:
            with contextlib.suppress(Exception):
                ray.kill(handle)
        self._closing.set()
        self._closed.wait(SHUTDOWN_S)
        shutil.rmtree(self.shared_dir, ignore_errors=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
