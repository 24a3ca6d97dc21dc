"""Ray: the resource plan as plain arithmetic, then the thin part that asks Ray for it. The only door to Ray's actors.

The runner builds one `Cluster` per run; stages start plain classes as actors with it and share its vLLM engines.
Promises: every call has a deadline; a dead, silent or failing actor becomes an InfrastructureError with its last log
lines; after `shutdown`, or after a kill -9 of the run, no process of a private Ray is left.

    run ── Cluster ─┬─▶ raylet ─▶ ActorHost (our class inside) ─▶ engine core     all wear the run's tag
                    └─▶ watchdog: kills what wears the tag when the run is gone

Waits, and what ends them: Ray's start, an actor's start (start_deadline_s); a call (its timeout_s, the actor's death,
ctrl-C); shutdown (SHUTDOWN_S, then the watchdog).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import watchdog
from pipeline.config import ClusterSettings
from pipeline.stage import DataError, GateStopped, InfrastructureError, RecipeError
from pipeline.stopping import put_handlers_back
from rl.types import EngineSettings

ROOT = Path(__file__).resolve().parents[1]
OBJECT_STORE_BYTES = 200 * 2**20  # prompts and answers pass through it; weights do not
SPARE_CPUS = 4  # logical CPUs for actors beyond the plan
STOP_S = 5.0
SHUTDOWN_S = 6.0
LOG_LINES = 15
KEPT_ERRORS = (DataError, RecipeError, GateStopped)  # they keep their type on the way: each has its own exit code
AUTH_TOKEN = secrets.token_hex(32)  # of every private Ray of this process: Ray reads it once


# --- the plan: arithmetic, no Ray ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActorPlan:
    role: str
    count: int
    num_cpus: float  # each; logical: Ray counts them, nothing enforces them
    num_gpus: float  # each


@dataclass(frozen=True)
class ResourcePlan:
    """What the actors of a run ask of Ray at the same time."""

    actors: tuple[ActorPlan, ...]

    @property
    def num_cpus(self) -> float:
        return sum(actor.count * actor.num_cpus for actor in self.actors)

    @property
    def num_gpus(self) -> float:
        return sum(actor.count * actor.num_gpus for actor in self.actors)

    def nodes_of_generators(self, nodes: Mapping[str, Mapping[str, float]], here: str) -> list[str]:
        """A node for each generator that fits, where they need not be `here`, on the node that the learners have: each
        goes to where most room is left. `nodes`: node → its resources."""
        generator, learner = self.actors
        asked = {"CPU": generator.num_cpus, "GPU": generator.num_gpus}
        room = {
            node: min(int(resources.get(kind, 0) // number) for kind, number in asked.items() if number)
            for node, resources in sorted(nodes.items())
        }
        room[here] -= learner.count
        chosen: list[str] = []
        while len(chosen) < generator.count and room[most := max(room, key=room.__getitem__)] > 0:
            chosen.append(most)
            room[most] -= 1
        return chosen

    def lacking(self, available: Mapping[str, float]) -> list[str]:
        """What a node with `available` resources cannot give, one line each; empty where the plan fits."""
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        who = " + ".join(f"{actor.count} {actor.role}" for actor in self.actors)
        return [
            f"{kind}: {who} ask for {number:g}, this node has {available.get(kind, 0):g}"
            for kind, number in asked.items()
            if number > available.get(kind, 0)
        ]


def plan_actors(settings: ClusterSettings, most_engines: int = 0) -> ResourcePlan:
    """The most actors a run has at once: its generators, and its learners or, in their place, a trainer.

    `most_engines`: the largest number that a stage asks for instead of `settings.generators`. Engines outlive their
    stage, so a trainer may find that many.
    """
    share = (settings.cpus_per_actor, settings.gpus_per_actor)
    return ResourcePlan((
        ActorPlan("generator", max(settings.generators, most_engines), *share),
        ActorPlan("learner or trainer", settings.learners, *share),
    ))  # fmt: skip


def thread_environment(num_threads: int) -> dict[str, str]:
    """Two OpenMP processes with more threads than cores collapse; every library that counts threads gets a number."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: str(num_threads) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}


# --- inside the actor's process -----------------------------------------------------------------------------------


class ActorHost:
    """The process around one object of ours: its environment, its log, its errors. Made remote in `Cluster`."""

    def __init__(self, log: str, environment: dict[str, str], import_path: list[str]) -> None:
        import faulthandler
        from concurrent.futures import ThreadPoolExecutor

        os.makedirs(os.path.dirname(log), exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # where is it? asked when a deadline passes
        os.environ.update(environment)
        sys.path += [entry for entry in import_path if entry not in sys.path and os.path.isdir(entry)]
        # One thread for everything that is not async: torch keeps its state per thread.
        self._executor = ThreadPoolExecutor(1, "worker")
        self._object: Any = None
        self._built = asyncio.Event()

    async def build(self, payload: bytes) -> tuple[bool, Any]:
        """Make the object; answers with the pid. Its class is unpickled here, with the environment set: it may import
        torch."""
        try:
            return await self._answer(self._build, payload)
        finally:
            self._built.set()

    def _build(self, payload: bytes) -> int:
        from ray import cloudpickle

        cls, args = cloudpickle.loads(payload)
        self._object = cls(*args)
        return os.getpid()

    async def invoke(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        await self._built.wait()
        return await self._answer(getattr(self._object, method), *args, **kwargs)

    async def _answer(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        """(True, the result) or (False, the error as its caller shall see it)."""
        import functools
        import inspect
        import traceback

        try:
            if inspect.iscoroutinefunction(function):
                return True, await function(*args, **kwargs)
            call = functools.partial(function, *args, **kwargs)
            return True, await asyncio.get_running_loop().run_in_executor(self._executor, call)
        except Exception as error:
            traceback.print_exc()
            for kind in KEPT_ERRORS:
                if isinstance(error, kind):
                    return False, (kind, str(error))
            return False, (None, f"{type(error).__name__}: {error}")


# --- the caller's side of an actor --------------------------------------------------------------------------------


class ActorGone(InfrastructureError):
    """The actor's process ended, or a call passed its deadline."""


class ActorFailed(InfrastructureError):
    """A method raised. `kind` is the name of the error's class."""

    kind = ""


class Actor:
    """A handle to one actor. Every call names its deadline; whatever goes wrong names actor, method and cause."""

    def __init__(self, name: str, handle: Any, log: Path, node: str = "") -> None:
        self.name, self.log, self.node = name, log, node
        self._handle, self._pid = handle, 0

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Call a method and wait for it, at most `timeout_s` seconds. Not for use inside an event loop."""
        return self._wait(method, self._handle.invoke.remote(method, args, kwargs), timeout_s)

    async def call_async(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """The same from an event loop. Cancelling the caller cancels the call inside the actor."""
        reference = self._handle.invoke.remote(method, args, kwargs)
        reply = asyncio.wrap_future(reference.future())
        reply.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, even when nobody waits
        try:
            await asyncio.wait({reply}, timeout=timeout_s)
        except asyncio.CancelledError:
            self._abandon(reference)
            raise
        if not reply.done():
            self._abandon(reference)
            raise await asyncio.to_thread(self._late, method, timeout_s)
        if (error := reply.exception()) is not None:
            raise self._lost(method, error) from error
        return self._unwrap(method, reply.result())

    def _wait(self, method: str, reference: Any, timeout_s: float) -> Any:
        import ray

        try:
            reply = ray.get(reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            self._abandon(reference)
            raise self._late(method, timeout_s) from None
        except KeyboardInterrupt:
            self._abandon(reference)
            raise
        except ray.exceptions.RayError as error:
            raise self._lost(method, error) from error
        return self._unwrap(method, reply)

    def _unwrap(self, method: str, reply: tuple[bool, Any]) -> Any:
        succeeded, value = reply
        if succeeded:
            return value
        kind, message = value
        if kind is not None:
            error = kind(message)
            error.add_note(f"in actor {self.name}, {method}; its log is {self.log}")
            raise error
        failed = ActorFailed(f"actor {self.name}: {method} failed: {message}\n{self.last_lines()}")
        failed.kind = message.split(":")[0]
        raise failed

    def _abandon(self, reference: Any) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.cancel(reference)

    def _late(self, method: str, timeout_s: float) -> ActorGone:
        if self._pid and _is_actor_process(self._pid):
            os.kill(self._pid, signal.SIGUSR1)  # its stacks go to its log
            time.sleep(0.3)
        return ActorGone(f"actor {self.name}: {method} did not answer within {timeout_s:g} s\n{self.last_lines()}")

    def _lost(self, method: str, error: BaseException) -> ActorGone:
        cause = " ".join(str(error).split())
        return ActorGone(f"actor {self.name} died during {method}\n{cause}\n{self.last_lines()}")

    def last_lines(self) -> str:
        """The end of the actor's log, headed by where it lies."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            lines = ["(no log)"]
        return "\n".join([f"last lines of {self.log}:", *(f"  {line}" for line in lines)])


def _is_actor_process(pid: int) -> bool:
    """Whether `pid` is on this machine and still a Ray worker: a signal must not hit someone else."""
    try:
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# --- the cluster --------------------------------------------------------------------------------------------------


@dataclass
class _Engine:
    """One generator actor and what it runs, or is starting to run."""

    actor: Actor
    key: tuple[object, ...]
    building: Any  # reference of the actor's pid, until it has been asked for
    starting: Any  # reference of the engine's start, while it is under way
    pristine: tuple[str, int] | None  # (checkpoint, seed) it was started with, until it is handed out
    since: float


class Cluster:
    """Actors and engines of one run. Ray starts at the first use, or earlier and in the background by `warm_up`.

    All actors run on the driver's node, also in a cluster of several: weights pass through its /dev/shm, and what a
    stage writes through its disk. With `weight_transfer: network` generators may be on any node that sees the disk.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        run_dir: Path,
        emit: Callable[..., None],
        seed: int = 0,
        most_engines: int = 0,  # that any stage asks for; see plan_actors
    ) -> None:
        self.settings, self.run_dir, self.emit, self.seed = settings, Path(run_dir).resolve(), emit, seed
        self.plan = plan_actors(settings, most_engines)
        self._ray: _Ray | None = None
        self._actors: list[Actor] = []
        self._engines: list[_Engine] = []
        sweep(self.run_dir)

    @property
    def shared_dir(self) -> Path:
        """A folder in memory where there is one, for weights on their way; removed when the run ends, even by kill -9.

        Only for processes on this machine.
        """
        return self._started().shared_dir

    @property
    def weights_served_at(self) -> str:
        """The host by which generators reach the learner for weights; empty where they find them in `shared_dir`."""
        if self.settings.weight_transfer == "shared_memory":
            return ""
        self._started()
        import ray

        return ray.util.get_node_ip_address()

    def warm_up(self) -> None:
        """Start Ray without waiting for it: it takes seconds in which the caller can read its data."""
        if self._ray is None:
            kind = _Ray if self.settings.address is None else _AttachedRay
            self._ray = kind(self.settings, self.run_dir, self.plan)

    def _started(self) -> _Ray:
        self.warm_up()
        assert self._ray is not None
        self._ray.wait(self.settings.start_deadline_s)
        return self._ray

    # actors

    def start(
        self, name: str, cls: type, *args: Any, num_threads: int = 1, env: Mapping[str, str] | None = None
    ) -> Actor:
        """Make `cls(*args)` an actor with a process of its own and wait until it is built.

        Its stdout and stderr go to `<run_dir>/logs/<name>.log`. `num_threads` and `env` are set before anything of
        the class is imported. Raises InfrastructureError naming what is asked and available when there is no room.
        """
        begin = time.perf_counter()
        actor, building = self._launch(name, cls, args, num_threads, env or {})
        try:
            actor._pid = self._await_start(actor, building, "start")
        except BaseException:
            self.stop(actor)
            raise
        self._tell_start(actor, begin)
        return actor

    def _launch(
        self,
        name: str,
        cls: type,
        args: tuple[Any, ...],
        num_threads: int,
        env: Mapping[str, str] = {},  # noqa: B006  only read
        *,
        node: str | None = None,  # None: the driver's
    ) -> tuple[Actor, Any]:
        """Ask for the actor; returns its handle and the reference of its pid, due when it is built."""
        ray_process = self._started()
        import ray
        from ray import cloudpickle
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        log = self.run_dir / "logs" / f"{name}.log"
        environment = thread_environment(num_threads) | ray_process.actor_environment() | dict(env)
        # max_concurrency: async methods overlap; others queue for the host's one worker thread.
        options: dict[str, Any] = dict(
            num_cpus=self.settings.cpus_per_actor, max_restarts=0, max_task_retries=0, max_concurrency=1000
        )
        if self.settings.gpus_per_actor:
            options["num_gpus"] = self.settings.gpus_per_actor
        node = node or ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        host = ray.remote(**options)(ActorHost).remote(str(log), environment, sys.path)
        actor = Actor(name, host, log, node)
        self._actors.append(actor)
        return actor, host.build.remote(cloudpickle.dumps((cls, args)))

    def _tell_start(self, actor: Actor, since: float, **more: Any) -> None:
        seconds = round(time.perf_counter() - since, 3)
        self.emit("actor_started", actor=actor.name, node=actor.node[:8], pid=actor._pid, seconds=seconds, **more)

    def _await_start(self, actor: Actor, reference: Any, what: str) -> Any:
        try:
            return actor._wait(what, reference, self.settings.start_deadline_s)
        except InfrastructureError as error:
            if lacking := self._started().lacking():
                raise InfrastructureError(f"{error}\nresources: {'; '.join(lacking)}") from error
            raise

    def stop(self, actor: Actor) -> None:
        """Kill an actor's process; a second stop does nothing. It is not asked first: it may hang, and whatever it
        owns has to survive a kill -9 anyway (an engine core ends with its actor)."""
        if actor not in self._actors:
            return
        import ray

        begin = time.perf_counter()
        self._actors.remove(actor)
        self._engines = [engine for engine in self._engines if engine.actor is not actor]
        with contextlib.suppress(Exception):  # dead already
            ray.kill(actor._handle)
        self.emit("actor_stopped", actor=actor.name, seconds=round(time.perf_counter() - begin, 3))

    # engines

    def generators(self, engine: EngineSettings, architecture_digest: str, count: int | None = None) -> list[Actor]:
        """`count` engines (default: settings.generators) that hold `engine.checkpoint` as version 0.

        Engines handed out before are no longer the caller's. One of the same shape takes the new weights and goes on;
        another is restarted inside its process, which has imported vLLM already.
        """
        engines = self._engines_starting(engine, architecture_digest, count)
        for one in engines:
            self._finish_start(one)
        for one in engines:
            if one.pristine != (engine.checkpoint, engine.seed):
                one.actor.call(
                    "take_weights", engine.checkpoint, 0, seed=engine.seed, timeout_s=self.settings.start_deadline_s
                )
            one.pristine = None
        return [one.actor for one in engines]

    def replace_generator(self, actor: Actor, engine: EngineSettings, architecture_digest: str) -> Actor:
        """A new process with a new engine, on `engine.checkpoint`, in the place of one that may be dead or stuck."""
        self.stop(actor)
        fresh = self._start_engine(engine, engine.reuse_key(architecture_digest))
        self._finish_start(fresh)
        fresh.pristine = None
        self._engines.append(fresh)
        return fresh.actor

    def prestart_generators(self, engine: EngineSettings, architecture_digest: str, count: int | None = None) -> None:
        """Begin what `generators` will ask for, without waiting. Engines handed out before are no longer the caller's.

        The checkpoint may be any of the same architecture: the right weights are loaded when they are asked for.
        """
        self._engines_starting(engine, architecture_digest, count)

    def _engines_starting(self, engine: EngineSettings, architecture_digest: str, count: int | None) -> list[_Engine]:
        """Bring every engine at least on its way to the asked shape."""
        key, wanted = engine.reuse_key(architecture_digest), count or self.settings.generators
        for surplus in self._engines[wanted:]:
            self.stop(surplus.actor)
        for one in list(self._engines):
            if one.starting is None and not self._is_well(one):
                self.stop(one.actor)
            elif one.key != key:
                self._restart(one, engine, key)
        while len(self._engines) < wanted:
            self._engines.append(self._start_engine(engine, key))
        return self._engines

    def _start_engine(self, engine: EngineSettings, key: tuple[object, ...]) -> _Engine:
        from rl.generator import VllmGenerator

        names = {one.actor.name for one in self._engines}
        name = next(name for i in range(len(names) + 1) if (name := f"generator-{i}") not in names)
        begin = time.perf_counter()
        node = None
        if self.settings.weight_transfer == "network":
            node = self._started().nodes_of_generators()[int(name.rpartition("-")[2])]
        actor, building = self._launch(name, VllmGenerator, (engine, name), engine.num_threads, node=node)
        starting = actor._handle.invoke.remote("start", (), {})
        return _Engine(actor, key, building, starting, (engine.checkpoint, engine.seed), begin)

    def _restart(self, one: _Engine, engine: EngineSettings, key: tuple[object, ...]) -> None:
        if one.starting is not None:
            self._finish_start(one)
        one.since, one.key, one.pristine = time.perf_counter(), key, (engine.checkpoint, engine.seed)
        one.starting = one.actor._handle.invoke.remote("restart", (engine,), {})

    def _finish_start(self, one: _Engine) -> None:
        if one.starting is None:
            return
        try:
            if one.building is not None:
                one.actor._pid = self._await_start(one.actor, one.building, "start")
            parts = self._await_start(one.actor, one.starting, "start")
            one.building = one.starting = None
        except BaseException:
            self.stop(one.actor)
            raise
        self._tell_start(one.actor, one.since, parts=parts)

    def _is_well(self, one: _Engine) -> bool:
        try:
            one.actor.call("health", timeout_s=STOP_S)
        except InfrastructureError:
            return False
        return True

    def shutdown(self) -> None:
        """End every actor and, if it is private, Ray itself, in less than ten seconds. May be called twice."""
        ray_process, self._ray = self._ray, None
        if ray_process is None:
            return
        begin = time.perf_counter()
        names = [actor.name for actor in self._actors]
        ray_process.close([actor._handle for actor in self._actors])
        self._actors, self._engines = [], []
        seconds = round(time.perf_counter() - begin, 3)
        for name in names:
            self.emit("actor_stopped", actor=name, seconds=seconds)


# --- Ray's own processes ------------------------------------------------------------------------------------------


def _tag_prefix(run_dir: Path) -> str:
    return "drover-" + hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]


def _temp_dir(tag: str) -> Path:
    """Ray's temporary folder. Its path is short: Unix sockets lie deep in it, and theirs may have 107 characters."""
    root = tempfile.gettempdir()
    return Path(root if len(root) < 16 else "/tmp") / "-".join(tag.split(".")[:2])


def _memory_root() -> Path:
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())


def _shared_dir(tag: str) -> Path:
    return _memory_root() / f"{tag}.weights"


def sweep(run_dir: Path) -> int:
    """Kill what an earlier run of this directory left behind and remove its folders; returns the processes killed.

    The watchdog does this at once; this is for when it was killed too. A run that is alive is not touched.
    """
    prefix = _tag_prefix(run_dir) + "."
    tags = set(watchdog.tags_by_pid(prefix).values())
    tags |= {folder.name.removesuffix(".weights") for folder in _memory_root().glob(f"{prefix}*.weights")}
    dead = [tag for tag in tags if not watchdog.owner_is_alive(tag)]
    killed = sum(watchdog.kill_tagged(tag) for tag in dead)
    for tag in dead:
        for folder in (_temp_dir(tag), _shared_dir(tag)):
            shutil.rmtree(folder, ignore_errors=True)
    return killed


class _Ray:
    """A private Ray on this machine, started in a thread that lives as long as it does.

    The thread is not for speed alone: Ray's processes are tied to the thread that started them and would die with a
    short-lived one, and outside the main thread Ray leaves our signal handlers alone.
    """

    def __init__(self, settings: ClusterSettings, run_dir: Path, plan: ResourcePlan) -> None:
        self.settings, self.run_dir, self.plan = settings, run_dir, plan
        self.tag = watchdog.make_tag(_tag_prefix(run_dir), os.getpid())
        self.temp_dir, self.shared_dir = _temp_dir(self.tag), _shared_dir(self.tag)
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


class _AttachedRay(_Ray):
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
