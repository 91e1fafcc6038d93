"""What a guarantee is made of: paths, confidences and labels of rows that the model was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nestling.data.dataset import LabelledData
from nestling.data.text import AnyPreprocessing
from nestling.engine.runtime import Runtime
from nestling.errors import DataError
from nestling.evaluate.decide import decide_leaf, decide_path
from nestling.evaluate.measure import CLEAN, outputs_of
from nestling.models.model import Answers, Model
from nestling.taxonomy import Taxonomy

TENSORS = {"confidence": torch.float64, "columns": torch.int64, "labels": torch.int64, "truth": torch.float64}
"""What ``Scores.tensors`` holds."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The paths of n rows through the levels that a model answers at, and what is known of them."""

    taxonomy: Taxonomy
    levels: tuple[str, ...]
    """Coarse to fine: those that the model answers at."""
    confidence: NDArray[np.float64]
    """(n, levels): of the path's column at each level; it never rises with depth."""
    columns: NDArray[np.int64]
    """(n, levels): the path."""
    labels: NDArray[np.int64]
    """(n, levels): the true columns; -1 where not known."""
    truth: NDArray[np.float64]
    """(n, levels): the probability of the true column; 0 where that is not known."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def named(self) -> NDArray[np.bool_]:
        """(n, levels): whether the path's column is a class of the level; a pass-through column repeats a leaf."""
        return self.columns < np.array([self.taxonomy.num_classes(level) for level in self.levels])

    @property
    def known(self) -> NDArray[np.bool_]:
        """(n, levels): whether the label is known."""
        return self.labels >= 0

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """As a bundle stores them."""
        return {
            f"{prefix}.{name}": torch.from_numpy(getattr(self, name)).to(kind).contiguous()
            for name, kind in TENSORS.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], prefix: str, taxonomy: Taxonomy) -> Scores:
        """The inverse of ``tensors``. Raises DataError where they are of another kind, shape or range."""
        first, found = tensors.get(f"{prefix}.confidence"), {}
        shape = () if first is None else tuple(first.shape)
        if len(shape) != 2 or not 1 <= shape[1] <= len(taxonomy.levels):
            raise DataError(f"{prefix}.confidence must be of shape (n, levels), with at most {len(taxonomy.levels)}")
        # A model answers at the level of its finest head, and at all coarser ones.
        levels = taxonomy.levels[: shape[1]]
        for name, kind in TENSORS.items():
            tensor = tensors.get(f"{prefix}.{name}")
            if tensor is None or tensor.dtype != kind or tuple(tensor.shape) != shape:
                raise DataError(f"{prefix}.{name} must be {kind} of shape {shape}")
            found[name] = tensor.numpy()
        widths = np.array([taxonomy.width(level) for level in levels])
        for name, lowest in (("columns", 0), ("labels", -1)):
            if not ((found[name] >= lowest) & (found[name] < widths)).all():
                raise DataError(f"{prefix}.{name} must be columns of the levels {levels}")
        for name in ("confidence", "truth"):
            if not ((found[name] >= 0) & (found[name] <= 1)).all():
                raise DataError(f"{prefix}.{name} must lie in [0, 1]")
        return cls(taxonomy, levels, **found)


def path_of(answers: Answers, taxonomy: Taxonomy, flat: bool) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Confidences and columns (n, levels) of the path that ``predict`` takes."""
    path = decide_leaf(answers, taxonomy) if flat else decide_path(answers, taxonomy)
    confidence = np.stack(list(path.confidence.values()), axis=1)
    # Sums of float32 may rise by a rounding error.
    return np.minimum.accumulate(confidence, axis=1), np.stack(list(path.columns.values()), axis=1).astype(np.int64)


def scores_from(answers: Answers, labels: NDArray[np.int64], taxonomy: Taxonomy, flat: bool) -> Scores:
    """The scores of rows with ``labels`` (n, levels of the taxonomy)."""
    levels = tuple(answers.combined)
    confidence, columns = path_of(answers, taxonomy, flat)
    known = taxonomy.columns(labels)[:, [taxonomy.level_index(level) for level in levels]]
    truth = [
        np.take_along_axis(p.double().cpu().numpy(), np.maximum(known[:, [i]], 0), 1)[:, 0]
        for i, p in enumerate(answers.combined.values())
    ]
    truth = np.where(known >= 0, np.stack(truth, axis=1), 0.0).clip(0, 1)
    return Scores(taxonomy, levels, confidence, columns, known, truth)


@torch.no_grad()
def scores_of(
    model: Model, preprocessing: AnyPreprocessing, data: LabelledData | None, runtime: Runtime
) -> Scores | None:
    """The scores of every row of ``data``; None without rows."""
    if data is None or len(data) == 0:
        return None
    answers = model.answers(outputs_of(model, preprocessing, data, runtime)[CLEAN])
    return scores_from(answers, data.labels, model.taxonomy, model.flat)
