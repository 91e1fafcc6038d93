"""A sweep as a figure: the score of every trial against each field that was searched."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from nestling.report.plots import BETTER, NEUTRAL, WIDTH, canvas, logarithmic, place, styled

PANEL, HEIGHT, ACROSS = 2.65, 2.2, 3


def draw(result: Mapping[str, Any], dpi: int = 110) -> bytes:
    """The content of a sweep.json as PNG; the best trial stands out."""
    known = [trial for trial in result["trials"] if trial["value"] is not None]
    best = result["best"]
    names = list(best["fields"])
    down = -(-len(names) // ACROSS)
    with styled():
        figure = canvas(0.3 + down * (HEIGHT + 0.5), WIDTH)
        for number, name in enumerate(names):
            left = 0.7 + (number % ACROSS) * (PANEL + 0.6)
            bottom = 0.5 + (down - 1 - number // ACROSS) * (HEIGHT + 0.5)
            axes = place(figure, left, bottom, PANEL, HEIGHT - 0.2)
            axes.plot([t["fields"][name] for t in known], [t["value"] for t in known], "o", color=NEUTRAL, markersize=4)
            axes.plot([best["fields"][name]], [best["value"]], "*", color=BETTER, markersize=12)
            logarithmic(axes, "x")
            axes.set(xlabel=name, ylabel=result["metric"] if number % ACROSS == 0 else "")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
