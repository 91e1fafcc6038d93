"""A table as a figure: lines where columns lie on an axis (layers, steps), else points beside the paper's."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from nestling.report.plots import MUTED, WIDTH, Look, canvas, legend, legend_rows, logarithmic, looks, place, styled
from nestling.reproduce.result import unit_of
from nestling.reproduce.table import Table, on_axis

PANEL, GAP, HEIGHT = 2.65, 0.6, 2.2
MOST_TICKS = 10
LETTERS = 40
"""Of a title on one line."""
SPREAD = 100
"""Times the least place, from which on an axis is logarithmic."""
APART = 0.1
"""Of the axis, at least, two ticks: nearer ones would overlap."""
Entry = dict[str, Any]


def sets_of(rows: Iterable[str]) -> tuple[str, ...]:
    """The sets of rows such as ``mnist: nested``, where there are several; of other rows none."""
    sets = dict.fromkeys(row.partition(": ")[0] if ": " in row else "" for row in rows)
    return tuple(sets) if len(sets) > 1 and "" not in sets else ()


def named(row: str, sets: tuple[str, ...]) -> str:
    """What a row is called in the legend: without its set, where there are several."""
    return row.partition(": ")[2] if sets else row


def panels_of(result: dict[str, Any], drawn: str = "") -> dict[tuple[str, str | None], list[Entry]]:
    """Entries by panel: (title, axis); of several sets a panel of lines each.

    A number that one row of several has compares nothing, and has no panel; nor has a column without the pattern
    ``drawn``.
    """
    sets = sets_of(entry["row"] for entry in result["table"])
    found: dict[tuple[str, str | None], list[Entry]] = {}
    for entry in result["table"]:
        if re.search(drawn, entry["column"]) is None:
            continue
        known = on_axis(entry["column"])
        title = f"{entry['row'].partition(': ')[0]}: " if known and sets else ""
        key = (title + (known[0] or "accuracy"), known[1]) if known else (entry["column"], None)
        if entry["mean"] is not None or not known:
            found.setdefault(key, []).append(entry)
    alone = len({entry["row"] for entry in result["table"]}) == 1
    return {key: some for key, some in found.items() if alone or key[1] or len({entry["row"] for entry in some}) > 1}


def draw(table: Table, result: dict[str, Any], dpi: int = 110) -> bytes:
    """The figure as PNG."""
    panels = panels_of(result, table.drawn)
    rows = list(dict.fromkeys(e["row"] for e in result["table"]))
    sets = sets_of(rows)
    styles = looks(list(dict.fromkeys(named(row, sets) for row in rows)))
    across = 3
    down = -(-len(panels) // across)
    top = 0.22 * legend_rows(list(styles), WIDTH - 1)[1] + 0.1
    with styled():
        figure = canvas(top + down * (HEIGHT + GAP))
        for number, ((title, axis), entries) in enumerate(panels.items()):
            left = GAP + (number % across) * (PANEL + GAP)
            bottom = 0.45 + (down - 1 - number // across) * (HEIGHT + GAP)
            axes = place(figure, left, bottom, PANEL, HEIGHT - 0.2)
            divisor, _, unit = unit_of(table, entries[0]["column"])
            axes.set_title(fill(f"{title}, {unit}" if unit else title, LETTERS), pad=4)
            axes.ticklabel_format(axis="y", useOffset=False)
            looked = {row: styles[named(row, sets)] for row in dict.fromkeys(e["row"] for e in entries)}
            if axis is None:
                points(axes, entries, looked, divisor, sets)
            else:
                lines(axes, entries, looked, divisor, axis)
        legend(figure, styles, 0.4, WIDTH - 1)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def lines(axes: Axes, entries: list[Entry], styles: dict[str, Look], divisor: float, axis: str) -> None:
    """A line per row, the deviation over seeds as bars, the paper's numbers dotted."""
    for row, look in styles.items():
        mine = sorted((e for e in entries if e["row"] == row), key=lambda e: depth(e["column"]))
        known = [e for e in mine if e["mean"] is not None]
        axes.errorbar(
            [depth(e["column"]) for e in known],
            [e["mean"] / divisor for e in known],
            yerr=[(e["std"] or 0) / divisor for e in known],
            color=look.colour, marker=look.marker, linewidth=look.width, markersize=4, capsize=2,
        )  # fmt: skip
        printed = [e for e in mine if e["paper"] is not None]
        axes.plot(
            [depth(e["column"]) for e in printed], [e["paper"] / divisor for e in printed], ":", color=look.colour
        )
    where = sorted({depth(e["column"]) for e in entries})
    if where[0] > 0 and where[-1] >= SPREAD * where[0]:
        logarithmic(axes, "x")
    elif len(where) <= MOST_TICKS:
        shown = where[:1]
        for x in where[1:]:
            if x - shown[-1] >= APART * (where[-1] - where[0]):
                shown.append(x)
        axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.set_xlabel(f"{axis}, dotted: the paper" if any(e["paper"] is not None for e in entries) else axis)


def points(
    axes: Axes, entries: list[Entry], styles: dict[str, Look], divisor: float, sets: tuple[str, ...] = ()
) -> None:
    """Ours as a filled marker with its deviation, the paper's hollow, side by side; set after set, with a gap."""
    if sets:
        entries = sorted(entries, key=lambda entry: sets.index(entry["row"].partition(": ")[0]))
    places: dict[str, list[float]] = {}
    for number, entry in enumerate(entries):
        look, group = styles[entry["row"]], entry["row"].partition(": ")[0] if sets else ""
        x = number + 1.5 * len(places.keys() - {group})
        places.setdefault(group, []).append(x)
        if entry["mean"] is not None:
            axes.errorbar(
                [x], [entry["mean"] / divisor], yerr=[(entry["std"] or 0) / divisor],
                color=look.colour, marker=look.marker, markersize=5 if sets else 6, capsize=2 if sets else 3,
            )  # fmt: skip
        if entry["paper"] is not None:
            axes.plot([x], [entry["paper"] / divisor], look.marker, color=look.colour, markerfacecolor="none")
    axes.set_xticks([float(np.mean(xs)) for xs in places.values()] if sets else [], list(places) if sets else [])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.7, x + 0.7)
    if any(entry["paper"] is not None for entry in entries):
        axes.set_xlabel("hollow: the paper", color=MUTED)


def depth(column: str) -> float:
    """The place on the axis."""
    found = on_axis(column)
    assert found is not None
    return found[2]
