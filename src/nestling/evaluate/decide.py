"""From probabilities to decisions: a class per level, a path from coarse to fine, the level to vouch for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.models.model import Answers
from nestling.objectives import functional
from nestling.objectives.votes import vote
from nestling.taxonomy import Taxonomy

CONFIDENT = 0.9
"""Without a risk to keep, the answer is the deepest level whose confidence is at least this."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """One column and one confidence per level and row, coarse to fine."""

    columns: dict[str, np.ndarray]
    """int64 (n,) each."""
    confidence: dict[str, np.ndarray]
    """float64 (n,) each, in [0, 1]."""


def decide_levels(answers: Answers, combined: bool = True) -> Decisions:
    """The most probable column of every level by itself.

    Its confidence is its probability times (1 - the largest rejection so far) where levels are combined; of a head by
    itself, the probability that stands beside the rejection's.
    """
    probabilities = answers.combined if combined else answers.separate
    columns, confidence, rejected = {}, {}, None
    for level, p in probabilities.items():
        best, column = p.max(1)
        if combined:
            rejected = (
                answers.rejection[level] if rejected is None else torch.maximum(rejected, answers.rejection[level])
            )
            best = best * (1 - rejected)
        columns[level], confidence[level] = column, best
    return _numpy(columns, confidence)


def decide_leaf(answers: Answers, taxonomy: Taxonomy, least_distance: bool = False) -> Decisions:
    """A flat model's decision: its finest column, and that column's ancestors with their summed probabilities.

    The column is the most probable one, or with ``least_distance`` that of least expected distance in the tree (CRM).
    """
    finest = taxonomy.levels[-1]
    p = answers.combined[finest]
    leaf = functional.least_expected_distance(p, taxonomy) if least_distance else p.argmax(1)
    columns, confidence = {}, {}
    for level, summed in answers.combined.items():
        ancestor = torch.from_numpy(taxonomy.ancestor(level, of=finest).copy()).to(leaf.device)
        columns[level] = ancestor[leaf]
        confidence[level] = summed.gather(1, columns[level][:, None])[:, 0] * (1 - answers.rejection[level])
    return _numpy(columns, confidence)


def decide_votes(answers: Answers, taxonomy: Taxonomy, weights: Sequence[float] | None = None) -> Decisions:
    """The levels decide together, by majority or by ``weights``, one for each: ``objectives.votes``.

    The coarser answers are the ancestors of the finest one, each with the probability that its own head gives it.
    """
    levels = list(answers.separate)
    leaf = vote(list(answers.separate.values()), taxonomy, weights, levels)
    columns, confidence = {}, {}
    for level, p in answers.separate.items():
        ancestor = torch.from_numpy(taxonomy.ancestor(level, of=levels[-1]).copy()).to(leaf.device)
        columns[level] = ancestor[leaf]
        confidence[level] = p.gather(1, columns[level][:, None])[:, 0]
    return _numpy(columns, confidence)


def decide_path(answers: Answers, taxonomy: Taxonomy) -> Decisions:
    """Top-down: the best coarsest column, then the best child of the chosen node; confidence never rises with depth."""
    columns: dict[str, Tensor] = {}
    confidence: dict[str, Tensor] = {}
    previous, rejected = None, None
    for level, p in answers.combined.items():
        if previous is not None:
            parent = torch.from_numpy(taxonomy.column_parent(level).copy()).to(p.device)
            p = p.masked_fill(parent[None, :] != previous[:, None], -1.0)
        best, previous = p.max(1)
        rejected = answers.rejection[level] if rejected is None else torch.maximum(rejected, answers.rejection[level])
        columns[level], confidence[level] = previous, best * (1 - rejected)
    return _numpy(columns, confidence)


def describe_paths(
    answers: Answers, taxonomy: Taxonomy, flat: bool, depth: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """For every row its path, the confidences along it, and the answer: as in ``predict --json``, without the input.

    ``depth`` (n,): how many levels of the path are answered, 0 for no answer; by default those that are confident.
    """
    path = decide_leaf(answers, taxonomy) if flat else decide_path(answers, taxonomy)
    names = {level: taxonomy.column_names(level) for level in path.columns}
    results = []
    for row in range(len(next(iter(path.columns.values())))):
        steps = []
        for level, columns in path.columns.items():
            column = int(columns[row])
            # A pass-through column repeats a leaf that ended above.
            if column < len(taxonomy.classes[level]):
                steps.append((level, names[level][column], float(path.confidence[level][row])))
        if depth is None:
            sure = [step for step in steps if step[2] >= CONFIDENT] or steps[:1]
        else:
            sure = steps[: int(depth[row])]
        answer = dict(zip(("level", "class", "confidence"), sure[-1], strict=True)) if sure else None
        results.append(
            {
                "path": [s[1] for s in steps],
                "confidence": [s[2] for s in steps],
                "answer": answer,
            }
        )
    return results


def _numpy(columns: dict[str, Tensor], confidence: dict[str, Tensor]) -> Decisions:
    return Decisions(
        {level: c.cpu().numpy() for level, c in columns.items()},
        {level: c.double().clamp(0, 1).cpu().numpy() for level, c in confidence.items()},
    )
