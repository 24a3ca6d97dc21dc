"""Imports run down only, and each heavy library has one door.

Every source file is read with `ast`, never imported. The planted trees at the end show that each rule can fail.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # room → the rooms below it
    "cli": {"pipeline", "rl", "rewards", "judges", "model"},
    "pipeline": {"rl", "rewards", "judges", "model"},
    "rl": {"rewards", "judges", "model"},
    "rewards": {"judges"},
    "judges": set(),
    "model": set(),
}
DOORS = {  # heavy library → the files, or folders, that may import it
    "ray": ("pipeline/cluster/", "pipeline/submit.py"),
    "vllm": ("rl/generator.py", "rl/weight_sync.py", "rl/worker_extension.py", "rl/text_of_multimodal.py"),
    "trl": ("pipeline/sft.py", "pipeline/dpo.py"),
    "peft": ("pipeline/sft.py", "pipeline/dpo.py"),
    "accelerate": ("pipeline/sft.py", "pipeline/dpo.py"),
    "datasets": ("pipeline/data.py",),
    "transformers": ("model/",),
    "triton": ("model/kernels/",),
}
LIGHT = (  # nothing heavy may come in when these are imported, through whatever they import
    "cli.py", "pipeline/config.py", "pipeline/recipe.py", "pipeline/plan.py", "pipeline/runner.py",
    "pipeline/run_dir.py", "pipeline/progress.py", "pipeline/stage.py", "pipeline/stopping.py",
    "pipeline/code_version.py", "rl/types.py", "rl/controller.py", "rl/curriculum.py", "judges/", "rewards/",
)  # fmt: skip
HEAVY = ("torch", "ray", "vllm", "trl")


@dataclass(frozen=True)
class Import:
    module: str  # dotted, absolute
    line: int
    at_load: bool  # runs when the file is imported: not in a function, not under TYPE_CHECKING


def source_files(root: Path) -> list[Path]:
    return [file for room in MAY_IMPORT for file in sorted([*(root / room).rglob("*.py"), root / f"{room}.py"])
            if file.is_file()]  # fmt: skip


def imports_of(file: Path, root: Path) -> list[Import]:
    package = file.relative_to(root).with_suffix("").parts[:-1]

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = [*package[: len(package) - child.level + 1]] if child.level else []
                source = ".".join([*base, *filter(None, [child.module])])
                yield from (Import(f"{source}.{alias.name}", child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, at_load=False)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                yield from walk(child, at_load=False)
            else:
                yield from walk(child, at_load)

    return list(walk(ast.parse(file.read_bytes(), filename=str(file)), at_load=True))


def violations(root: Path) -> list[str]:
    """Every broken house rule below a root, as `file:line: what`."""
    found = []
    imports = {file.relative_to(root).as_posix(): imports_of(file, root) for file in source_files(root)}
    for file, statements in imports.items():
        room = file.split("/")[0].removesuffix(".py")
        for statement in statements:
            target = statement.module.split(".")[0]
            if target in MAY_IMPORT and target != room and target not in MAY_IMPORT[room]:
                found.append(f"{file}:{statement.line}: {room} may not import {statement.module}")
            if target in DOORS and not file.startswith(DOORS[target]):
                found.append(f"{file}:{statement.line}: {target} comes in only through {', '.join(DOORS[target])}")
        if file.startswith(LIGHT):
            found += [f"{file}: importing it imports {library}, through {' → '.join(way)}"
                      for library, way in heavy_at_load(file, imports).items()]  # fmt: skip
    return found


def heavy_at_load(file: str, imports: dict[str, list[Import]]) -> dict[str, list[str]]:
    """Heavy library → the chain of files by which importing `file` imports it."""
    found: dict[str, list[str]] = {}
    ways, waiting = {file: [file]}, [file]
    while waiting:
        here = waiting.pop()
        for statement in imports[here]:
            if not statement.at_load:
                continue
            if (library := statement.module.split(".")[0]) in HEAVY:
                found.setdefault(library, ways[here])
            for there in files_loaded_by(statement.module, imports):
                if there not in ways:
                    ways[there] = [*ways[here], there]
                    waiting.append(there)
    return found


def files_loaded_by(module: str, imports: dict[str, list[Import]]) -> list[str]:
    parts = module.split(".")
    prefixes = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return [file for prefix in prefixes for file in (f"{prefix}.py", f"{prefix}/__init__.py") if file in imports]


def test_imports_run_down_only_and_heavy_libraries_have_one_door() -> None:
    assert len(source_files(ROOT)) > 15, "the walk found no sources: it proves nothing"
    assert violations(ROOT) == []


def test_light_modules_load_nothing_heavy_when_really_imported() -> None:
    """The same for what third-party libraries bring with them: ast cannot see that."""
    modules = [
        file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for file in source_files(ROOT)
        if file.relative_to(ROOT).as_posix().startswith(LIGHT)
    ]
    program = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        f"    heavy = set({HEAVY!r}) & set(sys.modules)\n    assert not heavy, (name, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("rewards/task.py", "import pipeline.config\n", "rewards/task.py:1: rewards may not import pipeline.config"),
        ("rewards/task.py", "def f():\n    from model import layers\n", "rewards may not import model.layers"),
        ("model/layers.py", "from rewards.task import Task\n", "model may not import rewards.task.Task"),
        ("judges/prompts.py", "from rewards import task\n", "judges may not import rewards.task"),
        ("rl/loop.py", "if TYPE_CHECKING:\n    import pipeline.config\n", "rl may not import pipeline.config"),
        ("pipeline/config.py", "from cli import main\n", "pipeline may not import cli.main"),
        ("rl/loop.py", "import ray\n", "rl/loop.py:1: ray comes in only through pipeline/cluster/"),
        ("pipeline/evaluate.py", "def f():\n    from vllm import LLM\n", "vllm comes in only through rl/generator.py"),
        ("pipeline/data.py", "import trl.trainer\n", "trl comes in only through"),
        ("pipeline/sft.py", "import transformers\n", "transformers comes in only through model/"),
        ("rl/curriculum.py", "import torch.nn\n", "rl/curriculum.py: importing it imports torch"),
        ("model/__init__.py", "import torch\n", "pipeline/plan.py → model/__init__.py"),
        ("pipeline/extra.py", "from .sub import x\nfrom ..rl import y\nimport ray\n", "extra.py:3: ray"),
    ],
)
def test_a_planted_bad_import_is_found(tmp_path: Path, file: str, source: str, told: str) -> None:
    clean = {
        "cli.py": "from pipeline import config\n",
        "pipeline/config.py": "import json\n",
        "pipeline/plan.py": "from model.layers import num_parameters\n",
        "pipeline/cluster/cluster.py": "def start():\n    import ray\n",
        "rl/generator.py": "import vllm\nfrom rewards import task\n",
        "rewards/task.py": "import hashlib\n",
        "judges/prompts.py": "",
        "model/__init__.py": "",
        "model/layers.py": "def f():\n    import torch\n    import transformers\n",
    }
    for path, text in clean.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(source)
    assert any(told in line for line in violations(tmp_path)), violations(tmp_path)
