"""Triton on a machine without a GPU: a test file's checks in a process of their own, interpreted or compiled.

TRITON_INTERPRET is read when triton is first imported, which some other test may have done by now. So a file calls
itself, and ends in `main(globals())`:

    outcomes(__file__)             of all its functions check_…, interpreted: {"check_…": "passed" or a traceback}
    compiled(__file__, folder)     what its `compile_kernels()` returned, as JSON gives it back; the interpreter accepts
                                   what the compiler may not
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def outcomes(file: str) -> dict[str, str]:
    return _in_another_process(file, "interpret", TRITON_INTERPRET="1")


def compiled(file: str, cache: Path) -> Any:
    return _in_another_process(file, "compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))


def _in_another_process(file: str, what: str, **environment: str) -> Any:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, file, what],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def checks(names: dict[str, Any]) -> list[str]:
    return [name for name in names if name.startswith("check_")]


def main(names: dict[str, Any]) -> None:
    if sys.argv[1] == "compile":
        print(json.dumps(names["compile_kernels"]()))
        return
    results = {}
    for name in checks(names):
        try:
            names[name]()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def built_for(capability: int, kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> Any:
    """A kernel compiled with 8 warps; what is neither a constant nor a pointer in `types` is an int32. As for tensors
    that a model has: all that is not a constant, addresses among them, is a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    multiples = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
