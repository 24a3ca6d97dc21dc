"""The one-file HTML report of a run.

`drover report` and the end of `drover run` call `write_report`. It reads the run directory and nothing else, draws what
is there, and says what is not: an unfinished run gives a partial report. The page loads nothing from outside and
runs no script; everything a model wrote is escaped.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline import plots
from pipeline.plots import Series
from pipeline.rank_correlation import spearman
from pipeline.report_difficulty import foresight_panel
from pipeline.report_routers import router_panel
from pipeline.run_reader import Row, RunReader, StageView

LONGEST_TEXT = 1500  # characters of one prompt or answer shown
EXAMPLES_SHOWN = 4  # prompts of each kind in the judge's section
SMOOTH_STEPS = 5  # trailing mean over so many optimiser steps
PASSED = 1.0  # an answer counts as right at full score, as in evaluate
LEFT_OUT = {  # metrics that hold a number → what it is that was left out
    "prompts_too_long": "prompts too long",
    "ungraded": "answers ungraded",
    "ungraded_answers": "answers ungraded in the groups mined",
}
LEFT_OUT_BY_REASON = {  # metrics that hold {reason: how many} → what it is that was left out
    "dropped": "examples dropped",
    "groups_lost": "groups sampled again",
    "groups_dropped": "groups without a pair",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory, whatever of the run exists, and return its path."""
    run = RunReader(run_dir)
    sections = {
        "overview": [overview(run)],
        "scores": _each(run, "evaluate", scores),
        "judges": _each(run, "judge_filter", judge),
        "tuned": _each(run, "sft", tuned),
        "climbs": _each(run, "online_rl", climb),
        "tidied": _each(run, "dpo", tidied),
    }
    # `autoescape` is what makes a hostile answer harmless: only `Markup` from pipeline/plots.py passes unescaped.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(zip=zip, points=points, seconds=seconds_in_words, count=count_in_words, shown=shown)
    name = (run.recipe.get("run") or {}).get("name") or run_dir.name
    page = environment.get_template("report.html.j2").render(name=name, run=run, notes=run.notes, **sections)
    path = run_dir / "report.html"
    beside = run_dir / "report.html.partial"
    beside.write_text(page, encoding="utf-8", errors="backslashreplace")
    os.replace(beside, path)
    return path


def _each(run: RunReader, kind: str, section: Callable[[RunReader, StageView, Path], Row | None]) -> list[Row]:
    """One section per stage of a kind. A file in an unknown shape costs its own section, not the report."""
    made = []
    for stage, folder in run.of_kind(kind):
        try:
            content = section(run, stage, folder)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            run.notes.append(f"{stage.name}: cannot be drawn ({type(error).__name__}: {error})")
            continue
        if content:
            made.append({"stage": stage, "left_out": left_out(stage), **content})
    return made


def left_out(stage: StageView) -> dict[str, int]:
    """What the stage's manifest counts as not used, in words, and how many; empty where nothing was left out."""
    metrics = stage.manifest.get("metrics") or {}
    counts = {words: metrics.get(key) for key, words in LEFT_OUT.items()}
    for key, words in LEFT_OUT_BY_REASON.items():
        for reason, number in (metrics.get(key) or {}).items():
            counts[f"{words} ({reason.replace('_', ' ')})"] = number
    return {words: number for words, number in counts.items() if number}


# --- sections: each takes what a stage left and gives what the template prints ---------------------------------------


def overview(run: RunReader) -> Row:
    """The stage graph, and what the run cost."""
    boxes = []
    for stage in run.stages:
        time = seconds_in_words(stage.seconds) if stage.seconds is not None else stage.state
        second = f"{stage.digest} · {stage.state}" if stage.digest else stage.state
        inputs = list(stage.manifest.get("inputs") or _named_stages(stage.config, run.stages))
        boxes.append(plots.Box(stage.name, (f"{stage.kind} · {time}", second), stage.state, inputs))
    firsts = {name: first_time(run.events, name) for name in ("first_rollout", "first_step")}
    started = next((event.get("time") for event in reversed(run.events) if event.get("event") == "run_started"), None)
    times = [event["time"] for event in run.events if isinstance(event.get("time"), int | float)]
    facts = {
        "state": _run_state(run),
        "stage time": seconds_in_words(sum(stage.seconds or 0.0 for stage in run.stages)),
        "tokens generated": count_in_words(sum(stage.manifest.get("tokens_generated") or 0 for stage in run.stages)),
        "tokens trained": count_in_words(sum(stage.manifest.get("tokens_trained") or 0 for stage in run.stages)),
    }
    for event, label in (("first_rollout", "to the first rollout"), ("first_step", "to the first RL step")):
        at = firsts[event]
        if started is not None and at is not None and at > started:  # else it is of an earlier run
            facts[label] = seconds_in_words(at - started)
    when = datetime.fromtimestamp(max(times)).strftime("%-d %B %Y, %H:%M") if times else ""
    return {"graph": plots.stage_graph(boxes) if boxes else "", "facts": facts, "when": when}


def scores(run: RunReader, stage: StageView, folder: Path) -> Row | None:
    """pass@k per checkpoint, by domain and level, and the same tasks answered by each checkpoint."""
    results = run.json_file(folder / "results.json")
    policies = results.get("policies") or []
    if not policies:
        return None
    ks = [str(k) for k in results.get("k") or policies[0]["pass_at_k"]]
    rows = []
    for i, policy in enumerate(policies):
        cells = []
        for k in ks:
            estimate = policy["pass_at_k"].get(k)
            before = policies[i - 1]["pass_at_k"].get(k) if i else None
            change = estimate["value"] - before["value"] if estimate and before else None
            strip = plots.interval(estimate["value"], estimate["low"], estimate["high"], i) if estimate else ""
            cells.append({"estimate": estimate, "change": change, "strip": strip})
        rows.append({**policy, "label": label_of(policy["policy"]), "colour": i % plots.NUM_COLOURS, "cells": cells})
    return {
        "results": results,
        "ks": ks,
        "rows": rows,
        "domains": sorted({domain for policy in policies for domain in policy.get("domains") or {}}),
        "by_level": _level_plots(policies, ks),
        "samples": sample_answers(run.parquet(folder / "answers.parquet"), [p["policy"] for p in policies]),
    }


def _level_plots(policies: Sequence[Row], ks: Sequence[str]) -> list[tuple[str, list[Markup]]]:
    """k → one plot per domain, one line per checkpoint. Empty where the tasks carry no levels."""
    cells = [{_cell(key): by_k for key, by_k in (policy.get("cells") or {}).items()} for policy in policies]
    domains = sorted({domain for cell in cells for domain, _ in cell})
    if not any(level for cell in cells for _, level in cell):
        return []
    rows = []
    for k in ks:
        figures = []
        for domain in domains:
            lines = []
            for i, (policy, cell) in enumerate(zip(policies, cells, strict=True)):
                here = {level: by_k.get(k) for (name, level), by_k in sorted(cell.items()) if name == domain}
                found = [(level, estimate["value"]) for level, estimate in here.items() if estimate]
                lines.append(Series(label_of(policy["policy"]), found, i))
            title = f"{domain}, pass@{k}"
            figures.append(plots.line_plot(title, lines, x_label="level", y_range=(0, 1), percent=True, dots=True))
        rows.append((k, figures))
    return rows


def sample_answers(answers: Sequence[Row], policies: Sequence[str]) -> list[Row]:
    """Held-out tasks with the first answer of every checkpoint: per domain the task that gained most, then the one
    that lost most. The first sample is shown, right or wrong; how many of all samples were right stands beside it."""
    by_task: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        by_task[answer["task_id"]][answer["policy"]].append(answer)
    gains: list[tuple[float, str, str]] = []
    for task_id, by_policy in by_task.items():
        if policies[0] in by_policy and policies[-1] in by_policy:
            first, last = (_share_right(by_policy[policy]) for policy in (policies[0], policies[-1]))
            if first is not None and last is not None:
                gains.append((last - first, task_id, by_policy[policies[0]][0]["domain"]))
    gains.sort(key=lambda gain: (-gain[0], gain[1]))
    chosen: dict[str, str] = {}
    for _, task_id, domain in gains:
        if domain not in (by_task[other][policies[0]][0]["domain"] for other in chosen):
            chosen[task_id] = f"largest gain in {domain}"
    if gains and gains[-1][0] < 0:
        chosen.setdefault(gains[-1][1], "largest loss of all")
    shown_tasks = []
    for task_id, why in chosen.items():
        task = by_task[task_id][policies[0]][0]
        replies = []
        for i, policy in enumerate(policies):
            rows = sorted(by_task[task_id].get(policy, []), key=lambda row: row.get("sample") or 0)
            if rows:
                right = sum(row["score"] is not None and row["score"] >= PASSED for row in rows)
                graded = sum(row["score"] is not None for row in rows)
                mark = "ungraded" if rows[0]["score"] is None else "right" if rows[0]["score"] >= PASSED else "wrong"
                colour = i % plots.NUM_COLOURS
                beside = {"label": label_of(policy), "colour": colour, "mark": mark, "tally": f"{right} of {graded}"}
                replies.append(rows[0] | beside)
        shown_tasks.append(task | {"why": why, "replies": replies})
    return shown_tasks


def judge(run: RunReader, stage: StageView, folder: Path) -> Row | None:
    """What was pruned, and how far the judge agrees with the measured pass rate."""
    verdicts = run.parquet(folder / "verdicts.parquet")
    if not verdicts:
        return None
    kept, pruned = ([row for row in verdicts if bool(row.get("kept")) is side] for side in (True, False))
    table: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in verdicts:
        cell = table[row["domain"]][row["level"]]
        cell[0] += bool(row["kept"])
        cell[1] += 1
    scored = [row for row in verdicts if isinstance(row.get("score"), int | float)]
    measured = [row for row in scored if isinstance(row.get("measured_pass_rate"), int | float)]
    domains = sorted(table)
    pairs = [(row["domain"], (row["score"], row["measured_pass_rate"])) for row in measured]
    dots = [Series(domain, [pair for name, pair in pairs if name == domain], 1 + i) for i, domain in enumerate(domains)]
    return {
        "total": len(verdicts),
        "kept": len(kept),
        "unscored": Counter(str(row.get("reason")) for row in verdicts if row.get("score") is None),
        "decisions": Counter(_group(row) for row in verdicts),
        "table": table,
        "levels": sorted({row["level"] for row in verdicts}),
        "histogram": _histogram(
            [row["score"] for row in scored if row["kept"]], [row["score"] for row in scored if not row["kept"]]
        ),
        "scatter": plots.scatter_plot(
            "pass rate by judged difficulty", dots, x_label="judge's score", y_range=(0, 1), percent=True
        ),
        "legend": [(series.label, series.colour) for series in dots],
        "spearman": spearman([row["score"] for row in measured], [row["measured_pass_rate"] for row in measured]),
        "measured": len(measured),
        "examples": [("pruned", _spread(pruned)), ("kept", _spread(kept))],
        "decision": _decision,
    }


def tuned(run: RunReader, stage: StageView, folder: Path) -> Row | None:
    losses = run.json_lines(folder / "losses.jsonl")
    figures = _curves(losses, [("loss", "loss", {}), ("learning_rate", "learning rate", {})])
    return {"figures": figures, "routers": router_panel(losses)} if figures else None


PREFERENCE_CURVES: list[tuple[str, str, Row]] = [
    ("loss", "loss", {}),
    ("rewards_margins", "margin", {}),
    ("rewards_accuracies", "accuracy", {"y_range": (0, 1), "percent": True}),
    ("logps_chosen", "log-probability of the chosen", {}),
    ("logps_rejected", "log-probability of the rejected", {}),
]


def tidied(run: RunReader, stage: StageView, folder: Path) -> Row | None:
    """The preference pass: what its pairs were, and its curves, in TRL's names."""
    pairs = Counter(str(row.get("category")) for row in run.parquet(folder / "pairs.parquet", ["category"]))
    losses = run.json_lines(folder / "losses.jsonl")
    figures = _curves(losses, PREFERENCE_CURVES)
    return {"figures": figures, "pairs": pairs, "routers": router_panel(losses)} if figures or pairs else None


CURVES: list[tuple[str, str, Row]] = [
    ("pass_rate", "pass rate of the rollouts", {"y_range": (0, 1), "percent": True, "smooth": SMOOTH_STEPS}),
    ("reward_mean", "mean reward", {"smooth": SMOOTH_STEPS}),
    ("loss", "loss", {"smooth": SMOOTH_STEPS}),
    ("entropy", "entropy (nats a token)", {"smooth": SMOOTH_STEPS}),
    ("grad_norm", "gradient norm", {"smooth": SMOOTH_STEPS}),
    ("mismatch_k3", "mismatch, engine to learner (k3)", {}),
    ("mismatch_max", "largest mismatch (nats)", {}),
    ("staleness_k3", "divergence of older versions (k3)", {}),
    ("ess", "effective sample size", {"percent": True}),
    ("repetition_share", "answers that repeat themselves", {"percent": True}),
    ("staleness_mean", "mean staleness of tokens", {}),
    ("answer_tokens_mean", "mean answer length (tokens)", {"smooth": SMOOTH_STEPS}),
    ("truncated_share", "truncated answers", {"percent": True}),
    ("zero_signal_share", "groups without signal", {"y_range": (0, 1), "percent": True, "smooth": SMOOTH_STEPS}),
    ("clip_share", "clipped tokens", {"percent": True}),
    ("is_weight_mean", "mean importance weight", {}),
    ("tokens_per_s", "generated tokens a second", {"smooth": SMOOTH_STEPS}),
    ("learner_wait_share", "learner waits for answers", {"percent": True, "smooth": SMOOTH_STEPS}),
    ("generator_wait_share", "engines wait for leases", {"percent": True, "smooth": SMOOTH_STEPS}),
    ("learner_step_s", "learner's step (s)", {}),
    ("sync_ms", "weight sync (ms)", {}),
]


def climb(run: RunReader, stage: StageView, folder: Path) -> Row | None:
    """The curves of online RL, and where the curriculum sampled."""
    steps = run.json_lines(folder / "steps.jsonl")
    if not steps:
        return None
    for step in steps:
        if step.get("groups"):
            step.setdefault("zero_signal_share", step.get("zero_signal_groups", 0) / step["groups"])
    staleness: Counter[int] = Counter()
    for step in steps:
        staleness.update({int(age): number for age, number in (step.get("staleness_counts") or {}).items()})
    bars = {str(age): [float(staleness[age])] for age in range(max(staleness, default=-1) + 1)}
    figures = _curves(steps, CURVES)
    if bars:
        words = "versions behind the learner"
        figures.append(plots.bar_plot("tokens trained, by staleness", bars, x_label=words, colours=(1,)))
    by_step = [(step["step"], step.get("levels") or {}) for step in steps]
    levels = [(domain, (number, level)) for number, mean in by_step for domain, level in mean.items() if level]
    drawn = run.json_lines(folder / "curriculum.jsonl")
    domains = sorted({row["domain"] for row in drawn} | {domain for domain, _ in levels})
    lines = [
        Series(domain, [point for name, point in levels if name == domain], 1 + i) for i, domain in enumerate(domains)
    ]
    colours = {series.label: series.colour for series in lines}
    domain_of = {row["cell"]: row["domain"] for row in drawn}
    return {
        "figures": figures,
        "routers": router_panel(steps),
        "foresight": foresight_panel(
            run.json_lines(folder / "observations.jsonl"),
            run.json_file(folder / "calibration.json"),
            domain_of,
            colours,
        ),
        "steps": len(steps),
        "legend": list(colours.items()),
        "mean_levels": [plots.line_plot("mean sampled level", lines, x_label="step", smooth=SMOOTH_STEPS)]
        if levels
        else [],
        "heat": _heat_maps([row for row in drawn if _is_level(row)], lines),
        "prompts": _prompt_plots([row for row in drawn if not _is_level(row)], lines),
        "worst_staleness": max((age for age in staleness if staleness[age]), default=None),
        "bound": stage.config.get("max_staleness"),
    }


def _heat_maps(rows: Sequence[Row], means: Sequence[Series]) -> list[Markup]:
    """One per domain: level by step, how many tasks were sampled, with the mean sampled level drawn over it."""
    cells: dict[str, dict[tuple[float, int], float]] = defaultdict(dict)
    before: Counter[tuple[str, int]] = Counter()
    for row in rows:
        cell, so_far = (row["domain"], int(row["level"])), row["sampled"]  # counted since the stage began
        cells[cell[0]][row["step"], cell[1]] = float(max(0, so_far - before[cell]))
        before[cell] = so_far
    return [
        plots.heat_map(
            series.label, cells[series.label], x_label="step", y_label="level", colour=series.colour,
            overlay=plots.trailing_mean(series.points, SMOOTH_STEPS),
        )
        for series in means
        if series.label in cells
    ]  # fmt: skip


def _prompt_plots(rows: Sequence[Row], colours: Sequence[Series]) -> list[Markup]:
    """Of a data set, whose cells are prompts: how many were sampled so far, and the mean of their posteriors."""
    # domain → step → the mean of each prompt's posterior
    means: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["sampled"]:
            means[row["domain"]][row["step"]].append(row["alpha"] / (row["alpha"] + row["beta"]))
    if not means:
        return []

    def lines(of: Callable[[list[float]], float]) -> list[Series]:
        return [
            Series(s.label, [(step, of(found)) for step, found in means[s.label].items()], s.colour) for s in colours
        ]

    return [
        plots.line_plot("prompts tried", lines(len), x_label="step"),
        plots.line_plot("their mean posterior pass rate", lines(fmean), x_label="step", y_range=(0, 1), percent=True),
    ]


def _is_level(row: Row) -> bool:
    """Whether a row of curriculum.jsonl is of a (domain, level) of generated tasks; else it is of one prompt."""
    return row["cell"] == f"{row['domain']}/{row['level']}"


# --- pieces -------------------------------------------------------------------------------------------------------


def label_of(reference: str) -> str:
    """A policy's short name: `recipes/tiny_base/` → `tiny_base`."""
    return re.split(r"[/:]", reference.rstrip("/"))[-1] or reference


def points(share: float | None) -> str:
    """A difference of shares in points: +12.3."""
    return "" if share is None else f"{share * 100:+.1f}".replace("-", "−")


def seconds_in_words(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count_in_words(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def shown(text: object) -> str:
    """A prompt or an answer, cut where it gets long. Escaping is the template's."""
    words = str(text)
    more = len(words) - LONGEST_TEXT
    return words if more <= 0 else f"{words[:LONGEST_TEXT]} … ({more} more characters)"


def _run_state(run: RunReader) -> str:
    for event in reversed(run.events):
        if event.get("event") == "run_finished":
            return "finished" if event.get("exit_code") == 0 else f"stopped with exit code {event.get('exit_code')}"
        if event.get("event") == "run_started":
            break
    return "not finished"


def _named_stages(config: Mapping[str, Any], stages: Sequence[StageView]) -> list[str]:
    """Stages that a recipe section names, for a stage without a manifest."""
    values = [value for key, value in config.items() if key not in ("name", "kind")]
    words = [word for value in values for word in (value if isinstance(value, list) else [value])]
    return [stage.name for stage in stages if stage.name in words]


def _curves(rows: Sequence[Row], curves: Iterable[tuple[str, str, Row]]) -> list[Markup]:
    """A plot for every key that was recorded."""
    drawn = [(Series(title, _series(rows, key), 1), options) for key, title, options in curves]
    return [plots.line_plot(s.label, [s], x_label="step", **options) for s, options in drawn if s.points]


def _series(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if _number(row.get("step")) and _number(row.get(key))]


def _number(value: object) -> bool:
    return isinstance(value, int | float)


def _cell(key: str) -> tuple[str, int]:
    """`maths/3` → ("maths", 3)."""
    domain, _, level = key.rpartition("/")
    return domain, int(level)


def first_time(events: Sequence[Row], name: str) -> float | None:
    return next((event.get("time") for event in events if event.get("event") == name), None)


def _share_right(rows: Sequence[Row]) -> float | None:
    graded = [row["score"] for row in rows if row["score"] is not None]
    return sum(score >= PASSED for score in graded) / len(graded) if graded else None


def _decision(row: Row) -> str:
    return str(row.get("decision_reason") or row.get("decision") or ("kept" if row.get("kept") else "pruned"))


def _group(row: Row) -> str:
    """The kind of decision, for counting: what its reason says before the colon."""
    return _decision(row).partition(":")[0]


def _histogram(kept: Sequence[float], pruned: Sequence[float], num_bins: int = 12) -> Markup:
    everything = [*kept, *pruned]
    low, high = min(everything, default=0.0), max(everything, default=1.0)
    width = (high - low) / num_bins or 1.0
    heights = [[0.0, 0.0] for _ in range(num_bins)]
    for side, scores_of_side in enumerate((kept, pruned)):
        for score in scores_of_side:
            heights[min(num_bins - 1, int((score - low) / width))][side] += 1
    decimals = max(1, math.ceil(-math.log10(width)) + 1)  # as many as tell one bin from the next
    bars = {f"{low + (i + 0.5) * width:.{decimals}f}": height for i, height in enumerate(heights)}
    return plots.bar_plot("prompts by judge's score", bars if everything else {}, x_label="judge's score")


def _spread(rows: Sequence[Row]) -> list[Row]:
    """A few rows from across the range of scores, not the most flattering ones."""
    ordered = sorted(rows, key=lambda row: (row.get("score") is None, row.get("score") or 0.0, str(row.get("task_id"))))
    picks = min(EXAMPLES_SHOWN, len(ordered))
    return [ordered[round(i * (len(ordered) - 1) / max(1, picks - 1))] for i in range(picks)]
