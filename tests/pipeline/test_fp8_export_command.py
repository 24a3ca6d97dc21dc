"""`drover export-fp8` on the shipped tiny model; the format itself is proved in tests/model/test_fp8_export.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pipeline.errors import DataError, RecipeError
from pipeline.fp8_export import export_checkpoint

BASE = str(Path(__file__).resolve().parents[2] / "recipes" / "tiny_base")


def test_experts_are_fp8_and_the_rest_is_as_it_was(tmp_path: Path, capsys: Any) -> None:
    export_checkpoint(BASE, str(tmp_path / "out"), recipe="row", all_layers=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith(".weight"):
                    kinds[".experts." in name].add(file.get_slice(name).get_dtype())
    assert kinds[True] == {"F8_E4M3"} and kinds[False] == {"BF16"}
    assert "routed_experts in FP8 (row)" in capsys.readouterr().out


def test_layers_may_be_named_one_by_one(tmp_path: Path) -> None:
    export_checkpoint(BASE, str(tmp_path / "out"), recipe="row", all_layers=False, layers=[3])
    fp8 = set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            fp8 |= {name.split(".")[2] for name in file.keys() if file.get_slice(name).get_dtype() == "F8_E4M3"}
    assert fp8 == {"3"}


def test_what_cannot_be_is_refused_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="fp8 recipe is 'rows'; accepted: tensor, row, block128"):
        export_checkpoint(BASE, str(tmp_path / "out"), recipe="rows", all_layers=True)
    with pytest.raises(DataError, match="exists; name a directory that does not"):
        export_checkpoint(BASE, str(tmp_path), recipe="row", all_layers=True)
    with pytest.raises(DataError, match="no such directory"):
        export_checkpoint(str(tmp_path / "nowhere"), str(tmp_path / "out"), recipe="row", all_layers=True)
    with pytest.raises(RecipeError, match="--layer 3 and --all-layers contradict"):
        export_checkpoint(BASE, str(tmp_path / "out"), recipe="row", all_layers=True, layers=[3])
    with pytest.raises(DataError, match=r"layers: \[2\], but \[2\] have nothing .* have are \[1, 3\]: name some"):
        export_checkpoint(BASE, str(tmp_path / "out"), recipe="row", all_layers=False, layers=[2])
    with pytest.raises(DataError, match="keep_first_and_last: true leaves no routed_experts"):
        export_checkpoint(BASE, str(tmp_path / "out"), recipe="row", all_layers=False)
    with pytest.raises(DataError, match="scope attention_v_o alone can be trained, not served"):
        export_checkpoint(BASE, str(tmp_path / "out"), recipe="row", all_layers=True, scope=["attention_v_o"])
    assert not (tmp_path / "out").exists()


def test_more_than_experts_may_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_checkpoint(BASE, str(tmp_path / "out"), recipe="row", all_layers=True, scope=["shared_expert", "dense_mlp"])
    fp8 = set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            fp8 |= {name for name in file.keys() if file.get_slice(name).get_dtype() == "F8_E4M3"}
    parts = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    dense = {f"model.layers.{layer}.feed_forward.{part}" for layer in (0, 2) for part in parts}
    assert fp8 == dense | {
        f"model.layers.{layer}.feed_forward.shared_expert.{part}" for layer in (1, 3) for part in parts
    }
    assert "shared_expert, dense_mlp in FP8 (row)" in capsys.readouterr().out
