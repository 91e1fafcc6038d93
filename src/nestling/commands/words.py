"""What several commands print: figures, and what to type to call nestling again. Imports no torch."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    ("accuracy %", "accuracy", 100, ".1f"),
    ("by class %", "macro_accuracy", 100, ".1f"),
    ("confidence %", "confidence", 100, ".1f"),
    ("overconfidence", "overconfidence", 100, "+z.1f"),
    ("calibration error %", "ece", 100, ".1f"),
    ("tree distance", "tree_distance", 1, ".2f"),
)
"""Of the figures: title, key in metrics.json, factor, format."""


def program() -> str:
    """``nestling`` where the shell finds this program by its name, else the way in which it was called."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m nestling"
    if called.stem != "nestling":
        return "nestling"
    found = shutil.which("nestling")
    same = found is not None and Path(found).resolve() == called.resolve()
    return "nestling" if same else shlex.quote(str(called))


def score_lines(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The levels of metrics.json by method or condition as one aligned table, its header first.

    A dash stands where nothing could be measured; where there is a single name "", its column is left out.
    """
    titles = ["", "level", *(title for title, _, _, _ in COLUMNS), "rows"]
    rows = [
        [
            name if place == 0 else "",
            level["name"],
            *(
                # A run of before the figure was taken lacks it.
                "-" if level.get(key) is None else format(scale * level[key], form)
                for _, key, scale, form in COLUMNS
            ),
            f"{level['n']:,}",
        ]
        for name, levels in scores.items()
        for place, level in enumerate(levels)
    ]
    table = [row if any(scores) else row[1:] for row in (titles, *rows)]
    words = len(titles) - len(COLUMNS) - 1 - (not any(scores))
    return aligned(table, words)


def retrieval_lines(retrieval: Mapping[str, Mapping[str, float]]) -> list[str]:
    """``retrieval`` of metrics.json as an aligned table, in per cent; nothing where nothing was compared."""
    if not retrieval:
        return []
    ks = list(next(iter(retrieval.values())))
    rows = [[level, *(f"{100 * found[k]:.1f}" for k in ks)] for level, found in retrieval.items()]
    return aligned([["search", *(f"recall@{k} %" for k in ks)], *rows], 1)


def attack_lines(attacks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each attack of metrics.json: what it took, and each base head by itself, in per cent."""
    lines = []
    for spec, found in attacks.items():
        median = found["strength"]["median"]
        strength = "" if median is None else f", median {found['measure']} {median:.3g}"
        flipped = "-" if found["flipped"] is None else f"{100 * found['flipped']:.1f}"
        heads = ", ".join(
            f"{entry['name']} {'-' if entry['accuracy'] is None else format(100 * entry['accuracy'], '.1f')}"
            for entry in found["levels_uncombined"]
        )
        lines.append(f"{spec} at {found['level']}: {flipped} % wrong{strength}; each head by itself: {heads}")
    return lines


def concept_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What metrics.json says of concepts, in a line or two; none where it says nothing."""
    found = metrics.get("concepts")
    if not found or not found["accuracy"]:
        return []
    worst = [f"{name} {100 * value:.1f} %" for name, value in list(found["accuracy"].items())[:3]]
    small = f"the five smallest {100 * found['smallest']:.1f} %, " if len(found["accuracy"]) > 5 else ""
    return [
        f"concepts of {found['level']}: mean {100 * found['mean']:.1f} %, {small}"
        f"spread {100 * found['spread']:.1f} points",
        f"least accurate: {', '.join(worst)}",
    ]


def hierarchical_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Hierarchical precision, recall and F in a line; none where no row is labelled down to its leaf."""
    found = metrics.get("hierarchical")
    if not found or found["f"] is None:
        return []
    precision, recall, f = (f"{100 * found[name]:.1f} %" for name in ("precision", "recall", "f"))
    return [f"hierarchical precision {precision}, recall {recall}, F {f}, over {found['n']:,.0f} rows"]


def aligned(table: Sequence[Sequence[str]], words: int) -> list[str]:
    """Rows of cells as lines: the first ``words`` columns to the left, the figures behind them to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if place < words else '>'}{widths[place]}}" for place, cell in enumerate(row))
        for row in table
    ]


def size(count: int) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Two figures are enough of an estimate."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
