"""An allocator that keeps what is freed, for benches that make many large tensors in turn.

A page that is touched for the first time costs a virtual machine several times what it costs to write to it, and the
gradients of many experts are many pages: without this a bench measures the kernel's page faults.
"""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


def keep_memory_and_one_thread() -> None:
    """Begin this program again with these variables, which are read when a process starts; once."""
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
