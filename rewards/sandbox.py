"""Where model output runs, and nowhere else. `rewards/code_tests.py` and `rewards/math_answer.py` call it.

Hostile programs run in a process of their own with no user, file, network, process or capability of ours (how: see
`sandbox_worker.py`). It fails closed: `Sandbox.start` tries to escape, and raises `SandboxUnavailable` if anything
succeeds or the kernel refuses a part. A program only ever returns data; what was expected stays on this side.

What can go wrong has two names, and they never mix: `AnswerFault` is the answer's doing (score 0), `SandboxFailure`
is ours (ungraded). Any number of threads may use one Sandbox; `workers` answers run at once.

What each wait waits for, and what ends it: a slot (another answer's end, or SLOT_WAIT_S), a broker's reply (its reply,
its death, or BROKER_WAIT_S), a child's reply (its reply, its death, its CPU limit, or the wall limit).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rewards.sandbox_worker import OUTSIDE_USER, decode, encode

BROKER_WAIT_S = 30.0  # a start imports modules on a machine that may be busy; all else answers in milliseconds
SLOT_WAIT_S = 300.0
ENDING_GRACE_MS = 200  # from a channel's end to its process's
CPU_TOLERANCE = 0.75  # the kernel enforces its CPU limit by clock ticks, and then reports less exact time
MAX_RESTARTS = 8  # of a broker, over a Sandbox's life: more deaths than that are not chance
MATH_WARM_UP = r"""
from math_verify import parse, verify
for gold, answer in (("$\\frac{1}{2}$", "0.5"), ("$x^2+1$", "$(x+1)^2-2x$"), ("$\\{1, 2\\}$", "$[0,1)$")):
    verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)
"""  # fills the caches that each child then inherits
WORKER = Path(__file__).with_name("sandbox_worker.py")
Library = Literal["plain", "math"]


class SandboxUnavailable(RuntimeError):
    """This machine cannot isolate hostile code. The text says what is missing and what to do about it."""


class SandboxFailure(RuntimeError):
    """The sandbox broke, through no fault of the answer: the answer is ungraded."""


class AnswerFault(Exception):
    """The answer's own doing: it raised, ran too long, died, or replied something malformed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one answer may use. The wall limit is wider than the CPU limit, so that a busy machine fails no answer."""

    cpu_s: int = 2
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20  # address space
    reply_bytes: int = 1 << 16  # the longest line it may send back; small, since we build sets and dicts from it


class Session:
    """One child in the sandbox, from `Sandbox.sessions`. Not for use by two threads at once."""

    def __init__(self, broker: _Broker, pid: int, channel: socket.socket, limits: Limits) -> None:
        self._broker, self._pid, self._channel, self._limits = broker, pid, channel, limits
        self._pending = bytearray()
        self._deadline = time.monotonic() + BROKER_WAIT_S

    def await_ready(self) -> None:
        """Wait until the child has locked itself in; its wall time starts then. SandboxFailure if it could not."""
        try:
            first = json.loads(self._read_line())
        except (AnswerFault, ValueError) as error:  # no answer has run yet, so it is none's fault
            raise SandboxFailure(f"a child did not start: {error}") from error
        if first != {"ready": True}:
            raise SandboxFailure(f"a child could not lock itself in: {first.get('error', first)}")
        self._deadline = time.monotonic() + self._limits.wall_s

    def load(self, program: str, function: str) -> None:
        """Run `program` (or a bare expression in x) for the `function` it defines. AnswerFault if it defines none."""
        self.ask({"load": program, "function": function})

    def call(self, function: str, arguments: list[Any]) -> Any:
        """`function(*arguments)`, plain data both ways. AnswerFault for whatever goes wrong inside."""
        reply = self.ask({"call": encode(arguments), "function": function})
        try:
            return decode(reply)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise AnswerFault("malformed result") from error

    def finish(self) -> None:
        """AnswerFault if anything beyond one reply a request was written to the channel."""
        self.ask({"finish": True})

    def ask(self, request: dict[str, Any]) -> Any:
        """The encoded value that answers one request. Each request has a new nonce, and only a reply that repeats it
        counts: nothing can be answered ahead, twice, or by a stray write."""
        reply = self.exchange({"nonce": secrets.token_hex(8), **request})
        if "error" in reply:
            raise AnswerFault(str(reply["error"])[:300])
        if "value" not in reply:
            raise AnswerFault("malformed result")
        return reply["value"]

    def exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one line, read one line that carries the same nonce."""
        self._send(request)
        try:
            reply = json.loads(self._read_line())
        except (ValueError, RecursionError) as error:
            raise AnswerFault("malformed result") from error
        if not isinstance(reply, dict) or reply.get("nonce") != request["nonce"] or self._pending:
            raise AnswerFault("a result that answers no request")
        return reply

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.settimeout(self._remaining_s())
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            self._raise_ending(error)

    def _read_line(self) -> bytes:
        while (end := self._pending.find(b"\n")) < 0:
            if len(self._pending) > self._limits.reply_bytes:
                raise AnswerFault(f"a result longer than {self._limits.reply_bytes} bytes")
            try:
                self._channel.settimeout(self._remaining_s())
                chunk = self._channel.recv(1 << 16)
            except OSError as error:
                self._raise_ending(error)
            if not chunk:
                self._raise_ending(None)
            self._pending += chunk
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def _remaining_s(self) -> float:
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        return remaining_s

    def _raise_ending(self, error: OSError | None) -> None:
        """Say why the channel went quiet: ended by a limit or by itself (the answer), or by something outside (us)."""
        ending = self.close(grace_ms=0 if error else ENDING_GRACE_MS)
        if isinstance(error, TimeoutError):
            raise AnswerFault(f"time limit: {self._limits.wall_s:g} s")
        if ending["cpu_s"] > self._limits.cpu_s * CPU_TOLERANCE:
            raise AnswerFault(f"time limit: {self._limits.cpu_s} s of CPU")
        if ending["signal"] == signal.SIGKILL and not ending["by_us"]:
            # The filter lets no answer send a signal, so somebody outside did: the machine ran out of memory, say.
            raise SandboxFailure("a child was killed from outside")
        raise AnswerFault("the process ended without a result")

    def close(self, grace_ms: int = 0) -> dict[str, Any]:
        """Kill the child and reap it; how it ended, as `sandbox_worker.end_child` says. A second close does nothing."""
        if self._pid == 0:
            return {"signal": 0, "by_us": True, "cpu_s": 0.0}
        pid, self._pid = self._pid, 0
        self._channel.close()
        return self._broker.end_child(pid, grace_ms)


class _Broker:
    """The owner's end of one launcher and its broker. `ask` is safe from any thread."""

    def __init__(self, library: Library, limits: Limits) -> None:
        path = _standard_library()
        warm_up = ""
        if library == "math":
            path += _import_directories("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")
            warm_up = MATH_WARM_UP
        as_nobody = _can_become_nobody()
        settings = {
            "owner": os.getpid(), "readable": _outermost(path), "path": path, "warm_up": warm_up,
            "drop_user": as_nobody, "limits": asdict(limits),
        }  # fmt: skip
        self._limits, self._lock, self._broken = limits, threading.Lock(), False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(BROKER_WAIT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(WORKER), str(theirs.fileno()), json.dumps(settings)],
                env={}, cwd="/", pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            self._receive("step")
            self._map_users(as_nobody)
            self._control.send(b"mapped")
            self.seen: dict[str, Any] = self._receive("ready")
        except BaseException:
            self.stop()
            raise

    def _map_users(self, as_nobody: bool) -> None:
        """User 0 inside is ourselves (it sets up the isolation); where we are root, answers run as 1, a nobody."""
        proc = Path("/proc") / str(self._process.pid)
        try:
            (proc / "setgroups").write_text("deny")
            for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
                (proc / name).write_text(f"0 {own} 1\n" + (f"1 {OUTSIDE_USER} 1\n" if as_nobody else ""))
        except OSError as error:
            raise SandboxFailure(f"user namespaces: mapping users: {error}") from error

    def _receive(self, expected: str) -> Any:
        """The broker's next message, which must hold `expected`. A broker that says anything else is done with."""
        try:
            message = self._control.recv(1 << 16)
            reply = json.loads(message) if message else {"error": "the sandbox broker ended"}
        except TimeoutError:
            reply = {"error": f"the sandbox broker said nothing for {BROKER_WAIT_S:g} s"}
        except OSError as error:
            reply = {"error": f"the sandbox broker is gone: {error}"}
        if expected not in reply:
            self._broken = True
            raise SandboxFailure(str(reply.get("error", reply)))
        return reply[expected]

    def _ask(self, message: bytes, expected: str, channel: socket.socket | None = None) -> Any:
        with self._lock:
            try:
                socket.send_fds(self._control, [message], [channel.fileno()] if channel else [])
            except OSError as error:
                self._broken = True
                raise SandboxFailure(f"the sandbox broker is gone: {error}") from error
            return self._receive(expected)

    def start_child(self) -> Session:
        """A new child, locked in and waiting for its program."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                session = Session(self, self._ask(b"start", "pid", theirs), ours, self._limits)
        except SandboxFailure:
            ours.close()
            raise
        try:
            session.await_ready()
        except SandboxFailure:
            session.close()
            raise
        return session

    def end_child(self, pid: int, grace_ms: int) -> dict[str, Any]:
        return self._ask(b"%d %d" % (pid, grace_ms), "end")

    def alive(self) -> bool:
        return not self._broken and self._process.poll() is None

    def stop(self) -> None:
        """End broker and children, and reap the launcher; at once, at most some seconds."""
        try:
            self._control.shutdown(socket.SHUT_RDWR)  # not only close: a forked sibling may hold a copy
        except OSError:
            pass  # the broker closed it first
        self._control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Sandbox:
    """Runs hostile programs, `workers` answers at once, from any number of threads.

    >>> with Sandbox() as sandbox:
    ...     sandbox.run("def f(x): return x + 1", "f", [[1], [2]])
    [2, 3]
    """

    def __init__(self, workers: int = 1, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._slots = threading.BoundedSemaphore(workers)
        self._brokers: dict[Library, _Broker] = {}
        self._restarts = 0
        self._started = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start, then try to escape. SandboxUnavailable (what is missing, what to do) if this machine cannot."""
        self._started = True
        try:
            seen = self._broker("plain").seen
            escaped = _escapes(self)
        except SandboxFailure as error:
            self.stop()
            raise SandboxUnavailable(f"no isolation for model output: {error}. {_advice(str(error))}") from error
        except BaseException:
            self.stop()
            raise
        if seen["interfaces"] != ["lo"]:
            escaped.append(f"network interfaces are visible: {seen['interfaces']}")
        if escaped:
            self.stop()
            raise SandboxUnavailable(f"the sandbox leaks, so nothing runs in it: {'; '.join(escaped)}")

    def stop(self) -> None:
        """End everything in the sandbox and leave no process behind. May be called twice."""
        with self._lock:
            self._started = False
            for broker in self._brokers.values():
                broker.stop()
            self._brokers.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, program: str, function: str, calls: list[list[Any]], library: Library = "plain") -> list[Any]:
        """The value of `function(*arguments)` for each of `calls`, all in one process. AnswerFault names the first call
        (from 1) that gave none; SandboxFailure if no call could be made through no fault of the program."""
        with self.sessions(1, library) as (session,):
            session.load(program, function)
            values = []
            for number, arguments in enumerate(calls, start=1):
                try:
                    values.append(session.call(function, arguments))
                except AnswerFault as fault:
                    raise AnswerFault(f"case {number} of {len(calls)}: {fault}") from fault
            session.finish()
            return values

    @contextmanager
    def sessions(self, count: int, library: Library = "plain") -> Iterator[list[Session]]:
        """`count` children for one answer, ended on leaving. library "math" has math-verify (slow to start, once)."""
        if not self._slots.acquire(timeout=SLOT_WAIT_S):
            raise SandboxFailure(f"no sandbox slot became free in {SLOT_WAIT_S:g} s")
        with ExitStack() as stack:
            stack.callback(self._slots.release)
            yield [self._start_child(library, stack) for _ in range(count)]

    def _start_child(self, library: Library, stack: ExitStack) -> Session:
        """A child that `stack` will end. A broker found dead is replaced once."""
        try:
            session = self._broker(library).start_child()
        except SandboxFailure:
            session = self._broker(library).start_child()
        stack.callback(session.close)
        return session

    def _broker(self, library: Library) -> _Broker:
        """The live broker for `library`, started or restarted if need be."""
        with self._lock:
            if not self._started:
                raise RuntimeError("start the sandbox before use")
            broker = self._brokers.get(library)
            if broker and broker.alive():
                return broker
            if broker:
                if self._restarts >= MAX_RESTARTS:
                    raise SandboxFailure(f"the sandbox broker died {self._restarts + 1} times")
                self._restarts += 1
                broker.stop()
            self._brokers[library] = _Broker(library, self._limits)
            return self._brokers[library]


# ---------------------------------------------------------------------------------------------- probing this machine

PROBE = """
import ctypes, os, socket

def attempts(owner, canary, port):
    def connect():
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    def environment():
        if not set(os.environ) <= {"LC_CTYPE"}:  # which Python sets itself
            return "visible"
        raise PermissionError
    def new_namespace():
        if ctypes.CDLL(None).unshare(0x10000000) != 0:
            raise PermissionError
    tries = {
        "read a file": lambda: open(canary).read(),
        "write beside it": lambda: open(canary + ".new", "w").close(),
        "write to /tmp": lambda: open("/tmp/drover_probe", "w").close(),
        "write to /dev/shm": lambda: open("/dev/shm/drover_probe", "w").close(),
        "list processes": lambda: os.listdir("/proc"),
        "connect to loopback": connect,
        "read the environment": environment,
        "fork": os.fork,
        "signal the owner": lambda: os.kill(owner, 0),
        "enter a new namespace": new_namespace,
    }
    outcome = {}
    for name, attempt in tries.items():
        try:
            attempt()
            outcome[name] = "escaped"
        except OSError as error:
            outcome[name] = "refused"
    return outcome
"""
PROBES = 10  # a probe that was not made proves nothing


def _escapes(sandbox: Sandbox) -> list[str]:
    """Really try to get out, with targets that can be reached from outside. The attempts that succeeded."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        canary = Path(folder) / "canary"
        canary.write_text(secrets.token_hex(8))
        canary.chmod(0o644)
        Path(folder).chmod(0o755)
        arguments = [os.getpid(), str(canary), server.getsockname()[1]]
        try:
            (outcome,) = sandbox.run(PROBE, "attempts", [arguments])
        except AnswerFault as fault:
            raise SandboxFailure(f"the probe did not finish: {fault}") from fault
    if len(outcome) != PROBES:
        raise SandboxFailure(f"the probe made {len(outcome)} of {PROBES} attempts")
    return [name for name, result in outcome.items() if result != "refused"]


def _advice(error: str) -> str:
    if "user namespaces" in error or "uid_map" in error or "Operation not permitted" in error:
        return (
            "The kernel or the container refuses user namespaces. Check user.max_user_namespaces > 0, "
            "kernel.unprivileged_userns_clone = 1 and kernel.apparmor_restrict_unprivileged_userns = 0 (sysctl); in "
            "Docker or Kubernetes allow unshare and mount in the seccomp profile."
        )
    if "seccomp" in error:
        return "Use an x86-64 Linux kernel built with CONFIG_SECCOMP_FILTER."
    return "`drover doctor` shows which sandbox features this machine has."


def features() -> dict[str, Any]:
    """What this machine offers, for `drover doctor`: user_namespaces, seccomp and isolated as booleans, landlock as its
    ABI version (0: none; not used yet), and in `detail` what is missing and what to do ("" when isolated)."""
    libc = ctypes.CDLL(None, use_errno=True)
    unshare = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)"
    try:
        probe = subprocess.run([sys.executable, "-I", "-c", unshare], timeout=BROKER_WAIT_S, check=False)
        namespaces = probe.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        namespaces = False
    detail = ""
    try:
        with Sandbox():
            pass
    except SandboxUnavailable as error:
        detail = str(error)
    return {
        "user_namespaces": namespaces,
        "seccomp": libc.prctl(21, 0, 0, 0, 0) >= 0 and platform.machine() == "x86_64",  # 21: PR_GET_SECCOMP
        "landlock": max(0, libc.syscall(444, None, 0, 1)),  # landlock_create_ruleset, asked for its version
        "isolated": not detail,
        "detail": detail,
    }


def _can_become_nobody() -> bool:
    """Whether we are root and may act as `OUTSIDE_USER`; in a container with one user only, root is no one special."""
    if os.geteuid() != 0:
        return False

    def is_mapped(name: str) -> bool:
        ranges = [list(map(int, line.split())) for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        return any(first <= OUTSIDE_USER < first + length for first, _, length in ranges)

    return is_mapped("uid_map") and is_mapped("gid_map")


def _standard_library() -> list[str]:
    """The directories of the standard library and of its compiled modules; a virtual environment has none itself."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    python, compiled = (os.path.realpath(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib"))
    return [python, os.path.join(compiled, "lib-dynload")]


def _import_directories(*packages: str) -> list[str]:
    """The directories from which `packages` are imported. SandboxFailure if one is not installed."""
    found = []
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SandboxFailure(f"{package} is not installed")
        found.append(os.path.realpath(Path(spec.submodule_search_locations[0]).parent))
    return list(dict.fromkeys(found))


def _outermost(directories: list[str]) -> list[str]:
    """`directories` without those that lie inside another of them."""

    def inside_another(one: str) -> bool:
        return any(one != other and Path(one).is_relative_to(other) for other in directories)

    return [one for one in directories if not inside_another(one)]
