"""A picture of the taxonomy: levels from left to right, every class as tall as its leaves, coloured by accuracy."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nestling.report.content import Content, plain, shorten
from nestling.report.plots import GRID, INK, MUTED, NEUTRAL, WIDTH, canvas, place

ONE_BLOCK, LABELLED = 60, 240
"""Leaves up to which one column of boxes is drawn, and up to which every leaf gets a line of its own."""
POINT = 1 / 72
# Dark where mistakes are, in one hue and then pale: it reads the same to every eye and in print.
COLOURS = LinearSegmentedColormap.from_list("mistakes", ["#6b2800", "#c65500", "#ee9d55", "#f9dcb9", "#e6f0f7"])


@dataclass(frozen=True)
class Node:
    """A class: the lines of the picture that it spans, and how it fared."""

    depth: int
    name: str
    begin: int
    end: int
    correct: int
    count: int


def shown_levels(content: Content) -> tuple[str, ...]:
    """Those down to the finest one at which rows were answered: below, a box could say nothing."""
    levels = () if content.taxonomy is None else content.taxonomy.levels
    answered = [k for k, level in enumerate(levels) if np.sum(content.node_accuracy.get(level, (0, 0))[1])]
    return tuple(levels[: answered[-1] + 1]) if answered else ()


def nodes(content: Content) -> tuple[list[Node], int]:
    """(every class with its span of leaves in depth-first order, number of leaves)."""
    taxonomy, levels = content.taxonomy, shown_levels(content)
    if taxonomy is None or not levels:
        return [], 0
    chains = np.empty((taxonomy.width(levels[-1]), len(levels)), dtype=np.int64)
    chains[:, -1] = np.arange(len(chains))
    for depth in range(len(levels) - 1, 0, -1):
        chains[:, depth - 1] = np.asarray(taxonomy.column_parent(levels[depth]))[chains[:, depth]]
    chains = chains[np.lexsort(chains.T[::-1])]
    found = []
    for depth, level in enumerate(levels):
        names = taxonomy.classes[level]
        correct, count = content.node_accuracy.get(level) or (np.zeros(len(names)), np.zeros(len(names)))
        edges = np.flatnonzero(np.diff(chains[:, depth], prepend=-1, append=-1))
        for begin, end in pairwise(edges.tolist()):
            code = int(chains[begin, depth])
            if code < len(names):  # later columns only carry a leaf that ended at a coarser level
                known = code < len(count)
                numbers = (int(correct[code]), int(count[code])) if known else (0, 0)
                found.append(Node(depth, plain(names[code]), begin, end, *numbers))
    return found, len(chains)


def _cut(found: list[Node], leaves: int) -> list[tuple[int, int]]:
    """The lines of each block: halves, divided between classes as coarse as stays balanced."""
    if not ONE_BLOCK < leaves <= LABELLED:
        return [(0, leaves)]
    for depth in range(max(node.depth for node in found) + 1):
        ends = [node.end for node in found if node.depth == depth]
        middle = min(ends, key=lambda end: abs(end - leaves / 2))
        if abs(middle - leaves / 2) <= 0.1 * leaves:
            return [(0, middle), (middle, leaves)]
    return [(0, leaves // 2), (leaves // 2, leaves)]


def _label(node: Node, width: float, height: float, size: float) -> str:
    """What fits into a box of this size in inches: the name, on several lines if need be, and the numbers."""
    numbers = f"{100 * node.correct / node.count:.0f} % ({node.count:,})" if node.count else "no rows"
    letters = max(int((width - 0.12) / (0.56 * size * POINT)), 6)
    if len(node.name) + len(numbers) + 2 <= letters:
        return f"{node.name}\u2002{numbers}"  # browsers collapse two plain spaces
    lines = int(height / (1.3 * size * POINT)) - 1
    if lines < 1:
        return f"{shorten(node.name, max(letters - len(numbers) - 2, 6))}\u2002{numbers}"
    wrapped = textwrap.wrap(node.name, letters)
    name = "\n".join(wrapped) if len(wrapped) <= min(lines, 4) else shorten(node.name, letters)
    return f"{name}\n{numbers}"


def _block(
    axes: Axes, found: list[Node], span: tuple[int, int], widths: np.ndarray, line: float, norm: Normalize
) -> None:
    """Boxes and labels; coordinates in inches from the upper left corner."""
    lefts = np.concatenate([[0.0], np.cumsum(widths)])
    shown = [n for n in found if n.begin < span[1] and n.end > span[0]]
    boxes, colours = [], []
    for node in shown:
        top, bottom = ((min(max(y, span[0]), span[1]) - span[0]) * line for y in (node.begin, node.end))
        a, b = lefts[node.depth], lefts[node.depth + 1]
        boxes.append([(a, top), (b, top), (b, bottom), (a, bottom)])
        colour = COLOURS(norm(100 * node.correct / node.count)) if node.count else (1.0, 1.0, 1.0, 1.0)
        colours.append(colour)
        size = min(8.5, 0.74 * (bottom - top) / POINT)
        if size < 5.2:
            continue
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5
        axes.text(a + 0.06, (top + bottom) / 2, _label(node, b - a, bottom - top, size), va="center", fontsize=size,
                  color=INK if light else "white", linespacing=1.15)  # fmt: skip
    edges = [0.6 if box[2][1] - box[1][1] > 0.08 else 0.0 for box in boxes]
    many = len(shown) > 3 * LABELLED
    axes.add_collection(
        PolyCollection(boxes, facecolors=colours, edgecolors=NEUTRAL, linewidths=edges, rasterized=many)
    )
    axes.set(xlim=(0, lefts[-1]), ylim=((span[1] - span[0]) * line, 0))
    axes.axis("off")


def icicle(content: Content) -> Figure | None:
    """The taxonomy with the accuracy and number of test rows of every class."""
    found, leaves = nodes(content)
    if not found or content.taxonomy is None:
        return None
    levels = shown_levels(content)
    blocks = _cut(found, leaves)
    lines = max(end - begin for begin, end in blocks)
    line = 11.0 / lines if leaves > LABELLED else min(0.5, max(0.125, 6.2 / lines))
    gap, head, foot = 0.3, 0.3, 0.75
    width = (WIDTH - 0.02 - gap * (len(blocks) - 1)) / len(blocks)
    share = np.array([1.0] * (len(levels) - 1) + [1.35])
    if len(levels) > 1 and leaves > LABELLED:
        share[-1] = 0.5
    widths = width * share / share.sum()
    worst = min(node.correct / node.count for node in found if node.count)
    norm = Normalize(min(10 * np.floor(10 * worst), 80), 100)
    figure = canvas(head + lines * line + foot)
    height = head + lines * line + foot
    for i, span in enumerate(blocks):
        x, tall = 0.01 + i * (width + gap), (span[1] - span[0]) * line
        _block(place(figure, x, height - head - tall, width, tall), found, span, widths, line, norm)
        for k, level in enumerate(levels):
            classes = len(content.taxonomy.classes[level])
            text = f"{shorten(level, 18)}, {classes:,} class{'es' if classes != 1 else ''}"
            fits = len(text) * 0.075 < widths[k]
            figure.text((x + widths[:k].sum()) / WIDTH, 1 - 0.2 / height, text if fits else shorten(level, 14),
                        fontsize=9, fontweight="bold")  # fmt: skip
    axes = place(figure, 0.4, foot - 0.3, 3.6, 0.13)
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), cax=axes, orientation="horizontal")
    bar.outline.set_linewidth(0.6)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    bar.ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.set_label("accuracy on the class's test rows (%)")
    note = "in each box: class, accuracy, (number of test rows); white: no test rows"
    figure.text(4.4 / WIDTH, (foot - 0.26) / height, note, fontsize=8, color=MUTED)
    axes.tick_params(color=GRID)
    return figure
