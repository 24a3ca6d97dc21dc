"""The prompts of `rl_efficiency.py`: its pools, the model that runs on each begin with, and what is held out.

dead      nine prompts in ten from levels that the model nearly always or nearly never solves; most lie beyond the
          ten levels, where a right answer does not even fit
filtered  from the same generators, all from levels in between
gym       not ours: eight data sets of reasoning-gym with its own levels, as they come: FOLDER/gym.jsonl.gz,
          written by `reasoning_gym_pool.py --per-level 400`
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pinned_run
import yaml
from worked_answers import worked

POOLS = ("dead", "filtered", "gym")
POOL_PROMPTS, DEAD_SHARE = 4000, 0.9
DEAD, LIVE = (0.03, 0.97), (0.1, 0.9)  # pass rates of a (domain, level): outside of the first, inside of the second
LEVELS = range(1, 11)
BEYOND = {"maths": range(14, 27, 2), "code": range(14, 27, 2), "dialogue": range(12, 19, 2), "reasoning": ()}
HISTOGRAM = (0.0, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.01)
START_TASKS, START_SAMPLES = 16, 8  # of each (domain, level), to tell them apart
HELD_OUT_TASKS, HELD_OUT_SAMPLES = 240, 4
BASE = f"{pinned_run.ROOT / 'recipes' / 'tiny_base'}/"
GYM_TAUGHT = 1600  # problems, the easy half of which the judge prunes
GYM_LEVELS = 32  # of all its data sets together
GYM_SFT = {"learning_rate": 1.0e-3, "epochs": 8, "batch_examples": 32}  # a new language for this model, no light touch


def start_folder(folder: Path, pool: str) -> Path:
    return folder / ("start_gym" if pool == "gym" else "start")


def starting_point(folder: Path, pool: str) -> Path:
    """The checkpoint that all arms begin with, with its pass rate in every (domain, level) beside it."""
    place = start_folder(folder, pool)
    if not (place / "run" / "rates" / "COMPLETE").exists():
        place.mkdir(parents=True, exist_ok=True)
        pinned_run.run(gym_start(folder) if pool == "gym" else demo_start(folder), place)
    return place / "run" / "warm" / "checkpoint"


def demo_start(folder: Path) -> dict[str, Any]:
    """The demo's model after its SFT."""
    demo = yaml.safe_load((pinned_run.ROOT / "stages.yaml").read_text())
    stages = {stage["name"]: stage for stage in demo["stages"]}
    candidates = start_folder(folder, "dead") / "candidates.jsonl.gz"
    if not candidates.exists():
        wanted = {f"{domain}/{level}": START_TASKS for domain, more in BEYOND.items() for level in (*LEVELS, *more)}
        write_tasks(candidates, wanted, first_seed=10**8)
    return {
        "run": {"name": "start", "seed": 1},
        "cluster": demo["cluster"],
        "stages": [
            stages["keep"] | {"calibrate_policy": BASE, "calibrate_tasks": 8},
            stages["warm"] | {"init": BASE},
            {"name": "rates", "kind": "evaluate", "policies": ["warm"], "tasks": examples_in(candidates), "k": [1],
             "samples": START_SAMPLES, "engines": 2},
        ],
    }  # fmt: skip


def gym_start(folder: Path) -> dict[str, Any]:
    """The base model, which knows nothing like them, after SFT on some of the problems, worked; RL gets the others."""
    from pipeline.data import read_examples, write_examples
    from rewards.task import split_of

    train = [example for example in read_examples(gym_source(folder)) if split_of(example.task.prompt) == "train"]
    taught = start_folder(folder, "gym") / "taught.jsonl.gz"
    lessons = [replace(one, answer=worked(one.task.domain, one.task.prompt, one.task.check["answer"]))
               for one in train[:GYM_TAUGHT]]  # fmt: skip
    for path, share in ((taught, lessons), (pool_path(folder, "gym"), train[GYM_TAUGHT:])):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_examples(path, share)
    return {
        "run": {"name": "start", "seed": 1},
        "stages": [
            {"name": "keep", "kind": "judge_filter", "examples": examples_in(taught), "keep_easy_share": 0.5},
            {"name": "warm", "kind": "sft", "init": BASE, "examples": "keep", "train": GYM_SFT},
            {"name": "rates", "kind": "evaluate", "policies": ["warm"], "k": [1], "samples": START_SAMPLES,
             "tasks": examples_in(pool_path(folder, "gym")) | {"limit": GYM_LEVELS * START_TASKS}, "engines": 2},
        ],
    }  # fmt: skip


def gym_source(folder: Path) -> Path:
    return folder / "gym.jsonl.gz"


def examples_in(path: Path) -> dict[str, Any]:
    return {"dataset": str(path), "format": "examples"}


def held_out(folder: Path, pool: str, count: int = HELD_OUT_TASKS) -> dict[str, Any]:
    """Tasks of all levels alike, as an evaluation names them."""
    if pool == "gym":
        return examples_in(gym_source(folder)) | {"split": "held_out", "limit": count}
    per_level = count // (len(BEYOND) * len(LEVELS))
    return {"domains": list(BEYOND), "levels": [1, 10], "tasks_per_level": per_level, "split": "held_out"}


def held_out_scores(
    place: Path, checkpoints: list[Path], folder: Path, pool: str, at_end: bool = True
) -> list[dict[str, Any]]:
    """Of each checkpoint pass@1, of all, by domain and by level; of the last one pass@k too, under `at_end`."""
    stages: list[dict[str, Any]] = [
        {"name": "curve", "kind": "evaluate", "policies": [f"{path}/" for path in checkpoints], "k": [1], "engines": 2,
         "samples": HELD_OUT_SAMPLES, "tasks": held_out(folder, pool)}
    ]  # fmt: skip
    if at_end:
        fewer = held_out(folder, pool, HELD_OUT_TASKS // 2)
        stages.append(
            stages[0] | {"name": "last", "policies": [f"{checkpoints[-1]}/"], "k": [1, 8, 32], "samples": 32,
                         "tasks": fewer}
        )  # fmt: skip
    run_dir = place / "run"
    if not (run_dir / stages[-1]["name"] / "COMPLETE").exists():
        run_dir = pinned_run.run({"run": {"name": "curve", "seed": 1}, "stages": stages}, place)
    by_stage = [json.loads((run_dir / stage["name"] / "results.json").read_text())["policies"] for stage in stages]
    scores: list[dict[str, Any]] = [
        {"pass_at_1": values(result["pass_at_k"])["1"],
         **{parts: {name: values(passes)["1"] for name, passes in result[parts].items()}
            for parts in ("domains", "levels")}}
        for result in by_stage[0]
    ]  # fmt: skip
    if at_end:
        scores[-1]["at_end"] = values(by_stage[1][0]["pass_at_k"])
    return scores


def values(pass_at_k: dict[str, dict[str, float]]) -> dict[str, float]:
    return {k: estimate["value"] for k, estimate in pass_at_k.items()}


def scores_at_start(folder: Path, pool: str) -> dict[str, Any]:
    """Of the model that all arms begin with."""
    (scores,) = held_out_scores(start_folder(folder, pool) / "held_out", [starting_point(folder, pool)], folder, pool)
    return scores


def cell_rates(folder: Path, pool: str) -> dict[str, float]:
    results = json.loads((start_folder(folder, pool) / "run" / "rates" / "results.json").read_text())
    return {cell: passes["1"]["value"] for cell, passes in results["policies"][0]["cells"].items()}


def pool_file(folder: Path, pool: str, labels: bool = True) -> Path:
    """The prompts; of `dead` and `filtered` as many from each (domain, level) of a kind as from the others. Without
    `labels` the same, all of one domain and of no known level."""
    path = pool_path(folder, pool)
    if not labels:
        return unlabelled(pool_file(folder, pool))
    if path.exists():
        return path
    rates = cell_rates(folder, pool)
    live = [cell for cell, rate in rates.items() if LIVE[0] <= rate <= LIVE[1]]
    dead = [cell for cell, rate in rates.items() if not DEAD[0] < rate < DEAD[1]]
    num_dead = round(POOL_PROMPTS * DEAD_SHARE) if pool == "dead" else 0
    wanted = Counter(itertools.islice(itertools.cycle(live), POOL_PROMPTS - num_dead))
    wanted += Counter(itertools.islice(itertools.cycle(dead), num_dead))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tasks(path, wanted, first_seed=10**9)
    return path


def unlabelled(path: Path) -> Path:
    from pipeline.data import Example, read_examples, write_examples
    from rewards.task import UNKNOWN_LEVEL

    bare = path.with_name(f"unlabelled_{path.name}")
    if not bare.exists():
        examples = read_examples(path)
        write_examples(
            bare, [Example(replace(one.task, domain="all", level=UNKNOWN_LEVEL), one.answer) for one in examples]
        )
    return bare


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


def shape(folder: Path, pool: str) -> dict[str, Any]:
    """Share of the pool's prompts by the pass rate of their (domain, level) at the start; prompts of each domain, and
    how many of them are of levels that can be learnt from."""
    from pipeline.data import read_examples

    rates = cell_rates(folder, pool)
    tasks = [example.task for example in read_examples(pool_path(folder, pool))]
    seen = [rates[f"{task.domain}/{task.level}"] for task in tasks]
    live = Counter(task.domain for task, rate in zip(tasks, seen) if LIVE[0] <= rate <= LIVE[1])
    domains = {name: [count, live[name]] for name, count in sorted(Counter(task.domain for task in tasks).items())}
    bins = {f"{low:g}–{min(high, 1):g}": sum(low <= rate < high for rate in seen) / len(seen)
            for low, high in itertools.pairwise(HISTOGRAM)}  # fmt: skip
    shares = {name: round(share, 4) for name, share in bins.items() if share}
    return {"shares": shares, "prompts_and_live": domains}
