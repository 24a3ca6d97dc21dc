"""The inside of the sandbox: started by `rewards/sandbox.py` as `python -I`, never imported for its side effects.

    owner ── Popen ──▶ launcher ── fork ──▶ broker (new namespaces, empty root) ── fork ──▶ one child per answer
      │                 waits for owner or broker to end, then reaps            │            own pid namespace, no
      ├──────────── control socket: "start a child on this channel", "end it" ──┘            capabilities, seccomp
      └──────────── one channel per child: JSON lines ───────────────────────────────────▶   allow-list, rlimits

The broker never sees an answer: a child reads its program from its own channel, after it has locked itself in. So no
child inherits anything of another. Only the standard library is used here; nothing of ours is importable inside.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

CHANNEL_FD = 3  # the child's only way out
OUTSIDE_USER = 65534  # "nobody": whom the children are on the machine when the owner is root

# What an answer may import without a file being read. Anything else of the standard library is read on demand.
WARM_MODULES = (
    "abc array ast base64 bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime "
    "decimal enum fractions functools hashlib heapq inspect io itertools json math numbers operator queue random re "
    "statistics string struct sys textwrap time traceback types typing unicodedata _strptime encodings.idna "
    "encodings.latin_1"
).split()

# ---------------------------------------------------------------------------------------------- values as JSON


def encode(value: Any) -> Any:
    """`value` as JSON that keeps Python's types apart: lists as they are, others as {"tuple": [...]} and so on.
    TypeError for anything that is not plain data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"returned a {type(value).__name__}, which is not plain data")


def decode(value: Any) -> Any:
    """What `encode` encoded. ValueError or TypeError if it is nothing that `encode` would write."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("malformed value")
    ((kind, content),) = value.items()
    builders: dict[str, Callable[[Any], Any]] = {
        "tuple": lambda items: tuple(decode(item) for item in items),
        "set": lambda items: {decode(item) for item in items},
        "frozenset": lambda items: frozenset(decode(item) for item in items),
        "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
        "complex": lambda parts: complex(*parts),
        "bytes": bytes.fromhex,
    }
    if kind not in builders:
        raise ValueError(f"malformed value of kind {kind[:20]!r}")
    return builders[kind](content)


# ---------------------------------------------------------------------------------------------- the kernel's side

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_PIVOT_ROOT = 155
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38

# x86-64 system calls of a Python that computes, allocates, sleeps, and reads what little there is to read. No process,
# thread, socket, signal to others, rename, truncate, ioctl, namespace or kernel facility is among them.
ALLOWED_CALLS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35,
    "getpid": 39, "exit": 60, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrusage": 98, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "openat": 257,
    "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "getrandom": 318,
    "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
AUDIT_ARCH_X86_64 = 0xC000003E
SECCOMP_MODE_FILTER = 2
SECCOMP_KILL, SECCOMP_ALLOW, SECCOMP_EPERM = 0x80000000, 0x7FFF0000, 0x00050001


class Refused(Exception):
    """The kernel refused a part of the isolation; the text names the part and the reason."""


def must(result: int, what: str) -> None:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def prctl(option: int, argument: int, what: str, address: int = 0) -> None:
    nothing = ctypes.c_ulong(0)  # the kernel insists on zeros, and reads all 64 bits of them
    must(libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_void_p(address), nothing, nothing), what)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    must(libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount on {target}")


def seccomp_program() -> tuple[ctypes.Array, ctypes.Array]:
    """The allow-list as a BPF program, and the struct that points to it (the caller keeps both alive)."""

    def instruction(code: int, jump_true: int, jump_false: int, constant: int) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, constant)

    load, jump_equal, give = 0x20, 0x15, 0x06
    architecture_at, number_at = 4, 0  # offsets in the kernel's struct seccomp_data
    lines = [
        instruction(load, 0, 0, architecture_at),
        instruction(jump_equal, 1, 0, AUDIT_ARCH_X86_64),
        instruction(give, 0, 0, SECCOMP_KILL),
        instruction(load, 0, 0, number_at),
    ]
    for number in ALLOWED_CALLS.values():
        lines += [instruction(jump_equal, 0, 1, number), instruction(give, 0, 0, SECCOMP_ALLOW)]
    lines.append(instruction(give, 0, 0, SECCOMP_EPERM))
    code = ctypes.create_string_buffer(b"".join(lines))
    return code, ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)))


def empty_root(readable: list[str]) -> None:
    """Replace the file system by an empty read-only one in which only `readable` directories exist, read-only."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    sources = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in readable]  # before /tmp hides any of them
    mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, source in zip(readable, sources, strict=True):
        target = f"/tmp{path}"
        os.makedirs(target)
        mount(f"/proc/self/fd/{source}", target, None, MS_BIND | MS_REC)
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)  # flags a user namespace may not clear
        mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)
        os.close(source)
    os.chdir("/tmp")
    must(libc.syscall(ctypes.c_long(SYS_PIVOT_ROOT), b".", b"."), "pivot_root")
    must(libc.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir("/")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


# ---------------------------------------------------------------------------------------------- the three processes


def launch(control: socket.socket, settings: dict[str, Any]) -> None:
    """Enter the namespaces, start the broker, and stay to reap it when it or the owner ends."""
    if platform.machine() != "x86_64":
        raise Refused(f"seccomp allow-list: known for x86_64 only, this is {platform.machine()}")
    owner = os.pidfd_open(os.getppid())
    if os.getppid() != settings["owner"]:
        return  # the owner died before we could watch it
    sys.path[:] = settings["path"]
    for name in WARM_MODULES:
        import_module(name)
    exec(settings["warm_up"], {})
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, an answer goes before the trainer
    if settings["drop_user"]:
        os.setgroups([])
    spaces = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID
    must(libc.unshare(spaces), "user namespaces")
    control.send(b'{"step": "map my users"}')  # only the owner may map more than its own user
    if control.recv(16) != b"mapped":
        return
    broker_pid = os.fork()
    if broker_pid == 0:
        run_guarded(control, lambda: be_broker(control, settings))
    control.close()
    waiting = select.poll()
    for pidfd in (owner, os.pidfd_open(broker_pid)):
        waiting.register(pidfd, select.POLLIN)
    waiting.poll()
    os.kill(broker_pid, signal.SIGKILL)  # it is the first process of its pid namespace: all within dies with it
    os.waitpid(broker_pid, 0)


def be_broker(control: socket.socket, settings: dict[str, Any]) -> None:
    """Start and end children as the owner asks, until the owner closes the control socket."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, "die with the launcher")
    own_space = os.open("/proc/self/ns/pid", os.O_RDONLY)
    empty_root(settings["readable"])
    socket.sethostname("sandbox")
    sys.path_importer_cache.clear()
    program = seccomp_program()
    gc.collect()
    gc.freeze()  # children share these pages; a collection in one must not copy them
    seen = {"root": sorted(os.listdir("/")), "interfaces": [name for _, name in socket.if_nameindex()]}
    control.send(json.dumps({"ready": seen}).encode())
    while True:
        message, channels, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            os._exit(0)
        if channels:
            # A process can make a pid namespace for its next child only from its own one, so it goes back first.
            must(libc.setns(own_space, CLONE_NEWPID), "returning to the broker's pid namespace")
            must(libc.unshare(CLONE_NEWPID), "a pid namespace for an answer")
            pid = os.fork()
            if pid == 0:
                be_child(channels[0], settings, program)
            os.close(channels[0])
            control.send(json.dumps({"pid": pid}).encode())
        else:
            pid, grace_ms = map(int, message.split())
            control.send(json.dumps({"end": end_child(pid, grace_ms)}).encode())


def end_child(pid: int, grace_ms: int) -> dict[str, Any]:
    """Kill and reap a child, after waiting `grace_ms` for an end of its own. Which signal ended it (0: none), whether
    that was ours, and the CPU seconds it used."""
    pidfd = os.pidfd_open(pid)
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    ended_itself = bool(waiting.poll(grace_ms))
    os.close(pidfd)
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": ended_by, "by_us": not ended_itself, "cpu_s": usage.ru_utime + usage.ru_stime}


def be_child(channel: int, settings: dict[str, Any], program: tuple[ctypes.Array, ctypes.Array]) -> None:
    """Lock ourselves in, say so, then serve requests from the channel. Never returns."""
    try:
        if channel != CHANNEL_FD:
            os.dup2(channel, CHANNEL_FD)
        os.closerange(CHANNEL_FD + 1, 1 << 20)
        os.setsid()
        capability = 0
        while libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == 0:  # past the last one it fails
            capability += 1
        if settings["drop_user"]:
            os.setresgid(1, 1, 1)
            os.setresuid(1, 1, 1)
        header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
        must(libc.capset(header, nothing), "dropping capabilities")
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, "die with the broker")  # after the change of user, which clears it
        prctl(PR_SET_DUMPABLE, 0, "not dumpable")
        limits = settings["limits"]
        for name, limit in (
            ("CPU", limits["cpu_s"]), ("AS", limits["memory_bytes"]), ("FSIZE", 0), ("NPROC", 0), ("NOFILE", 32),
            ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0),
        ):  # fmt: skip
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
        prctl(PR_SET_NO_NEW_PRIVS, 1, "no new privileges")
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, "seccomp", ctypes.addressof(program[1]))
        send({"ready": True})
        serve()
    except BaseException as error:  # noqa: BLE001 - the owner hears what stopped us, then the process must end here
        send({"error": f"{type(error).__name__}: {error}"[:300]})
    finally:
        os._exit(0)


# ---------------------------------------------------------------------------------------------- what a child does


def send(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(CHANNEL_FD, data) :]


def receive(pending: bytearray) -> dict[str, Any]:
    """The next JSON line from the owner; EOFError when the owner is done with us."""
    while b"\n" not in pending:
        chunk = os.read(CHANNEL_FD, 1 << 16)
        if not chunk:
            raise EOFError
        pending += chunk
    line, _, rest = bytes(pending).partition(b"\n")
    pending[:] = rest
    return json.loads(line)


def serve() -> None:
    """Answer `load`, `call`, `check` and `finish` requests; every reply repeats its request's nonce."""
    pending = bytearray()
    namespace: dict[str, Any] = {}
    while True:
        try:
            request = receive(pending)
        except EOFError:
            os._exit(0)
        nonce = request["nonce"]
        reply: dict[str, Any]
        try:
            if "load" in request:
                namespace = load(request["load"], request["function"])
                reply = {"value": None}
            elif "call" in request:
                reply = {"value": encode(namespace[request["function"]](*decode(request["call"])))}
            elif "check" in request:
                reply = {"value": check(request, nonce, pending)}
            else:
                reply = {"value": None}
            json.dumps(reply)
        except BaseException as error:  # noqa: BLE001 - whatever an answer raises, SystemExit too, is its result
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        send({"nonce": nonce, **reply})


def load(program: str, function: str) -> dict[str, Any]:
    """The names a program defines. A bare expression in x stands for `def function(x): return <expression>`."""
    namespace: dict[str, Any] = {"__name__": "answer"}
    try:
        compile(program.strip(), "answer", "eval")
    except SyntaxError:
        exec(compile(program, "answer", "exec"), namespace)
    else:
        namespace[function] = eval(f"lambda x: (\n{program.strip()}\n)", namespace)
    if not callable(namespace.get(function)):
        raise NameError(f"no function {function!r} is defined")
    return namespace


def check(request: dict[str, Any], nonce: str, pending: bytearray) -> str:
    """Run a test program whose `candidate` lives in another process: its arguments and values pass through the owner
    as data. "passed", or what failed."""

    def candidate(*args: Any) -> Any:
        send({"nonce": nonce, "call": encode(list(args))})
        reply = receive(pending)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return decode(reply["value"])

    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(request["setup"], "setup", "exec"), namespace)
    exec(compile(request["check"], "tests", "exec"), namespace)
    namespace[request["function"]] = candidate  # some tests call the function by its name
    try:
        namespace["check"](candidate)
    except AssertionError as error:
        return f"assertion failed {error}".strip()[:300]
    except Exception as error:  # noqa: BLE001 - an answer's value that breaks the test fails it
        return f"{type(error).__name__}: {error}"[:300]
    return "passed"


def run_guarded(control: socket.socket, body: Callable[[], None]) -> None:
    """Run one of the outer processes to its end; the owner hears what stopped it. Never returns."""
    try:
        body()
    except BaseException as error:  # noqa: BLE001 - reported, then the process ends
        try:
            control.send(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}).encode())
        except OSError:
            pass
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    to_owner = socket.socket(fileno=int(sys.argv[1]))
    run_guarded(to_owner, lambda: launch(to_owner, json.loads(sys.argv[2])))
