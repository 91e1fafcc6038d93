"""What a taxonomy is read from, part two: folders, a bundle's JSON, and CSV edges. All of it is untrusted.

Size first, then parse, then cross-check; every fault leaves as a DataError of one line, or as a StorageError where the
file cannot be read at all. Lines count from 1.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from nestling.errors import DataError, StorageError, unknown
from nestling.tree import MAX_LEVELS, Content, Node

MAX_BYTES = 64 * 2**20


def folder_paths(root: Path) -> list[Node]:
    """The path of every class folder below ``root`` that holds files. Raises DataError, StorageError."""
    paths: list[Node] = []
    pending: list[tuple[Node, frozenset[tuple[int, int]]]] = [((), frozenset())]
    while pending:
        path, above = pending.pop()
        folder = root.joinpath(*path)
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            with os.scandir(folder) as found:
                entries = [(entry.name, entry.is_dir()) for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            raise StorageError(f"cannot read folder {folder}: {error.strerror or error}; check the path") from error
        if here in above:
            raise DataError(f"folder {folder} is a cycle: a link leads back into a folder above it; remove the link")
        if path and not all(is_folder for _, is_folder in entries):
            paths.append(path)
        pending += [((*path, name), above | {here}) for name, is_folder in entries if is_folder]
    if not paths:
        raise DataError(f"folder {root} holds no class folders with files: put each class's files into its own folder")
    return paths


def read_untrusted(path: Path) -> str:
    """A text file of at most 64 MB. Raises StorageError where it cannot be read, DataError where it is no such text."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(f"cannot read taxonomy {path}: {error.strerror or error}; check the path") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"taxonomy {path} is larger than {MAX_BYTES // 2**20} MB: give a file of classes only")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"taxonomy {path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None


def parse_json(text: str) -> object:
    """JSON in which no key stands twice. Raises DataError."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise DataError(f"the key {twice!r:.80} stands twice in one object: keep one")
        return result

    try:
        return json.loads(text, object_pairs_hook=once)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is no JSON ({error}): give the JSON of a bundle, or name a CSV of edges *.csv") from None


def check_content(content: object) -> Content:
    """The shape of a bundle's taxonomy.json; what it means is checked by ``Taxonomy`` itself. Raises DataError."""
    shape = '{"levels": […], "classes": {level: […]}, "parent": {level: […]}}'
    if not isinstance(content, Mapping):
        raise DataError(f"a taxonomy is an object {shape}, got {type(content).__name__}")
    known = ("levels", "classes", "parent")
    for key in content:
        if key not in known:
            raise unknown("key of a taxonomy", key, known, DataError)
    for key in known:
        if key not in content:
            raise DataError(f"a taxonomy needs the key {key!r}: {shape}")
    levels, classes, parent = (content[key] for key in known)
    if not isinstance(levels, list | tuple) or not all(isinstance(level, str) for level in levels):
        raise DataError(f"'levels' of a taxonomy must be a list of names, got {levels!r:.80}")
    for what, given in (("classes", classes), ("parent", parent)):
        if not isinstance(given, Mapping):
            raise DataError(f"{what!r} of a taxonomy must be an object of one list per level, got {given!r:.80}")
        for level, values in given.items():
            if not isinstance(values, list | tuple):
                raise DataError(f"{what!r} of level {level!r} must be a list, got {values!r:.80}")
    if levels and levels[0] in classes:
        # Redundant, so whoever writes the file by hand may leave it out.
        parent = {levels[0]: [-1] * len(classes[levels[0]]), **parent}
    return list(levels), dict(classes), dict(parent)


def read_edges(text: str) -> list[tuple[int, str, str]]:
    """The edges of a CSV ``parent,child`` as (line, parent, child), the parent of a root empty. Raises DataError."""
    edges: list[tuple[int, str, str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            line = reader.line_num
            edge = [cell.strip() for cell in cells]
            if not any(edge) or (not edges and [cell.casefold() for cell in edge] == ["parent", "child"]):
                continue
            if len(edge) != 2 or not edge[1]:
                raise DataError(f"line {line}, {','.join(cells)!r:.80}, is no edge: write parent,child")
            edges.append((line, edge[0], edge[1]))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} is no CSV ({error}): write parent,child") from None
    return edges


def parse_edges(text: str) -> list[Node]:
    """The path of every node of a CSV ``parent,child``; level is depth. Raises DataError, naming lines."""
    parent: dict[str, str] = {}
    line_of: dict[str, int] = {}
    for line, above, child in read_edges(text):
        if child in line_of and parent[child] != above:
            one, two = (f"a child of {name!r}" if name else "a root" for name in (parent[child], above))
            raise DataError(
                f"{child!r} has two parents: it is {one} on line {line_of[child]}, {two} on line {line}; "
                "delete one of these lines, or give the two classes different names"
            )
        parent[child] = above
        line_of.setdefault(child, line)
    for above in list(parent.values()):
        if above:
            parent.setdefault(above, "")
    paths: dict[str, Node] = {"": ()}
    for start in parent:
        chain: dict[str, None] = {}
        node = start
        while node not in paths:
            if node in chain:
                raise _cycle(list(chain)[list(chain).index(node) :], parent, line_of)
            chain[node] = None
            node = parent[node]
        for node in reversed(chain):
            paths[node] = (*paths[parent[node]], node)
            if len(paths[node]) > MAX_LEVELS:
                raise DataError(f"{node!r} lies deeper than {MAX_LEVELS} levels: a taxonomy has at most {MAX_LEVELS}")
    del paths[""]
    if not paths:
        raise DataError("the file holds no edges: write one line parent,child for each class")
    return list(paths.values())


def _cycle(members: list[str], parent: Mapping[str, str], line_of: Mapping[str, int]) -> DataError:
    first = min(members, key=lambda name: line_of[name])
    upwards = [parent[first]]
    while len(upwards) <= len(members):
        upwards.append(parent[upwards[-1]])
    downwards = [repr(name) for name in reversed(upwards)]
    if len(downwards) > 12:
        downwards[6:-5] = ["…"]
    return DataError(
        f"the edges form a cycle: {' -> '.join(downwards)}; delete one of them, as on line {line_of[first]}"
    )
