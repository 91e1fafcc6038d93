"""Concepts: their weights over the epochs, and how every method fares on each (robust training, Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nestling.report.content import Content, main_method, shorten
from nestling.report.plots import NEUTRAL, PALETTE, WIDTH, canvas, legend, looks, place

NAMED = 8
"""Concepts that get a colour and a name: those whose weight moves most; the others are grey."""
PLOT = 2.3


def concepts(content: Content) -> Figure | None:
    """Left the weight of each concept over the epochs, right the sorted accuracies of every method."""
    entries = {main_method(content): content.metrics, **(content.metrics.get("methods") or {})}
    scores = {
        name: found for name, entry in entries.items() if (found := (entry.get("concepts") or {}).get("accuracy"))
    }
    if not content.concept_weights and not scores:
        return None
    left, gap = 0.65, 0.9
    width = (WIDTH - left - 0.1 - gap) / 2
    figure = canvas(PLOT + 1.25)
    if content.concept_weights:
        _weights(place(figure, left, 0.5, width, PLOT), content.concept_weights)
    if scores:
        _accuracies(place(figure, left + width + gap, 0.5, width, PLOT), scores)
        legend(figure, looks(list(scores)), left + width + gap, width)
    return figure


def _weights(axes: Axes, weights: Mapping[str, Sequence[float]]) -> None:
    """One line per concept, against the epoch."""
    moved = sorted(weights, key=lambda name: -float(np.ptp(weights[name])))
    for name in reversed(moved):
        number = moved.index(name)
        named = number < NAMED
        style = {"color": PALETTE[number] if named else NEUTRAL, "linewidth": 1.6 if named else 0.7}
        label = shorten(name, 20) if named else None
        values = 100 * np.asarray(weights[name])
        axes.plot(np.arange(1, len(values) + 1), values, label=label, marker="." if len(values) < 3 else "", **style)
    axes.set(xlabel="epoch", ylabel="weight of the concept (%)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, borderaxespad=0.2)


def _accuracies(axes: Axes, scores: dict[str, dict[str, float]]) -> None:
    """Figure 5: each method's accuracies in ascending order."""
    for name, look in looks(list(scores)).items():
        values = 100 * np.sort(list(scores[name].values()))
        axes.plot(
            np.arange(1, len(values) + 1), values, color=look.colour, marker=look.marker, linewidth=look.width,
            markersize=4,
        )  # fmt: skip
    axes.set(xlabel="concepts, from the least accurate", ylabel="accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
