"""`drover upcycle`'s errors and its last words; what it makes is proved in tests/model/test_upcycle.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import model.upcycle
from model.dense_llama import UpcycleRefused
from model.upcycle import Upcycled
from pipeline.config import UpcycleStage
from pipeline.errors import DataError
from pipeline.upcycle import UpcycleJob, Upcycler, upcycle_checkpoint

WORDS: dict[str, Any] = dict(experts=8, every=2, seed=0, dtype=None, text=None)


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "dense" / "model.safetensors").touch()
    return str(tmp_path / "dense")


def test_refusals_are_data_errors(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        upcycle_checkpoint(str(tmp_path / "nowhere"), str(tmp_path / "moe"), **WORDS)
    with pytest.raises(DataError, match="model_type is 'qwen3'; accepted is 'llama'"):
        upcycle_checkpoint(source, str(tmp_path / "moe"), **WORDS)
    with pytest.raises(DataError, match=r"--text .*missing.txt cannot be read .*; accepted is a file of text in UTF-8"):
        upcycle_checkpoint(source, str(tmp_path / "moe"), **WORDS | {"text": str(tmp_path / "missing.txt")})


def test_words_reach_the_function_and_counts_are_printed(
    source: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    asked: dict[str, Any] = {}

    def fake(source: Path, target: Path, **arguments: Any) -> Upcycled:
        asked.update(arguments, source=source, target=target)
        arguments["on_progress"](500, 1000)
        return Upcycled(134_515_008, 453_089_088, 174_397_248, 30, 15, 8, 4096 if arguments["calibration_text"] else 0)

    monkeypatch.setattr(model.upcycle, "upcycle", fake)
    (tmp_path / "text.txt").write_text("words")
    words = dict(experts=4, every=3, seed=7, dtype="float32", text=str(tmp_path / "text.txt"))
    upcycle_checkpoint(source, "moe", **words)
    del asked["on_progress"]
    assert asked == dict(source=Path(source), target=Path("moe"), num_experts=4, moe_step=3, seed=7, dtype="float32",
                         calibration_text="words")  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "moe: 30 layers, 15 of them MoE with 8 experts",
        "parameters: 134.5 M dense → 453.1 M in all, 174.4 M of them at work on a token",
        f"routers: fitted to 4,096 tokens of {words['text']}",
    ]
    upcycle_checkpoint(source, "moe", **WORDS)
    assert "routers: drawn at random; --text FILE makes them share evenly" in capsys.readouterr().out


def test_faults_of_our_own_are_not_blamed_on_the_data(source: str, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> Upcycled:
        raise ValueError("a fault")

    monkeypatch.setattr(model.upcycle, "upcycle", broken)
    with pytest.raises(ValueError, match="a fault") as raised:
        upcycle_checkpoint(source, str(tmp_path / "moe"), **WORDS)
    assert not isinstance(raised.value, UpcycleRefused)


def test_a_stage_asks_for_the_same_and_names_itself_when_refused(source: str, tmp_path: Path, monkeypatch: Any) -> None:
    stage = UpcycleStage(name="moe", kind="upcycle", source=source, experts=4, every=3, dtype="bfloat16")
    upcycler = Upcycler(UpcycleJob(stage=stage, source=Path(source), seed=7, work=tmp_path))
    with pytest.raises(DataError, match="stages.moe: .*model_type is 'qwen3'"):
        upcycler.train()
    asked: dict[str, Any] = {}

    def fake(source: Path, target: Path, **arguments: Any) -> Upcycled:
        asked.update(arguments, source=source, target=target)
        return Upcycled(134_515_008, 453_089_088, 174_397_248, 30, 10, 4, 0)

    monkeypatch.setattr(model.upcycle, "upcycle", fake)
    metrics = upcycler.train()
    assert asked == dict(source=Path(source), target=tmp_path / "checkpoint", num_experts=4, moe_step=3, seed=7,
                         dtype="bfloat16")  # fmt: skip
    assert metrics == {"parameters": 453_089_088, "active_parameters": 174_397_248, "moe_layers": 10, "experts": 4}
