"""Search: Recall@k at every level; and the theory of search from coarse labels, on the rows that trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nestling.report.content import Content, shorten
from nestling.report.plots import INK, MUTED, NEUTRAL, PALETTE, WIDTH, canvas, legend, looks, place

PLOT = 2.3
GAP = 0.75


def retrieval(content: Content) -> Figure | None:
    """A line for each level: the share of rows that have one of their class among their k nearest others."""
    found: Mapping[str, Mapping[str, float]] = content.metrics.get("retrieval") or {}
    known = {level: shares for level, shares in found.items() if shares}
    if not known:
        return None
    figure = canvas(PLOT + 0.85)
    axes = place(figure, 0.65, 0.45, WIDTH - 1.9, PLOT)
    styles = looks([shorten(level, 24) for level in known])
    for look, shares in zip(styles.values(), known.values(), strict=True):
        ks, values = [int(k) for k in shares], [100 * float(share) for share in shares.values()]
        axes.plot(ks, values, color=look.colour, marker=look.marker, linewidth=look.width, markersize=5)
        axes.annotate(
            f"R@{ks[0]} {values[0]:.1f}", (ks[0], values[0]), xytext=(6, -10), textcoords="offset points",
            color=look.colour, fontsize=8,
        )  # fmt: skip
    ks = sorted({int(k) for shares in known.values() for k in shares})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(xlabel="k nearest others", ylabel="Recall@k (%)")
    axes.set_ylim(top=102)
    legend(figure, styles, 0.65, WIDTH - 1)
    return figure


def theory(content: Content) -> Figure | None:
    """Left Lemma 1's bound against the measured probability of the fine class, right the probabilities themselves."""
    rows = content.theory
    if not rows:
        return None
    figure = canvas(PLOT + 0.85)
    both = "measured" in rows
    width = (WIDTH - 0.8 - 2 * GAP) / 2
    left = 0.65
    if both:
        _bound(place(figure, left, 0.45, width, PLOT), np.asarray(rows["measured"]), np.asarray(rows["bound"]))
        left += width + GAP + 0.1
    names = {"alpha": "α among all rows", "within": "α within the coarse class", "beta": "β of the coarse class"}
    names = {key: name for key, name in names.items() if key in rows}
    axes = place(figure, left, 0.45, width if both else WIDTH - 1.4, PLOT)
    for (key, name), colour in zip(names.items(), PALETTE, strict=False):
        values = np.sort(np.asarray(rows[key], dtype=float))
        axes.plot(100 * np.arange(1, len(values) + 1) / len(values), values, color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="training rows, from the least probable (%)", ylabel="probability of what is right")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return figure


def _bound(axes: Axes, measured: np.ndarray, bound: np.ndarray) -> None:
    """A point for each row; none may lie above the diagonal."""
    least = 1e-6
    x, y = np.clip(measured, least, 1), np.clip(bound, least, 1)
    axes.plot([least, 1], [least, 1], color=NEUTRAL, linewidth=0.9)
    axes.scatter(x, y, s=5, color=PALETTE[0], alpha=0.35, linewidths=0, rasterized=True)
    axes.set(xscale="log", yscale="log", xlabel="measured Pr{fine class}", ylabel="Lemma 1's lower bound")
    axes.set_xlim(left=max(float(x.min()) / 2, least))
    axes.set_ylim(bottom=max(float(y.min()) / 2, least), top=1.5)
    axes.text(0.02, 0.95, "above the line it would be broken", transform=axes.transAxes, color=MUTED, fontsize=8)
    axes.tick_params(colors=INK)
