"""The actors and vLLM engines of one run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.actor import Actor, ActorHost
from pipeline.cluster.ray_process import AttachedRay, PrivateRay, sweep
from pipeline.cluster.resource_plan import plan_actors, thread_environment
from pipeline.config import ClusterSettings
from pipeline.errors import InfrastructureError
from rl.types import EngineSettings

STOP_S = 5.0


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
        self._ray: PrivateRay | None = None
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
            kind = PrivateRay if self.settings.address is None else AttachedRay
            self._ray = kind(self.settings, self.run_dir, self.plan)

    def _started(self) -> PrivateRay:
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
