"""What a run of stage 2 needs to go on where it was, on disk: either the old state or the new one, never half of one.

    state/000012/    loop.json      the protocol's state, curriculum, what was planned and came of it, counters
                     learner.pt     weights, optimiser, version, random numbers: written by the learner

A state is written beside, synced and renamed; the one before is removed afterwards. Answers that were being sampled are
not in it: they are leased again, whatever their length, so that a kill favours neither short answers nor long ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from model.disk import naming, remove, sync
from rl.controller import State
from rl.places import Place
from rl.replay import Replayable

LOOP = "loop.json"
LEARNER = "learner.pt"


@dataclass(frozen=True, kw_only=True)
class RunState:
    protocol: State
    curriculum: dict[str, Any]  # `Curriculum.state()`
    places: dict[int, Place]  # slot → its tasks, groups and parts; those that were not trained on yet
    replayable: list[Replayable]
    generated_tokens: int
    trained_tokens: int


FORMAT = TypeAdapter(RunState)


class RunStates:
    """The states of one run, in a folder of its own. One process writes at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before_publish: Callable[[], None] = lambda: None  # makes durable what a state takes for granted

    def newest(self) -> tuple[RunState, Path] | None:
        """The last complete one and its folder; remains of a kill are removed."""
        if not self.folder.is_dir():
            return None
        for partial in self.folder.glob("*.partial"):
            remove(partial)
        complete = sorted(self.folder.iterdir())
        if not complete:
            return None
        for old in complete[:-1]:
            remove(old)
        return FORMAT.validate_json((complete[-1] / LOOP).read_bytes()), complete[-1]

    def open(self, version: int) -> Path:
        """An empty folder to write a state's files into, until `publish`."""
        partial = self.folder / f"{version:06}.partial"
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, state: RunState) -> None:
        """Complete and make durable what was written into `partial`; older states are removed."""
        with naming(partial / LOOP):
            (partial / LOOP).write_bytes(FORMAT.dump_json(state))
        self.before_publish()
        for path in (*partial.iterdir(), partial):
            sync(path)
        place = partial.with_suffix("")
        os.rename(partial, place)
        sync(self.folder)
        for old in self.folder.iterdir():
            if old != place:
                remove(old)
