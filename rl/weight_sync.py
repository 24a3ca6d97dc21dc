"""Weights on their way from the learner to the engines: how they are published, read, checked and proved.

The learner calls `publish_weights`; every engine's worker (`rl/worker_extension.py`) reads the same file through
`WeightFiles`. A publication appears whole or not at all, and both sides compute `weights_digest` over what they really
hold, so a sync is proved rather than believed. Needs torch and safetensors, not vLLM.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file

from model.disk import naming, sync

# The output projection. Checkpoints of models whose embedding is tied to it may hold it or leave it out.
OUTPUT_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class WeightsRefused(ValueError):
    """These weights do not belong in this engine; the message names the tensor or the digests. Nothing was changed."""


def weights_digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """BLAKE3 over every tensor's name, dtype, shape and bytes, in the order of the names: as hard to forge as sha256,
    and nearly as fast as the memory is read.

    Takes a stream as well as a list, but a stream must already be sorted by name: `ValueError` otherwise. Tensors may
    lie on any device; two models have the same digest exactly when they are the same bit for bit.
    """
    if not isinstance(named_tensors, Iterator):
        named_tensors = sorted(named_tensors, key=lambda item: item[0])
    digest, previous = blake3(), ""
    for name, tensor in named_tensors:
        if name <= previous:
            raise ValueError(f"weights_digest: {name!r} comes after {previous!r}; a stream must be sorted by name")
        previous = name
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def publish_weights(named_tensors: Iterable[tuple[str, torch.Tensor]], path: Path | str) -> str:
    """Write one safetensors file that is either absent or complete, and return its `weights_digest`.

    A reader that has the previous file open keeps reading the previous weights. Tensors that share their memory (tied
    embeddings) are written once, under the first name given.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    # Each is kept until the end: the place of one that was let go, once copied from a GPU, may be the next one's.
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
    for name, tensor in named_tensors:
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in places:
            continue
        places[place] = tensor
        tensors[name] = tensor.detach().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            save_file(tensors, partial)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return weights_digest(tensors.items())


class Weights(Protocol):
    """A set of tensors, all of it there before the first is used."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...


class WeightFiles:
    """The tensors behind a safetensors file or a Hugging Face directory (sharded or not), memory-mapped.

    Open it once and iterate as often as needed: every pass reads the same bytes, even when the path is replaced
    meanwhile. Raises `WeightsRefused` where there is nothing to read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not files or not files[0].is_file():
            raise WeightsRefused(f"no safetensors weights at {self.path}")
        self._stack = contextlib.ExitStack()
        self._file_of: dict[str, Any] = {}
        try:
            for file in files:
                opened = self._stack.enter_context(safe_open(str(file), "pt"))
                self._file_of.update({name: opened for name in opened.keys()})  # noqa: SIM118  not a mapping
        except Exception as error:
            self._stack.close()
            raise WeightsRefused(f"{file} is not a readable safetensors file: {error}") from error

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._file_of.clear()
        self._stack.close()

    def __len__(self) -> int:
        return len(self._file_of)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order of the names, one tensor in memory at a time."""
        for name in sorted(self._file_of):
            yield name, self._file_of[name].get_tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def manifest(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) in the order of the names."""
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]


def check_names(
    expected: Mapping[str, tuple[int, ...]], received: Mapping[str, tuple[int, ...]], *, tied: bool
) -> None:
    """Refuse an update that is not the whole model and nothing but the model (`WeightsRefused` names the tensors).

    A missing name would leave an old tensor in the engine without a word, an unknown one would be dropped so. With a
    `tied` output head either side may leave `lm_head.weight` out: it is the embedding.
    """
    optional = {OUTPUT_HEAD} if tied else set()
    missing = sorted(expected.keys() - received.keys() - optional)
    unknown = sorted(received.keys() - expected.keys() - optional)
    reshaped = sorted(name for name in expected.keys() & received.keys() if expected[name] != received[name])
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if unknown:
        problems.append(f"{len(unknown)} unknown ({', '.join(unknown[:3])})")
    if reshaped:
        name = reshaped[0]
        problems.append(f"{len(reshaped)} of another shape ({name} is {received[name]}, expected {expected[name]})")
    if problems:
        raise WeightsRefused(f"of {len(expected)} tensors expected: {'; '.join(problems)}")


def check_tied_head(weights: Weights) -> None:
    """A tied engine ignores the head it is sent; refuse one that differs from the embedding instead of losing it."""
    names = weights.shapes()
    if OUTPUT_HEAD in names and EMBEDDING in names:
        if not torch.equal(weights.tensor(OUTPUT_HEAD), weights.tensor(EMBEDDING)):
            raise WeightsRefused(f"{OUTPUT_HEAD} differs from {EMBEDDING}, but this model's config ties them")
