"""Checks of the tree that the labels span: cycles, contradictions with a taxonomy, rows that do not fit."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from nestling.audit import contradictions
from nestling.errors import listed, unknown
from nestling.lint.finding import Finding
from nestling.lint.parents import forget
from nestling.lint.table import Table
from nestling.taxonomy import Taxonomy
from nestling.tree import Integers, some_rows
from nestling.tree_files import read_edges, read_untrusted


def cycles(table: Table) -> list[Finding]:
    """Names that stand above each other by way of other rows: columns were swapped there."""
    edges: dict[tuple[str, str], list[int]] = {}
    if table.qualified:
        return []
    for level in range(1, len(table.levels)):
        above, coarse = table.named[level - 1]
        names, fine = table.named[level]
        both = np.flatnonzero((fine >= 0) & (coarse >= 0))
        if not len(both):
            continue
        pairs, which = np.unique(np.stack([coarse[both], fine[both]], axis=1), axis=0, return_inverse=True)
        order = np.argsort(which.reshape(-1), kind="stable")
        parts = np.split(both[order], np.cumsum(np.bincount(which.reshape(-1), minlength=len(pairs)))[:-1])
        for (parent, child), places in zip(pairs.tolist(), parts, strict=True):
            # A class may share its name with its only child.
            if above[parent] != names[child]:
                edges.setdefault((above[parent], names[child]), []).extend(places.tolist())
    found = []
    for members in loops(edges):
        inside = {edge: places for edge, places in edges.items() if edge[0] in members and edge[1] in members}
        least = min(len(places) for places in inside.values())
        rare = [edge for edge, places in inside.items() if len(places) == least]
        places = sorted({place for edge in rare for place in inside[edge]})
        shown = "; ".join(f"{child!r} below {parent!r} in {len(inside[parent, child])} rows" for parent, child in rare)
        message = f"{listed(sorted(members))} form a cycle: {shown}; see {some_rows(table.numbers[places])}"
        cells = [(place, level, None) for place in places for level in range(len(table.levels))]
        remedy = "put the labels of these rows into their columns, coarse to fine"
        found.append(table.finding("cycle", places, message, remedy, cells=cells))
    return found


def loops(edges: dict[tuple[str, str], list[int]]) -> list[set[str]]:
    """The strongly connected sets of two names and more."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names = sorted({name for edge in edges for name in edge})
    code = {name: number for number, name in enumerate(names)}
    if not names:
        return []
    ends = np.array([[code[above], code[below]] for above, below in edges])
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(names), len(names)))
    _, part = connected_components(graph, connection="strong")
    return [
        {names[member] for member in np.flatnonzero(part == number)} for number in np.flatnonzero(np.bincount(part) > 1)
    ]


def against(table: Table, taxonomy: Taxonomy) -> list[Finding]:
    """Labels that are not in the taxonomy, and rows that contradict it."""
    found = []
    labels = np.full((len(table), len(table.levels)), -1, np.int64)
    for level, (names, codes) in enumerate(table.named):
        classes = taxonomy.classes[table.levels[level]]
        code_of = {name: code for code, name in enumerate(classes)}
        last = defaultdict(list)
        for code, name in enumerate(classes):
            last[name.rsplit("/", 1)[-1]].append(code)
        translate = np.full(len(names) + 1, -1)
        for number, name in enumerate(names):
            places = np.flatnonzero(codes == number)
            # A class that is named by its path also goes by its last part, where the coarser labels tell which.
            several = last.get(name, [])
            if name in code_of or several:
                translate[number] = code_of.get(name, several[0] if len(several) == 1 else -1)
                continue
            hint = str(unknown(f"class at level {table.levels[level]!r}:", name, classes))
            message = f"{some_rows(table.numbers[places])}: {hint}"
            remedy = "correct the name, or add the class to the taxonomy"
            cells = forget(table, places, level)
            found.append(table.finding("unknown-class", places, message, remedy, cells=cells))
        labels[:, level] = translate[codes]
    for fault in contradictions(taxonomy, labels):
        fine, coarse = taxonomy.levels[fault.level], taxonomy.levels[fault.coarser]
        name, given, expected = (
            taxonomy.classes[level][code]
            for level, code in ((fine, fault.code), (coarse, fault.given), (coarse, fault.expected))
        )
        message = (
            f"{some_rows(table.numbers[fault.rows])}: {fine} {name!r} is a {expected!r} in the taxonomy, but {coarse} "
            f"says {given!r}"
        )
        remedy = f"set {coarse} to {expected!r} in these rows, or correct {fine}"
        cells = forget(table, fault.rows, fault.level)
        found.append(table.finding("contradicting-labels", fault.rows, message, remedy, cells=cells))
    return found


def single_child(table: Table) -> list[Finding]:
    """Classes with one child: the finer level says nothing new about them."""
    found = []
    for level in range(1, len(table.levels)):
        names, fine = table.named[level]
        above, coarse = table.named[level - 1]
        both = (fine >= 0) & (coarse >= 0)
        pairs = np.unique(np.stack([coarse[both], fine[both]], axis=1), axis=0)
        parent, counts = np.unique(pairs[:, 0], return_counts=True)
        for code in parent[counts == 1].tolist() if len(pairs) else []:
            child = names[int(pairs[pairs[:, 0] == code][0, 1])]
            message = (
                f"{table.levels[level - 1]} {above[code]!r} has a single child, {child!r}: level "
                f"{table.levels[level]!r} says nothing new about it"
            )
            remedy = "name another class beside it, or leave the row's finer label out"
            found.append(table.finding("single-child", np.flatnonzero(coarse == code), message, remedy))
    return found


def ragged(table: Table) -> list[Finding]:
    """Lines of another length, labels that leave a level out, and classes that end above the finest level."""
    found = []
    if table.ragged:
        places = sorted(table.ragged)
        lengths = listed(sorted({f"{cells} cells" for cells in table.ragged.values()}))
        message = f"{some_rows(table.numbers[places])}: {lengths}, unlike the header; training refuses such lines"
        remedy = "give every line as many cells as the header, or put quotes around the cell that holds the separator"
        found.append(table.finding("ragged-row", places, message, remedy))
    codes = table.codes
    for level in range(len(table.levels) - 1):
        names, here = table.named[level]
        holes = np.flatnonzero((here < 0) & (codes[:, level + 1] >= 0))
        if len(holes) and "*" not in table.column_of and table.levels[level] in table.column_of:
            message = (
                f"{some_rows(table.numbers[holes])}: {table.levels[level + 1]} is labelled and "
                f"{table.levels[level]} is not"
            )
            found.append(
                table.finding("ragged-row", holes, message, f"fill {table.levels[level]} in; training takes the parent")
            )
        deeper = np.unique(here[(here >= 0) & (codes[:, level + 1 :] >= 0).any(axis=1)])
        ends = np.setdiff1d(np.unique(here[here >= 0]), deeper)
        if not len(deeper):
            continue
        for code in ends.tolist():
            places = np.flatnonzero(here == code)
            message = (
                f"{table.levels[level]} {names[code]!r} ends there: none of its {len(places):,} rows is labelled at "
                f"level {table.levels[level + 1]!r}, unlike those of other classes"
            )
            remedy = f"label some of its rows at level {table.levels[level + 1]!r}; else it is taken for a leaf"
            found.append(table.finding("ragged-row", places, message, remedy))
    return found


def of_file(table: Table, path: Path) -> list[Finding]:
    """Two parents and cycles in a taxonomy of edges, which is no tree then; the rows are those of its classes."""
    edges = read_edges(read_untrusted(path))
    lines: dict[str, dict[str, int]] = {}
    for line, parent, child in edges:
        lines.setdefault(child, {}).setdefault(parent, line)
    found = []
    for child, given in lines.items():
        if len(given) > 1:
            where = ", ".join(f"{parent!r} on line {line}" for parent, line in given.items())
            message = f"taxonomy {path}: {child!r} has two parents: {where}"
            items = [f"{path} line {line}" for line in given.values()]
            remedy = "delete one of these lines, or give the two classes different names"
            found.append(table.finding("two-parents", _labelled(table, {child}), message, remedy, items=items))
    for members in loops({(parent, child): [line] for line, parent, child in edges if parent}):
        inside = [line for line, parent, child in edges if parent in members and child in members]
        message = f"taxonomy {path}: {listed(sorted(members))} form a cycle, on lines {', '.join(map(str, inside))}"
        items = [f"{path} line {line}" for line in inside]
        found.append(
            table.finding("cycle", _labelled(table, members), message, "delete one of these lines", items=items)
        )
    return found


def _labelled(table: Table, names: set[str]) -> Integers:
    """The rows that any of these classes is a label of."""
    hit = np.zeros(len(table), bool)
    for known, codes in table.named:
        chosen = [number for number, name in enumerate(known) if name in names]
        hit |= np.isin(codes, chosen)
    return np.flatnonzero(hit)
