"""Generated tokens and seconds to the same held-out pass@1: TRL's GRPOTrainer, ours sampling uniformly, ours in full.

    python bench/rl_efficiency.py run FOLDER [--pools dead --pools filtered] [--arms A --arms C] [--seeds 1]
    python bench/rl_efficiency.py table FOLDER [--picture docs/rl_efficiency.svg]

`run` does what is not yet in FOLDER, one after the other, so it can be stopped and go on; `table` prints what is there.
A run of an arm leaves `curve.json`: for every checkpoint on the way the tokens generated until then (whatever for:
screening, discarded and lost answers too), the seconds (without start and saving), and pass@1 on held-out tasks of all
levels alike, which no arm ever sees. What an arm needs is read off where its curve, made monotone, crosses the target.

Arms: A    TRL's GRPOTrainer, uniform              B    ours, uniform, the settings of A
      C    ours in full                            C-x  ours in full without lever x
Pools, from the same generators and equally large, by the pass rates of the model at the start:
      dead      nine prompts in ten from levels that it nearly always or nearly never solves; most lie beyond the ten
                levels, where a right answer does not even fit
      filtered  all from levels in between
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pinned_run
import typer
import yaml
from rich.console import Console
from rich.table import Table

from pipeline import plots

app = typer.Typer(add_completion=False, help=__doc__)

POOL_PROMPTS, DEAD_SHARE = 4000, 0.9
DEAD, LIVE = (0.03, 0.97), (0.1, 0.9)  # pass rates of a (domain, level): outside of the first, inside of the second
LEVELS = range(1, 11)
BEYOND = {"maths": range(14, 27, 2), "code": range(14, 27, 2), "dialogue": range(12, 19, 2), "reasoning": ()}
HISTOGRAM = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.01)
START_TASKS, START_SAMPLES = 16, 8  # of each (domain, level), to tell them apart
HELD_OUT_TASKS, HELD_OUT_SAMPLES = 6, 4  # of each (domain, level)
HELD_OUT = {"domains": ["maths", "code", "reasoning", "dialogue"], "levels": [1, 10], "tasks_per_level": HELD_OUT_TASKS,
            "split": "held_out"}  # fmt: skip

# Of A and B alike. Not tuned yet: A ran 24 steps at this rate and 4 at 4e-4, docs/results.md.
SHARED = {"groups_per_step": 16, "group_size": 16, "learning_rate": 1.0e-3}
TRL_OPTIONS = {"loss": "dapo", "scale_rewards": "group"}
UNIFORM = {"sampler": "uniform", "explore_share": 0.0, "domain_floor": 0.0}
FULL: dict[str, Any] = {
    "groups_per_step": 4,
    "group_size": 16,
    "learning_rate": 5.0e-4,
    "max_staleness": 2,
    "curriculum": {"sampler": "thompson", "band": [0.25, 0.75], "explore_share": 0.05, "decay": 0.95},
}
LEVERS: dict[str, dict[str, Any]] = {
    "selection": {"curriculum": UNIFORM},
    "small_batches": {"groups_per_step": 16, "learning_rate": 1.0e-3},
    "long_memory": {"curriculum": {"decay": 0.9, "explore_share": 0.15}},
    "asynchrony": {"max_staleness": 0},
}


PLOT_WIDTH, PLOT_HEIGHT = 420, 266
COLOURS = ("#3b6fb6", "#d9822b", "#3a8f5c", "#b0403f", "#7a5aa8", "#777777")
STYLE = (
    "text{font:10.5px sans-serif;fill:#555} .title{font-size:12px;font-weight:600;fill:#111} .grid{stroke:#ddd} "
    ".line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round} .fill{fill:currentColor}"
)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Where the runs lie.")],
    pools: Annotated[list[str], typer.Option(help="dead | filtered")] = ["dead", "filtered"],  # noqa: B006
    arms: Annotated[list[str], typer.Option(help="A | B | C | C-<lever>")] = ["A", "B", "C"],  # noqa: B006
    seeds: Annotated[list[int], typer.Option()] = [1],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Of 256 answers; an arm with smaller steps makes more of them.")] = 60,
    settings: Annotated[str, typer.Option(help="YAML over an arm's stage, for a trial: '{learning_rate: 8e-4}'.")] = "",
    checkpoints: Annotated[int, typer.Option(help="Points of a curve.")] = 10,
    label: Annotated[str, typer.Option(help="Name of that trial: it lies beside the arm's own runs.")] = "",
) -> None:
    """Do the runs that are missing."""
    start = starting_point(folder)
    for pool, arm, seed in itertools.product(pools, arms, seeds):
        place = folder / pool / f"{arm}{label}" / f"seed{seed}"
        if (place / "curve.json").exists():
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        changes = yaml.safe_load(settings) or {}
        examples = pool_file(folder, pool, start)
        if arm == "A":
            rows = trl_run(place, start, examples, seed, steps, changes, checkpoints)
        else:
            rows = our_run(place, start, examples, seed, steps, changed(stage_of(arm), changes), checkpoints)
        curve = evaluated(place, rows, trial=bool(label))
        (place / "curve.json").write_text(json.dumps(curve, indent=1))
        print(place, " ".join(f"{point['pass_at_1']:.3f}" for point in curve), flush=True)


def starting_point(folder: Path) -> Path:
    """The demo's model after its SFT, with its pass rate in every (domain, level) beside it."""
    demo = yaml.safe_load((pinned_run.ROOT / "stages.yaml").read_text())
    stages = {stage["name"]: stage for stage in demo["stages"]}
    base = f"{pinned_run.ROOT / 'recipes' / 'tiny_base'}/"
    candidates = folder / "start" / "candidates.jsonl.gz"
    if not candidates.exists():
        candidates.parent.mkdir(parents=True, exist_ok=True)
        wanted = {f"{domain}/{level}": START_TASKS for domain, more in BEYOND.items() for level in (*LEVELS, *more)}
        write_tasks(candidates, wanted, first_seed=10**8)
    every = {"dataset": str(candidates), "format": "examples"}
    recipe = {
        "run": {"name": "start", "seed": 1},
        "cluster": demo["cluster"],
        "stages": [
            stages["keep"] | {"calibrate_policy": base, "calibrate_tasks": 8},
            stages["warm"] | {"init": base},
            {"name": "rates", "kind": "evaluate", "policies": ["warm"], "tasks": every, "k": [1],
             "samples": START_SAMPLES, "engines": 2},
        ],
    }  # fmt: skip
    if not (folder / "start" / "run" / "rates" / "COMPLETE").exists():
        pinned_run.run(recipe, folder / "start")
    return folder / "start" / "run" / "warm" / "checkpoint"


def score_at_start(folder: Path, start: Path) -> float:
    """Held-out pass@1 of the model that all arms begin with."""
    run_dir = folder / "begin" / "run"
    if not (run_dir / "begin" / "COMPLETE").exists():
        stage = {"name": "begin", "kind": "evaluate", "policies": [f"{start}/"], "tasks": HELD_OUT, "k": [1],
                 "samples": HELD_OUT_SAMPLES, "engines": 2}  # fmt: skip
        pinned_run.run({"run": {"name": "begin", "seed": 1}, "stages": [stage]}, folder / "begin")
    results = json.loads((run_dir / "begin" / "results.json").read_text())
    return results["policies"][0]["pass_at_k"]["1"]["value"]


def cell_rates(start: Path) -> dict[str, float]:
    results = json.loads((start.parents[1] / "rates" / "results.json").read_text())
    return {cell: passes["1"]["value"] for cell, passes in results["policies"][0]["cells"].items()}


def pool_file(folder: Path, pool: str, start: Path) -> Path:
    """Prompts, as many from each (domain, level) of a kind as from the others."""
    path = pool_path(folder, pool)
    if path.exists():
        return path
    rates = cell_rates(start)
    live = [cell for cell, rate in rates.items() if LIVE[0] <= rate <= LIVE[1]]
    dead = [cell for cell, rate in rates.items() if not DEAD[0] < rate < DEAD[1]]
    num_dead = round(POOL_PROMPTS * DEAD_SHARE) if pool == "dead" else 0
    wanted = Counter(itertools.islice(itertools.cycle(live), POOL_PROMPTS - num_dead))
    wanted += Counter(itertools.islice(itertools.cycle(dead), num_dead))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tasks(path, wanted, first_seed=10**9)
    return path


def pool_path(folder: Path, pool: str) -> Path:
    return folder / pool / "pool.jsonl.gz"


def write_tasks(path: Path, wanted: Mapping[str, int], first_seed: int) -> None:
    """So many of each "domain/level", with distinct prompts as far as there are."""
    from pipeline.data import Example, write_examples
    from rewards.domains import generate

    examples, seen = [], set()
    for cell, count in sorted(wanted.items()):
        domain, level = cell.split("/")
        draws = (generate(domain, int(level), first_seed + draw, "train") for draw in range(count * 20))
        for task in draws:
            if count and task.prompt not in seen:
                seen.add(task.prompt)
                examples.append(Example(task, ""))
                count -= 1
    write_examples(path, examples)


def stage_of(arm: str) -> dict[str, Any]:
    """What an arm's stage says beyond what all have in common."""
    if arm == "B":
        return SHARED | {"max_staleness": 2, "curriculum": UNIFORM}
    letter, _, lever = arm.partition("-")
    if letter != "C" or (lever and lever not in LEVERS):
        raise typer.BadParameter(f"{arm} is no arm; there are A, B, C, {', '.join(f'C-{name}' for name in LEVERS)}")
    return changed(FULL, LEVERS[lever]) if lever else FULL


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged, but for a curriculum of another sampler, which replaces all of it."""
    merged = settings | changes
    for name in ("curriculum", "objective"):
        if name in settings and name in changes and changes[name] != UNIFORM:
            merged[name] = settings[name] | changes[name]
    return merged


def our_run(
    place: Path, start: Path, examples: Path, seed: int, steps: int, settings: dict[str, Any], checkpoints: int
) -> list[dict[str, Any]]:
    """Stage 2 alone; as many answers as `steps` of 256."""
    steps = round(steps * 256 / (settings["groups_per_step"] * settings["group_size"]))
    every = max(1, steps // checkpoints)
    stage = {
        "name": "climb", "kind": "online_rl", "policy": f"{start}/", "steps": steps, "max_answer_tokens": 160,
        "tasks": {"dataset": str(examples), "format": "examples"}, "save_every_steps": 0,
        "checkpoint_every_steps": every, **settings,
    }  # fmt: skip
    run_dir = pinned_run.run({"run": {"name": "arm", "seed": seed}, "stages": [stage]}, place)
    (run_dir / "climb" / "checkpoints").rename(place / "checkpoints")
    steps_done = pinned_run.json_lines(run_dir / "climb" / "steps.jsonl")
    begin = steps_done[0]["time"] - steps_done[0]["step_s"]
    return [row | {"seconds": row["time"] - begin} for row in steps_done if row["step"] % every == 0]


def trl_run(
    place: Path, start: Path, examples: Path, seed: int, steps: int, changes: dict[str, Any], checkpoints: int
) -> list[dict[str, Any]]:
    settings = SHARED | TRL_OPTIONS | changes
    steps = round(steps * 256 / (settings["groups_per_step"] * settings["group_size"]))
    every = max(1, steps // checkpoints)
    options = {"steps": steps, "checkpoint-every": every, "seed": seed, **settings}
    words = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    script = Path(__file__).with_name("trl_grpo.py")
    with (place / "output.txt").open("w") as log:
        subprocess.run(
            [sys.executable, str(script), str(start), str(examples), str(place / "trl"), *words],
            stdout=log, stderr=log, check=True,
        )  # fmt: skip
    (place / "trl" / "checkpoints").rename(place / "checkpoints")
    return [row for row in pinned_run.json_lines(place / "trl" / "steps.jsonl") if row["step"] % every == 0]


def evaluated(place: Path, rows: list[dict[str, Any]], trial: bool) -> list[dict[str, Any]]:
    """The curve, and but for a trial pass@k at its end. Of all checkpoints but the last only the scores are kept."""
    checkpoints = {row["step"]: place / "checkpoints" / f"step-{row['step']:06}" for row in rows}
    many = {"name": "curve", "kind": "evaluate", "policies": [f"{path}/" for path in checkpoints.values()],
            "tasks": HELD_OUT, "k": [1], "samples": HELD_OUT_SAMPLES, "engines": 2}  # fmt: skip
    fewer = HELD_OUT | {"tasks_per_level": HELD_OUT_TASKS // 2}
    last = many | {"name": "last", "policies": many["policies"][-1:], "tasks": fewer, "k": [1, 8, 32], "samples": 32}
    stages = [many] if trial else [many, last]
    recipe = {"run": {"name": "curve", "seed": 1}, "stages": stages}
    run_dir = pinned_run.run(recipe, place / "evaluated")
    results = json.loads((run_dir / "curve" / "results.json").read_text())["policies"]
    curve = [
        {"step": row["step"], "generated_tokens": row["generated_tokens"], "seconds": row["seconds"],
         "pass_at_1": result["pass_at_k"]["1"]["value"],
         "domains": {name: passes["1"]["value"] for name, passes in result["domains"].items()}}
        for row, result in zip(rows, results, strict=True)
    ]  # fmt: skip
    if not trial:
        at_end = json.loads((run_dir / "last" / "results.json").read_text())["policies"][0]["pass_at_k"]
        curve[-1]["at_end"] = {k: estimate["value"] for k, estimate in at_end.items()}
    for path in list(checkpoints.values())[:-1]:
        shutil.rmtree(path)
    return curve


# --- what it adds up to -------------------------------------------------------------------------------------------


def needed(curve: list[dict[str, Any]], key: str, target: float, start: float) -> float:
    """Where the monotone curve crosses `target`, between checkpoints in proportion; infinite where it never does."""
    before, score_before = 0.0, start
    for point, score in zip(curve, monotone([point["pass_at_1"] for point in curve], start)):
        if score >= target:
            share = (target - score_before) / (score - score_before) if score > score_before else 1.0
            return before + share * (point[key] - before)
        before, score_before = point[key], score
    return float("inf")


def monotone(scores: list[float], start: float) -> list[float]:
    """The rising curve nearest to the scores (isotonic regression by pooling neighbours), not below `start`."""
    blocks: list[tuple[float, int]] = []
    for score in scores:
        mean, count = score, 1
        while blocks and blocks[-1][0] >= mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    return [max(start, mean) for mean, count in blocks for _ in range(count)]


def runs_in(folder: Path) -> Iterator[tuple[str, str, int, list[dict[str, Any]]]]:
    for path in sorted(folder.glob("*/*/seed*/curve.json")):
        pool, arm, seed = path.parts[-4:-1]
        yield pool, arm, int(seed.removeprefix("seed")), json.loads(path.read_text())


@app.command()
def table(
    folder: Annotated[Path, typer.Argument(help="Where the runs lie.")],
    target: Annotated[list[float], typer.Option(help="Held-out pass@1 to read the curves at.")] = [0.5],  # noqa: B006
    picture: Annotated[Path | None, typer.Option(help="Draw the curves into this file (.svg).")] = None,
) -> None:
    """Print one table a pool: median of the seeds, and their range."""
    start = folder / "start" / "run" / "warm" / "checkpoint"
    at_start = score_at_start(folder, start)
    runs: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    for pool, arm, _, curve in runs_in(folder):
        runs.setdefault(pool, {}).setdefault(arm, []).append(curve)
    console = Console(width=150)
    for pool, arms in runs.items():
        columns = [f"{what} to {goal:g}" for goal in target for what in ("tokens", "seconds")]
        shown = Table("arm", "seeds", *columns, "pass@1, 8, 32 at its end", title=f"pool {pool}: {shape(folder, pool)}")
        for arm, curves in arms.items():
            cells = []
            for goal in target:
                for key, unit in (("generated_tokens", 1e3), ("seconds", 1)):
                    values = sorted(needed(curve, key, goal, at_start) / unit for curve in curves)
                    cells.append(spread(values, "k" if unit > 1 else "s"))
            ends = [curve[-1]["at_end"] for curve in curves if "at_end" in curve[-1]]
            end = ", ".join(f"{statistics.median(one[k] for one in ends):.3f}" for k in ("1", "8", "32") if ends)
            shown.add_row(arm, f"{len(curves)}", *cells, end)
        console.print(shown)
    print(f"held-out pass@1 at the start: {at_start:.3f}")
    print(pinned_run.circumstances())
    if picture:
        draw(runs, at_start, picture)


def spread(values: list[float], unit: str) -> str:
    if values[0] == float("inf"):
        return "not reached"
    middle = f"{statistics.median(values):,.0f} {unit}"
    return middle if len(values) == 1 else f"{middle} ({values[0]:,.0f}–{values[-1]:,.0f})"


def shape(folder: Path, pool: str) -> str:
    """Share of the pool's prompts by the pass rate of their (domain, level) at the start."""
    from pipeline.data import read_examples

    rates = cell_rates(folder / "start" / "run" / "warm" / "checkpoint")
    seen = [rates[f"{example.task.domain}/{example.task.level}"] for example in read_examples(pool_path(folder, pool))]
    bins = [(low, high, sum(low <= rate < high for rate in seen)) for low, high in itertools.pairwise(HISTOGRAM)]
    return ", ".join(f"{low:g}–{min(high, 1):g}: {count / len(seen):.0%}" for low, high, count in bins if count)


def draw(runs: dict[str, dict[str, list[list[dict[str, Any]]]]], at_start: float, picture: Path) -> None:
    """Held-out pass@1 by tokens and by seconds, a row a pool, a line a run."""
    arms = sorted({arm for of_pool in runs.values() for arm in of_pool})
    parts = [
        f'<circle class="fill c{colour}" cx="{14 + 90 * i}" cy="12" r="4"/><text x="{22 + 90 * i}" y="16">{arm}</text>'
        for i, (arm, colour) in enumerate(zip(arms, itertools.cycle(range(plots.NUM_COLOURS))))
    ]
    for row, (pool, of_pool) in enumerate(runs.items()):
        for column, (key, label) in enumerate((("generated_tokens", "generated tokens"), ("seconds", "seconds"))):
            series = [
                plots.Series(
                    arm, [(0.0, at_start), *((point[key], point["pass_at_1"]) for point in curve)], arms.index(arm)
                )
                for arm, curves in of_pool.items()
                for curve in curves
            ]
            plot = plots.line_plot(f"pool {pool}: held-out pass@1", series, x_label=label, percent=True, dots=True)
            x, y = column * PLOT_WIDTH, 24 + row * PLOT_HEIGHT
            place = f'<svg x="{x}" y="{y}" width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}"'
            parts.append(str(plot).replace("<svg", place, 1))
    size = f"{2 * PLOT_WIDTH} {24 + len(runs) * PLOT_HEIGHT}"
    colours = " ".join(f".c{i}{{color:{colour}}}" for i, colour in enumerate(COLOURS))
    picture.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE} {colours}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    app()
