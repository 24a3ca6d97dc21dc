"""From a recipe file to a checked Recipe, or to a RecipeError that names every key that is wrong.

Called by the command line, by `submit` and by tests. Four steps, each of which may refuse: read the YAML strictly,
apply `--set` overrides, hold the result against the schema, check what no single section can see. Whatever the file
holds, the answer is a Recipe or a RecipeError. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config import AnyStage, DatasetTasks, GeneratedTasks, Recipe
from pipeline.errors import RecipeError
from pipeline.recipe_checks import nearest, problems

MAX_BYTES = 1_000_000  # a recipe is a page or two; more is another file
MAX_VALUES = 50_000  # a few YAML aliases can unfold into billions of values
MAX_DEPTH = 40
MAX_NUMBER = 2**63  # larger whole numbers mean nothing as any setting
PATH_KEYS = ("init", "policy", "calibrate_policy", "policies", "model", "dataset")
STAGE_KINDS = {
    kind: stage for stage in get_args(get_args(AnyStage)[0]) for kind in get_args(stage.model_fields["kind"].annotation)
}

_show = reprlib.Repr()
_show.maxstring = _show.maxother = 80


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with `--set` overrides (`stages.climb.steps=50`) applied.

    Paths in it are relative to the current directory or, where nothing lies there, to the recipe's own folder.
    RecipeError: one line a problem, each with its key path, the value seen and what would be accepted.
    """
    title = os.fspath(path)
    data = _copy(read_yaml(path), title)  # a YAML alias becomes a copy: an override changes one place
    for override in overrides:
        _apply_override(data, override)
    return check(data, folder=os.path.dirname(title), title=title)


def check(data: dict[str, Any], folder: str = "", title: str = "recipe") -> Recipe:
    """The checked recipe behind plain YAML values; RecipeError lists every problem under `title`."""
    plain = _copy(data, title)
    written = plain.get("stages")
    names = [stage.get("name") for stage in written if isinstance(stage, dict)] if isinstance(written, list) else []
    located = _locate(plain, folder, {name for name in names if isinstance(name, str)})
    try:
        recipe = Recipe.model_validate_json(json.dumps(located), strict=True)
    except ValidationError as error:
        meant = [detail for detail in error.errors() if _on_chosen_branch(detail, located)]
        raise _refusal(title, list(dict.fromkeys(_explain(detail, located) for detail in meant))) from None
    if found_across := problems(recipe):
        raise _refusal(title, found_across)
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe, every default written out, as YAML that `load` reads back into an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _copy(data: dict[str, Any], title: str) -> dict[str, Any]:
    try:
        return _plain(data, "", Budget(MAX_VALUES))
    except ValueError as error:
        raise _refusal(title, [str(error)]) from None


def _refusal(title: str, lines: list[str]) -> RecipeError:
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return RecipeError("\n".join([f"{title}: {count}", *(f"  {line}" for line in lines)]))


# --- reading ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars (1e-4 is a number; yes, on and dates are text); a key written twice is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is written twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+\.?(?:[eE][-+]?[0-9]+)", "-+.0123456789"),
    ("float", r"[-+]?[0-9]+\.|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # quote exactly what the loader would misread


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; RecipeError with file and line for anything else."""
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: {reason}.{_nearby_recipes(path)}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: more than {MAX_BYTES} bytes; that is no recipe")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}, line {line}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from None
    data = _parse(text, path)
    if not isinstance(data, dict):
        seen = "nothing" if data is None else _show.repr(data)
        raise RecipeError(f"{path}, line 1: expected a mapping with run, cluster and stages; saw {seen}")
    return data


def _nearby_recipes(path: str) -> str:
    folder = os.path.dirname(path) or "."
    found = [os.path.join(folder, name) for name in sorted(os.listdir(folder))] if os.path.isdir(folder) else []
    found = [os.path.normpath(name) for name in found if name.endswith((".yaml", ".yml"))]
    return nearest(path, found) if found else " Name a recipe file, such as recipes/smoke.yaml."


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{place}: {error.problem or error.context}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply") from None
    except Exception as error:  # PyYAML lets KeyError, IndexError, … out for tagged scalars such as "!!bool maybe"
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where}: not readable as YAML ({type(error).__name__}: {reason})") from None


class Budget:
    """How many more values a recipe may hold."""

    def __init__(self, values: int) -> None:
        self.left = values

    def spend(self) -> bool:
        self.left -= 1
        return self.left >= 0


def _plain(value: Any, path: str, budget: Budget, depth: int = 0) -> Any:
    """A copy of mappings, lists, text, finite numbers, true, false and null; ValueError for anything else."""
    where = path or "recipe"
    if depth > MAX_DEPTH or not budget.spend():
        raise ValueError(f"{where}: nested too deeply or unfolds into more than {MAX_VALUES} values.")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or not _is_text(key):
                raise ValueError(f"{where}: {_show.repr(key)} is no key; keys are words.")
        return {key: _plain(inner, _join(path, key), budget, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, _join_item(path, i, inner), budget, depth + 1) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is no finite number.")
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        raise ValueError(f"{where}: a number of {value.bit_length()} bits; expected less than 2^63.")
    if isinstance(value, str) and not _is_text(value):
        raise ValueError(f"{where}: {_show.repr(value)} holds half a character (a lone surrogate) or a null byte.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: a YAML {type(value).__name__} has no place in a recipe.")


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _join(path: str, key: str) -> str:
    key = key if re.fullmatch(r"[\w-]{1,80}", key) else _show.repr(key)
    return f"{path}.{key}" if path else key


def _join_item(path: str, index: int, item: Any) -> str:
    """Stages go by their names, other items by their place in the list."""
    name = item.get("name") if path == "stages" and isinstance(item, dict) else None
    return _join(path, name if isinstance(name, str) and name else str(index))


# --- overrides ----------------------------------------------------------------------------------------------------


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Write one `a.b=value` into the data. Segments are keys, list positions, or names of stages."""
    path, equals, text = override.partition("=")
    segments = path.strip().split(".")
    if not equals or not all(segments):
        raise RecipeError(f"--set {override!r}: expected KEY=VALUE, for example --set stages.climb.steps=50")
    where = f"--set {path.strip()}"
    value = _parse(text, where)
    node: Any = data
    for segment in segments[:-1]:
        place = _place(node, segment, where)
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}  # a section left out of the file; the schema says whether there is such a one
        node = node[place]
    node[_place(node, segments[-1], where)] = value


def _place(node: Any, segment: str, where: str) -> Any:
    """The key or position that a segment of an override's path means in a mapping or list."""
    if isinstance(node, dict):
        return segment
    if not isinstance(node, list):
        raise RecipeError(f"{where}: nothing lies under {_show.repr(node)}, so there is no {segment!r} in it")
    names = [str(item["name"]) for item in node if isinstance(item, dict) and "name" in item]
    if segment in names:
        return next(i for i, item in enumerate(node) if isinstance(item, dict) and str(item.get("name")) == segment)
    if segment.isascii() and segment.isdigit() and len(segment) < 9 and int(segment) < len(node):
        return int(segment)
    raise RecipeError(f"{where}: there is no {segment!r}.{nearest(segment, names or map(str, range(len(node))))}")


# --- paths --------------------------------------------------------------------------------------------------------


def _locate(node: Any, folder: str, stages: set[str], key: str = "") -> Any:
    """The same data with paths that exist only beside the recipe written so that they can be opened from here."""
    if isinstance(node, dict):
        return {name: _locate(value, folder, stages, name) for name, value in node.items()}
    if isinstance(node, list):
        located = [_locate(value, folder, stages, key) for value in node]
        if key == "dataset" and located and all(isinstance(value, str) for value in located):
            return next((value for value in located if os.path.exists(value)), located[-1])
        return located
    if key in PATH_KEYS and isinstance(node, str) and node and node not in stages and not os.path.exists(node):
        beside = os.path.join(folder, node)
        return beside if os.path.exists(beside) else node
    return node


# --- the schema's refusals, in words ------------------------------------------------------------------------------

EXPECTED = {  # pydantic's error types, as people say them
    "model_type": "expected a mapping (key: value)",
    "dict_type": "expected a mapping (key: value)",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "string_pattern_mismatch": "expected lower-case letters, digits and _, a letter first",
}


# (section, key) of earlier recipes → what it is called now
RENAMED: dict[tuple[str, ...], str] = {("curriculum", "kind"): "sampler"}


def _explain(detail: ErrorDetails, data: Any) -> str:
    """One line for one of pydantic's errors: key path, value seen, what is accepted."""
    path, seen, kind = _key_path(detail["loc"], data), _seen(detail["input"]), detail["type"]
    context = detail.get("ctx", {})
    last = str(detail["loc"][-1]) if detail["loc"] else ""
    if kind == "extra_forbidden" and (renamed := RENAMED.get(tuple(map(str, detail["loc"][-2:])))):
        return f"{path}: is called {renamed} now (value seen: {seen})."
    if kind == "extra_forbidden":
        known = [name for model in _models_at(detail["loc"][:-1]) for name in model.model_fields]
        return f"{path}: no such key (value seen: {seen}).{nearest(last, dict.fromkeys(known))}"
    if kind == "missing":
        fields = [model.model_fields[last] for model in _models_at(detail["loc"][:-1]) if last in model.model_fields]
        meaning = next((f" It is the {field.description}." for field in fields if field.description), "")
        return f"{path}: missing, and it has no default.{meaning}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = context.get("tag")
        return f"{path}.kind: {f'{tag[:80]!r} is no kind of stage' if tag else 'missing'}.{nearest(tag, STAGE_KINDS)}"
    if kind == "value_error":  # our own validators open with the key
        key, _, reason = str(context["error"]).partition(": ")
        return f"{path}.{key}: {reason}."
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return f"{path}: {seen} is none of {', '.join(options)}.{nearest(detail['input'], options)}"
    expected = EXPECTED.get(kind) or detail["msg"].replace("Input should", "should").replace(" after validation", "")
    return f"{path or 'recipe'}: {expected}; saw {seen}."


def _seen(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    return json.dumps(value) if value is None or isinstance(value, bool) else _show.repr(value)


def _key_path(loc: tuple[int | str, ...], data: Any) -> str:
    """A location as people write it: stages by name, without the schema's own branch names."""
    path, node = "", data
    for part in loc:
        child = _child(node, part)
        if isinstance(part, int):
            path, node = _join_item(path, part, child), child
        elif child is not None or not _is_branch(part):
            path, node = _join(path, part), child
    return path


def _child(node: Any, part: int | str) -> Any:
    """What lies under one part of a location; None where nothing does."""
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        return node[part]
    return node.get(part) if isinstance(node, dict) else None


def _is_branch(part: int | str) -> bool:
    return part in STAGE_KINDS or any(_names_branch(part, source) for source in (GeneratedTasks, DatasetTasks))


def _names_branch(part: int | str, source: type[BaseModel]) -> bool:
    """Whether a part of pydantic's location is the name it gives to this member of a union."""
    return re.fullmatch(rf"(function-after\[\w+\(\), )?{source.__name__}\]?", str(part)) is not None


def _on_chosen_branch(detail: ErrorDetails, data: Any) -> bool:
    """Pydantic reports every member of a union; keep the errors of the one that was meant."""
    node = data
    for part in detail["loc"]:
        if _names_branch(part, GeneratedTasks) or _names_branch(part, DatasetTasks):
            only_datasets = DatasetTasks.model_fields.keys() - GeneratedTasks.model_fields.keys()
            meant = DatasetTasks if isinstance(node, dict) and node.keys() & only_datasets else GeneratedTasks
            return _names_branch(part, meant)
        if not _is_branch(part):
            node = _child(node, part)
    return True


def _models_at(loc: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """The sections that may stand at a location."""
    models: list[type[BaseModel]] = [Recipe]
    for part in loc:
        if isinstance(part, int) or any(_names_branch(part, model) for model in models):
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        stage = STAGE_KINDS.get(part)
        models = [stage] if stage in models else [inner for field in fields for inner in _sections_in(field.annotation)]
    return models


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


# --- a recipe of one stage ----------------------------------------------------------------------------------------


def evaluation_recipe(checkpoint: str, tasks: str, run_dir: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe behind `drover evaluate`: one checkpoint, one stage called `score`.

    `tasks` is a YAML mapping as it would stand in a recipe; `split: held_out` is filled in where it is not written.
    """
    source = _parse(tasks, "--tasks")
    if isinstance(source, dict):
        source = {"split": "held_out"} | source
    slug = re.sub(r"[^\w.-]+", "-", checkpoint.rstrip("/")).strip("-.")[-80:] or "checkpoint"
    data = {
        "run": {"name": "evaluate", "dir": run_dir or f"runs/evaluate/{slug}"},
        "stages": [{"name": "score", "kind": "evaluate", "policies": [checkpoint], "tasks": source}],
    }
    for override in overrides:
        _apply_override(data, override)
    return check(data, title="evaluate")
