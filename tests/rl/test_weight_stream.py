"""Weights through a socket and a process group: the same bits, or nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rl.weight_stream import WeightClient, WeightServer
from rl.weight_sync import WeightFiles, WeightsRefused, publish_weights, weights_digest


def tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "wide": torch.randn(257, 33, generator=draw),
        "half": torch.randn(5, 7, generator=draw).bfloat16(),
        "one": torch.randn((), generator=draw),
        "none": torch.empty(0, 3),
        "counts": torch.arange(9),
    }


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WeightServer]:
    server = WeightServer(tmp_path, "127.0.0.1")
    yield server
    server.stop()


@pytest.fixture
def client() -> Iterator[WeightClient]:
    client = WeightClient(torch.device("cpu"))
    yield client
    client.close()


def test_what_arrives_is_what_was_published_bit_for_bit(server: WeightServer, client: WeightClient) -> None:
    for version in range(3):  # the later ones over the connection of the first
        digest = publish_weights(tensors(version).items(), server.folder / f"v{version}")
        with client.get(server.location(f"v{version}")) as arrived, WeightFiles(server.folder / f"v{version}") as files:
            assert weights_digest(iter(arrived)) == digest
            assert arrived.shapes() == files.shapes() and len(arrived) == len(files)
            assert torch.equal(arrived.tensor("half"), tensors(version)["half"])


def test_two_engines_at_different_versions_at_once(server: WeightServer) -> None:
    digests = [publish_weights(tensors(version).items(), server.folder / f"v{version}") for version in range(2)]
    seen: dict[int, str] = {}

    def take(version: int) -> None:
        with WeightClient(torch.device("cpu")).get(server.location(f"v{version}")) as arrived:
            seen[version] = weights_digest(iter(arrived))

    threads = [threading.Thread(target=take, args=(version,)) for version in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [seen[0], seen[1]] == digests


def test_a_folder_s_neighbours_and_wrong_tokens_are_refused(
    server: WeightServer, client: WeightClient, tmp_path: Path
) -> None:
    publish_weights(tensors(0).items(), server.folder / "v0")
    secret = tmp_path.parent / "secret"
    publish_weights(tensors(1).items(), secret)
    with pytest.raises(WeightsRefused, match="no safetensors weights"):
        client._connect(("127.0.0.1", server.port))
        client._received({"token": server.token, "file": "../secret", "cuda": False})
    with pytest.raises(WeightsRefused, match="wrong token"):
        client.get(server.location("v0").replace(server.token, "0" * 32))
    assert len(client.get(server.location("v0"))) == 5  # and neither broke the connection for good


def test_a_server_that_says_what_it_will_send_and_does_not(
    client: WeightClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.weight_stream.DEADLINE_S", 0.5)
    listening = socket.create_server(("127.0.0.1", 0))

    def promise() -> None:
        peer, _ = listening.accept()
        with peer, peer.makefile("rw") as lines:
            lines.readline()
            print(json.dumps({"tensors": [["wide", "torch.float32", [2]]], "backend": "gloo", "port": 1}), file=lines)

    thread = threading.Thread(target=promise)
    thread.start()
    port = listening.getsockname()[1]
    with pytest.raises(WeightsRefused, match=f"v0 did not arrive whole from 127.0.0.1:{port}"):
        client.get(f"stream://127.0.0.1:{port}/token/v0")
    thread.join()
    listening.close()


def _serve_until_killed(folder: str, ready: multiprocessing.connection.Connection) -> None:
    class Dying(WeightFiles):
        passes = 0

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            self.passes += 1  # the first tells what will come
            for name, tensor in super().__iter__():
                yield name, tensor
                if self.passes == 2 and name == "half" and os.path.exists(f"{folder}/die"):
                    os._exit(9)

    import rl.weight_stream

    rl.weight_stream.WeightFiles = Dying  # type: ignore[misc]
    server = WeightServer(folder, "127.0.0.1")
    ready.send(server.location("v0"))
    threading.Event().wait()


def test_a_learner_that_dies_while_it_sends_is_noticed_and_another_can_be_asked(
    server: WeightServer, client: WeightClient
) -> None:
    digest = publish_weights(tensors(0).items(), server.folder / "v0")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve_until_killed, args=(str(server.folder), theirs), daemon=True
    )
    process.start()
    location = ours.recv()
    assert weights_digest(iter(client.get(location))) == digest
    (server.folder / "die").touch()
    with pytest.raises(WeightsRefused, match="did not arrive whole"):
        client.get(location)
    process.join()
    assert process.exitcode == 9
    assert weights_digest(iter(client.get(server.location("v0")))) == digest
