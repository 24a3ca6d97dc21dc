"""A recipe of four stages and fakes of all that they need, for tests of the runner (unit and real processes)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import Recipe
from pipeline.runner import Doors, run
from pipeline.stage import StageContext

ALL = ["keep", "warm", "climb", "score"]


def make_recipe(
    tmp_path: Path, seed: int = 17, generators: int = 1, sft_rate: float = 1e-3, engines: int | None = None
) -> Recipe:
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    if not (base / "config.json").exists():
        (base / "config.json").write_text("{}")
        (base / "model.safetensors").write_bytes(b"weights")
    data = tmp_path / "problems.jsonl"
    if not data.exists():
        data.write_text("{}\n")
    return Recipe.model_validate(
        {
            "run": {"name": "small", "dir": str(tmp_path / "run"), "seed": seed},
            "cluster": {"generators": generators},
            "stages": [
                {"name": "keep", "kind": "judge_filter", "examples": {"dataset": str(data), "format": "gsm8k"}},
                {"name": "warm", "kind": "sft", "init": f"{base}/", "examples": "keep",
                 "train": {"learning_rate": sft_rate}},
                {"name": "climb", "kind": "online_rl", "policy": "warm", "tasks": {}},
                {"name": "score", "kind": "evaluate", "policies": [f"{base}/", "climb"], "tasks": {},
                 "engines": engines},
            ],
        }
    )  # fmt: skip


RESULTS = {
    "policies": [
        {"policy": name, "pass_at_k": {k: {"value": value, "low": 0.1, "high": 0.9} for k in ("1", "8")}}
        for name, value in (("base", 0.25), ("climb", 0.5))
    ]
}


@dataclass
class World:
    """Fake stages that count their runs; `behaviour` may replace what one of them does."""

    tmp_path: Path
    ran: list[str] = field(default_factory=list)
    behaviour: dict[str, Callable[[StageContext], dict[str, Any]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    clusters: list[FakeCluster] = field(default_factory=list)
    reports: int = 0
    found: list[list[str]] = field(default_factory=list)  # in the folder of each stage that ran

    def doors(self) -> Doors:
        return Doors(
            load_stage=lambda kind: self.run_stage,
            code_version=lambda kind: self.versions.get(kind, "1"),
            make_cluster=self.make_cluster,
            write_report=self.write_report,
        )

    def run_stage(self, context: StageContext) -> dict[str, Any]:
        name = context.stage.name
        self.ran.append(name)
        self.found.append([path.name for path in context.work.iterdir() if not path.name.startswith(".")])
        assert not self.found[-1] or context.stage.kind == "online_rl"
        assert all((folder / "COMPLETE").exists() for folder in context.inputs.values())
        (context.work / "seed.txt").write_text(str(context.seed))
        context.progress(1, 2, "steps", loss=0.5)
        if name == "score":
            (context.work / "results.json").write_text(json.dumps(RESULTS))
        if name in self.behaviour:
            return self.behaviour[name](context)
        return {"tokens_trained": 5}

    def make_cluster(self, recipe: Recipe, run_dir: Path, emit: Callable[..., None]) -> FakeCluster:
        self.clusters.append(FakeCluster())
        return self.clusters[-1]

    def write_report(self, run_dir: Path) -> Path:
        self.reports += 1
        (run_dir / "report.html").write_text("<html>")
        return run_dir / "report.html"

    def go(self, recipe: Recipe, **options: Any) -> tuple[int, list[str], str]:
        """(exit code, stages that ran, what was printed)"""
        self.ran.clear()
        console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        code = run(recipe, doors=self.doors(), console=console, **options)
        return code, list(self.ran), console.export_text()


@dataclass
class FakeCluster:
    is_shut: bool = False

    def shutdown(self) -> None:
        self.is_shut = True
