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
from nestling.errors import StorageError, UsageError
from nestling.evaluate.predictor import Predictor
from nestling.evaluate.retrieval import nearest, normalised
from nestling.files import write_folder
from nestling.models.weights import weights_hash

FORMAT = 1
FEATURES, ROWS = "features.safetensors", "index.json"
LARGEST = 16 * 2**30
"""Bytes of each file; a larger one is refused before it is read."""
AT_ONCE = 1024
"""Pictures that are decoded and embedded together."""


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

    def __len__(self) -> int:
        return len(self.items)

    def labels_of(self, row: int) -> dict[str, str]:
        """The labels known of a row."""
        return {level: names[row] for level, names in self.labels.items() if names[row] is not None}  # type: ignore[misc]

    def file_of(self, row: int) -> Path | None:
        """The file that a row was made from, which may be gone; None where it was none."""
        return Path(self.root, self.items[row]) if self.root else None

    def fingerprint(predictor: Predictor) -> str:
    """By which a model is known again: its weights, and how pictures are made ready for it."""
    text = f"{weights_hash(predictor.model)} {json.dumps(predictor.preprocessing.to_dict(), sort_keys=True)}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def build_index(predictor: Predictor, data: LabelledData, source: str) -> Index:
    """Embed every row of ``data``, whose images have the model's size."""
    parts = [
        predictor.embed(data.images(np.arange(begin, min(begin + AT_ONCE, len(data)))))
        for begin in range(0, len(data), AT_ONCE)
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
    return Index(features, data.items, labels, fingerprint(predictor), source, root)


def check_model(index: Index, predictor: Predictor, place: str) -> None:
    """Raise UsageError where another model made the index: its features mean nothing to this one."""
    own = fingerprint(predictor)
    if index.fingerprint != own:
        raise UsageError(
            f"the index {place} was made by another model (fingerprint {index.fingerprint}, this one's is {own}): "
            "index the source again with this model, or search with that one"
        )
