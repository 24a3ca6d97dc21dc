"""C++ kernels, compiled for the processor that they run on the first time they are wanted (some seconds), then kept.

    library = compiled(Path("model/kernels/grouped_gemm.cpp"))      # ctypes.CDLL, or None without a compiler

Kept below ~/.cache/drover (DROVER_CACHE), under a digest of all that the machine code depends on. There is no binary
to install and none that is wrong for a machine; who calls it has another way, for a machine without a compiler. CXX
names the compiler; without it g++, clang++ and c++ are looked for. DROVER_COMPILED=0 does without any.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from model.disk import cache_dir

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
COMPILERS = ("g++", "clang++", "c++")

log = logging.getLogger(__name__)


@functools.cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """The library of one C++ file; None, and a line in the log, where it cannot be made."""
    if os.environ.get("DROVER_COMPILED") == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        log.info("no C++ compiler (CXX, %s): %s is not used, torch does its work", ", ".join(COMPILERS), source.name)
        return None
    try:
        library = cache_dir() / "kernels" / f"{source.stem}-{_digest(source, compiler)}.so"
        if not library.exists():
            _compile(source, compiler, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as refusal:  # RuntimeError: nobody's home directory
        said = getattr(refusal, "stderr", None) or str(refusal)
        log.warning("%s could not be compiled by %s, torch does its work: %s", source.name, compiler, said.strip())
        return None


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), *COMPILERS])), None)


def processor(*fields: str) -> str:
    """What Linux says of it under the first of these names that it has; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines()) if cpuinfo.exists() else ()
    return next((value.strip() for name, _, value in lines if name.strip() in fields), "")


def _digest(source: Path, compiler: str) -> str:
    """Of the text, the compiler and the processor: what `native` means."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    features = processor("flags", "Features") or platform.processor()
    parts = (source.read_text(), " ".join(FLAGS), compiler, version, platform.machine(), features)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(source: Path, compiler: str, library: Path) -> None:
    """Beside its place first, then moved: processes that compile at the same time do not read half a file."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run([compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True, check=True)
        made.replace(library)
