"""The report's panel on the routers of a mixture of experts: load, agreement and drift over a stage's steps.

Called by `pipeline/report.py` with the rows of `steps.jsonl` or `losses.jsonl`, whose keys `model/router_gauges.py`
explains.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline import plots
from pipeline.plots import Series
from pipeline.run_reader import Row

LAYER = re.compile(r"router/layer(\d+)/\w+")
SHARE: dict[str, Any] = {"y_range": (0, 1), "percent": True}
GAUGES: list[tuple[str, str, dict[str, Any]]] = [
    ("max_vio", "busiest expert over the mean, − 1", {}),
    ("load_entropy", "evenness of the load (entropy)", SHARE),
    ("dead_share", "experts with next to no token", SHARE),
    ("drift", "drift since the start (JS, nats)", {}),
    ("moved", "tokens that changed their expert", SHARE),
    ("agreement", "agreement with the engine's routes", SHARE),
]


def router_panel(rows: Sequence[Row]) -> Row | None:
    """A plot per gauge with a line per MoE layer; of many layers the worst only. None where nothing was recorded."""
    layers = sorted({int(found[1]) for row in rows[-1:] for key in row if (found := LAYER.fullmatch(key))})
    if not layers:
        return None
    lines = [(f"layer {layer}", f"router/layer{layer}/") for layer in layers]
    if len(lines) > plots.NUM_COLOURS - 1:
        lines = [(f"the worst of {len(layers)} layers", "router/")]
    figures = []
    for gauge, title, options in GAUGES:
        series = [
            Series(label, [(row["step"], row[prefix + gauge]) for row in rows if prefix + gauge in row], 1 + i)
            for i, (label, prefix) in enumerate(lines)
        ]
        if any(line.points for line in series):
            figures.append(plots.line_plot(title, series, x_label="step", **options))
    return {"figures": figures, "legend": [(label, 1 + i) for i, (label, _) in enumerate(lines)]}
