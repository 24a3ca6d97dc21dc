"""Weights for engines that do not share the learner's memory: over NCCL between GPUs (not measured on a GPU), over gloo
between CPUs.

    engine's worker ── token, file, device ──▶ WeightServer, a thread in the learner's process
                    ◀── names, dtypes, shapes ──
                    ◀══ every tensor in the order of the names ══   a process group of the two, kept for the next time

What is sent is the file that `publish_weights` wrote: a snapshot, so that the learner goes on meanwhile, and several
engines may be at different versions. An engine has received everything before it checks it, and has checked everything
before it touches its model: `StreamedWeights` stands where `WeightFiles` stands for a file.

Waits, and what ends them: every send and receive, DEADLINE_S or the other side's death; the server's threads, the
process.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from rl.weight_sync import WeightFiles, WeightsRefused

SCHEME = "stream"
DEADLINE_S = 60.0
SERVER, ENGINE = 0, 1  # ranks
TAG = 0


def _pair(store: Any, rank: int, backend: str, host: str) -> Any:
    """The process group of one server thread and one engine. Not torch's global one: the learners have that."""
    deadline = timedelta(seconds=DEADLINE_S)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = deadline
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = deadline
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _store(host: str, port: int, *, master: bool) -> Any:
    return dist.TCPStore(
        host, port, 2, is_master=master, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_S)
    )  # fmt: skip


class WeightServer:
    """Sends the files of one folder to whoever knows the token. Lives as long as its process, or until `stop`."""

    def __init__(self, folder: Path | str, host: str) -> None:
        self.folder, self.host, self.token = Path(folder), host, secrets.token_hex(16)
        self._listening = socket.create_server((host, 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, name="weight-server", daemon=True).start()

    def location(self, path: Path | str) -> str:
        """What an engine is given in the place of the file's path."""
        return f"{SCHEME}://{self.host}:{self.port}/{self.token}/{Path(path).name}"

    def stop(self) -> None:
        # A thread that waits in `accept` would keep the port open.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listening.accept()
            except OSError:
                return  # stopped
            threading.Thread(target=self._serve, args=(peer,), name="weight-sender", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """One engine, from its first request to its end. What goes wrong here is told, or seen, at the other end."""
        with peer, peer.makefile("rw") as lines:
            group = None
            for line in lines:
                try:
                    request = json.loads(line)
                    if not hmac.compare_digest(request["token"], self.token):
                        raise WeightsRefused("wrong token")
                    with WeightFiles(self.folder / Path(request["file"]).name) as weights:
                        tensors = [(name, str(dtype), shape) for name, dtype, shape in weights.manifest()]
                        backend = "nccl" if request["cuda"] and torch.cuda.is_available() else "gloo"
                        store = None if group else _store(self.host, 0, master=True)
                        answer = {"tensors": tensors, "backend": backend, "port": store.port if store else None}
                        print(json.dumps(answer), file=lines, flush=True)
                        group = group or _pair(store, SERVER, backend, self.host)
                        for _, tensor in weights:
                            _send(group, tensor.cuda() if backend == "nccl" else tensor)
                except (WeightsRefused, KeyError, ValueError) as error:
                    print(json.dumps({"refused": str(error)}), file=lines, flush=True)
                except (RuntimeError, OSError):
                    return  # the engine is gone


def _send(group: Any, tensor: torch.Tensor) -> None:
    group.send([tensor.reshape(-1).view(torch.uint8)], ENGINE, TAG).wait()


class WeightClient:
    """An engine's end: one connection, made at the first use and again after a failure."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._address: tuple[str, int] | None = None
        self._socket: socket.socket | None = None
        self._group: Any = None

    def get(self, location: str) -> StreamedWeights:
        """All tensors of a published file. Raises WeightsRefused for what the server refuses, or cannot send whole."""
        parts = urlsplit(location)
        assert parts.hostname and parts.port
        _, token, file = parts.path.split("/")
        try:
            self._connect((parts.hostname, parts.port))
            return self._received({"token": token, "file": file, "cuda": self.device.type == "cuda"})
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            if isinstance(error, WeightsRefused):
                raise
            raise WeightsRefused(f"{file} did not arrive whole from {parts.hostname}:{parts.port}: {error}") from error

    def _connect(self, address: tuple[str, int]) -> None:
        if self._socket is None or self._address != address:
            self.close()
            self._socket, self._address = socket.create_connection(address, timeout=DEADLINE_S), address
            self._lines = self._socket.makefile("rw")

    def _received(self, request: dict[str, Any]) -> StreamedWeights:
        assert self._address is not None
        print(json.dumps(request), file=self._lines, flush=True)
        if not (line := self._lines.readline()):
            raise ConnectionError("the connection was closed")
        answer = json.loads(line)
        if "refused" in answer:
            raise WeightsRefused(answer["refused"])
        if self._group is None:
            host = self._address[0]
            self._group = _pair(_store(host, answer["port"], master=False), ENGINE, answer["backend"], host)
        tensors = {}
        for name, dtype, shape in answer["tensors"]:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=self.device)
            self._group.recv([tensor.reshape(-1).view(torch.uint8)], SERVER, TAG).wait()
            tensors[name] = tensor
        return StreamedWeights(tensors)

    def close(self) -> None:
        if self._socket is not None:
            self._lines.close()
            self._socket.close()
        self._socket = self._group = None


class StreamedWeights:
    """What arrived, with the manners of `WeightFiles`. As large as the model, until it is loaded."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> StreamedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order of the names."""
        yield from sorted(self._tensors.items())

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
