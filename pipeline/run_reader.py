"""What can be read of a run from its directory alone, whether it finished, died or is under way.

Called by `pipeline/report.py`. What is missing is empty; what cannot be read is noted, never fatal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]


@dataclass
class StageView:
    """What the run directory says about one stage."""

    name: str
    kind: str
    state: str = "waiting"  # waiting, running, done, cached, failed
    folder: Path | None = None  # published, or the partial one of a stage under way
    manifest: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    error: str = ""

    @property
    def seconds(self) -> float | None:
        return self.manifest.get("seconds")

    @property
    def digest(self) -> str:
        return str(self.manifest.get("identity", "")).removeprefix("sha256:")[:8]


class RunReader:
    """Reads the files of a run directory; what cannot be read is noted, never fatal."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.notes: list[str] = []
        self.events = self.json_lines(run_dir / "events.jsonl")
        self.recipe = self._recipe()
        self.stages = self._stages()

    def of_kind(self, kind: str) -> list[tuple[StageView, Path]]:
        """The stages of a kind that have left anything, with the folder it lies in."""
        return [(stage, stage.folder) for stage in self.stages if stage.kind == kind and stage.folder]

    def json_lines(self, path: Path | None) -> list[Row]:
        if path is None or not path.exists():
            return []
        rows, unreadable = [], 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                unreadable += 1
        if unreadable:
            self.notes.append(f"{self._relative(path)}: {unreadable} unreadable lines left out")
        return rows

    def json_file(self, path: Path) -> Row:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return value if isinstance(value, dict) else {}
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            self.notes.append(f"{self._relative(path)}: {error}")
            return {}

    def parquet(self, path: Path, columns: Sequence[str] | None = None) -> list[Row]:
        if not path.exists():
            return []
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
            there = [name for name in table.column_names if columns is None or name in columns]
            return table.select(there).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            self.notes.append(f"{self._relative(path)}: {error}")
            return []

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.run_dir))

    def _recipe(self) -> Row:
        try:
            recipe = yaml.safe_load((self.run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            self.notes.append(f"recipe.yaml: {error}")
            return {}
        return recipe if isinstance(recipe, dict) else {}

    def _stages(self) -> list[StageView]:
        configs = [config for config in self.recipe.get("stages") or [] if isinstance(config, dict)]
        if not configs:  # no recipe: whatever was published, in the order of completion
            done = sorted(self.run_dir.glob("*/COMPLETE"), key=lambda path: path.stat().st_mtime)
            configs = [{"name": path.parent.name} for path in done]
        states, errors = stage_states(self.events)
        views = []
        for config in configs:
            name = str(config.get("name"))
            published, partial = self.run_dir / name, self.run_dir / f"{name}.partial"
            folder = published if published.is_dir() else partial if partial.is_dir() else None
            manifest = self.json_file(published / "manifest.json")
            state = states.get(name, "cached" if manifest else "waiting")
            kind = str(config.get("kind") or manifest.get("kind") or "")
            views.append(StageView(name, kind, state, folder, manifest, config, errors.get(name, "")))
        return views


def stage_states(events: Sequence[Row]) -> tuple[dict[str, str], dict[str, str]]:
    """Stage name → state in the last run, and stage name → error."""
    names = {"stage_skipped": "cached", "stage_started": "running", "stage_completed": "done", "stage_failed": "failed"}
    states: dict[str, str] = {}
    errors: dict[str, str] = {}
    for event in events:
        if event.get("event") == "run_started":
            states, errors = {}, {}
        elif event.get("event") in names and event.get("stage"):
            states[event["stage"]] = names[event["event"]]
            if event["event"] == "stage_failed":
                errors[event["stage"]] = str(event.get("error", ""))
    return states, errors
