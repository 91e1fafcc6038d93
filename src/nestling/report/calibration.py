"""Reliability diagrams: is a confidence of 80 % right in 80 % of the cases?"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nestling.report.content import Content, main_method, shorten
from nestling.report.plots import INK, NEUTRAL, WIDTH, Look, canvas, legend, legend_rows, looks, place
from nestling.report.summary import method_entries

BINS, FEW, ACROSS = 10, 10, 4
Rows = dict[str, tuple[np.ndarray, np.ndarray]]
"""Method -> (confidence, correct) per test row."""


def binned(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean confidence, accuracy, number of rows) per equal-width bin (lo, hi]; NaN in empty bins."""
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_of, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(bin_of, weights=correct, minlength=bins) / count
    return mean, accuracy, count


def _level(upper: Axes, lower: Axes, rows: Rows, methods: dict[str, Look]) -> int:
    """Draw one level; the largest number of rows in a bin is returned."""
    upper.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle="--")
    edges = np.linspace(0, 100, BINS + 1)
    top = 1
    for method, (confidence, correct) in reversed(rows.items()):
        look = methods[method]
        mean, accuracy, count = binned(confidence, correct)
        many = count >= FEW
        upper.plot(100 * mean[many], 100 * accuracy[many], color=look.colour, linewidth=look.width)
        upper.plot(100 * mean[many], 100 * accuracy[many], look.marker, color=look.colour, markersize=5)
        upper.plot(100 * mean[~many], 100 * accuracy[~many], look.marker, color=look.colour, markersize=4,
                   markerfacecolor="white", alpha=0.7)  # fmt: skip
        lower.stairs(np.maximum(count, 0.5), edges, baseline=0.5, color=look.colour, linewidth=look.width * 0.8)
        top = max(top, int(count.max()))
    ticks = range(0, 101, 20)
    upper.set(xlim=(-2, 102), ylim=(-2, 102), xticks=ticks, yticks=ticks)
    upper.set_xticklabels([])
    lower.set(xlim=(-2, 102), xticks=ticks, xlabel="confidence (%)")
    return top


def reliability(content: Content) -> Figure | None:
    """Accuracy against confidence for every level and method; beneath, how many test rows are in each bin."""
    order = looks(list(method_entries(content)))
    found = {m: v for m, v in content.reliability.items() if any(len(rows[0]) for rows in v.values())}
    if not found:
        return None
    methods = order | {m: look for m, look in looks([*order, *found]).items() if m not in order}
    methods = {m: look for m, look in methods.items() if m in found}
    first = found.get(main_method(content)) or next(iter(found.values()))
    levels = list(first)
    across = min(len(levels), ACROSS)
    down = -(-len(levels) // across)
    gap, left = 0.38, 0.72
    side = min((WIDTH - left - 0.1 - gap * (across - 1)) / across, 3.4)
    histogram = 0.8
    block = 0.34 + side + 0.12 + histogram + 0.5
    span = across * side + (across - 1) * gap
    head = 0.22 * legend_rows(list(methods), WIDTH - left)[1] + 0.1
    figure = canvas(head + down * block, WIDTH)
    start = max(left, (WIDTH - span) / 2)
    legend(figure, methods, start if len(methods) == 1 else left, WIDTH - left)
    top, histograms = 1, []
    for i, level in enumerate(levels):
        x = start + (i % across) * (side + gap)
        y = (down - 1 - i // across) * block + 0.5
        lower = place(figure, x, y, side, histogram)
        upper = place(figure, x, y + histogram + 0.12, side, side)
        rows = {m: found[m][level] for m in methods if level in found[m] and len(found[m][level][0])}
        top = max(top, _level(upper, lower, rows, methods))
        histograms.append(lower)
        upper.set_title(shorten(level, 30))
        if i % across == 0:
            upper.set_ylabel("accuracy (%)")
            lower.set_ylabel("rows (log)")
        if i == 0:
            upper.text(4, 90, "too cautious", color=NEUTRAL, fontsize=8)
            upper.text(98, 4, "overconfident", color=NEUTRAL, fontsize=8, ha="right")
    for i, axes in enumerate(histograms):
        axes.set(yscale="log", ylim=(0.5, 2 * top), yticks=[10**k for k in range(len(str(top)))])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.tick_params(axis="y", labelleft=i % across == 0)
        axes.minorticks_off()
    return figure
