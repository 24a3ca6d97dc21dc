"""The view of a run: the same events give the same picture, live or from the run directory alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.progress import LiveView, RunState, render, show_status
from pipeline.run_dir import Event, RunDir

GRAPH = {
    "stages": ["keep", "warm", "climb"],
    "selected": ["keep", "warm"],
    "kinds": {"keep": "judge_filter", "warm": "sft", "climb": "online_rl"},
    "inputs": {"keep": [], "warm": ["keep"], "climb": ["warm"]},
}


def event(time: float, name: str, stage: str | None = None, **fields: Any) -> Event:
    return {"time": time, "event": name, "stage": stage, **fields}


EVENTS = [
    event(100.0, "run_started", pid=7, **GRAPH),
    event(100.5, "stage_skipped", "keep"),
    event(101.0, "stage_started", "warm"),
    event(102.0, "actor_started", "warm", actor="generator-0", seconds=1.0),
    event(103.0, "progress", "warm", done=12, total=48, unit="steps", loss=0.41234, tokens_per_s=812.6),
]


def drawn(state: RunState, now: float) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(state, now=now))
    return console.export_text()


def test_events_fold_into_the_picture() -> None:
    state = RunState.of(EVENTS)
    text = drawn(state, now=131.0)
    rows = {line.split()[1]: line for line in text.splitlines()[1:4]}
    assert "cached" in rows["keep"]
    for part in ("warm ◀ keep", "running", "12/48 steps", "30.0 s", "━"):
        assert part in rows["warm"], part
    assert "warm: loss 0.412  tokens_per_s 813" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "not asked" in rows["climb"]
    assert "actors up: generator-0" in text


def test_completed_stage_stops_its_clock_and_a_new_run_begins_a_new_picture() -> None:
    state = RunState.of([*EVENTS, event(111.0, "stage_completed", "warm", seconds=10.0, metrics={})])
    assert state.stages["warm"].status == "done" and state.stages["warm"].elapsed_s(now=999.0) == 10.0
    state.fold(event(200.0, "run_started", pid=8, **GRAPH))
    assert state.pid == 8 and state.actors == [] and state.stages["warm"].status == "waiting"


def test_unknown_events_and_stages_change_nothing() -> None:
    state = RunState.of([*EVENTS, event(104.0, "from_the_future", "warm"), event(105.0, "stage_started", "elsewhere")])
    assert state.stages == RunState.of(EVENTS).stages and state.last_event == 105.0


def test_plain_lines_where_there_is_no_terminal_and_progress_only_every_ten_seconds() -> None:
    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with LiveView(console) as view:
        for item in EVENTS:
            view.show(item)
        for second in range(40):
            view.show(event(104.0 + second, "progress", "warm", done=second, total=48, unit="steps", loss=0.5))
        view.show(event(150.0, "note", "warm", text="a note that is longer than sixty characters is still one line"))
        view.show(event(151.0, "stage_completed", "warm", seconds=50.0, metrics={}))
    lines = console.export_text().splitlines()
    assert "keep: complete, skipped" in lines[0]
    assert "warm: started (sft)" in lines[1]
    assert "warm: generator-0 is up after 1.0 s" in lines[2]
    assert sum("/48 steps  loss 0.5" in line for line in lines) == 4
    assert "still one line" in lines[-2] and "warm: done in 50.0 s" in lines[-1]


def test_terminal_gets_one_live_picture_and_notes_above_it() -> None:
    console = Console(width=120, record=True, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with LiveView(console) as view:
        for item in [*EVENTS, event(104.0, "note", "warm", text="pruned 55 %")]:
            view.show(item)
    text = console.export_text()
    assert "warm: pruned 55 %" in text and "12/48 steps" in text and "started (sft)" not in text


def status_of(run_dir: RunDir) -> tuple[int, str]:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    return show_status(run_dir.path, console), console.export_text()


def test_status_tells_a_living_run_from_a_dead_one(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert status_of(run_dir)[0] == 2
    with run_dir.locked():
        run_dir.append_event("run_started", pid=os.getpid(), **GRAPH)
        run_dir.append_event("stage_started", "warm")
        code, text = status_of(run_dir)
        assert code == 0 and f"running: process {os.getpid()} in stage warm" in text and "resume" not in text
    _, text = status_of(run_dir)
    assert f"died: process {os.getpid()} is gone" in text and "in stage warm" in text and "died here" in text
    assert f"resume it with: drover run {tmp_path}/recipe.yaml" in text
    run_dir.append_event("run_finished", exit_code=0)
    _, text = status_of(run_dir)
    assert "finished: exit 0" in text and "resume" not in text


def test_what_happens_to_engines_and_what_health_says_is_told() -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    state = RunState.of(EVENTS)
    view = LiveView(console)
    view.state = state
    for said in (
        event(104.0, "generator_died", "warm", generator=0, incarnation=0, reason="actor died\nlast lines"),
        event(105.0, "generator_up", "warm", generator=0, incarnation=1, seconds=17.5),
        event(106.0, "sync_refused", "warm", generator=0, version=3, reason="1 missing"),
        event(107.0, "health", "warm", step=9, action="stop", metric="ess", text="ess is 0.01, below 0.02"),
    ):
        view.show(said)
    text = console.export_text()
    assert "generator 0 is lost, its groups are sampled again: actor died" in text and "last lines" not in text
    assert "generator 0 is replaced after 17.5 s" in text and "generator 0 refused version 3: 1 missing" in text
    assert "step 9: stop: ess is 0.01, below 0.02" in text
    assert state.stages["warm"].remark.startswith("step 9")
