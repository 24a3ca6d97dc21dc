"""One actor, from both sides: the process around an object of ours, and the handle that its caller holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, GateStopped, InfrastructureError, RecipeError

LOG_LINES = 15
KEPT_ERRORS = (DataError, RecipeError, GateStopped)  # they keep their type on the way: each has its own exit code


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


# --- the caller's side --------------------------------------------------------------------------------------------


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
