"""A class of the user's own, named in a recipe as `module:Class`: found without importing it, loaded when it is needed.

A module is looked for where `drover` is started, then where Python looks for any. Its source is part of a stage's
identity and travels with `drover submit`; what it imports of the user's own is neither.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import os
import re
import sys
from pathlib import Path
from typing import Any

NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def source_of(name: str) -> Path | None:
    """The file of the module; None where there is none to read. Packages around it are not imported either."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    *packages, module = match[1].split(".")
    search: list[str] | None = [os.getcwd(), *sys.path]
    for package in packages:
        spec = importlib.machinery.PathFinder.find_spec(package, search)
        search = list(spec.submodule_search_locations or ()) if spec else []
    spec = importlib.machinery.PathFinder.find_spec(module, search)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def problem(name: str) -> str:
    """Why it cannot be used, in words; empty where the module's source defines the class."""
    match = NAME.fullmatch(name)
    if match is None:
        return f"{name!r} is no module:Class, such as my_samplers:Mine"
    source = source_of(name)
    if source is None:
        return f"{name!r}: no module {match[1]!r} in {os.getcwd()} or on Python's path"
    try:
        tree = ast.parse(source.read_bytes(), filename=str(source))
    except (OSError, SyntaxError, ValueError) as error:
        return f"{name!r}: {source} cannot be read ({error})"
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if match[2] not in classes:
        return f"{name!r}: {source} defines no class {match[2]!r}, only {', '.join(classes) or 'none'}"
    return ""


def load(name: str) -> Any:
    """The class. Whatever importing its module raises is the user's to see."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    finally:
        sys.path.remove(os.getcwd())
