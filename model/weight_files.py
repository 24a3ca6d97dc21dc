"""Weights between safetensors shards and a Llama 4 in memory, one tensor at a time.

Called by `model/checkpoint.py`. What a checkpoint must hold comes from `model/tensor_map.py`; whatever else it holds,
or lacks, is an error. Reading needs the model and one shard in memory, writing the model and the shard being collected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from model.tensor_map import NOT_TEXT, Config, DiskFormat, Piece, Shape, format_of, parameters, pieces

INDEX = "model.safetensors.index.json"
NAMED_IN_ERROR = 3  # tensors of each kind
NamedTensor = tuple[str, torch.Tensor]


class WeightsMismatch(ValueError):
    """These tensors are not the model's; the message names tensors, the shapes seen and the shapes wanted."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    shape: Shape
    file: Path


# --- reading ------------------------------------------------------------------------------------------------------


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """What the headers of a checkpoint's shards say, by name. With an index, only the files that it names count."""
    index = directory / INDEX
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which is not there")
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  not a mapping
                if name in stored:
                    raise WeightsMismatch(f"{name} lies both in {stored[name].file} and in {file.name}")
                stored[name] = StoredTensor(name, tuple(shard.get_slice(name).get_shape()), file)
    return stored


def read_tensors(tensors: Iterable[StoredTensor]) -> Iterator[NamedTensor]:
    """The tensors themselves, shard after shard. Each is a view of the mapped file: copy what is to be kept, and let go
    of it before asking for the next, so that a finished shard leaves the memory."""
    by_file = sorted(tensors, key=lambda tensor: (tensor.file, tensor.name))
    for file, inside in groupby(by_file, key=lambda tensor: tensor.file):
        with safe_open(file, "pt") as shard:
            for tensor in inside:
                yield tensor.name, shard.get_tensor(tensor.name)


def passed_through(directory: Path) -> Iterator[NamedTensor]:
    """The tensors of a multimodal checkpoint that are not the text model's, as they are."""
    return read_tensors(tensor for name, tensor in stored_tensors(directory).items() if name.startswith(NOT_TEXT))


def read_pieces(directory: Path, config: Config, multimodal: bool) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Every text tensor of a checkpoint, with the place in memory that it belongs to. WeightsMismatch, before the first
    is read, unless the checkpoint holds exactly the tensors of `config`, in one of the formats known (and, where it is
    `multimodal`, those of its vision part, which are left out)."""
    stored = stored_tensors(directory)
    text = {name: tensor for name, tensor in stored.items() if not (multimodal and name.startswith(NOT_TEXT))}
    disk = format_of(text)
    wanted = {piece.name: piece for spec in parameters(config) for piece in pieces(spec, disk)}
    check_tensors(
        {name: piece.shape for name, piece in wanted.items()},
        {name: tensor.shape for name, tensor in text.items()},
        str(directory),
    )
    for name, tensor in read_tensors(text.values()):
        yield wanted[name], tensor


def check_tensors(wanted: Mapping[str, Shape], seen: Mapping[str, Shape], where: str) -> None:
    """WeightsMismatch unless the names and the shapes are the same."""
    missing = [f"{name} {list(wanted[name])}" for name in wanted if name not in seen]
    unexpected = [f"{name} {list(seen[name])}" for name in seen if name not in wanted]
    reshaped = [
        f"{name} is {list(seen[name])}, wanted {list(wanted[name])}"
        for name in wanted
        if name in seen and seen[name] != wanted[name]
    ]
    kinds = {"missing": missing, "not the model's": unexpected, "of another shape": reshaped}
    problems = [
        f"{len(names)} {kind} ({'; '.join(names[:NAMED_IN_ERROR])}{'; …' if len(names) > NAMED_IN_ERROR else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise WeightsMismatch(f"{where}: of {len(wanted)} tensors wanted, {', '.join(problems)}")


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Iterable[tuple[Piece, torch.Tensor]], dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device its parameters, in `dtype`. RuntimeError where one is left."""
    for piece, tensor in tensors:
        piece.view(_real_parameter(model, piece.parameter, dtype)).copy_(tensor)
        del tensor  # a view of the mapped shard, which else stays until the next one has been opened
    model.tie_weights()
    left = [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{len(left)} tensors of {type(model).__name__} got no value ({', '.join(left[:3])})")


def _real_parameter(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter:
    """The parameter called so; memory for it is taken when its first piece comes."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = getattr(module, leaf)
    if parameter.is_meta:
        parameter = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
        setattr(module, leaf, parameter)
    return parameter


# --- writing ------------------------------------------------------------------------------------------------------


def cut_for_disk(
    weights: Iterable[NamedTensor], config: Config, disk: DiskFormat, dtype: torch.dtype | None = None
) -> Iterator[NamedTensor]:
    """Parameters, by their names in memory, as the tensors of a checkpoint: named, cut and converted one at a time.

    `dtype` None keeps each tensor's own. WeightsMismatch where `weights`, each whole, are not the parameters of
    `config`; that one is missing is known only at the end.
    """
    missing = {spec.name: spec for spec in parameters(config)}
    for name, tensor in weights:
        spec = missing.pop(name, None)
        if spec is None or tuple(tensor.shape) != spec.shape:
            wanted = f"wanted {list(spec.shape)}" if spec else "which is not the model's, or comes twice"
            raise WeightsMismatch(f"weights to write: {name} {list(tensor.shape)}, {wanted}")
        for piece in pieces(spec, disk):
            yield piece.name, piece.view(tensor.detach()).to("cpu", dtype or tensor.dtype).contiguous()
    if missing:
        names = [f"{name} {list(spec.shape)}" for name, spec in missing.items()][:NAMED_IN_ERROR]
        raise WeightsMismatch(f"weights to write: {len(missing)} missing ({'; '.join(names)})")


def write_shards(directory: Path, tensors: Iterable[NamedTensor], max_shard_bytes: int) -> None:
    """One model.safetensors, or shards of at most `max_shard_bytes` (a larger tensor has one of its own) and their
    index. Replaces what lies there only when everything has been written, so `tensors` may come from there."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, dict[str, int]]] = []  # file, bytes of each tensor in it
    try:
        for shard in _collect(tensors, max_shard_bytes):
            file = directory / f".shard-{len(written) + 1:05d}.{os.getpid()}.partial"
            written.append((file, {name: tensor.nbytes for name, tensor in shard.items()}))
            save_file(shard, file, metadata={"format": "pt"})  # transformers refuses a file that does not say so
            shard.clear()  # before the next is collected, else two are held
        for old in [*directory.glob("*.safetensors"), directory / INDEX]:
            old.unlink(missing_ok=True)
        _name_shards(directory, written)
    finally:
        for file, _ in written:
            file.unlink(missing_ok=True)


def _collect(tensors: Iterable[NamedTensor], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _name_shards(directory: Path, written: list[tuple[Path, dict[str, int]]]) -> None:
    if len(written) == 1:
        written[0][0].rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (file, sizes) in enumerate(written, start=1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        file.rename(directory / name)
        weight_map |= dict.fromkeys(sizes, name)
    total = sum(size for _, sizes in written for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
