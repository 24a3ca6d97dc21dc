"""What the curves of `rl_efficiency.py` add up to: tokens and seconds to a score, fits, a table and a picture."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pipeline import plots

PLOT_WIDTH, PLOT_HEIGHT = 420, 266
COLOURS = ("#3b6fb6", "#d9822b", "#3a8f5c", "#b0403f", "#7a5aa8", "#777777")
STYLE = (
    "text{font:10.5px sans-serif;fill:#555} .title{font-size:12px;font-weight:600;fill:#111} .grid{stroke:#ddd} "
    ".line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round} .fill{fill:currentColor}"
)
TABLE_WIDTH = 200
EASY = (1, 2)  # levels
FIT_POINTS = 6  # a curve of fewer is not fitted
PICTURED = ("A", "A+head_rate", "B", "C", "C-labels")

Curve = list[dict[str, Any]]  # its first point: the model that the run began with, at no tokens
Curves = dict[str, dict[str, list[Curve]]]  # pool → arm → one a seed


def table(
    runs: Annotated[Path, typer.Argument(help="What `collect` wrote.")],
    target: Annotated[list[float], typer.Option(help="Held-out pass@1 to read the curves at.")] = [0.5],  # noqa: B006
    picture: Annotated[Path | None, typer.Option(help="Draw the curves into this file (.svg).")] = None,
) -> None:
    """Print a table a pool, median of the seeds and their range, and one of the trials; draw the curves."""
    known = json.loads(runs.read_text())
    curves, trials = by_arm(known["runs"], trials=False), by_arm(known["runs"], trials=True)
    console = Console(width=TABLE_WIDTH)
    for title, some in (("", curves), ("trials of ", trials)):
        for pool, arms in some.items():
            heading = f"{title}pool {pool}: {shape_text(known['pools'][pool])}"
            console.print(pool_table(heading, arms, target, known["at_start"][pool]))
    for machine in sorted({run["machine"] for run in known["runs"]}):
        print(machine)
    if picture:
        draw(curves, picture)


def by_arm(runs: list[dict[str, Any]], trials: bool) -> Curves:
    """A trial's arm has a label behind a dot."""
    found: Curves = {}
    for run in runs:
        if ("." in run["arm"]) == trials:
            begin = {"generated_tokens": 0, "seconds": 0.0, "pass_at_1": run["start"]}
            found.setdefault(run["pool"], {}).setdefault(run["arm"], []).append([begin, *run["curve"]])
    return found


def shape_text(shape: dict[str, Any]) -> str:
    return ", ".join(f"{rates}: {share:.0%}" for rates, share in shape["shares"].items())


def pool_table(title: str, arms: dict[str, list[Curve]], targets: list[float], starts: list[dict[str, Any]]) -> Table:
    columns = [f"{what} to {goal:g}" for goal in targets for what in ("tokens", "seconds")]
    ends = ("pass@1, 8, 32 at its end", f"levels {EASY[0]} to {EASY[-1]}", "end, middle, slope of the fit")
    shown = Table(title=title)
    shown.add_column("arm", no_wrap=True)
    for column in ("seeds", *columns, *ends):
        shown.add_column(column)
    shown.add_row("the start", "", *([""] * len(columns)), *end_texts(starts), "")
    for arm, curves in arms.items():
        cells = []
        for goal in targets:
            for key, unit in (("generated_tokens", 1e3), ("seconds", 1)):
                values = sorted(needed(curve, key, goal) / unit for curve in curves)
                most = max(curve[-1][key] for curve in curves) / unit
                cells.append(spread(values, "k" if unit > 1 else "s", most))
        shown.add_row(arm, f"{len(curves)}", *cells, *end_texts([curve[-1] for curve in curves]), fit_text(curves))
    return shown


def end_texts(points: list[dict[str, Any]]) -> tuple[str, str]:
    """pass@k, and pass@1 of the easiest levels, which a run on hard prompts might forget: medians of the seeds."""
    at_end = [point["at_end"] for point in points if "at_end" in point]
    easy = [statistics.fmean(point["levels"][str(level)] for level in EASY) for point in points if "levels" in point]
    passes = (f"{statistics.median(one[k] for one in at_end):.3f}" for k in ("1", "8", "32") if at_end)
    return ", ".join(passes), f"{statistics.median(easy):.3f}" if easy else ""


def needed(curve: Curve, key: str, target: float) -> float:
    """Where the monotone curve crosses `target`, between checkpoints in proportion; infinite where it never does."""
    begin, *points = curve
    before, score_before = begin[key], begin["pass_at_1"]
    for point, score in zip(points, monotone([point["pass_at_1"] for point in points], score_before)):
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


def spread(values: list[float], unit: str, most: float) -> str:
    """Median and range over seeds; a run that did not get there went on to `most`."""
    if values[0] == float("inf"):
        return f"not by {most:,.0f} {unit}"

    def text(value: float) -> str:
        if value == float("inf"):
            return f"not by {most:,.0f}"
        return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

    middle = f"{text(statistics.median_low(values))} {unit}"
    return middle if len(values) == 1 else f"{middle} ({text(values[0])}–{text(values[-1])})"


def sigmoid_fit(tokens: np.ndarray, scores: np.ndarray, start: float) -> tuple[float, float, float, float]:
    """(A, C_mid, B, rms error) of the best start + (A - start)/(1 + (C_mid/C)^B): ScaleRL's curve (Khatri et al. 2025,
    eq. 1) over generated tokens in the place of compute. Least squares over a grid, A between the best score and 1."""
    ends = np.linspace(max(scores.max(), start + 1e-3), 1.0, 60)
    middles = np.geomspace(tokens.min() / 2, tokens.max() * 4, 80)
    slopes = np.linspace(0.5, 4.0, 36)
    shape = 1.0 / (1.0 + (middles[:, None, None] / tokens) ** slopes[:, None])  # [middle, slope, point]
    fitted = start + (ends[:, None, None, None] - start) * shape
    error = ((fitted - scores) ** 2).mean(axis=-1)
    a, m, b = np.unravel_index(error.argmin(), error.shape)
    return float(ends[a]), float(middles[m]), float(slopes[b]), float(error[a, m, b] ** 0.5)


def fit_text(curves: list[Curve]) -> str:
    """Of all seeds together, where they rise and the fit is closer than the noise of an evaluation."""
    at_start = statistics.fmean(curve[0]["pass_at_1"] for curve in curves)
    points = [(point["generated_tokens"], point["pass_at_1"]) for curve in curves for point in curve[1:]]
    tokens, scores = np.array([t for t, _ in points], float), np.array([s for _, s in points])
    if len(points) < FIT_POINTS or scores.max() < at_start + 0.1:
        return ""
    end, middle, slope, error = sigmoid_fit(tokens, scores, at_start)
    return f"{end:.2f}, {middle / 1e3:,.0f} k, {slope:.1f} (±{error:.3f})"


def draw(runs: Curves, picture: Path) -> None:
    """Held-out pass@1 by tokens and by seconds, a row a pool, a line a run."""
    runs = {pool: {arm: of for arm, of in arms.items() if arm in PICTURED} for pool, arms in runs.items()}
    arms = sorted({arm for of_pool in runs.values() for arm in of_pool})
    parts = [
        f'<circle class="fill c{colour}" cx="{14 + 90 * i}" cy="12" r="4"/><text x="{22 + 90 * i}" y="16">{arm}</text>'
        for i, (arm, colour) in enumerate(zip(arms, itertools.cycle(range(plots.NUM_COLOURS))))
    ]
    for row, (pool, of_pool) in enumerate(runs.items()):
        for column, (key, label) in enumerate((("generated_tokens", "generated tokens"), ("seconds", "seconds"))):
            series = [
                plots.Series(arm, [(point[key], point["pass_at_1"]) for point in curve], arms.index(arm))
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
