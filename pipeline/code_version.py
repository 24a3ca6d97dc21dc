"""The version of the code behind a stage: a digest over the sources it can reach.

The runner puts it into a stage's identity, so that editing `rl/losses.py` repeats the RL stage and leaves the judge's
verdicts alone. Sources are read, never imported: this works without torch and takes milliseconds.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("pipeline", "rl", "rewards", "judges", "model")  # cli.py holds words, no behaviour of a stage
ROOT = Path(__file__).resolve().parent.parent
FILE_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)+")
DOTTED_NAME = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")


@cache
def code_version(module: str, root: Path = ROOT) -> str:
    """sha256 over the sources of `module` ("pipeline.sft") and of every module of ours it imports, transitively.

    Imports inside functions count; those under `if TYPE_CHECKING` never run and do not. So does what a module names in
    a string: the "package.module.Class" that vLLM imports by name, a script or template that lies beside the module.
    Raises FileNotFoundError when there is no such module.
    """
    if _source_file(module, root) is None:
        raise FileNotFoundError(f"no module {module} under {root}")
    digest = hashlib.sha256()
    for name, file in sorted(reachable_modules(module, root).items()):
        digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def reachable_modules(module: str, root: Path = ROOT) -> dict[str, Path]:
    """Every source of ours that `module` reaches, itself and the packages around it included, with its file."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _source_file(name, root)
        if file is None or name in found:
            continue
        found[name] = file
        waiting += _parents(name)
        nodes = list(_nodes_that_run(ast.parse(file.read_bytes(), filename=str(file))))
        waiting += _imported_names(nodes, package=name if file.name == "__init__.py" else name.rpartition(".")[0])
        found |= {str(beside.relative_to(root)): beside for beside in _files_named_beside(nodes, file)}
    return found


def _source_file(module: str, root: Path) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    base = root.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def _parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _imported_names(nodes: list[ast.AST], package: str) -> Iterator[str]:
    """Candidate module names; those that are functions or classes have no file and fall away later."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED_NAME.fullmatch(node.value):
            yield node.value
            yield node.value.rpartition(".")[0]


def _files_named_beside(nodes: list[ast.AST], file: Path) -> Iterator[Path]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and FILE_NAME.fullmatch(node.value):
            beside = file.with_name(node.value)
            if beside.is_file():
                yield beside


def _nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield child
                yield from _nodes_that_run(child)
            continue
        yield node
        yield from _nodes_that_run(node)
