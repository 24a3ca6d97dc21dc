"""A disk that is watched, or fails, at every operation. Below Python, so that what C++ and Rust write is on it too.

    parent: supervise ◀── system call ──┐            looks at the disk · carries it out, or answers "no space left"
        fork │                          │
             ▼                          │
    child:  seccomp filter ─▶ work() ───┘            stopped in each call that may change a file, until it is answered

The kernel hands over every such call of the child (seccomp_unotify(2), Linux 5.5). Those below `root` are counted, but
for calls that change nothing: an open of what is there, the removal of what is not. A sync is answered and not carried
out: nobody cuts the power of this machine.

While a child is stopped its files stand still: a copy of them (`Disk.copy`) is what `kill -9` at that moment would
leave, or a power cut, which takes what was written and not synced as well.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import shutil
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DEADLINE_MS = 60_000  # between two operations of a child

# Numbers of x86-64, as in the sandbox's allow-list (rewards/sandbox_worker.py).
WRITES = {"write": 1, "pwrite64": 18, "writev": 20}
SYNCS = {"fsync": 74, "fdatasync": 75}
BY_DESCRIPTOR = {"ftruncate": 77, "fallocate": 285}
OPENS = {"open": 2, "creat": 85}
REMOVALS = {"rmdir": 84, "unlink": 87, "unlinkat": 263}
OTHERS = {"truncate": 76, "rename": 82, "mkdir": 83, "link": 86, "symlink": 88, "openat": 257, "mkdirat": 258,
          "renameat": 264, "renameat2": 316}  # fmt: skip
IN_FOLDER = {"openat", "mkdirat", "unlinkat", "renameat", "renameat2"}  # take a descriptor, then a path in it
CALLS = WRITES | SYNCS | BY_DESCRIPTOR | OPENS | REMOVALS | OTHERS
NAMES = {number: name for name, number in CALLS.items()}
NEED_SPACE = WRITES.keys() | OPENS.keys() | {"openat", "mkdir", "mkdirat", "fallocate"}

PR_SET_NO_NEW_PRIVS, SECCOMP, SET_MODE_FILTER, FLAG_NEW_LISTENER = 38, 317, 1, 8
LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # of classic BPF
NUMBER_AT, THIRD_ARGUMENT_AT = 0, 32  # in the kernel's struct seccomp_data
CHANGING = os.O_CREAT | os.O_TRUNC  # flags of an open that may change something by itself
ALLOW, ASK = 0x7FFF0000, 0x7FC00000
RECEIVE, REPLY, CARRY_OUT = 0xC0502100, 0xC0182101, 1
QUESTION, ANSWER = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")
AT_FDCWD = -100


@dataclass(frozen=True, slots=True)
class Operation:
    number: int  # from 1
    call: str
    path: str  # below the root; of two, the first
    content: bytes = b""  # what is to be written,
    place: int = 0  # and where in the file

    def __str__(self) -> str:
        return f"operation {self.number}, {self.call} {self.path}"


@dataclass
class Disk:
    """What lies below `root`, and how much of it would outlive a power cut."""

    root: Path
    unsynced: dict[str, int] = field(default_factory=dict)  # path → bytes of it that were synced

    def copy(self, to: Path, *, torn: Operation | None = None, power_cut: bool = False) -> None:
        """`torn`: the first half of what it writes is there as well."""
        to.parent.mkdir(parents=True, exist_ok=True)
        if self.root.exists():
            shutil.copytree(self.root, to)
        if torn is not None:
            with (to / torn.path).open("r+b") as file:
                file.seek(torn.place)
                file.write(torn.content[: len(torn.content) // 2])
        for path, size in self.unsynced.items() if power_cut else ():
            os.truncate(to / path, min(size, (to / path).stat().st_size))

    def note(self, operation: Operation, target: str) -> None:
        """It is about to be carried out."""
        path = operation.path
        if operation.call in SYNCS:
            self.unsynced.pop(path, None)
        elif operation.call in WRITES:
            self.unsynced.setdefault(path, operation.place)
        elif operation.call.startswith("rename"):
            for one in [one for one in self.unsynced if one == path or one.startswith(f"{path}/")]:
                self.unsynced[target + one.removeprefix(path)] = self.unsynced.pop(one)
        elif operation.call in REMOVALS:
            self.unsynced.pop(path, None)


Watch = Callable[[Operation, Disk], None]


def supervise(
    work: Callable[[], int],
    root: Path,
    *,
    before: Watch = lambda *_: None,
    full: Callable[[Operation], bool] = lambda _: False,
) -> tuple[int, list[Operation]]:
    """Run `work` in a forked child; returns its exit code and its operations below `root`.

    `before` is called ahead of each. One of which `full` says so finds no space left on the disk."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        _be_the_child(work, theirs)
    theirs.close()
    with ours:
        _, (listener,), _, _ = socket.recv_fds(ours, 1, 1)
    ended = os.pidfd_open(child)
    operations: list[Operation] = []
    disk = Disk(root)
    waiting = select.poll()
    for descriptor in (listener, ended):
        waiting.register(descriptor, select.POLLIN)
    try:
        while True:
            ready = [descriptor for descriptor, _ in waiting.poll(DEADLINE_MS)]
            assert ready, f"nothing happened for {DEADLINE_MS} ms after {operations[-1:]}"
            if ended in ready:
                break
            question = bytearray(QUESTION.size)
            try:
                fcntl.ioctl(listener, RECEIVE, question)
            except OSError:  # who asked is gone
                continue
            number, pid, _, call, _, _, *arguments = QUESTION.unpack(question)
            caller = _Caller(pid, NAMES[call], arguments)
            failure, flags = 0, CARRY_OUT
            path = caller.path()
            if path.is_relative_to(root) and not caller.changes_nothing(path):
                operation = Operation(len(operations) + 1, caller.call, str(path.relative_to(root)), *caller.content())
                operations.append(operation)
                before(operation, disk)
                if full(operation):
                    failure, flags = errno.ENOSPC, 0
                else:
                    disk.note(operation, os.path.relpath(caller.target(), root))
                    flags = 0 if caller.call in SYNCS else CARRY_OUT
            fcntl.ioctl(listener, REPLY, bytearray(ANSWER.pack(number, 0, -failure, flags)))
    finally:
        if ended not in ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(listener)
        os.close(ended)
    return os.waitstatus_to_exitcode(status), operations


def in_child(work: Callable[[], int]) -> int:
    """The exit code of `work` in a forked child."""
    child = os.fork()
    if child == 0:
        _be_the_child(work, None)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _be_the_child(work: Callable[[], int], channel: socket.socket | None) -> None:
    code = 99
    try:
        if channel:
            listener = _install_filter()
            socket.send_fds(channel, [b"x"], [listener])
            os.close(listener)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _install_filter() -> int:
    """From here on, CALLS of this process and of those that it starts are asked about at the descriptor returned."""
    program = [(LOAD_WORD, 0, 0, NUMBER_AT)]
    program += [(JUMP_IF_EQUAL, 0, 3, CALLS["openat"]), (LOAD_WORD, 0, 0, THIRD_ARGUMENT_AT)]
    program += [(JUMP_IF_ANY_BIT, len(CALLS) + 2, 0, CHANGING), (RETURN, 0, 0, ALLOW)]
    program += [(JUMP_IF_EQUAL, len(CALLS) - i, 0, number) for i, number in enumerate(CALLS.values())]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ASK)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = libc.syscall(SECCOMP, SET_MODE_FILTER, FLAG_NEW_LISTENER, header)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "this kernel does not hand over system calls (seccomp_unotify, Linux 5.5)")
    return listener


@dataclass
class _Caller:
    """A process that is stopped in a system call."""

    pid: int
    call: str
    arguments: list[int]

    def path(self) -> Path:
        """What the call works on; of two, the first."""
        if self.call in WRITES or self.call in SYNCS or self.call in BY_DESCRIPTOR:
            return Path(self._link(f"fd/{self.arguments[0]}"))
        if self.call in IN_FOLDER:
            return self._path_in(self.arguments[0], self.arguments[1])
        return self._path_in(AT_FDCWD, self.arguments[0])

    def target(self) -> Path:
        """Of a renaming: the new path."""
        if self.call == "rename":
            return self._path_in(AT_FDCWD, self.arguments[1])
        if self.call.startswith("rename"):
            return self._path_in(self.arguments[2], self.arguments[3])
        return self.path()

    def changes_nothing(self, path: Path) -> bool:
        there = os.path.lexists(path)
        if self.call in ("open", "openat"):
            flags = self.arguments[1 if self.call == "open" else 2]
            return not (flags & os.O_TRUNC and there or flags & os.O_CREAT and not there)
        if self.call == "ftruncate":
            return path.stat().st_size == self.arguments[1]
        if self.call in REMOVALS:
            return not there
        return self.call in ("mkdir", "mkdirat") and there

    def content(self) -> tuple[bytes, int]:
        """(bytes, place in the file) of what is written."""
        if self.call not in WRITES:
            return b"", 0
        descriptor, address, count, place, *_ = self.arguments
        pieces = [(address, count)]
        if self.call == "writev":
            pieces = list(struct.iter_unpack("QQ", self._memory(address, 16 * count)))
        if self.call != "pwrite64":
            lines = Path(f"/proc/{self.pid}/fdinfo/{descriptor}").read_text().splitlines()
            told = dict(line.split(":") for line in lines[:2])  # pos, flags
            appends = int(told["flags"], 8) & os.O_APPEND
            place = os.stat(f"/proc/{self.pid}/fd/{descriptor}").st_size if appends else int(told["pos"])
        return b"".join(self._memory(*piece) for piece in pieces), place

    def _path_in(self, folder: int, name_address: int) -> Path:
        folder = ctypes.c_int(folder & 0xFFFFFFFF).value
        base = self._link("cwd" if folder == AT_FDCWD else f"fd/{folder}")
        name = self._memory(name_address, os.pathconf("/", "PC_PATH_MAX")).partition(b"\0")[0].decode()
        return Path(os.path.normpath(os.path.join(base, name)))

    def _memory(self, address: int, size: int) -> bytes:
        """Less of it where the memory ends."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)

    def _link(self, name: str) -> str:
        return os.readlink(f"/proc/{self.pid}/{name}")
