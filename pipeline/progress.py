"""What a person sees of a run: events folded into a state, the state drawn with rich.

`RunState` is pure: the same events give the same state, whether they come from the run in this process (`LiveView`,
used by the runner) or from the events.jsonl of one in another process, living or dead (`show_status`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.run_dir import Event, RunDir

PLAIN_PROGRESS_EVERY_S = 10.0  # a line this often while a stage works, where there is no terminal
REFRESH_PER_S = 4.0
BAR_WIDTH = 16  # characters; the whole view fits 80
STATUS_STYLE = {
    "waiting": "dim", "not asked": "dim", "running": "bold cyan", "cached": "green", "done": "green", "failed": "red",
    "stopped": "yellow",
}  # fmt: skip
SYMBOL = {
    "waiting": "·", "not asked": "·", "running": "▶", "cached": "=", "done": "✓", "failed": "✗", "stopped": "■",
}  # fmt: skip


@dataclass
class StageState:
    """One row of the view."""

    name: str
    kind: str
    inputs: list[str]  # earlier stages it reads
    status: str = "waiting"
    started: float | None = None  # unix seconds
    ended: float | None = None
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    rates: dict[str, Any] = field(default_factory=dict)
    remark: str = ""  # the error, or the last note

    def elapsed_s(self, now: float) -> float:
        return 0.0 if self.started is None else max(0.0, (self.ended or now) - self.started)


@dataclass
class RunState:
    """A run as its events tell it. A new run_started begins the picture anew."""

    stages: dict[str, StageState] = field(default_factory=dict)
    actors: list[str] = field(default_factory=list)  # those that are up
    pid: int | None = None
    started: float | None = None
    last_event: float | None = None
    exit_code: int | None = None  # None: no run_finished was seen

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunState:
        state = cls()
        for event in events:
            state.fold(event)
        return state

    def fold(self, event: Event) -> None:
        """Take in one event. An event of an unknown kind or stage changes nothing but the time."""
        self.last_event = event["time"]
        stage = self.stages.get(event.get("stage") or "")
        actor = event.get("actor", "")
        match event["event"]:
            case "run_started":
                self._begin(event)
            case "run_finished":
                self.exit_code, self.actors = event["exit_code"], []
            case "actor_started" if actor not in self.actors:
                self.actors.append(actor)
            case "actor_stopped" if actor in self.actors:
                self.actors.remove(actor)
            case "stage_skipped" if stage:
                stage.status = "cached"
            case "stage_started" if stage:
                stage.status, stage.started = "running", event["time"]
            case "progress" if stage:
                stage.done, stage.total, stage.unit = event["done"], event["total"], event["unit"]
                stage.rates.update(_extras(event))
            case "stage_completed" if stage:
                stage.status, stage.ended, stage.remark = "done", event["time"], ""
            case "stage_failed" if stage:
                stage.status = "stopped" if event.get("stopped") else "failed"
                stage.ended, stage.remark = event["time"], event["error"]
            case _ if stage and (text := _told(event)):
                stage.remark = text

    def running(self) -> StageState | None:
        return next((stage for stage in self.stages.values() if stage.status == "running"), None)

    def _begin(self, event: Event) -> None:
        self.pid, self.started, self.exit_code, self.actors = event["pid"], event["time"], None, []
        asked = event.get("selected") or event["stages"]
        self.stages = {
            name: StageState(
                name=name,
                kind=event.get("kinds", {}).get(name, ""),
                inputs=event.get("inputs", {}).get(name, []),
                status="waiting" if name in asked else "not asked",
            )
            for name in event["stages"]
        }


def render(state: RunState, now: float | None = None) -> RenderableType:
    """The stage graph, one row a stage (`warm ◀ keep` reads keep's output), with the rates of the running stage, what
    went wrong, and the actors that are up below it.

    `now` in unix seconds; None stands for the present.
    """
    now = time.time() if now is None else now
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "stage", "status", "progress", "time"):
        table.add_column(heading, no_wrap=heading != "stage", overflow="fold")
    lines: list[RenderableType] = [table]
    for stage in state.stages.values():
        style = STATUS_STYLE[stage.status]
        table.add_row(
            Text(SYMBOL[stage.status], style=style),
            Text(stage.name + (f" ◀ {', '.join(stage.inputs)}" if stage.inputs else "")),
            Text(stage.status, style=style),
            _progress_cell(stage),
            Text(_clock(stage.elapsed_s(now)) if stage.started is not None else ""),
        )
        remark = stage.remark if stage.status in ("failed", "stopped") else ""
        if stage.status == "running":
            remark = _rates_text(stage) or stage.remark
        if remark:
            lines.append(Text(f"{SYMBOL[stage.status]}  {stage.name}: {remark}", style=style))
    if state.actors:
        lines.append(Text(f"actors up: {', '.join(state.actors)}", style="dim"))
    return Group(*lines)


class LiveView:
    """Shows a run while it runs: redrawn in place on a terminal, else a plain line for each thing that happened.

    Use as a context manager; hand every event to `show`, from any thread.
    """

    def __init__(self, console: Console) -> None:
        self.state = RunState()
        self._console = console
        self._live: Live | None = None
        self._last_progress_line: dict[str | None, float] = {}  # stage → unix seconds

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=lambda: render(self.state),
                refresh_per_second=REFRESH_PER_S,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, event: Event) -> None:
        self.state.fold(event)
        plain = self._live is None or _told(event)  # on a terminal what people are told is printed above the view
        if plain and (line := self._plain_line(event)):
            self._console.print(Text(line), soft_wrap=True)

    def _plain_line(self, event: Event) -> str | None:
        stage = self.state.stages.get(event.get("stage") or "")
        if stage is None and event["event"] not in ("actor_started", "actor_stopped", "note"):
            return None
        text = _told(event)
        match event["event"]:
            case "stage_skipped":
                text = "complete, skipped"
            case "stage_started" if stage:
                text = f"started ({stage.kind})"
                self._last_progress_line[stage.name] = event["time"]
            case "progress" if stage:
                if event["time"] - self._last_progress_line.get(stage.name, 0.0) >= PLAIN_PROGRESS_EVERY_S:
                    self._last_progress_line[stage.name] = event["time"]
                    text = f"{_amount(stage)}  {_rates_text(stage)}".rstrip()
            case "stage_completed":
                text = f"done in {_clock(event['seconds'])}"
            case "stage_failed":
                text = "stopped" if event.get("stopped") else "failed"
            case "actor_started":
                text = f"{event['actor']} is up after {event.get('seconds', 0.0):.1f} s"
            case "actor_stopped":
                text = f"{event['actor']} is down"
        if text is None:
            return None
        since_start = event["time"] - (self.state.started or event["time"])
        return f"[{_clock(since_start):>7}] {event.get('stage') or 'run'}: {text}"


def _told(event: Event) -> str | None:
    """What an event that is meant for people says."""
    match event["event"]:
        case "note":
            return event.get("text", "")
        case "health":
            return f"step {event.get('step')}: {event.get('action')}: {event.get('text')}"
        case "generator_died":
            reason = str(event.get("reason", "")).split("\n")[0]
            return f"generator {event.get('generator')} is lost, its groups are sampled again: {reason}"
        case "generator_up":
            return f"generator {event.get('generator')} is replaced after {event.get('seconds')} s"
        case "sync_refused":
            return f"generator {event.get('generator')} refused version {event.get('version')}: {event.get('reason')}"
    return None


def show_status(run_dir: Path | str, console: Console | None = None) -> int:
    """Print where a run stands, from its directory alone: whether its process lives, and what command resumes it.

    Gives the exit code for the command line: 0, or 2 where no run was ever started.
    """
    console = console or Console()
    directory = RunDir(run_dir)
    state = RunState.of(directory.read_events())
    if state.started is None or state.last_event is None:
        console.print(Text(f"{run_dir}: no run was started here (there is no events.jsonl with a run in it)"))
        return 2
    holder = directory.holder()
    alive = holder is not None and holder == state.pid
    verdict = _verdict(state, alive)
    if not alive and (stage := state.running()):
        stage.status, stage.ended, stage.remark = "failed", state.last_event, "its process died here"
        state.actors = []
    console.print(render(state, now=time.time() if alive else state.last_event))
    console.print(Text(verdict), soft_wrap=True)
    if not alive and state.exit_code != 0:
        console.print(Text(f"resume it with: drover run {directory.recipe_file}"), soft_wrap=True)
    if directory.report_file.exists():
        console.print(Text(f"report: {directory.report_file}"), soft_wrap=True)
    return 0


def _verdict(state: RunState, alive: bool) -> str:
    at = f" in stage {stage.name}" if (stage := state.running()) else ""
    if alive:
        return f"running: process {state.pid}{at}"
    if state.exit_code is None:
        last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.last_event))
        return f"died: process {state.pid} is gone without a last word{at}; its last event is of {last}"
    return f"finished: exit {state.exit_code}"


def _extras(event: Mapping[str, Any]) -> dict[str, Any]:
    known = ("time", "event", "stage", "done", "total", "unit")
    return {key: value for key, value in event.items() if key not in known}


def _progress_cell(stage: StageState) -> RenderableType:
    if not stage.total or stage.status != "running":
        return Text(_amount(stage) if stage.total else "")
    cell = Table.grid(padding=(0, 1))
    done = min(stage.done, stage.total)
    cell.add_row(ProgressBar(total=stage.total, completed=done, width=BAR_WIDTH), Text(_amount(stage)))
    return cell


def _amount(stage: StageState) -> str:
    return f"{stage.done:g}/{stage.total:g} {stage.unit}".rstrip()


def _rates_text(stage: StageState) -> str:
    return "  ".join(f"{key} {_short(value)}" for key, value in stage.rates.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
