"""Answers for many pictures or texts, batch by batch, and the table that they go into line by line.

The table grows by whole lines, and a note beside it, ``OUT.state``, says what made it: the same command goes on behind
the last whole line. When the table is done the note goes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestling.commands.outputs import refuse_others
from nestling.data.images import LazyImages, read_images
from nestling.data.inputs import inputs_of
from nestling.data.stream import Ahead, choose_workers
from nestling.data.text import read_texts
from nestling.errors import DataError, UsageError
from nestling.evaluate.predictor import Predictor
from nestling.files import Appender, remove, write_json

COLUMNS = ("input", "answer", "level", "confidence", "path", "confidences", "error")
PIXELS_AT_ONCE, MOST = 1 << 24, 512
"""Of a batch: pixels, and pictures."""
FEW = 4
"""Batches for which starting workers costs more than they save."""
EVERY = 5.0
"""Seconds between two lines of progress."""

Describe = Callable[[Any], list[dict[str, Any]]]
"""Images, uint8 (b, c, h, w), or texts, to what ``Predictor.describe`` says of each."""


def batches_of(predictor: Predictor, count: int) -> list[np.ndarray]:
    """The numbers of so many pictures, some at a time."""
    size = predictor.preprocessing.height * predictor.preprocessing.width
    at_once = max(min(PIXELS_AT_ONCE // size, MOST), 8)
    return [np.arange(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def answer_all(
    predictor: Predictor, paths: Sequence[Path], describe: Describe, workers: int | None
) -> Iterator[list[dict[str, Any]]]:
    """The answers of a batch of files after the other, each as in ``predict --json``; decoded ahead by workers."""
    size, channels = (predictor.preprocessing.height, predictor.preprocessing.width), predictor.preprocessing.channels
    batches = batches_of(predictor, len(paths))
    num_workers = choose_workers(workers)[0] if workers is not None or len(batches) > FEW else 0
    images = LazyImages(inputs_of(list(paths)), [str(path) for path in paths], size, channels)
    with Ahead(images, batches, num_workers) as ahead:
        for rows in batches:
            chosen = [paths[row] for row in rows.tolist()]
            try:
                pixels, results = next(ahead), [{"input": printable(str(path))} for path in chosen]
            except DataError:
                # One that cannot be read does not stop the others of its batch.
                read = list(read_images(chosen, size, channels))
                results = [
                    {"input": printable(name)}
                    | ({} if isinstance(image, np.ndarray) else {"error": printable(str(image))})
                    for name, image in read
                ]
                good = [image for _, image in read if isinstance(image, np.ndarray)]
                pixels = torch.from_numpy(np.stack(good)) if good else None
            if pixels is not None:
                readable = [result for result in results if "error" not in result]
                for result, answer in zip(readable, describe(pixels), strict=True):
                    result |= {key: value for key, value in answer.items() if key != "input"}
            yield results


def answer_texts(paths: Sequence[Path], describe: Describe) -> Iterator[list[dict[str, Any]]]:
    """The same for files that hold a text each."""
    for start in range(0, len(paths), MOST):
        results: list[dict[str, Any]] = []
        texts: list[str] = []
        for path, text in read_texts(paths[start : start + MOST]):
            if isinstance(text, str):
                texts.append(text)
                results.append({"input": printable(path)})
            else:
                results.append({"input": printable(path), "error": printable(str(text))})
        readable = [result for result in results if "error" not in result]
        for result, answer in zip(readable, describe(texts) if texts else [], strict=True):
            result |= {key: value for key, value in answer.items() if key != "input"}
        yield results


def printable(name: str) -> str:
    """A file's name in one line, bytes that are no UTF-8 escaped: files of answers are UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r").replace("\n", "\\n")


def lines(results: Sequence[dict[str, Any]], more: Sequence[str] = ()) -> str:
    """Results as lines of CSV: input, answer, its level and confidence, path and confidences joined by '/', error, and
    one column for each key of ``more`` that was asked for."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for result in results:
        answer = result.get("answer") or {}
        cells = [result["input"], *(answer.get(key, "") for key in ("class", "level", "confidence"))]
        cells += ["/".join(result.get("path", ())), "/".join(f"{c:.4f}" for c in result.get("confidence", ()))]
        writer.writerow([*cells, result.get("error", ""), *(_cell(result.get(key)) for key in more)])
    return text.getvalue()


def header(more: Sequence[str] = ()) -> str:
    """The first line of a table."""
    return ",".join((*COLUMNS, *more)) + "\n"


def _cell(value: Any) -> str:
    """``unknown`` as its text, ``sets`` as JSON."""
    if not value:
        return ""
    return value["text"] if "text" in value else json.dumps(value, ensure_ascii=False)


class Table:
    """A CSV file that a command writes line by line, and the same command goes on with.

    ``about``: all that the answers depend on, as JSON; a table that anything else made is begun ``anew``, as any is
    where that is asked for.
    """

    def __init__(self, path: Path, about: dict[str, Any], more: Sequence[str] = (), anew: bool = False) -> None:
        self.path, self.more = path, more
        self.state = path.with_name(path.name + ".state")
        text = json.dumps(about, sort_keys=True)
        digest, found = hashlib.sha256(text.encode()).hexdigest(), None
        with suppress(OSError, ValueError):
            found = json.loads(self.state.read_text(encoding="utf-8"))
        refuse_others(path, ",".join(COLUMNS))
        if found not in (None, {"digest": digest}) and path.exists():
            raise UsageError(
                f"{path} holds the unfinished answers of another model, or to other options: finish those by the same "
                "command, delete it, or give another name"
            )
        kept = b""
        if found == {"digest": digest} and not anew:
            with suppress(OSError):
                kept = whole_lines(path.read_bytes())
        first = header(more)
        if not kept.startswith(first.encode()):
            kept = b""
        # Prediction sets of many classes are longer than what Python reads by default.
        csv.field_size_limit(2**31 - 1)
        self.done: set[str] = set()
        self.errors: list[str] = []
        for row in csv.DictReader(io.StringIO(kept.decode("utf-8", "replace"), newline="")):
            self.done.add(row["input"])
            if row["error"]:
                self.errors.append(row["error"])
        self.file = Appender(path, len(kept))
        if not kept:
            write_json(self.state, {"digest": digest})
            self.file.append_text(first)
            self.file.flush()

    def add(self, results: Sequence[dict[str, Any]]) -> None:
        """Write the results of a batch, whole lines at once."""
        self.file.append_text(lines(results, self.more))
        self.file.flush()
        self.errors += [result["error"] for result in results if "error" in result]

    def finish(self) -> None:
        """All is there."""
        self.file.flush(sync=True)
        remove(self.state)


def whole_lines(data: bytes) -> bytes:
    """What ends with a line's end that stands in no quotes: a kill may have torn the last line."""
    position = end = 0
    inside = False
    for line in data.split(b"\n")[:-1]:
        position += len(line) + 1
        inside ^= line.count(b'"') % 2 == 1
        if not inside:
            end = position
    return data[:end]


class Progress:
    """How far it is, every few seconds, on stderr."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.count, self.first = total, done, done
        self.began = self.said = time.monotonic()

    def add(self, count: int) -> None:
        """So many more are answered."""
        self.count += count
        now = time.monotonic()
        if now - self.said < EVERY or self.count >= self.total:
            return
        self.said = now
        rate = (self.count - self.first) / (now - self.began)
        left = (self.total - self.count) / rate
        print(f"{self.count:,} of {self.total:,} pictures, {rate:.0f} a second, {left:.0f} s left", file=sys.stderr)
