"""The runner: what is skipped, what is repeated, and how a run ends, with tiny stages in the place of the real ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipeline.config import Recipe
from pipeline.run_dir import RunDir
from pipeline.runner import Doors, _most_engines, run, stage_seed, stage_states
from pipeline.stage import DataError, GateStopped, InfrastructureError, RecipeError, StageContext
from rewards.task import BadTask

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
        assert list(context.work.iterdir()) == []
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


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def raising(error: BaseException) -> Callable[[StageContext], dict[str, Any]]:
    def stage(_: StageContext) -> dict[str, Any]:
        raise error

    return stage


def test_second_run_does_nothing_and_says_so_with_the_same_table(world: World) -> None:
    recipe = make_recipe(world.tmp_path)
    code, ran, first = world.go(recipe)
    assert (code, ran) == (0, ALL) and world.clusters[0].is_shut
    code, ran, second = world.go(recipe)
    assert (code, ran) == (0, []) and len(world.clusters) == 1, "a cluster was started for nothing"
    assert "nothing to do: every stage is complete" in second and "nothing to do" not in first
    for text in (first, second):
        assert "0.250 (0.100–0.900)" in text and "pass@8" in text and "report.html" in text
    assert world.reports == 1


def test_manifest_and_events_tell_what_was_done(world: World) -> None:
    recipe = make_recipe(world.tmp_path)
    world.go(recipe)
    run_dir = RunDir(recipe.run.dir)
    manifest = run_dir.read_complete("warm", verify=True) or {}
    keep = run_dir.read_complete("keep") or {}
    assert manifest["inputs"] == {"keep": keep["identity"]}
    assert manifest["seed"] == stage_seed(17, "warm") and manifest["tokens_trained"] == 5
    assert set(manifest["outputs"]) == {"seed.txt"} and manifest["environment"]["python"]
    assert Recipe.model_validate(yaml.safe_load(run_dir.recipe_file.read_text())) == recipe
    names = [event["event"] for event in run_dir.read_events()]
    assert names[0] == "run_started" and names[-1] == "run_finished"
    assert names.count("stage_completed") == 4 and names.count("progress") == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sft_rate": 2e-3}, ["warm", "climb", "score"]),
        ({"seed": 18}, ALL),
        ({"generators": 2}, []),
        ({"engines": 2}, []),
    ],
)
def test_what_is_repeated_follows_what_was_changed(world: World, change: dict[str, Any], expected: list[str]) -> None:
    world.go(make_recipe(world.tmp_path))
    changed = make_recipe(world.tmp_path, **change)
    states = stage_states(changed, world.doors())
    assert [name for name, state in states.items() if state != "cached"] == expected
    assert world.go(changed)[:2] == (0, expected)
    assert set(stage_states(changed, world.doors()).values()) == {"cached"}


def test_changed_code_checkpoint_and_data_repeat_those_who_read_them(world: World) -> None:
    recipe = make_recipe(world.tmp_path)
    assert set(stage_states(recipe, world.doors()).values()) == {"runs"}
    world.go(recipe)
    world.versions["evaluate"] = "2"
    assert stage_states(recipe, world.doors())["score"] == "stale"
    assert world.go(recipe)[1] == ["score"]
    (world.tmp_path / "base/model.safetensors").write_bytes(b"Weights")
    assert world.go(recipe)[1] == ["warm", "climb", "score"]
    (world.tmp_path / "problems.jsonl").write_text('{"other": 1}\n')
    assert world.go(recipe)[1] == ALL


def test_moved_run_directory_is_still_complete(world: World) -> None:
    recipe = make_recipe(world.tmp_path)
    world.go(recipe)
    (world.tmp_path / "run").rename(world.tmp_path / "moved")
    moved = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"dir": world.tmp_path / "moved", "name": "b"})}
    )
    assert world.go(moved)[:2] == (0, [])


def test_until_only_and_fresh_select_stages(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(world.tmp_path)
    assert world.go(recipe, only="climb")[:2] == (2, [])
    assert "'warm', which is not complete" in capsys.readouterr().err
    assert world.go(recipe, until="warm")[1] == ["keep", "warm"]
    assert world.go(recipe, only="climb")[1] == ["climb"]
    assert world.go(recipe, only="climb")[1] == []
    assert world.go(recipe, only="warm", fresh=True)[1] == ["warm"]
    assert world.go(recipe, fresh=True)[1] == ALL
    assert world.go(recipe, until="nothing")[0] == 2
    assert "keep, warm, climb, score" in capsys.readouterr().err
    assert world.go(recipe, until="warm", only="warm")[0] == 2


def test_only_uses_an_input_of_an_older_recipe_and_says_so(world: World) -> None:
    world.go(make_recipe(world.tmp_path))
    changed = make_recipe(world.tmp_path, sft_rate=2e-3)
    code, ran, text = world.go(changed, only="climb")
    assert (code, ran) == (0, []) and "'warm' is of an earlier recipe or code" in text
    assert world.go(changed)[1] == ["warm", "climb", "score"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("steps: 3 is too few"), 2),
        (DataError("problems.jsonl has no column 'question'"), 3),
        (BadTask("task t: no constraints"), 3),
        (InfrastructureError("generator-0: sample: the actor died"), 4),
        (GateStopped("parity gate"), 5),
    ],
)
def test_an_error_has_its_exit_code_and_keeps_what_is_complete(
    world: World, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    recipe = make_recipe(world.tmp_path)
    world.behaviour["climb"] = raising(error)
    assert world.go(recipe)[:2] == (code, ["keep", "warm", "climb"])
    shown = capsys.readouterr().err
    assert str(error) in shown and "traceback" not in shown and world.clusters[0].is_shut
    events = RunDir(recipe.run.dir).read_events()
    assert [event["event"] for event in events[-2:]] == ["stage_failed", "run_finished"]
    assert events[-1]["exit_code"] == code
    world.behaviour.clear()
    assert world.go(recipe)[:2] == (0, ["climb", "score"])


def test_unforeseen_error_leaves_its_traceback_in_a_named_file(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(world.tmp_path)
    world.behaviour["warm"] = raising(ZeroDivisionError("by zero"))
    assert world.go(recipe)[0] == 4
    log = recipe.run.dir / "logs/warm.error.txt"
    assert str(log) in capsys.readouterr().err and "ZeroDivisionError: by zero" in log.read_text()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError(f"SafetensorError: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
)
def test_full_disk_in_a_stage_is_infrastructure_and_says_so(
    world: World, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    world.behaviour["warm"] = raising(error)
    assert world.go(make_recipe(world.tmp_path))[0] == 4
    shown = capsys.readouterr().err
    assert "warm: the disk under" in shown and "is full" in shown


def test_full_disk_for_the_events_too_still_ends_with_its_message(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(context: StageContext) -> dict[str, Any]:
        for name in ("pwrite", "write"):
            monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(full))
        raise full

    recipe = make_recipe(world.tmp_path)
    world.behaviour["warm"] = fill
    code, _, _ = world.go(recipe)
    monkeypatch.undo()
    assert code == 4 and "is full" in capsys.readouterr().err
    world.behaviour.clear()
    assert world.go(recipe)[:2] == (0, ["warm", "climb", "score"])


def test_wrong_paths_are_found_before_anything_starts(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(world.tmp_path)
    (world.tmp_path / "problems.jsonl").unlink()
    assert world.go(recipe)[:2] == (3, [])
    assert "stages.keep.examples.dataset" in capsys.readouterr().err
    recipe = make_recipe(world.tmp_path)
    (world.tmp_path / "base").rename(world.tmp_path / "elsewhere")
    assert world.go(recipe)[:2] == (3, [])
    assert "stages.warm.init" in capsys.readouterr().err


def test_failed_report_ends_the_run_with_its_own_error(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    doors = world.doors()
    broken = Doors(doors.load_stage, doors.code_version, doors.make_cluster, lambda _: {}["gone"])
    assert run(make_recipe(world.tmp_path), doors=broken, console=Console(file=open(os.devnull, "w"))) == 4  # noqa: SIM115
    assert "report: KeyError" in capsys.readouterr().err


def test_stale_report_is_written_anew_though_every_stage_is_complete(world: World) -> None:
    world.go(make_recipe(world.tmp_path))
    changed, doors = make_recipe(world.tmp_path, sft_rate=2e-3), world.doors()
    dies = Doors(doors.load_stage, doors.code_version, doors.make_cluster, lambda _: {}["killed here"])
    assert run(changed, doors=dies, console=Console(file=open(os.devnull, "w"))) == 4  # noqa: SIM115
    assert world.go(changed)[:2] == (0, []) and world.reports == 2
    assert world.go(changed)[:2] == (0, []) and world.reports == 2, "a report that is up to date is left alone"


def test_cluster_is_planned_for_the_stage_with_the_most_engines(tmp_path: Path) -> None:
    assert _most_engines(make_recipe(tmp_path, generators=2)) == 2
    assert _most_engines(make_recipe(tmp_path, generators=2, engines=1)) == 2
    assert _most_engines(make_recipe(tmp_path, generators=2, engines=3)) == 3


def test_every_stage_has_its_own_seed() -> None:
    assert len({stage_seed(seed, name) for seed in (1, 2) for name in ALL}) == 8
    assert stage_seed(17, "warm") == stage_seed(17, "warm") < 2**31


# --- real processes, real signals ---------------------------------------------------------------------------------

PROGRAM = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from pipeline.runner import Doors, run
    from tests_world import World, make_recipe

    root, how = Path(sys.argv[1]), sys.argv[2]
    world = World(root)

    def slow(context):
        child = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        (context.work / "half_written").write_text("x")
        (root / "pids").write_text(f"{os.getpid()} {child.pid}")
        if how == "ray":
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # what ray.init does to a driver
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                if how != "deaf":
                    raise

    STUBBORN = (
        "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print('up', flush=True); "
        "time.sleep(600)"
    )
    if how != "quick":
        world.behaviour["climb"] = slow
    code = run(make_recipe(root), doors=world.doors())
    print("ran", *world.ran)
    sys.exit(code)
    """
)


def start(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    (tmp_path / "tests_world.py").write_text(Path(__file__).read_text())
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).resolve().parents[2]}:{tmp_path}"}
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path), how],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def wait_until_slow(tmp_path: Path, process: subprocess.Popen[str]) -> list[int]:
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.05)
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_kill_in_the_middle_of_a_stage_then_the_same_command_completes(tmp_path: Path) -> None:
    process = start(tmp_path, "slow")
    pids = wait_until_slow(tmp_path, process)
    process.kill()
    process.wait(timeout=10)
    os.kill(pids[1], signal.SIGKILL)  # the stage's child is Ray's to end; here there is no Ray
    run_dir = RunDir(tmp_path / "run")
    assert (tmp_path / "run/climb.partial/half_written").exists() and run_dir.read_complete("climb") is None
    assert run_dir.holder() is None
    again = start(tmp_path, "quick")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "ran climb score" in output, output
    assert run_dir.read_complete("climb", verify=True) and not (tmp_path / "run/climb/half_written").exists()


@pytest.mark.parametrize(
    ("how", "number", "exit_code"),
    [
        ("slow", signal.SIGINT, 130),
        ("slow", signal.SIGTERM, 143),
        ("ray", signal.SIGTERM, 143),
        ("deaf", signal.SIGINT, 130),
    ],
)
def test_signal_stops_within_ten_seconds_and_leaves_no_process(
    tmp_path: Path, how: str, number: signal.Signals, exit_code: int
) -> None:
    process = start(tmp_path, how)
    pids = wait_until_slow(tmp_path, process)
    began = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == exit_code, output
    assert not any(lives(pid) for pid in pids)
    if how != "deaf":
        assert "Resume with" in output
        assert RunDir(tmp_path / "run").read_events()[-1]["exit_code"] == exit_code


def test_second_signal_leaves_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf")
    pids = wait_until_slow(tmp_path, process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - began < 4 and process.returncode == 130
    assert not any(lives(pid) for pid in pids)


def test_nothing_to_do_imports_nothing_heavy(tmp_path: Path) -> None:
    world = World(tmp_path)
    recipe = make_recipe(tmp_path)
    assert world.go(recipe)[0] == 0
    program = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        import yaml
        from pipeline.config import Recipe
        from pipeline.runner import Doors, run, stage_states
        recipe = Recipe.model_validate(yaml.safe_load(Path({str(recipe.run.dir / "recipe.yaml")!r}).read_text()))
        doors = Doors(code_version=lambda kind: "1")
        assert set(stage_states(recipe, doors).values()) == {{"cached"}}
        assert run(recipe, doors=doors) == 0
        heavy = {{"torch", "ray", "vllm", "trl", "transformers", "datasets"}} & set(sys.modules)
        assert not heavy, heavy
    """)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "nothing to do: every stage is complete" in done.stdout
    assert time.monotonic() - began < 10
