"""The code version changes with what a stage can reach, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.code_version import code_version, reachable_modules

SOURCES = {
    "pipeline/__init__.py": "",
    "pipeline/sft.py": (
        "from typing import TYPE_CHECKING\n"
        "from pipeline.stage import StageContext\n"
        "if TYPE_CHECKING:\n    from pipeline.cluster import Cluster\n"
        "def run(context):\n    from model import layers\n    return layers.go()\n"
    ),
    "pipeline/stage.py": "import json\nclass StageContext: pass\n",
    "pipeline/cluster.py": "class Cluster: pass\n",
    "model/__init__.py": "",
    "model/layers.py": (
        "from .kernels import fast\nEXTENSION = 'rl.worker.Extension'\nWORKER = __file__ and 'worker_script.py'\n"
    ),
    "model/worker_script.py": "print('a script, started by name')\n",
    "model/kernels/__init__.py": "from . import fast\n",
    "model/kernels/fast.py": "import torch\n",
    "model/unused.py": "",
    "rl/__init__.py": "",
    "rl/worker.py": "class Extension: pass\n",
    "cli.py": "",
}
REACHED = {
    "pipeline", "pipeline.sft", "pipeline.stage", "model", "model.layers", "model/worker_script.py", "model.kernels",
    "model.kernels.fast", "rl", "rl.worker",
}  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path, source in SOURCES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    return tmp_path


def fresh_version(tree: Path) -> str:
    code_version.cache_clear()
    return code_version("pipeline.sft", tree)


def test_reaches_imports_in_functions_relative_ones_and_those_named_in_strings(tree: Path) -> None:
    assert set(reachable_modules("pipeline.sft", tree)) == REACHED


@pytest.mark.parametrize("path", sorted(SOURCES))
def test_version_changes_exactly_with_what_is_reached(tree: Path, path: str) -> None:
    before = fresh_version(tree)
    with (tree / path).open("a") as file:
        file.write("\nCHANGED = 1\n")
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert (fresh_version(tree) != before) == (name in REACHED or path in REACHED)


def test_missing_module_is_an_error_not_a_constant_version(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pipeline.nothing"):
        code_version("pipeline.nothing", tree)


def test_our_own_stages_reach_the_rooms_below_and_not_the_runner() -> None:
    reached = reachable_modules("pipeline.sft")
    assert "pipeline.stage" in reached and "rewards.task" in reached
    assert not {"pipeline.runner", "pipeline.progress", "pipeline.report", "pipeline.cluster"} & set(reached)
