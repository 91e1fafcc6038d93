"""Training curves: loss and validation accuracy over the epochs, the stages shaded and named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nestling.report.content import Content, Curve, main_method, plain, shorten
from nestling.report.plots import INK, MUTED, PALETTE, WIDTH, canvas, place
from nestling.report.summary import level_names

MAX_METHODS, PLOT = 8, 1.75
SHADES = ("#f1f4f8", "#dfe6ee")
Segment = tuple[str, list[int], float]
"""A stage of one run: its name, the positions of its epochs, and the epoch count before its first one."""
Points = dict[tuple[int, float], float]
"""(number of the stage, epoch within it) -> value."""


def segments(curve: Curve) -> list[Segment]:
    """The stages of one run, in order; its epochs may be counted over all stages or anew in each."""
    found: list[Segment] = []
    for i in range(min(len(curve.epochs), len(curve.stage_of_epoch), len(curve.loss))):
        name, epoch = plain(curve.stage_of_epoch[i]), float(curve.epochs[i])
        if found and found[-1][0] == name:
            found[-1][1].append(i)
            continue
        previous = float(curve.epochs[i - 1]) if i else epoch
        goes_on = previous < epoch
        found.append((name, [i], previous if goes_on else min(epoch - 1.0, 0.0)))
    return found


def _points(run: Curve, values: Sequence[float | None]) -> Points:
    found = {}
    for k, (_, positions, before) in enumerate(segments(run)):
        for i in positions:
            value = values[i] if i < len(values) else None
            if value is not None and np.isfinite(value):
                found[k, float(run.epochs[i]) - before] = float(value)
    return found


def _line(points: Points, starts: np.ndarray, scale: float) -> tuple[list[float], list[float]]:
    """Coordinates, with a gap between stages: no line may join the losses of two objectives."""
    x, y, before = [], [], None
    for (k, epoch), value in sorted(points.items()):
        if before is not None and k != before:
            x.append(np.nan)
            y.append(np.nan)
        x.append(starts[k] + epoch)
        y.append(scale * value)
        before = k
    return x, y


def _draw(axes: Axes, runs: Sequence[Curve], starts: np.ndarray, name: str, colour: str, dashed: bool) -> None:
    """One metric: every seed as a faint line, over them the mean where all seeds were still training."""
    scale = 1.0 if is_loss(name) else 100.0
    lines = [_points(run, run.loss if name == "loss" else run.metrics.get(name) or ()) for run in runs]
    lines = [points for points in lines if points]
    style: dict[str, Any] = {"color": colour, "linestyle": "--" if dashed else "-"}
    for points in lines if len(lines) > 1 else ():
        axes.plot(*_line(points, starts, scale), linewidth=0.8, alpha=0.4, **style)
    common = [key for key in (lines[0] if lines else ()) if all(key in points for points in lines)]
    mean = {key: float(np.mean([points[key] for points in lines])) for key in common}
    axes.plot(*_line(mean, starts, scale), linewidth=1.8, marker="." if len(mean) < 3 else "", **style)


def is_loss(name: str) -> bool:
    """Whether a metric shares the axes of the loss."""
    return re.search(r"\b(loss|nll)\b", name) is not None


def _level_of(name: str, levels: Sequence[str]) -> str:
    longest_first = sorted(levels, key=len, reverse=True)
    return next((level for level in longest_first if re.search(rf"(?<!\w){re.escape(level)}(?!\w)", name)), "")


def _looks(names: Sequence[str], levels: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """Metric -> (label, colour, dashed); levels run from light (coarse) to dark (fine)."""
    steps = 0.25 + 0.75 * np.arange(len(levels)) / max(len(levels) - 1, 1)
    shades = {level: to_hex(colormaps["viridis_r"](step)) for level, step in zip(levels, steps)}
    if len(levels) <= 3:
        shades = dict(zip(levels, (PALETTE[5], PALETTE[0], INK)[3 - len(levels) :], strict=True))
    found = {"loss": ("training loss", PALETTE[1], False)}
    others = iter(PALETTE[2:] * len(names))
    for name in names:
        level = _level_of(name, levels)
        label = plain(name) if is_loss(name) or not level else level
        label = plain(name) if label in {x[0] for x in found.values()} else label
        found[name] = (label, shades[level] if level else PALETTE[0] if is_loss(name) else next(others), is_loss(name))
    return found


def _shade(axes: Axes, names: Sequence[str], starts: np.ndarray) -> str:
    """Shade and name the stages; too narrow ones are numbered, and the key to the numbers is returned."""
    inches = axes.get_position().width * WIDTH / max(starts[-1], 1e-9)
    fits = all(len(name) * 0.075 < (b - a) * inches for name, a, b in zip(names, starts[:-1], starts[1:], strict=True))
    for k, (name, a, b) in enumerate(zip(names, starts[:-1], starts[1:], strict=True)):
        axes.axvspan(a, b, color=SHADES[k % 2], linewidth=0, zorder=0)
        if fits or (b - a) * inches > 0.15:
            axes.annotate(name if fits else str(k + 1), ((a + b) / 2, 1), (0, 3), xycoords=("data", "axes fraction"),
                          textcoords="offset points", ha="center", fontsize=8, color=MUTED)  # fmt: skip
    axes.set_xlim(0, max(starts[-1], 1e-9))
    axes.grid(axis="x", visible=False)
    return "" if fits else "stages: " + ", ".join(f"{k + 1} {name}" for k, name in enumerate(names))


def line_up(runs: Sequence[Curve]) -> tuple[list[str], np.ndarray]:
    """(names, where each stage starts and the last ends): as long as the longest run, so that seeds line up."""
    found = [[(name, float(run.epochs[at[-1]]) - before) for name, at, before in segments(run)] for run in runs]
    longest = max(found, key=len, default=[])
    lengths = [max(run[k][1] for run in found if k < len(run)) for k in range(len(longest))]
    return [name for name, _ in longest], np.concatenate([[0.0], np.cumsum(lengths)])


def training(content: Content) -> Figure | None:
    """One row per method: loss on the left, validation accuracy per level on the right."""
    runs: dict[str, list[Curve]] = {}
    for curve in sorted(content.curves, key=lambda c: c.method != main_method(content)):
        if segments(curve):
            runs.setdefault(curve.method, []).append(curve)
    runs = dict(list(runs.items())[:MAX_METHODS])
    if not runs:
        return None
    names = list(dict.fromkeys(name for group in runs.values() for run in group for name in run.metrics))
    looks = _looks(names, content.taxonomy.levels if content.taxonomy else level_names(content))
    rates = [name for name in names if not is_loss(name)]
    block, head, left, gap = 0.5 + PLOT + 0.5, 0.3, 0.65, 0.8
    width = (WIDTH - left - 0.1 - gap) / 2
    figure = canvas(head + block * len(runs))
    for shown, x in (([n for n in looks if is_loss(n)], left), (rates, left + width + gap)):
        _key(figure, {name: looks[name] for name in shown}, x, width)
    right: list[Axes] = []
    for i, (method, group) in enumerate(runs.items()):
        stages, starts = line_up(group)
        y = (len(runs) - 1 - i) * block + 0.5
        for shown, x, label in (
            ([n for n in looks if is_loss(n)], left, "loss (nats)"),
            (rates, left + width + gap, "validation accuracy (%)"),
        ):
            if not shown:
                continue
            axes = place(figure, x, y, width, PLOT)
            key = _shade(axes, [shorten(stage, 24) for stage in stages], starts)
            for name in shown:
                _draw(axes, group, starts, name, *looks[name][1:])
            axes.set(xlabel="epoch", ylabel=label)
            if x == left:
                axes.set_title(shorten(method, 40), pad=17)
                figure.text((x + width) / WIDTH, (y + PLOT + 0.26) / figure.get_figheight(), shorten(key, 92),
                            fontsize=8, color=MUTED)  # fmt: skip
            right += [axes] if x > left else []
    lowest = min((axes.get_ylim()[0] for axes in right), default=0.0)
    for axes in right:
        axes.set_ylim(lowest, 101)
    return figure


def _key(figure: Figure, looks: Mapping[str, tuple[str, str, bool]], left: float, width: float) -> None:
    handles = [
        Line2D([], [], color=colour, linestyle="--" if dashed else "-", linewidth=1.8, label=shorten(label, 24))
        for label, colour, dashed in looks.values()
    ]
    w, h = figure.get_size_inches()
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left / w, 1 - 0.03 / h), ncols=max(len(handles), 1),
        borderaxespad=0, borderpad=0, columnspacing=1.4, handlelength=1.8,
    )  # fmt: skip
