"""The runner: what is skipped, what is repeated, and how a run ends, with tiny stages in the place of the real ones."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from runner_world import ALL, World, make_recipe

from pipeline.config import Recipe
from pipeline.errors import DataError, GateStopped, InfrastructureError, RecipeError
from pipeline.run_dir import RunDir
from pipeline.runner import Doors, _most_engines, run, stage_seed, stage_states
from pipeline.stage import StageContext
from rewards.task import BadTask


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


def test_online_rl_finds_what_a_killed_run_of_the_same_recipe_left_and_others_begin_anew(world: World) -> None:
    def dies(context: StageContext) -> dict[str, Any]:
        (context.work / "state").touch()
        raise InfrastructureError("a learner died")

    world.behaviour["climb"] = dies
    assert world.go(make_recipe(world.tmp_path))[0] == 4
    assert world.go(make_recipe(world.tmp_path))[1] == ["climb"] and "state" in world.found[-1]
    assert world.go(make_recipe(world.tmp_path), fresh=True)[0] == 4 and world.found[-1] == []
    assert world.go(make_recipe(world.tmp_path))[0] == 4 and "state" in world.found[-1], "a fresh run too can go on"
    assert world.go(make_recipe(world.tmp_path, sft_rate=2e-3))[0] == 4 and world.found[-1] == [], "another recipe"
    del world.behaviour["climb"]
    assert world.go(make_recipe(world.tmp_path, sft_rate=2e-3))[0] == 0
    assert not (world.tmp_path / "run" / "climb" / ".resume").exists()


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
