"""Small plots as SVG text, drawn with the page's own colours so that they follow light and dark.

Called by `pipeline/report.py`. Each function takes plain numbers and gives one `<svg>` as `Markup`; every word that
goes into a plot is escaped here. Colours are the CSS classes `c0` … `c5` of `report.html.j2`. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

NUM_COLOURS = 6
WIDTH, HEIGHT = 300, 190  # view box units; about CSS pixels on the page
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 28, 32  # margins around the plotting area
MOST_COLUMNS = 60  # a heat map joins steps beyond this, a line plot keeps them all
PLAIN_NUMBERS = (0.01, 1e9)  # numbers outside these bounds are written in powers of ten


@dataclass(frozen=True)
class Series:
    label: str
    points: Sequence[tuple[float, float]]  # (x, y), x rising; points that are not finite are left out
    colour: int = 0


@dataclass(frozen=True)
class Axes:
    """The plotting area: data coordinates to view box coordinates."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_plot(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "",
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    dots: bool = False,
    smooth: int = 1,
) -> Markup:
    """Lines over a shared x axis. `smooth` > 1 draws the raw line faint and its trailing mean over `smooth` points."""
    series = [Series(s.label, [p for p in s.points if all(map(math.isfinite, p))], s.colour) for s in series]
    points = [point for s in series for point in s.points]
    if not points:
        return nothing(title)
    x_range = _around([x for x, _ in points])
    axes = Axes(x_range, y_range or _padded([y for _, y in points]))
    parts = [_frame(axes, title, x_label, percent)]
    for s in series:
        parts.append(_line(axes, s.points, f"line c{s.colour % NUM_COLOURS}" + (" faint" if smooth > 1 else "")))
        if smooth > 1:
            parts.append(_line(axes, trailing_mean(s.points, smooth), f"line c{s.colour % NUM_COLOURS}"))
        if dots or len(s.points) == 1:
            parts += [_dot(axes, point, s.colour, s.label) for point in s.points]
    return _svg(title, parts)


def bar_plot(
    title: str, bars: Mapping[str, Sequence[float]], *, x_label: str = "", colours: Sequence[int] = (1, 0)
) -> Markup:
    """Stacked bars: label → one height per colour."""
    if not bars:
        return nothing(title)
    axes = Axes((0, len(bars)), (0, _ticks(0, max(map(sum, bars.values())) or 1, 4)[-1]))
    parts = [_frame(axes, title, x_label, x_ticks=False)]
    every = math.ceil(len(bars) * (max(map(len, bars)) + 1) / 36)  # as many labels as have room side by side
    for i, (label, heights) in enumerate(bars.items()):
        base = 0.0
        for height, colour in zip(heights, colours, strict=False):
            (left, top), (right, bottom) = axes.at(i + 0.12, base + height), axes.at(i + 0.88, base)
            parts.append(_rect(left, top, right - left, bottom - top, f"fill c{colour}", f"{label}: {_short(height)}"))
            base += height
        if i % every == 0:
            parts.append(_text(axes.at(i + 0.5, 0)[0], HEIGHT - BOTTOM + 13, label, "middle"))
    return _svg(title, parts)


def scatter_plot(
    title: str, series: Sequence[Series], *, x_label: str, y_range: tuple[float, float], percent: bool = False
) -> Markup:
    points = [point for s in series for point in s.points]
    if not points:
        return nothing(title)
    axes = Axes(_padded([x for x, _ in points]), y_range)
    dots = [_dot(axes, point, s.colour, s.label) for s in series for point in s.points]
    return _svg(title, [_frame(axes, title, x_label, percent), *dots])


def heat_map(
    title: str,
    cells: Mapping[tuple[float, int], float],
    *,
    x_label: str,
    y_label: str,
    colour: int,
    overlay: Sequence[tuple[float, float]] = (),
) -> Markup:
    """(x, whole y) → value ≥ 0, drawn as opacity. `overlay` is a line on top of it, in the same coordinates."""
    if not cells:
        return nothing(title)
    xs, ys = [x for x, _ in cells], [y for _, y in cells]
    low, high = min(xs), max(xs) + 1
    width = max(1.0, math.ceil((high - low) / MOST_COLUMNS))
    joined: dict[tuple[int, int], float] = {}
    for (x, y), value in cells.items():
        joined[int((x - low) // width), y] = joined.get((int((x - low) // width), y), 0.0) + value
    brightest = max(joined.values()) or 1.0
    axes = Axes((low, high), (min(ys) - 0.5, max(ys) + 0.5))
    parts = [_frame(axes, title, x_label, y_ticks=sorted(set(ys)) if len(set(ys)) <= 10 else None, grid=False)]
    for (column, y), value in joined.items():
        if value > 0:
            (left, top), (right, bottom) = (
                axes.at(low + column * width, y + 0.5),
                axes.at(min(high, low + (column + 1) * width), y - 0.5),
            )
            opacity = f"{0.08 + 0.87 * value / brightest:.2f}"
            hint = f"{x_label} {low + column * width:g}, {y_label} {y}: {_short(value)}"
            parts.append(_rect(left, top, right - left, bottom - top, f"fill c{colour}", hint, opacity))
    if overlay:
        parts.append(_line(axes, [(x + 0.5, y) for x, y in overlay], "line ink"))
    return _svg(title, parts)


def interval(value: float, low: float, high: float, colour: int) -> Markup:
    """A point with its confidence interval on a scale from 0 to 1, as high as a line of text."""
    x, x_low, x_high = (4 + 112 * min(1.0, max(0.0, number)) for number in (value, low, high))
    return Markup(
        '<svg class="interval" viewBox="0 0 120 14" aria-hidden="true">'
        '<line class="axis" x1="4" x2="116" y1="7" y2="7"/>'
        f'<line class="span c{colour % NUM_COLOURS}" x1="{x_low:.1f}" x2="{x_high:.1f}" y1="7" y2="7"/>'
        f'<circle class="fill c{colour % NUM_COLOURS}" cx="{x:.1f}" cy="7" r="3.5"/></svg>'
    )


# --- the stage graph ----------------------------------------------------------------------------------------------

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 150, 72, 44, 24


@dataclass(frozen=True)
class Box:
    """One stage of the graph."""

    name: str
    lines: Sequence[str]  # at most two short lines under the name
    state: str  # a CSS class: done, cached, running, failed, waiting
    inputs: Sequence[str]  # names of other boxes


def stage_graph(boxes: Sequence[Box]) -> Markup:
    """Boxes in columns by their depth, arrows by inputs. An arrow that passes over a column runs below the boxes."""
    known = {box.name for box in boxes}
    depth: dict[str, int] = {}
    for box in boxes:  # a stage only names earlier ones, so one pass is enough
        depth[box.name] = 1 + max((depth.get(name, -1) for name in box.inputs if name in known), default=-1)
    rows: dict[int, int] = {}
    place: dict[str, tuple[float, float]] = {}
    for box in boxes:
        column = depth[box.name]
        row = rows[column] = rows.get(column, -1) + 1
        place[box.name] = 8 + column * (BOX_WIDTH + GAP_X), 8 + row * (BOX_HEIGHT + GAP_Y)
    below = 16 + (max(rows.values(), default=0) + 1) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    parts: list[str] = []
    longest = 0
    for box in boxes:
        x, y = place[box.name]
        for source in (name for name in box.inputs if name in place):
            from_x, from_y = place[source]
            span = depth[box.name] - depth[source]
            if span == 1:
                start, end = (from_x + BOX_WIDTH, from_y + BOX_HEIGHT / 2), (x - 3, y + BOX_HEIGHT / 2)
                bend = f"C{start[0] + GAP_X / 2},{start[1]} {end[0] - GAP_X / 2},{end[1]} {end[0]},{end[1]}"
            else:
                longest = max(longest, span)
                start = (from_x + BOX_WIDTH * 0.66, from_y + BOX_HEIGHT)
                end = (x + BOX_WIDTH * 0.44 - span * 12, y + BOX_HEIGHT + 3)
                deep = below + 14 * span
                bend = f"C{start[0]},{deep} {end[0]},{deep} {end[0]},{end[1]}"
            parts.append(f'<path class="edge" d="M{start[0]},{start[1]} {bend}" marker-end="url(#tip)"/>')
    for box in boxes:
        x, y = place[box.name]
        parts.append(
            f'<rect class="box {box.state}" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>'
        )
        parts.append(_text(x + 12, y + 23, box.name, "start", "name"))
        parts += [_text(x + 12, y + 41 + 17 * i, line, "start") for i, line in enumerate(box.lines)]
    width = 16 + (max(depth.values(), default=0) + 1) * (BOX_WIDTH + GAP_X) - GAP_X
    height = below + (14 * longest if longest else -8)
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0,0L8,4L0,8z"/></marker>'
    )
    return Markup(
        f'<svg class="graph" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Stage graph"><defs>{tip}</defs>{"".join(parts)}</svg>'
    )


# --- pieces -------------------------------------------------------------------------------------------------------


def nothing(title: str) -> Markup:
    """An empty plot that says so."""
    return _svg(
        title, [_text(LEFT, 15, title, "start", "title"), _text(WIDTH / 2, HEIGHT / 2, "not recorded", "middle")]
    )


def _svg(title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _frame(
    axes: Axes,
    title: str,
    x_label: str,
    percent: bool = False,
    *,
    x_ticks: bool = True,
    y_ticks: Sequence[float] | None = None,
    grid: bool = True,
) -> str:
    parts = [_text(8, 15, title, "start", "title")]
    heights = y_ticks or _ticks(*axes.y, 4)
    step = heights[1] - heights[0] if len(heights) > 1 else 1.0
    for y in heights:
        if axes.y[0] - 1e-12 <= y <= axes.y[1] + 1e-12:
            left, height = axes.at(axes.x[0], y)
            if grid:
                parts.append(
                    f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
                )
            parts.append(
                _text(left - 5, height + 3.5, f"{_short(y * 100, step * 100)}%" if percent else _short(y, step), "end")
            )
    if x_ticks:
        for x in _ticks(*axes.x, 5):
            if axes.x[0] <= x <= axes.x[1] and x == int(x) or axes.x[1] - axes.x[0] < 3:
                across = axes.at(x, axes.y[0])[0]
                if LEFT - 1 <= across <= WIDTH - RIGHT + 1:
                    parts.append(_text(across, HEIGHT - BOTTOM + 13, _short(x), "middle"))
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 5, x_label, "middle", "label"))
    return "".join(parts)


def _line(axes: Axes, points: Sequence[tuple[float, float]], css: str) -> str:
    path = " ".join("{:.1f},{:.1f}".format(*axes.at(*point)) for point in points)
    return f'<polyline class="{css}" points="{path}"/>'


def _dot(axes: Axes, point: tuple[float, float], colour: int, label: str) -> str:
    x, y = axes.at(*point)
    hint = escape(f"{label}: {_short(point[0])}, {_short(point[1])}")
    return (
        f'<circle class="fill c{colour % NUM_COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{hint}</title></circle>'
    )


def _rect(x: float, y: float, width: float, height: float, css: str, hint: str, opacity: str = "1") -> str:
    return (
        f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}" '
        f'fill-opacity="{opacity}"><title>{escape(hint)}</title></rect>'
    )


def _text(x: float, y: float, words: str, anchor: str, css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _short(number: float, step: float | None = None) -> str:
    """A number in few characters: 0.25, 12, 3.4k, 2e-05. `step`, the distance of two ticks, decides the decimals."""
    size = abs(number)
    if step is not None and size < 1000 and step >= PLAIN_NUMBERS[0] / 100 and max(size, step) >= PLAIN_NUMBERS[0]:
        return f"{number:.{_decimals(step)}f}"
    if size and not PLAIN_NUMBERS[0] <= size < PLAIN_NUMBERS[1]:
        return re.sub(r"e([+-])0?", r"e\1", f"{number:.1e}".replace(".0e", "e"))
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def _decimals(step: float) -> int:
    """Digits after the point that tell two ticks apart."""
    return next(
        digits for digits in range(12) if abs(round(step, digits) - step) < 1e-9 * max(1.0, step) or digits == 11
    )


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about so many."""
    rough = ((high - low) or 1.0) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def _around(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(numbers), max(numbers)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(numbers: Sequence[float]) -> tuple[float, float]:
    """A range that ends on round numbers."""
    low, high = min(numbers), max(numbers)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    ticks = _ticks(low, high, 4)
    return ticks[0], ticks[-1]


def trailing_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    means = []
    for i, (x, _) in enumerate(points):
        recent = points[max(0, i + 1 - window) : i + 1]
        means.append((x, sum(y for _, y in recent) / len(recent)))
    return means
