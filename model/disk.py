"""Writing what must not be lost, errors of the disk that name their file, and where to keep what can be made again.

Called by whoever writes a checkpoint, published weights, or the state of a run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers tell of one


def cache_dir() -> Path:
    """Where converted checkpoints and compiled kernels are kept: $DROVER_CACHE, or ~/.cache/drover."""
    return Path(os.environ.get("DROVER_CACHE") or Path.home() / ".cache" / "drover")


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An error of the operating system inside becomes an OSError that says which file or folder it was about.

    Python names it where it opens one, not where it writes or syncs; libraries in C++ and Rust name it seldom.
    """
    try:
        yield
    except OSError as error:
        if os.path.isabs(str(error.filename)):
            raise
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    except Exception as error:
        if (told := RUST_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error


def sync(path: Path | str) -> None:
    """Make durable: of a file its content, of a folder its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """A folder and all in it."""
    with naming(folder):
        shutil.rmtree(folder)
