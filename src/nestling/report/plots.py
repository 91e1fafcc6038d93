"""The look of every figure, and how a figure becomes a data URI.

Matplotlib's object interface alone, without pyplot's list of open figures; SVG with text as text; the colours of Okabe
and Ito, told apart by colour-blind readers, and a marker of its own for every method.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nestling.report.content import shorten

WIDTH = 10.4
"""Inches; 1,000 CSS pixels, so that a point of font size is 1.33 pixels in the page."""

INK, MUTED, GRID, NEUTRAL = "#1f2933", "#52606d", "#d9dee5", "#8a94a0"
BETTER, WORSE = "#0072B2", "#D55E00"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7B5EA7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": NEUTRAL,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "nestling",
    "text.parse_math": False,  # a class may be called "$x"
    "text.usetex": False,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, in every figure and in the tables."""

    colour: str
    marker: str
    width: float


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A look per method; the first is the main one."""
    return {
        name: Look(PALETTE[i % len(PALETTE)], MARKERS[(i + i // len(PALETTE)) % len(MARKERS)], 2.2 if i == 0 else 1.3)
        for i, name in enumerate(methods)
    }


@contextmanager
def styled() -> Iterator[None]:
    """The style, for building *and* saving; names in scripts that the layout font lacks are drawn by the browser."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(height: float, width: float = WIDTH) -> Figure:
    """An empty white figure; sizes in inches."""
    return Figure(figsize=(width, height), facecolor="white")


def logarithmic(axes: Axes, *which: str) -> None:
    """A logarithmic x or y axis, whose ticks are plain numbers: the style's texts are not read as formulas."""
    for name in which:
        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _, axis=axis: f"{value:g}" if _within_a_decade(axis) else "")


def _within_a_decade(axis: Axis) -> bool:
    """Whether fewer than two powers of ten are in view, so that the ticks between have to be named."""
    low, high = sorted(axis.get_view_interval())
    return sum(bool(low <= tick <= high) for tick in axis.get_majorticklocs()) < 2


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches: nothing has to be laid out again, which costs seconds."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


def legend_rows(names: Sequence[str], width: float) -> tuple[int, int]:
    """(columns, rows) of a legend of these names in ``width`` inches."""
    each = [0.55 + 0.08 * len(name) for name in names]
    columns = len(names) if sum(each) <= width else max(1, int(width / max(each)))
    return columns, -(-len(names) // columns)


def legend(figure: Figure, looks: Mapping[str, Look], left: float, width: float, top: float = 0.03) -> None:
    """Which line is which method, at the top of the figure; its height is 0.22 inches a row of ``legend_rows``."""
    names = [shorten(name, 32) for name in looks]
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linewidth=look.width, markersize=5, label=name)
        for name, look in zip(names, looks.values(), strict=True)
    ]
    w, h = figure.get_size_inches()
    columns, _ = legend_rows(names, width)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left / w, 1 - top / h), ncols=columns, borderaxespad=0,
        borderpad=0, columnspacing=1.6, handlelength=1.8, labelspacing=0.35,
    )  # fmt: skip


def svg_uri(figure: Figure) -> str:
    """The figure as ``data:image/svg+xml;base64,…``; used in ``<img>``, where its ids cannot clash with another's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
