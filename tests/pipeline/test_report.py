"""The report from small run directories: its numbers, what is missing, and what a hostile model wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import plots, report
from pipeline.report import write_report
from pipeline.report_routers import router_panel

HOSTILE = "</pre></title><script>alert('pwned')</script><img src=x onerror=alert(1)>"
STAGES: list[dict[str, Any]] = [
    {"name": "keep", "kind": "judge_filter"},
    {"name": "warm", "kind": "sft", "init": "recipes/tiny_base/", "examples": "keep"},
    {"name": "climb", "kind": "online_rl", "policy": "warm", "max_staleness": 2},
    {"name": "tidy", "kind": "dpo", "policy": "climb", "rollouts": "climb"},
    {"name": "score", "kind": "evaluate", "policies": ["recipes/tiny_base/", "climb"]},
]
METRICS = {
    "keep": {"ungraded": 31},
    "warm": {"dropped": {"too_long": 32}},
    "climb": {"groups_lost": {"sandbox: gone": 33}, "ungraded": 34, "prompts_too_long": 35},
    "tidy": {"groups_dropped": {"all_right": 36}, "ungraded_answers": 0},
    "score": {"ungraded": 37},
}


def start_run(run_dir: Path, events: list[dict]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump({"run": {"name": "small"}, "stages": STAGES}))
    started = [{"time": 100.0, "event": "run_started", "stages": [stage["name"] for stage in STAGES]}]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in started + events))


def publish(run_dir: Path, name: str, inputs: list[str], seconds: float) -> Path:
    folder = run_dir / name
    folder.mkdir()
    kind = next(stage["kind"] for stage in STAGES if stage["name"] == name)
    manifest = {"stage": name, "kind": kind, "identity": name[0] * 64, "inputs": dict.fromkeys(inputs, "x"),
                "seconds": seconds, "tokens_generated": 1_500_000, "tokens_trained": 0,
                "metrics": METRICS.get(name, {})}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMPLETE").touch()
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def whole_run(run_dir: Path) -> None:
    names = [stage["name"] for stage in STAGES]
    done = [{"time": 101.0 + i, "event": "stage_completed", "stage": name} for i, name in enumerate(names[1:])]
    start_run(
        run_dir,
        [
            {"time": 100.5, "event": "stage_skipped", "stage": "keep"},
            *done,
            {"time": 130.0, "event": "first_rollout"},
            {"time": 140.0, "event": "run_finished", "exit_code": 0},
        ],
    )
    keep = publish(run_dir, "keep", [], 61.0)
    verdicts = [{"task_id": f"maths/{i}/0", "domain": "maths", "level": i, "prompt": HOSTILE,
                 "score": float(i), "kept": i > 2,
                 "reason": "mass", "decision_reason": "kept as hard: x" if i > 2 else "pruned as easier: y",
                 "measured_pass_rate": 1 - i / 5} for i in range(1, 5)]  # fmt: skip
    write_rows(keep / "verdicts.parquet", verdicts)
    warm = publish(run_dir, "warm", ["keep"], 34.0)
    (warm / "losses.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 9)))
    climb = publish(run_dir, "climb", ["warm"], 402.0)
    steps = [{"step": i, "loss": 0.1, "pass_rate": 0.1 * i, "staleness_counts": {"0": 5, "1": 7}, "groups": 4,
              "zero_signal_groups": 1, "levels": {"maths": 2.0 + i}} for i in range(1, 4)]  # fmt: skip
    (climb / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 4, "lo')
    write_curriculum(climb, [("maths/3", 3, i, 2 * i) for i in range(1, 4)])
    observed = [{"step": i, "entry": "maths/3", "expected": 0.1 * i, "passes": i, "total": 4} for i in range(1, 4)]
    (climb / "observations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in observed))
    tidy = publish(run_dir, "tidy", ["climb"], 48.0)
    (tidy / "losses.jsonl").write_text(json.dumps({"step": 1, "loss": 0.69, "rewards_margins": 0.1}) + "\n")
    write_rows(tidy / "pairs.parquet", [{"category": "wrong"}] * 3 + [{"category": "truncated"}])
    score = publish(run_dir, "score", ["warm", "climb"], 95.0)
    policies, answers = [], []
    for policy, value in (("recipes/tiny_base/", 0.312), ("climb", 0.574)):
        estimate = {"1": {"value": value, "low": value - 0.05, "high": value + 0.05}}
        policies.append({"policy": policy, "checkpoint_digest": "c0ffee" * 8, "pass_at_k": estimate,
                         "cells": {"maths/3": estimate},
                         "domains": {"maths": estimate}, "ungraded": {HOSTILE: 2}, "left_out": {"1": 0},
                         "mean_answer_tokens": 41.0, "truncated_share": 0.25})  # fmt: skip
        answers.append({"policy": policy, "task_id": "maths/3/1", "domain": "maths", "level": 3, "prompt": HOSTILE,
                        "sample": 0,
                        "text": HOSTILE, "score": float(value > 0.5), "reason": HOSTILE, "finish_reason": "stop",
                        "num_tokens": 9})  # fmt: skip
    (score / "results.json").write_text(json.dumps({"k": [1], "samples": 4, "num_tasks": 1, "policies": policies}))
    write_rows(score / "answers.parquet", answers)


def write_curriculum(climb: Path, cells: list[tuple[str, int, int, int]]) -> None:
    """(cell, level, step, sampled) of each row; every posterior has the mean 1/4."""
    rows = [{"step": step, "cell": cell, "domain": "maths", "level": level, "alpha": 1.0, "beta": 3.0,
             "sampled": sampled} for cell, level, step, sampled in cells]  # fmt: skip
    (climb / "curriculum.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Tags(HTMLParser):
    """Counts tags and notes what would load or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.active: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.active += [name for name, _ in attributes if name in ("src", "href") or name.startswith("on")]


def test_a_whole_run_shows_its_numbers(tmp_path):
    whole_run(tmp_path)
    page = write_report(tmp_path).read_text()
    numbers = ["31.2", "57.4", "+26.2", "26.2 – 36.2", "6 min 42 s", "7.5 M", "−1.00", "0.25", "cccccccc", "c0ffeec0"]
    words = ["2 were kept and 2 pruned", "pruned as easier", "4 pairs: 3 wrong, 1 truncated", "largest gain in maths"]
    words += ['that came (Spearman) <b class="number">1.00', 'calibration error <b class="number">0.300']
    words += ["small", "finished", "cached", "1 versions old; the bound is 2", "✗ wrong", "✓ right"]
    for shown in numbers + words:
        assert shown in page, shown
    assert "climb/steps.jsonl: 1 unreadable lines left out" in page  # a torn last line costs itself only


def router_rows(layers: list[int]) -> list[dict]:
    prefixes = ["router/", *(f"router/layer{layer}/" for layer in layers)]
    gauges = {"max_vio": 1.5, "drift": 0.01}
    rows = [{f"{prefix}{gauge}": value for prefix in prefixes for gauge, value in gauges.items()} for _ in range(3)]
    return [row | {"step": i, "loss": 0.5} for i, row in enumerate(rows, 1)]


def test_what_the_routers_did_is_drawn_by_layer_in_every_training_stage(tmp_path):
    whole_run(tmp_path)
    assert "routers sent" not in write_report(tmp_path).read_text(), "nothing was recorded"
    for stage, file in (("warm", "losses.jsonl"), ("climb", "steps.jsonl"), ("tidy", "losses.jsonl")):
        rows = router_rows([1, 3])
        (tmp_path / stage / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert page.count("Where its routers sent the tokens") == 3
    assert page.count("layer 1</span>") == page.count("layer 3</span>") == 3
    assert page.count("drift since the start (JS, nats)</text>") == 3 and "agreement with" not in page


def test_of_many_router_layers_the_worst_is_drawn():
    assert router_panel([{"step": 1, "loss": 0.1}]) is None
    panel = router_panel(router_rows(list(range(24))))
    assert panel["legend"] == [("the worst of 24 layers", 1)] and len(panel["figures"]) == 2
    assert panel["figures"][0].count("<polyline") == 1


def test_what_was_left_out_is_counted_in_its_section(tmp_path):
    whole_run(tmp_path)
    sections = re.split("<h2>", write_report(tmp_path).read_text())
    for heading, words in {
        "What the judge": "31 answers ungraded.",
        "Supervised": "32 examples dropped (too long).",
        "Online RL": "35 prompts too long, 34 answers ungraded, 33 groups sampled again (sandbox: gone).",
        "Preference": "36 groups without a pair (all right).",
        "Held-out score": "37 answers ungraded.",
    }.items():
        (section,) = (section for section in sections if section.startswith(heading))
        assert f"Left out: {words}" in section


def test_a_curriculum_of_levels_is_a_heat_map_and_one_of_prompts_is_counted(tmp_path):
    whole_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "step 2, level 3: 2" in page and "prompts tried" not in page
    # Two prompts at the first step, three at the second. One of a stated level is still a prompt, not a level.
    tried = [("gsm8k/7", 0, 1, 1), ("gsm8k/8", 0, 1, 1), ("gsm8k/7", 0, 2, 2), ("gsm8k/8", 0, 2, 1), ("x", 5, 2, 1)]
    write_curriculum(tmp_path / "climb", tried)
    page = write_report(tmp_path).read_text()
    assert "prompts tried" in page and "mean posterior" in page and "level 5: " not in page


def test_prompt_plots_count_the_prompts_and_average_their_posteriors(monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "line_plot", lambda title, lines, **_: drawn.update({title: lines[0].points}))
    cells = [(1, "a", 1, 1), (1, "b", 3, 1), (1, "c", 9, 0), (2, "a", 1, 2)]
    rows = [{"step": step, "cell": cell, "domain": "maths", "level": 0, "alpha": alpha, "beta": 1, "sampled": sampled}
            for step, cell, alpha, sampled in cells]  # fmt: skip
    report._prompt_plots(rows, [plots.Series("maths", [], 1)])
    assert drawn["prompts tried"] == [(1, 2), (2, 1)]
    assert drawn["their mean posterior pass rate"] == [(1, (0.5 + 0.75) / 2), (2, 0.5)]


def test_hostile_text_stays_text(tmp_path):
    whole_run(tmp_path)
    page = write_report(tmp_path).read_text()
    seen = Tags(page)
    assert "script" not in seen.tags and "img" not in seen.tags
    assert seen.active == [], "nothing is loaded and nothing runs"
    assert "&lt;script&gt;alert(" in page
    assert not re.search(r"url\((?!#tip\))|@import|https?://", page)


@pytest.mark.parametrize("missing", [stage["name"] for stage in STAGES])
def test_a_missing_stage_costs_only_its_own_section(tmp_path, missing):
    whole_run(tmp_path)
    for file in (tmp_path / missing).iterdir():
        file.unlink()
    (tmp_path / missing).rmdir()
    page = write_report(tmp_path).read_text()
    headings = {"keep": "What the judge pruned", "warm": "Supervised pass", "climb": "Online RL",
                "tidy": "Preference pass", "score": "Held-out score"}  # fmt: skip
    assert {name for name, heading in headings.items() if heading not in page} == {missing}


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    start_run(tmp_path, [{"time": 101.0, "event": "stage_started", "stage": "keep"}])
    page = write_report(tmp_path).read_text()
    assert "not finished" in page and "running" in page and "waiting" in page


def test_an_empty_directory_has_a_report(tmp_path):
    assert "No stage has left anything yet" in write_report(tmp_path).read_text()


def test_a_failed_stage_shows_its_error_and_what_it_had_left(tmp_path):
    start_run(tmp_path, [{"time": 101.0, "event": "stage_failed", "stage": "warm", "error": f"actor died {HOSTILE}"}])
    partial = tmp_path / "warm.partial"
    partial.mkdir()
    (partial / "losses.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    page = write_report(tmp_path).read_text()
    assert "warm failed" in page and "actor died &lt;/pre&gt;" in page and "Supervised pass" in page


def test_a_file_in_an_unknown_shape_is_noted(tmp_path):
    whole_run(tmp_path)
    (tmp_path / "score" / "results.json").write_text('{"policies": [{"policy": "climb"}]}')
    (tmp_path / "keep" / "verdicts.parquet").write_bytes(b"not parquet")
    page = write_report(tmp_path).read_text()
    assert "score: cannot be drawn" in page and "keep/verdicts.parquet: " in page and "Online RL" in page


def test_plots_escape_their_words_and_survive_odd_numbers():
    line = plots.line_plot(HOSTILE, [plots.Series(HOSTILE, [(1, 0.5), (2, float("nan")), (3, 0.5)])], dots=True)
    assert "<script>" not in line and "nan" not in line
    for drawn in (
        plots.line_plot("one point", [plots.Series("a", [(4, 2.0)])]),
        plots.bar_plot("empty", {}),
        plots.bar_plot("zero", {"a": [0.0]}),
        plots.heat_map("one", {(1, 1): 0.0}, x_label="step", y_label="level", colour=1),
        plots.scatter_plot("none", [], x_label="x", y_range=(0, 1)),
    ):
        assert drawn.startswith("<svg") and drawn.endswith("</svg>")


@pytest.mark.parametrize(("low", "high", "about", "ticks"), [
    (0, 1, 4, [0, 0.25, 0.5, 0.75, 1.0]),
    (1, 40, 5, [0, 10, 20, 30, 40]),
    (0.0, 0.004, 4, [0, 0.001, 0.002, 0.003, 0.004]),
])  # fmt: skip
def test_ticks_are_round(low, high, about, ticks):
    assert plots._ticks(low, high, about) == pytest.approx(ticks)


def test_scores_that_lie_close_together_still_have_their_own_bars():
    from pipeline.report import _histogram

    assert str(_histogram([3.201, 3.202, 3.2125], [3.2])).count("<rect") >= 3
