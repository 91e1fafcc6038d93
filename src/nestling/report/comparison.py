"""Figures that set methods side by side: differences with their intervals, and what distortions do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nestling.report.content import Content, main_method, plain, shorten
from nestling.report.plots import BETTER, INK, NEUTRAL, WIDTH, WORSE, canvas, legend, legend_rows, looks, place
from nestling.report.summary import (
    METRICS,
    at_level,
    condition_of,
    conditions,
    higher_is_better,
    level_names,
    method_entries,
    number,
    outcome,
)

ROW, PANELS = 0.3, 2
Row = tuple[str, str, str]
"""Baseline, level, condition."""
OUTCOMES = {"better": (BETTER, "o"), "worse": (WORSE, "X"), "open": (NEUTRAL, "D")}


def _row(comparison: Mapping[str, Any]) -> Row:
    return str(comparison["baseline"]), str(comparison.get("level") or ""), condition_of(comparison)


def _panel(axes: Axes, content: Content, comparisons: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> None:
    """One metric: a dot and an interval per row, its numbers to the right of the axes."""
    metric, ends = str(comparisons[0]["metric"]), [0.0]
    scale, unit, digits = (1.0, "edges", 2) if "distance" in metric else (100.0, "percentage points", 1)
    for comparison in comparisons:
        y = rows.index(_row(comparison))
        middle, low, high = (scale * value for value in (comparison["difference"], *comparison["interval"]))
        colour, marker = OUTCOMES[outcome(content, comparison)]
        axes.plot([low, high], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot([middle], [y], marker=marker, color=colour, markersize=7.5, markeredgecolor="white")
        text = f"{middle:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]".replace("-", "−")
        axes.annotate(text, (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", fontsize=8, color=INK)  # fmt: skip
        ends += [low, high]
    pad = 0.08 * (max(ends) - min(ends)) or 1.0
    axes.axvline(0, color=INK, linewidth=1)
    axes.set(xlim=(min(ends) - pad, max(ends) + pad), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)))
    axes.grid(axis="y", visible=False)
    for k in range(1, len(rows)):
        if rows[k][0] != rows[k - 1][0]:
            axes.axhline(k - 0.5, color=NEUTRAL, linewidth=0.6, linestyle=":")
    way = "" if metric == "overconfidence" else f" ({'right' if higher_is_better(metric) else 'left'} is better)"
    axes.set_title(METRICS.get(metric, plain(metric)) + way)
    axes.set_xlabel(f"{shorten(main_method(content), 24)} minus baseline ({unit})")


def forest(content: Content) -> Figure | None:
    """Difference between the main method and each baseline: a dot, its interval, and the line of no difference."""
    comparisons = content.metrics.get("comparisons") or []
    if not comparisons:
        return None
    metrics = list(dict.fromkeys(str(c["metric"]) for c in comparisons))
    baselines = list(dict.fromkeys(_row(c)[0] for c in comparisons))
    bands: list[tuple[list[str], list[Row]]] = []
    for metric in metrics:
        rows = list(dict.fromkeys(_row(c) for c in comparisons if c["metric"] == metric))
        rows.sort(key=lambda row: (baselines.index(row[0]), row[2] != "clean", row[2]))
        beside = next((shown for shown, theirs in bands if theirs == rows and len(shown) < PANELS), None)
        if beside is None:
            bands.append(([metric], rows))
        else:
            beside.append(metric)
    labels = {
        row: shorten(" · ".join(x for x in row if x not in ("", "clean")), 44) for _, rows in bands for row in rows
    }
    left = min(0.35 + 0.074 * max(map(len, labels.values())), 3.4)
    numbers, gap, frame = 1.45, 0.12, 0.95
    bottom = sum(ROW * len(rows) + frame for _, rows in bands)
    figure = canvas(bottom)
    for shown, rows in bands:
        bottom -= ROW * len(rows) + frame
        width = (WIDTH - left - gap * (len(shown) - 1)) / len(shown) - numbers
        for i, metric in enumerate(shown):
            axes = place(figure, left + i * (width + numbers + gap), bottom + 0.5, width, ROW * len(rows))
            _panel(axes, content, [c for c in comparisons if c["metric"] == metric], rows)
            axes.set_yticklabels([labels[row] for row in rows] if i == 0 else [])
    return figure


def _dots(figure: Figure, content: Content, key: str, title: str, label: str, box: Sequence[float]) -> None:
    finest = level_names(content)[-1]
    under = conditions(content)
    methods = looks(list(method_entries(content)))
    axes = place(figure, *box)
    step = min(0.8 / len(methods), 0.16)
    for i, (method, look) in enumerate(methods.items()):
        x = np.arange(len(under)) + (i - (len(methods) - 1) / 2) * step
        entries = [at_level(found.get(method, {}), finest) for found in under.values()]
        y = 100 * np.array([number(entry, key) for entry in entries])
        spread = 100 * np.nan_to_num([number(entry.get("std") or {}, key) for entry in entries])
        axes.errorbar(x, y, yerr=spread if spread.any() else None, fmt=look.marker, color=look.colour, markersize=6,
                      elinewidth=1.4, capsize=2.5)  # fmt: skip
    for edge in np.arange(len(under) - 1) + 0.5:
        axes.axvline(edge, color=NEUTRAL, linewidth=0.6, linestyle=":")
    crowded = max(len(name) for name in under) * 0.075 * len(under) > box[2]
    axes.set(xlim=(-0.5, len(under) - 0.5), xticks=range(len(under)), ylabel=label, xlabel="condition of the test rows")
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticklabels([shorten(name, 24) for name in under], **turned)
    axes.grid(axis="x", visible=False)
    axes.set_title(title)
    if key == "overconfidence":
        axes.axhline(0, color=INK, linewidth=1)
    else:
        axes.set_ylim(max(axes.get_ylim()[0], -1), min(axes.get_ylim()[1], 101))


def distortions(content: Content) -> Figure | None:
    """Accuracy and overconfidence at the finest level, clean and under each distortion; bars: one std over seeds."""
    under = conditions(content)
    if len(under) < 2 or not level_names(content):
        return None
    methods = looks(list(method_entries(content)))
    panel = (WIDTH - 0.7 - 0.9) / 2
    crowded = max(len(name) for name in under) * 0.075 * len(under) > panel
    head = 0.22 * legend_rows(list(methods), WIDTH - 0.7)[1] + 0.42
    foot = 0.95 if crowded else 0.5
    figure = canvas(head + 2.7 + foot)
    legend(figure, methods, 0.7, WIDTH - 0.7)
    finest = plain(level_names(content)[-1])
    box = (0.7, foot, panel, 2.7)
    _dots(figure, content, "accuracy", f"Accuracy, {finest} (higher is better)", "accuracy (%)", box)
    box = (0.7 + panel + 0.85, *box[1:])
    title = f"Overconfidence, {finest} (nearer to 0 is better)"
    _dots(figure, content, "overconfidence", title, "confidence − accuracy (points)", box)
    return figure
