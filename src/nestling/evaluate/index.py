"""An index: what a model makes of the rows of a source, in a folder of safetensors and JSON, to be searched again.

``features.safetensors`` holds unit features (n, d); ``index.json`` what the rows are called, their labels, and the
fingerprint of the model, whose features alone may be compared with them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.text import beginning
from nestling.errors import StorageError, UsageError
from nestling.evaluate.predictor import Predictor
from nestling.evaluate.retrieval import highest, normalised
from nestling.files import storage_error, write_folder
from nestling.models.weights import weights_hash

FORMAT = 1
FEATURES, ROWS = "features.safetensors", "index.json"
LARGEST = 16 * 2**30
"""Bytes of each file; a larger one is refused before it is read."""
EXHAUSTED = (RecursionError, MemoryError)
"""What reading bytes may end in that were made to be too deep or too much."""
AT_ONCE = 1024
"""Pictures or texts that are decoded and embedded together."""


@dataclass(frozen=True, eq=False)
class Index:
    """Rows that can be searched."""

    features: Tensor
    """(n, d) float32 of unit norm."""
    items: tuple[str, ...]
    """A name for every row: a file, or ``mnist/test row 17``."""
    labels: dict[str, list[str | None]]
    """By level, coarse to fine; None = not labelled."""
    fingerprint: str
    """Of the model that made the features."""
    source: str
    """What was indexed."""
    root: str = ""
    """The folder from which the items are files; empty where they are none: rows of tables and of made sets."""
    texts: tuple[str, ...] = ()
    """How each row's text begins; nothing of pictures."""

    def __len__(self) -> int:
        return len(self.items)

    def labels_of(self, row: int) -> dict[str, str]:
        """The labels known of a row."""
        return {level: names[row] for level, names in self.labels.items() if names[row] is not None}  # type: ignore[misc]

    def file_of(self, row: int) -> Path | None:
        """The file that a row was made from, which may be gone; None where it was none."""
        return Path(self.root, self.items[row]) if self.root else None

    def is_gone(self, row: int) -> bool:
        """Whether a row was a file that is no longer there."""
        file = self.file_of(row)
        return file is not None and not file.exists()

    def search(self, features: Tensor, k: int) -> tuple[list[list[tuple[int, float]]], list[str]]:
        """For each of ``features`` (b, d) the ``k`` most similar rows and their cosine similarity, best first.

        Rows whose files have vanished since are left out; the second value names those that would have been found.
        """
        hits: list[list[tuple[int, float]]] = []
        gone: dict[int, bool] = {}
        for unit in normalised(features):
            similarities, found, seen, size = unit[None] @ self.features.T, [], 0, k
            # Where files are gone, twice as many rows are looked at, until enough are there or none is left.
            while len(found) < k and seen < len(self):
                rows, scores = (part[0, seen:].tolist() for part in highest(similarities, min(size, len(self))))
                for row, score in zip(rows, scores, strict=True):
                    if row not in gone:
                        gone[row] = self.is_gone(row)
                    if not gone[row]:
                        found.append((row, score))
                    if len(found) == k:
                        break
                seen, size = size, 2 * size
            hits.append(found)
        return hits, [self.items[row] for row, is_gone in gone.items() if is_gone]

    def write(self, folder: Path | str) -> None:
        """As a folder, whole or not at all, in place of an older index. Raises UsageError as ``check_place``."""
        check_place(folder)
        rows = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "root": self.root,
            "items": list(self.items),
            "labels": self.labels,
            "texts": list(self.texts),
        }
        contents = {
            FEATURES: save({"features": self.features.contiguous()}),
            ROWS: json.dumps(rows, ensure_ascii=False, allow_nan=False).encode(),
        }
        write_folder(folder, contents)

    @classmethod
    def read(cls, folder: Path | str) -> Index:
        """From ``write``. Raises StorageError for what is damaged, or newer than this nestling."""
        folder = Path(folder)
        try:
            for name in (FEATURES, ROWS):
                if (folder / name).stat().st_size > LARGEST:
                    raise ValueError(f"{name} is larger than {LARGEST:,} bytes")
            rows: dict[str, Any] = json.loads((folder / ROWS).read_bytes())
            if rows["format"] > FORMAT:
                raise StorageError(f"the index {folder} is of a newer nestling: update nestling, or index again")
            index = cls(
                features=load((folder / FEATURES).read_bytes())["features"],
                items=tuple(rows["items"]),
                labels={str(level): list(names) for level, names in rows["labels"].items()},
                fingerprint=str(rows["fingerprint"]),
                source=str(rows["source"]),
                root=str(rows["root"]),
                texts=tuple(rows.get("texts", [])),
            )
            if not isinstance(rows.get("texts", []), list):
                raise ValueError("the texts are no list")
            index.check()
        except StorageError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, *EXHAUSTED) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise StorageError(f"the index {folder} is damaged ({reason:.200}): index again") from error
        return index

    def check(self) -> None:
        """Raise ValueError where the parts do not fit each other."""
        if self.features.ndim != 2 or self.features.dtype != torch.float32 or not torch.isfinite(self.features).all():
            raise ValueError("the features are not finite numbers (n, d)")
        # A row of zeros stays one.
        norms = torch.linalg.vector_norm(self.features, dim=1)
        if not (((norms - 1).abs() < 1e-3) | (norms == 0)).all():
            raise ValueError("the features are not of unit norm")
        counts = {len(self.items), len(self.features), *map(len, self.labels.values())}
        if len(self.texts) not in (0, len(self.items)):
            raise ValueError(f"{len(self.items)} items and {len(self.texts)} texts")
        names = [
            *self.items,
            *self.texts,
            *(name for column in self.labels.values() for name in column if name is not None),
        ]
        if len(counts) > 1 or not all(isinstance(name, str) for name in names):
            raise ValueError(f"features, items and labels of {sorted(counts)} rows")
        # Half a character cannot be written anywhere.
        "".join(self.texts).encode()


def is_index(path: Path | str) -> bool:
    """Whether the folder holds an index."""
    return (Path(path) / ROWS).is_file() and (Path(path) / FEATURES).is_file()


def check_place(path: Path | str) -> None:
    """Raise UsageError unless an index may be written there: where nothing is, an empty folder, or nothing but one."""
    path = Path(path)
    if not (path.exists() or path.is_symlink()):
        return
    try:
        names = {child.name for child in path.iterdir()} if path.is_dir() else {path.name}
    except OSError as error:
        raise storage_error("read", path, error) from error
    if names and not (is_index(path) and names == {FEATURES, ROWS}):
        raise UsageError(f"{path} is there already and is no index, so it is not replaced: give --out another folder")


def fingerprint(predictor: Predictor) -> str:
    """By which a model is known again: its weights, and how pictures or texts are made ready for it."""
    text = f"{weights_hash(predictor.model)} {json.dumps(predictor.preprocessing.to_dict(), sort_keys=True)}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def build_index(predictor: Predictor, data: LabelledData, source: str) -> Index:
    """Embed every row of ``data``, whose images have the model's size; or texts."""
    texts = data.inputs if isinstance(data.inputs, list) else []
    parts = [
        predictor.embed(texts[begin:end] or data.images(np.arange(begin, end)))
        for begin in range(0, len(data), AT_ONCE)
        for end in [min(begin + AT_ONCE, len(data))]
    ]
    if not parts:
        raise UsageError(f"{source} has no rows to index")
    names = [data.taxonomy.classes[level] for level in data.taxonomy.levels]
    labels = {
        level: [names[place][code] if code >= 0 else None for code in data.labels[:, place].tolist()]
        for place, level in enumerate(data.taxonomy.levels)
    }
    features = normalised(torch.from_numpy(np.concatenate(parts)))
    root = str(Path.cwd()) if Path(data.items[0]).is_file() else ""
    return Index(features, data.items, labels, fingerprint(predictor), source, root, tuple(map(beginning, texts)))


def check_model(index: Index, predictor: Predictor, place: str) -> None:
    """Raise UsageError where another model made the index: its features mean nothing to this one.

    Raises StorageError where this model cannot have made features so wide.
    """
    own = fingerprint(predictor)
    if index.fingerprint != own:
        raise UsageError(
            f"the index {place} was made by another model (fingerprint {index.fingerprint}, this one's is {own}): "
            "index the source again with this model, or search with that one"
        )
    width = predictor.embed([]).shape[1]
    if index.features.shape[1] != width:
        raise StorageError(
            f"the index {place} is damaged (features of width {index.features.shape[1]}, this model's have {width}): "
            "index again"
        )
