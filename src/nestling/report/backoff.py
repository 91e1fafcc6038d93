"""Back-off: how deep the answers go at which error rate, and where each guaranteed risk comes to lie."""

from __future__ import annotations

from matplotlib.figure import Figure

from nestling.report.content import Content
from nestling.report.plots import INK, NEUTRAL, PALETTE, WIDTH, canvas, place

PLOT = 2.6


def backoff(content: Content) -> Figure | None:
    """Left the error rate against the mean depth of the answers, right against the share of rows answered."""
    found = content.metrics.get("backoff") or {}
    points = found.get("curve") or {}
    if not points.get("error"):
        return None
    left, gap = 0.65, 0.7
    width = (WIDTH - left - 0.1 - gap) / 2
    figure = canvas(PLOT + 0.75)
    named = {"fixed": [found["fixed"]], **{name: found[name] for name in ("ltt", "crc")}}
    for number, (key, title, scale) in enumerate(
        (("depth", "levels answered, on average", 1), ("answered", "rows answered (%)", 100))
    ):
        axes = place(figure, left + number * (width + gap), 0.5, width, PLOT)
        axes.plot([scale * x for x in points[key]], [100 * y for y in points["error"]], color=INK, linewidth=1.6)
        for (name, entries), colour, marker in zip(named.items(), (NEUTRAL, *PALETTE), "Dos", strict=False):
            shown = [entry for entry in entries if entry.get("error") is not None]
            axes.plot(
                [scale * entry[key] for entry in shown], [100 * entry["error"] for entry in shown],
                marker, color=colour, markersize=6, label=LABELS[name],
            )  # fmt: skip
        axes.set(xlabel=title, ylabel="wrong answers (%)" if number == 0 else "")
        axes.set_ylim(bottom=0)
        if number == 0:
            axes.legend(loc="upper left")
    return figure


LABELS = {"fixed": "confidence of at least 90 %", "ltt": "risk guaranteed (ltt)", "crc": "risk on average (crc)"}
