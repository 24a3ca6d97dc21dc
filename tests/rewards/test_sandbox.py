"""Attempts to escape, exhaust or deceive the sandbox. Each test asserts that the attempt was really made, and that the
same attempt succeeds outside where that is harmless to show."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewards import sandbox as module
from rewards.sandbox import AnswerFault, Limits, Sandbox, SandboxFailure, SandboxUnavailable, features

TRY = """
import errno
def attempt(act):
    try:
        return {"made": True, "got": act()}
    except OSError as error:
        return {"made": True, "refused": errno.errorcode.get(error.errno, str(error.errno))}
"""


def attempt(sandbox: Sandbox, act: str, *arguments: object) -> dict:
    """What the expression `act` (of a list `x`) gives inside: {"made", "got"} or {"made", "refused"}."""
    program = f"{TRY}\ndef f(*x):\n    import os, socket, ctypes, threading\n    return attempt(lambda: {act})\n"
    outcome = sandbox.run(program, "f", [list(arguments)])[0]
    assert outcome["made"]
    return outcome


def processes_below(pid: int) -> set[int]:
    """All living descendants of a process."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(entry.name)] = int(parent)
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(holds, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


# ---------------------------------------------------------------------------------------------- escape


def test_a_file_outside_cannot_be_read_or_found(sandbox: Sandbox, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("secret")
    canary.chmod(0o644)
    assert open(canary).read() == "secret"
    for path in (str(canary), "/etc/passwd", "/proc/self/environ", "/proc/1/mem", "/dev/vda", str(Path(__file__))):
        assert "refused" in attempt(sandbox, "open(x[0]).read()", path), path
    assert attempt(sandbox, "os.path.exists(x[0])", str(canary))["got"] is False
    assert set(attempt(sandbox, "os.listdir('/')")["got"]).isdisjoint({"etc", "proc", "dev", "tmp", "work", "var"})


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm", "/", "/etc", os.path.dirname(os.__file__)])
def test_nothing_can_be_written(sandbox: Sandbox, folder: str) -> None:
    path = f"{folder}/drover_escape_{os.getpid()}"
    assert "refused" in attempt(sandbox, "open(x[0], 'w').write('x')", path)
    assert "refused" in attempt(sandbox, "os.symlink('/etc/passwd', x[0])", path)
    assert "refused" in attempt(sandbox, "os.mkdir(x[0])", path)
    assert not os.path.lexists(path)


def test_the_environment_holds_no_secret(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROVER_SECRET", "hush")
    with Sandbox() as started_with_it:
        environment = attempt(started_with_it, "dict(os.environ)")["got"]
    assert set(environment) <= {"LC_CTYPE"}


def test_no_connection_leaves(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = list(server.getsockname())
        socket.create_connection(tuple(address), timeout=5).close()  # reachable from here
        server.accept()[0].close()
        assert "refused" in attempt(sandbox, "socket.create_connection(tuple(x), timeout=1)", *address)
        assert "refused" in attempt(sandbox, "socket.socketpair()")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "act",
    [
        "os.fork()",
        "os.system('true') and (_ for _ in ()).throw(PermissionError)",  # -1 or a status, never a shell
        "os.execv('/bin/sh', ['sh'])",
        "os.setsid()",
        "os.kill(x[0], 9)",
        "os.kill(1, 9)",
        "os.setuid(0)",
        "os.chroot('/')",
        "os.memfd_create('x')",
        "os.sched_setaffinity(0, [0])",
        "os.open('/dev/tty', os.O_RDWR)",
    ],
)
def test_no_process_signal_or_privilege_is_to_be_had(sandbox: Sandbox, act: str) -> None:
    assert "refused" in attempt(sandbox, act, os.getpid())


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("socket", 41), ("clone", 56), ("ptrace", 101), ("setns", 308), ("unshare", 272), ("mount", 165), ("bpf", 321),
        ("keyctl", 250), ("userfaultfd", 323), ("perf_event_open", 298), ("io_uring_setup", 425), ("kexec_load", 246),
        ("prctl", 157), ("clone3", 435), ("process_vm_readv", 310), ("pidfd_getfd", 438), ("seccomp", 317),
        ("shmget", 29), ("ioctl", 16), ("x32 getpid", 0x40000000 + 39),
    ],
)  # fmt: skip
def test_raw_system_calls_are_refused(sandbox: Sandbox, name: str, number: int) -> None:
    program = (
        "import ctypes\ndef f(n):\n    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    return libc.syscall(n, 0, 0, 0, 0, 0), ctypes.get_errno(), libc.syscall(39)\n"
    )
    result, errno, own_pid = sandbox.run(program, "f", [[number]])[0]
    assert (result, errno) == (-1, 1), name
    assert own_pid == 1  # the same door does work, and we are alone in our pid namespace


def test_the_child_is_nobody_and_sees_no_process(sandbox: Sandbox) -> None:
    assert attempt(sandbox, "os.getpid()")["got"] == 1
    if os.geteuid() == 0:
        assert attempt(sandbox, "os.getuid()")["got"] == 1  # which is `nobody` outside


def test_one_answer_finds_nothing_of_another(sandbox: Sandbox) -> None:
    leave = "import builtins, math\ndef f():\n    builtins.left = math.left = 'here'\n    return left\n"
    assert sandbox.run(leave, "f", [[]]) == ["here"]
    look = "import builtins, math\ndef f(): return hasattr(builtins, 'left') or hasattr(math, 'left')"
    assert sandbox.run(look, "f", [[]]) == [False]


# ---------------------------------------------------------------------------------------------- exhaust


def test_an_endless_loop_is_killed(sandbox: Sandbox) -> None:
    with pytest.raises(AnswerFault, match="case 2 of 2: time limit: 1 s of CPU"):
        sandbox.run("def f(x):\n while x: pass\n return x", "f", [[0], [1]])


def test_sleeping_for_ever_is_killed_at_the_wall_limit() -> None:
    with Sandbox(limits=Limits(wall_s=0.5)) as own:
        began = time.monotonic()
        with pytest.raises(AnswerFault, match=r"time limit: 0\.5 s"):
            own.run("import time\ndef f(): time.sleep(1000)", "f", [[]])
        assert time.monotonic() - began < 5
        assert own.run("x + 1", "f", [[1]]) == [2]


def test_a_fork_bomb_does_not_fork(sandbox: Sandbox) -> None:
    bomb = (
        "import os\ndef f():\n    tries = 0\n    for _ in range(1000):\n        tries += 1\n"
        "        try:\n            os.fork()\n        except OSError:\n            continue\n        return 'forked'\n"
        "    return tries\n"
    )
    assert sandbox.run(bomb, "f", [[]]) == [1000]


def test_threads_are_refused(sandbox: Sandbox) -> None:
    with pytest.raises(AnswerFault, match="can't start new thread"):
        sandbox.run("import threading\ndef f(): threading.Thread(target=print).start()", "f", [[]])


def test_a_memory_bomb_ends_in_memory_error(sandbox: Sandbox) -> None:
    with pytest.raises(AnswerFault, match="MemoryError"):
        sandbox.run("def f():\n x = []\n while True: x.append(bytearray(1 << 28))", "f", [[]])


def test_a_gigabyte_on_stdout_goes_nowhere(sandbox: Sandbox) -> None:
    program = "def f():\n x = 'x' * (1 << 20)\n for _ in range(1024): print(x)\n return 'printed'"
    assert sandbox.run(program, "f", [[]]) == ["printed"]


@pytest.mark.parametrize(
    "body",
    [
        "return 'x' * (1 << 20)",
        "os.write(3, b'x' * (1 << 20))",
        "while True: os.write(3, b'x' * (1 << 16))",
    ],
)
def test_a_flood_of_results_is_cut(sandbox: Sandbox, body: str) -> None:
    with pytest.raises(AnswerFault, match="a result longer than"):
        sandbox.run(f"import os\ndef f():\n    {body}", "f", [[]])


@pytest.mark.parametrize("value", ["[x] * 0 + deep()", "cyclic()", "object()", "(i for i in [1])", "10 ** 10000"])
def test_what_is_not_plain_data_is_a_fault(sandbox: Sandbox, value: str) -> None:
    program = (
        "def deep():\n    x = []\n    for _ in range(100000): x = [x]\n    return x\n"
        "def cyclic():\n    x = []\n    x.append(x)\n    return x\n"
        f"def f(x): return {value}\n"
    )
    with pytest.raises(AnswerFault):
        sandbox.run(program, "f", [[1]])


# ---------------------------------------------------------------------------------------------- deceive


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os._exit(0)", "ended without a result"),
        ("os.close(3)", "OSError|ended without a result"),
        ("os.abort()", "ended without a result"),
        ("ctypes.string_at(0)", "ended without a result"),
        ("raise SystemExit(0)", "SystemExit"),
        ("os.write(3, b'{\"value\": 4}\\n'); return 4", "answers no request"),
        ("os.write(3, b'not json\\n'); return 4", "malformed"),
        ("os.write(3, b'[' * 50000 + b'\\n'); return 4", "malformed"),
        ("os.write(3, json.dumps({'nonce': nonce(), 'value': {'set': 1}}).encode() + b'\\n')", "malformed|answers no"),
        ("os.write(3, json.dumps({'nonce': nonce(), 'value': 4}).encode() + b'\\n'); return 4", "answers no request"),
    ],
)
def test_a_missing_doubled_or_malformed_result_is_a_fault(sandbox: Sandbox, body: str, reason: str) -> None:
    program = (
        "import ctypes, json, os, sys\ndef nonce(): return sys._getframe(2).f_locals['request']['nonce']\n"
        f"def f():\n    {body}\n"
    )
    with pytest.raises(AnswerFault, match=reason):
        sandbox.run(program, "f", [[]])


def test_a_verdict_on_stdout_or_stderr_is_not_heard(sandbox: Sandbox) -> None:
    program = (
        "import os\ndef f():\n    print('PASSED', flush=True)\n"
        '    return [os.write(fd, b\'{"value": "passed"}\\n\') for fd in (1, 2)]\n'
    )
    assert sandbox.run(program, "f", [[]]) == [[20, 20]]


# ---------------------------------------------------------------------------------------------- our own failures


def test_a_child_killed_from_outside_is_our_failure_not_the_answers(sandbox: Sandbox) -> None:
    with Sandbox() as own, pytest.raises(SandboxFailure, match="killed from outside"):
        launcher = own._brokers["plain"]._process.pid
        (broker,) = processes_below(launcher)

        def kill_child() -> None:
            assert wait_until(lambda: len(processes_below(broker)) == 1)
            time.sleep(0.2)  # let it begin the answer
            os.kill(processes_below(broker).pop(), signal.SIGKILL)

        killer = threading.Thread(target=kill_child)
        killer.start()
        try:
            own.run("import time\ndef f(): time.sleep(8)", "f", [[]])
        finally:
            killer.join()


def test_a_dead_broker_is_restarted_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.sandbox.MAX_RESTARTS", 2)
    with Sandbox() as own:
        for _ in range(2):
            (broker,) = processes_below(own._brokers["plain"]._process.pid)
            os.kill(broker, signal.SIGKILL)
            assert own.run("x + 1", "f", [[1]]) == [2]
        (broker,) = processes_below(own._brokers["plain"]._process.pid)
        own._brokers["plain"]._process.kill()  # the launcher: the broker dies with it
        assert wait_until(lambda: is_gone(broker))
        with pytest.raises(SandboxFailure, match="died 3 times"):
            own.run("x + 1", "f", [[1]])


def test_many_threads_share_one_sandbox(sandbox: Sandbox) -> None:
    results: dict[int, list] = {}

    def work(number: int) -> None:
        results[number] = [sandbox.run("x * x", "f", [[number], [number + 1]]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: [[number**2, (number + 1) ** 2]] * 5 for number in range(8)}


def test_stop_leaves_no_process_and_no_descriptor() -> None:
    before, descriptors = processes_below(os.getpid()), len(os.listdir("/proc/self/fd"))
    own = Sandbox()
    own.start()
    for number in range(20):
        own.run("x", "f", [[number]])
    assert len(processes_below(os.getpid()) - before) == 2  # launcher and broker; every child is reaped
    began = time.monotonic()
    own.stop()
    own.stop()
    assert time.monotonic() - began < 5
    assert processes_below(os.getpid()) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(RuntimeError, match="start the sandbox"):
        own.run("x", "f", [[1]])


def test_nothing_outlives_an_owner_that_is_killed(repo_root: Path) -> None:
    script = (
        "from rewards.sandbox import Limits, Sandbox\nwith Sandbox(limits=Limits(cpu_s=60, wall_s=60)) as own:\n"
        "    print('started', flush=True)\n    own.run('def f():\\n while True: pass', 'f', [[]])\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=repo_root, stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"started\n"
        assert wait_until(lambda: len(processes_below(owner.pid)) == 3)  # launcher, broker, the looping child
        family = processes_below(owner.pid)
    finally:
        owner.kill()
        owner.communicate()
    assert wait_until(lambda: all(map(is_gone, family)))


def test_without_user_namespaces_it_refuses_to_start(repo_root: Path) -> None:
    script = (
        "from rewards.sandbox import *\n"
        "try:\n    Sandbox().start()\nexcept SandboxUnavailable as error:\n    print(error, features())\n"
    )
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    run = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", forbid, "sh", sys.executable, "-c", script],
        cwd=repo_root, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "user namespaces: No space left on device" in run.stdout, run.stderr
    assert "sysctl" in run.stdout and "'isolated': False" in run.stdout


def test_it_works_for_a_root_that_has_no_other_user(repo_root: Path) -> None:
    script = "from rewards.sandbox import *\nwith Sandbox() as own: print(own.run('x + 1', 'f', [[1]]))"
    command = ["unshare", "-Ur", sys.executable, "-c", script]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout == "[2]\n", run.stderr


def test_a_probe_that_gets_out_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    leaking = module.PROBE.replace('"fork": os.fork', '"fork": os.getpid')
    assert leaking != module.PROBE
    monkeypatch.setattr(module, "PROBE", leaking)
    with pytest.raises(SandboxUnavailable, match="the sandbox leaks, so nothing runs in it: fork"):
        Sandbox().start()
    monkeypatch.setattr(module, "PROBE", "def attempts(*x): return {}")
    with pytest.raises(SandboxUnavailable, match="made 0 of 10 attempts"):
        Sandbox().start()


def test_features_say_that_this_machine_isolates() -> None:
    found = features()
    assert found["isolated"] and found["user_namespaces"] and found["seccomp"] and found["detail"] == ""
    json.dumps(found)
