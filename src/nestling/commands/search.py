"""``nestling search``: the pictures or texts of a gallery that are most like each query."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nestling.commands.index import is_named, load_gallery, open_model
from nestling.commands.outputs import PAGE, refuse_others
from nestling.commands.predict import printable
from nestling.commands.train import say
from nestling.data.images import find_images, read_images
from nestling.data.text import TextEncoding, beginning, find_texts, read_texts
from nestling.errors import DataError, NestlingError, UsageError, listed
from nestling.evaluate.index import Index, build_index, check_model, is_index
from nestling.evaluate.predictor import Predictor
from nestling.files import write_json, write_text
from nestling.models.words import HASHED
from nestling.report.search import Picture, Shelf, render_search

if TYPE_CHECKING:
    from nestling.data.dataset import LabelledData
    from nestling.options import Search


def search(command: Search) -> int:
    """Run the command. A query that cannot be read is reported, the others are answered, and the exit code is 3."""
    if not command.queries:
        raise UsageError("search needs at least one picture or text, or a row of the gallery by its name")
    if command.k < 1:
        raise UsageError(f"-k must be at least 1, got {command.k}")
    refuse_others(command.json, "[")
    refuse_others(command.html, PAGE)
    command, predictor, seed = open_model(command)
    data = None
    if not is_named(command.gallery) and is_index(command.gallery):
        index = Index.read(command.gallery)
        check_model(index, predictor, command.gallery)
    else:
        data = load_gallery(command, command.gallery, predictor, seed)
        index = build_index(predictor, data, command.gallery)
    queries = read_queries(command.queries, predictor, index)
    good = [query for query in queries if query.features is not None]
    hits, gone = index.search(torch.stack([q.features for q in good]) if good else index.features[:0], command.k + 1)  # type: ignore[misc]
    for query, found in zip(good, hits, strict=True):
        # A row of the gallery that is asked for by its name is not its own answer.
        query.hits = [hit for hit in found if hit[0] != query.row][: command.k]
    if gone:
        what = "1 file of the index is" if len(gone) == 1 else f"{len(gone)} files of the index are"
        say(f"{what} gone, and left out of the answers: {listed(gone, 5)}; index again")
    write(command, index, queries)
    if command.html:
        write_text(command.html, render_search(shelves(command, queries, index, data, predictor, seed)))
    # Nothing was found where the gallery has moved as a whole.
    return 3 if len(good) < len(queries) or (gone and not any(query.hits for query in good)) else 0


class Query:
    """One picture or text that is asked for, and what was found."""

    def __init__(
        self,
        name: str,
        features: torch.Tensor | None = None,
        row: int | None = None,
        image: np.ndarray | None = None,
        text: str | None = None,
        said: bool = False,
        error: str = "",
    ) -> None:
        self.name, self.features, self.row, self.error = name, features, row, error
        self.image, self.text, self.said = image, text, said
        self.hits: list[tuple[int, float]] = []

    def labels(self, index: Index) -> dict[str, str]:
        """What is known of it: where its file was found in the gallery, or its name is that of a row."""
        if self.row is not None:
            return index.labels_of(self.row)
        if self.said:
            return {}
        own = Path(self.name).resolve()
        rows = [row for row, _ in self.hits if (file := index.file_of(row)) is not None and file.resolve() == own]
        return index.labels_of(rows[0]) if rows else {}


def read_queries(names: tuple[str, ...], predictor: Predictor, index: Index) -> list[Query]:
    """Files, folders of files, names of rows of the gallery, and texts themselves, with their features."""
    reads = isinstance(predictor.preprocessing, TextEncoding)
    found: list[Query] = []
    for name in names:
        there = is_there(name)
        if not there and name in index.items:
            row = index.items.index(name)
            found.append(Query(name, index.features[row], row))
        elif not there and reads and is_said(name):
            found.append(Query(beginning(name), text=name, said=True))
        elif not there:
            what = "neither a file, nor the name of a row of the gallery"
            what += ", nor a text of two words" if reads else ""
            example = f" (rows have names such as {index.items[0]!r})" if index.items else ""
            found.append(Query(name, error=f"{name}: {what}{example}"))
        else:
            try:
                found += queries_of_texts(name) if reads else queries_of_pictures(name, predictor)
            except DataError as error:
                found.append(Query(name, error=str(error)))
    asked = [query for query in found if query.image is not None or query.text is not None]
    if asked:
        inputs = [q.text for q in asked] if reads else torch.from_numpy(np.stack([q.image for q in asked]))  # type: ignore[misc]
        for query, features in zip(asked, torch.from_numpy(predictor.embed(inputs)), strict=True):
            if reads and not features[-HASHED:].any():
                query.error = f"{query.name or 'an empty text'}: none of its words is in the texts of the training"
            else:
                query.features = features
    return found


def is_there(name: str) -> bool:
    """Whether it is a file or folder; a text may be longer than any name."""
    try:
        return bool(name) and Path(name).exists()
    except OSError:
        return False


def is_said(name: str) -> bool:
    """Whether it is a text itself: of two words or more, and not the name of a file or row that is missing."""
    path = Path(name)
    file = path.suffix.lower() == ".txt" or (str(path.parent) != "." and is_there(str(path.parent)))
    return len(name.split()) > 1 and not file and not re.fullmatch(r"\S* row \d+", name)


def queries_of_pictures(name: str, predictor: Predictor) -> list[Query]:
    """A picture, or all of a folder."""
    size, channels = (predictor.preprocessing.height, predictor.preprocessing.width), predictor.preprocessing.channels
    return [
        Query(path, image=image) if isinstance(image, np.ndarray) else Query(path, error=str(image))
        for path, image in read_images(find_images(name), size, channels)
    ]


def queries_of_texts(name: str) -> list[Query]:
    """A file that holds a text, or all of a folder."""
    return [
        Query(path, text=text) if isinstance(text, str) else Query(path, error=str(text))
        for path, text in read_texts(find_texts(name))
    ]


def write(command: Search, index: Index, queries: list[Query]) -> None:
    """The answers as text or JSON."""
    results: list[dict[str, Any]] = []
    for query in queries:
        if query.error:
            results.append({"query": printable(query.name), "error": printable(query.error)})
            continue
        hits = [
            {"item": printable(index.items[row]), "score": score, "labels": index.labels_of(row)}
            | ({"text": index.texts[row]} if index.texts else {})
            for row, score in query.hits
        ]
        results.append({"query": printable(query.name), "hits": hits})
    if command.json == "-":
        print(json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False))
        return
    if command.json:
        write_json(command.json, results)
    for result in results:
        if "error" in result:
            print(f"nestling: {result['error']}", file=sys.stderr)
            continue
        print(result["query"])
        for hit in result["hits"]:
            about = [hit["item"], " > ".join(hit["labels"].values()), hit.get("text", "")]
            print(f"  {hit['score']:.3f}  {'  '.join(filter(None, about))}")


def shelves(
    command: Search, queries: list[Query], index: Index, data: LabelledData | None, predictor: Predictor, seed: int
) -> list[Shelf]:
    """What the page shows: every query, its hits, and which of them are right at the finest level known of both."""
    pictures = gallery_pictures(command, queries, index, data, predictor, seed)
    found = []
    for query in queries:
        known = query.labels(index)
        cards = []
        for row, score in query.hits:
            labels = index.labels_of(row)
            both = [level for level in labels if level in known]
            right = labels[both[-1]] == known[both[-1]] if both else None
            text = index.texts[row] if index.texts else ""
            cards.append(Picture(pictures.get(row), index.items[row], " › ".join(labels.values()), score, right, text))
        image, text = query.image, beginning(query.text or "")
        if query.row is not None:
            image, text = pictures.get(query.row), index.texts[query.row] if index.texts else ""
        name = "" if query.said else query.name
        found.append(Shelf(Picture(image, name, " › ".join(known.values()), text=text), cards, query.error))
    return found


def gallery_pictures(
    command: Search, queries: list[Query], index: Index, data: LabelledData | None, predictor: Predictor, seed: int
) -> dict[int, np.ndarray]:
    """The pictures of all rows that the page shows, as uint8 (c, h, w); those that cannot be read are left out."""
    if index.texts:
        return {}
    rows = sorted({row for query in queries for row, _ in query.hits} | {q.row for q in queries if q.row is not None})
    size, channels = (predictor.preprocessing.height, predictor.preprocessing.width), predictor.preprocessing.channels
    files = {row: file for row in rows if (file := index.file_of(row)) is not None and not index.is_gone(row)}
    read = read_images(list(files.values()), size, channels)
    found = {row: image for row, (_, image) in zip(files, read, strict=True) if isinstance(image, np.ndarray)}
    others = [] if index.root else rows
    if others and data is None:
        try:
            data = load_gallery(command, index.source, predictor, seed)
        except NestlingError as error:
            say(f"the page has no pictures of {index.source}: {error}")
    if others and data is not None and len(data) == len(index):
        found |= dict(zip(others, data.images(np.array(others)).numpy(), strict=True))
    return found
