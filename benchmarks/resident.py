"""The most memory that something takes: ``python benchmarks/resident.py recall|rows NUMBER FOLDER`` prints it as JSON.

A process of its own for each, since memory that was had does not come back whole. On Linux alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from memory import most_resident

from nestling.data.dataset import LabelledData
from nestling.engine.fit import fit
from nestling.evaluate.retrieval import recall_at_k
from nestling.methods import Coins
from nestling.taxonomy import Taxonomy

WIDTH, STEPS = 128, 20


def recall(number: int, folder: Path) -> None:
    """Recall@k of so many rows of 512 in classes of five."""
    recall_at_k(torch.randn(number, 512), torch.randint(number // 5, (number,)))


def rows(number: int, folder: Path) -> None:
    """Train with so many instance rows, through ``fit``, files of the run included."""
    taxonomy = Taxonomy.from_paths([f"{coarse}/{coarse}-only" for coarse in range(20)])
    images = torch.randint(0, 256, (number, 1, 4, 4), dtype=torch.uint8)
    labels = np.repeat(np.arange(number) % 20, 2).reshape(number, 2)
    data = LabelledData(images, labels, taxonomy, name="noise")
    recipe = Coins(epochs=1, steps_per_epoch=STEPS, batch_size=256, augmentation="none")
    options = {"device": "cpu", "precision": "fp32", "verbose": False, "whole": True}
    fit(recipe, data, backbone=f"conv:8/{WIDTH}", out=folder / "rows", **options)  # type: ignore[arg-type]


def main() -> None:
    what, number, folder = sys.argv[1:]
    began = time.perf_counter()
    {"recall": recall, "rows": rows}[what](int(number), Path(folder))
    print(json.dumps({"resident": most_resident(), "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
