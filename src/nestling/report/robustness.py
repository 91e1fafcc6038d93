"""The robustness curve: how every level of the main method fares as a distortion becomes stronger."""

from __future__ import annotations

from matplotlib.figure import Figure

from nestling.report.content import Content, main_method, plain
from nestling.report.plots import INK, WIDTH, canvas, legend, legend_rows, looks, place
from nestling.report.summary import at_level, conditions, level_names, number

HEIGHT, LEAST = 2.6, 2
"""Inches; strengths of one kind below which there is no curve."""


def strengths(names: list[str]) -> dict[str, dict[str, float]]:
    """Distortions by kind, each with its last number: ``turbulence:2,1`` is of kind ``turbulence:2,·`` and 1."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        before, separator, last = name.rpartition("," if "," in name else ":")
        try:
            strength = float(last)
        except ValueError:
            continue
        if separator:
            found.setdefault(f"{before}{separator}·", {})[name] = strength
    return found


def robustness(content: Content) -> Figure | None:
    """Accuracy and overconfidence of each level against the strength of the kind with most strengths; clean is 0."""
    under, levels, main = conditions(content), level_names(content), main_method(content)
    kind, points = max(strengths(list(under)).items(), key=lambda item: len(item[1]), default=("", {}))
    if len(points) < LEAST or not levels or "clean" not in under:
        return None
    ordered = {"clean": 0.0, **dict(sorted(points.items(), key=lambda item: item[1]))}
    styles = looks([plain(level) for level in levels])
    head, panel = 0.22 * legend_rows(list(styles), WIDTH - 0.7)[1] + 0.42, (WIDTH - 0.7 - 0.9) / 2
    figure = canvas(head + HEIGHT + 0.5)
    legend(figure, styles, 0.7, WIDTH - 0.7)
    for side, (key, label) in enumerate((("accuracy", "accuracy (%)"), ("overconfidence", "overconfidence (points)"))):
        axes = place(figure, 0.7 + side * (panel + 0.85), 0.5, panel, HEIGHT)
        for level, look in zip(levels, styles.values(), strict=True):
            values = [100 * number(at_level(under[name].get(main, {}), level), key) for name in ordered]
            axes.plot(list(ordered.values()), values, color=look.colour, marker=look.marker, markersize=5)
        axes.set(xlabel=f"strength of {kind}, 0 is clean", ylabel=label)
        if key == "overconfidence":
            axes.axhline(0, color=INK, linewidth=1)
    return figure
