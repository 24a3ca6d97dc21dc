"""Stage 2 against its disk: killed, cut off from power or out of space at every single operation of a short run.

A run is watched from below (tests/disk_faults.py). Before each operation its directory is copied, as a kill there would
leave it; the same command then goes on from every copy and must end exactly as if nothing had happened.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from disk_faults import NEED_SPACE, REMOVALS, SYNCS, WRITES, Disk, Operation, in_child, supervise
from stage2_world import GROUPS, STEPS, Learner, Stage2, make_base

from pipeline.online_rl import learner_settings
from pipeline.run_dir import DISK_FULL_ADVICE

CORES = len(os.sched_getaffinity(0))
LASTING = 8  # of so many full disks one stays full; else the operation alone finds no space


@dataclass(frozen=True)
class Crash:
    how: str
    operation: Operation
    left: Stage2  # what is there afterwards

    def __str__(self) -> str:
        return f"{self.how} {self.operation}"


@pytest.fixture(scope="module")
def whole(memory_path: Path) -> Iterator[Stage2]:
    """An undisturbed run, in this process: its children then find everything imported, and a learner ready."""
    stage = Stage2(memory_path / "whole", make_base(memory_path / "base"))
    stage.folder.mkdir()
    assert stage.run() == 0
    (settings,) = learner_settings(stage.recipe.stages[0], stage.base, 0, memory_path, world_size=1)
    learner = Learner(settings)
    learner.start()
    Learner.started = learner
    gc.collect()
    gc.freeze()  # what children never change is never copied for them
    yield stage
    gc.unfreeze()
    Learner.started = None


def crashes_of(stage: Stage2, *, also: bool = True) -> list[Crash]:
    """Run it; gives a kill at each of its operations (a sync leaves nothing else than the next one does), and `also`
    torn writes and power cuts."""
    crashes: list[Crash] = []

    def before(operation: Operation, disk: Disk) -> None:
        ways: dict[str, dict[str, Any]] = {} if operation.call in SYNCS else {"killed before": {}}
        if also and operation.call in WRITES:
            ways["killed half way through"] = {"torn": operation}
        if also and (operation.call in SYNCS or operation.call.startswith("rename")):
            ways["power cut before"] = {"power_cut": True}
        for how, options in ways.items():
            left = replace(stage, folder=stage.folder.with_name(f"{stage.folder.name}-{len(crashes)}"))
            disk.copy(left.run_dir, **options)
            crashes.append(Crash(how, operation, left))

    code, operations = supervise(stage.run_in_child, stage.run_dir, before=before)
    assert code == 0, stage.output()
    meant = {operation.number for operation in operations if also or operation.call not in SYNCS}
    assert {crash.operation.number for crash in crashes} == meant
    return crashes


def check(crash: Crash, wanted: dict[str, Any]) -> str:
    """What is wrong with going on from there; empty: nothing."""
    code = in_child(crash.left.run_in_child)
    if code:
        return f"{crash}: exit {code}: {crash.left.output()[-500:]}"
    result = crash.left.result()
    shutil.rmtree(crash.left.folder)
    return ", ".join(f"{crash}: {found}" for key in wanted for found in differences(result[key], wanted[key], key))


def check_full(crash: Crash, wanted: dict[str, Any]) -> str:
    """What is wrong with a run to which that happens, and with the same command afterwards."""
    stage, (how, operation) = crash.left, (crash.how, crash.operation)
    stage.folder.mkdir()

    def full(one: Operation) -> bool:
        later = how == "disk full from" and one.number > operation.number and one.call in NEED_SPACE
        return later or one.number == operation.number

    code, _ = supervise(stage.run_in_child, stage.folder, full=full)
    place = Path(operation.path).parent
    if operation.call in REMOVALS:  # of a whole folder, which is what is named
        place = Path(*Path(operation.path).parts[:2])
    output = stage.output()
    if code != 4 or str(stage.folder / place) not in output or DISK_FULL_ADVICE not in output:
        return f"{crash}: exit {code}: {output}"
    return check(crash, wanted)


def check_all(crashes: Sequence[Crash], wanted: dict[str, Any], one: Callable[..., str] = check) -> None:
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        failures = [failure for failure in pool.starmap(one, [(crash, wanted) for crash in crashes], 1) if failure]
    operations = {crash.operation.number for crash in crashes}
    print(f"{len(operations)} operations: {dict(Counter(crash.how for crash in crashes))}")
    assert len(operations) > 20
    assert not failures, "\n".join(failures)


def differences(result: Any, wanted: Any, at: str) -> list[str]:
    """Where the two differ, each with its place."""
    if isinstance(result, list) and isinstance(wanted, list):
        result, wanted = dict(enumerate(result)), dict(enumerate(wanted))
    if isinstance(result, dict) and isinstance(wanted, dict):
        found = [f"{at}/{key}: missing" for key in wanted.keys() - result.keys()]
        found += [f"{at}/{key}: too much" for key in result.keys() - wanted.keys()]
        both = sorted(wanted.keys() & result.keys())
        return found + [one for key in both for one in differences(result[key], wanted[key], f"{at}/{key}")]
    return [] if result == wanted else [f"{at} is {result}, not {wanted}"]


def test_the_same_command_goes_on_from_a_crash_at_any_operation(whole: Stage2) -> None:
    stage, wanted = replace(whole, folder=whole.folder.with_name("killed")), whole.result()
    crashes = crashes_of(stage)
    assert not differences(stage.result(), wanted, "") and len(crashes) > 150
    check_all(crashes, wanted)


def test_a_run_that_goes_on_can_crash_in_its_turn(whole: Stage2) -> None:
    """From where it finds the most remains: a second step that is undone, and a state that is not complete."""
    stage = replace(whole, folder=whole.folder.with_name("again"))
    crashes = crashes_of(stage)
    last_state = [crash for crash in crashes if crash.operation.path.endswith(f"state/{STEPS:06}.partial")][-1]
    assert last_state.operation.call == "rename"
    left = last_state.left
    names = {str(path.relative_to(left.run_dir)) for path in left.run_dir.rglob("*")}
    assert any(name.endswith("000001/learner.pt") for name in names), names
    assert any(name.endswith("000002.partial/learner.pt") for name in names), names
    again = crashes_of(left)
    assert not differences(left.result(), whole.result(), "")
    begin = next(crash.operation.number for crash in again if crash.operation.path.endswith("000002.partial"))
    check_all([crash for crash in again if crash.operation.number <= begin + 10], whole.result())


def test_with_staleness_every_slot_is_trained_on_once_whatever_operation_a_kill_comes_before(whole: Stage2) -> None:
    stage = replace(whole, folder=whole.folder.with_name("stale"), max_staleness=2)
    crashes = crashes_of(stage, also=False)
    wanted = {key: whole.result()[key] for key in ("trained", "files")}
    assert sorted({slot for _, slot in wanted["trained"]}) == list(range(GROUPS * STEPS))
    check_all(crashes, wanted)


def test_a_full_disk_at_any_operation_is_told_and_the_same_command_goes_on_from_it(whole: Stage2) -> None:
    stage = replace(whole, folder=whole.folder.with_name("full"))
    stage.folder.mkdir()
    code, operations = supervise(stage.run_in_child, stage.folder)
    assert code == 0
    crashes = [
        Crash(how, operation, replace(whole, folder=whole.folder.with_name(f"{how} {operation.number}")))
        for how, every in (("disk full at", 1), ("disk full from", LASTING))
        for operation in operations[::every]
    ]
    check_all(crashes, whole.result(), check_full)
