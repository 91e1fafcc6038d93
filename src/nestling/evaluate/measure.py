"""What a model scores on labelled rows: the numbers of metrics.json, and the rows behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nestling.data.dataset import LabelledData
from nestling.data.distortions import parse_distortion
from nestling.data.loader import DeviceData
from nestling.data.text import AnyPreprocessing, TextEncoding
from nestling.engine.predict import predict
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate.accuracy import agreement, level_metrics
from nestling.evaluate.concepts import concept_accuracies
from nestling.evaluate.decide import Decisions, decide_leaf, decide_levels
from nestling.evaluate.hierarchical import hierarchical_scores
from nestling.evaluate.retrieval import retrieval_metrics
from nestling.models.model import Answers, Model, Outputs
from nestling.models.search import SearchModel
from nestling.objectives.robust import right_at_finest

CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class Measurement:
    """One model on one set of rows."""

    metrics: dict[str, Any]
    """``levels``, ``levels_uncombined``, ``agreement``, ``agreement_uncombined``, ``distortions`` of metrics.json; of
    a model made for search ``retrieval`` too."""
    decisions: dict[str, Decisions]
    """Per condition: 'clean', or a distortion."""

    def correct(self, data: LabelledData, level: str, condition: str = CLEAN) -> np.ndarray:
        """float (rows known at ``level``,): 1 where the decision is right."""
        labels = data.labels[:, data.taxonomy.level_index(level)]
        return (self.decisions[condition].columns[level] == labels)[labels >= 0].astype(np.float64)

    def confidence(self, data: LabelledData, level: str, condition: str = CLEAN) -> np.ndarray:
        """float (rows known at ``level``,): the confidence of the decision."""
        labels = data.labels[:, data.taxonomy.level_index(level)]
        return self.decisions[condition].confidence[level][labels >= 0]


def outputs_of(
    model: Model, preprocessing: AnyPreprocessing, data: LabelledData, runtime: Runtime, distortions: Sequence[str] = ()
) -> dict[str, Outputs]:
    """Outputs under every condition: clean first, then each distortion. Raises UsageError for an impossible one."""
    reads = isinstance(preprocessing, TextEncoding)
    if isinstance(data.inputs, list) and not reads:
        raise UsageError("this model needs images, and the source has texts")
    if reads and distortions:
        raise UsageError(f"the distortion {distortions[0]!r} moves pixels, which texts do not have: leave it out")
    runtime.prepare(model)
    rows = DeviceData(data, preprocessing, runtime.device)
    conditions = {CLEAN: None, **{spec: parse_distortion(spec) for spec in distortions}}
    for distortion in conditions.values():
        if distortion is not None:
            distortion.check(preprocessing.height, preprocessing.width)
    return {name: predict(model, rows, runtime, distortion=distortion)[0] for name, distortion in conditions.items()}


@torch.no_grad()
def measure(
    model: Model,
    outputs: dict[str, Outputs],
    data: LabelledData,
    *,
    reject: bool = True,
    least_distance: bool = False,
    concepts: Mapping[str, Any] | None = None,
) -> Measurement:
    """Score outputs under every condition.

    ``reject=False`` leaves the rejection layers out; ``least_distance`` decides a flat model's answers by CRM;
    ``concepts`` is what a bundle remembers of them: their level, and the training rows of each.
    """
    answers = {name: model.answers(output, reject) for name, output in outputs.items()}
    decisions = {name: decisions_of(model, answer, least_distance) for name, answer in answers.items()}
    taxonomy = data.taxonomy
    separate = decisions[CLEAN] if model.flat else decide_levels(answers[CLEAN], combined=False)
    levels = list(decisions[CLEAN].columns)
    metrics = {
        "levels": entries(decisions[CLEAN], data),
        "levels_uncombined": entries(separate, data),
        "hierarchical": hierarchical_scores(decisions[CLEAN].columns, data.labels, taxonomy),
        "agreement": agreement(list(decisions[CLEAN].columns.values()), taxonomy, levels),
        "agreement_uncombined": agreement(list(separate.columns.values()), taxonomy, levels),
        "distortions": {
            name: {"levels": entries(decision, data)} for name, decision in decisions.items() if name != CLEAN
        },
    }
    if isinstance(model, SearchModel):
        metrics |= retrieval_metrics(outputs[CLEAN].embedding, data)
    if concepts is not None and (found := by_concept(decisions[CLEAN], data, concepts)):
        metrics["concepts"] = found
    return Measurement(metrics, decisions)


def by_concept(decisions: Decisions, data: LabelledData, concepts: Mapping[str, Any]) -> dict[str, Any]:
    """The entry ``concepts``: every row at the finest level of which it is labelled; empty where there is none.

    ``concepts``: ``level``, whose classes and ragged leaves they are, or a column, and perhaps ``rows``, the training
    rows of each.
    ``of`` is the finest level that any row is judged at.
    """
    taxonomy, above = data.taxonomy, concepts["level"]
    columns = taxonomy.columns(data.labels)
    decided = {level: torch.from_numpy(column) for level, column in decisions.columns.items()}
    right, judged = (found.numpy() for found in right_at_finest(decided, torch.from_numpy(columns), taxonomy.levels))
    if not data.has_concepts(above) or not (judged >= 0).any():
        return {}
    codes, names = data.concepts_at(above)
    scores = concept_accuracies(right, np.where(judged >= 0, codes, -1), names, concepts.get("rows"))
    return {"level": above, "of": taxonomy.levels[judged.max()], **scores}


def decisions_of(model: Model, answers: Answers, least_distance: bool = False) -> Decisions:
    """Each level by itself, or for a flat model the finest decision and its ancestors."""
    return decide_leaf(answers, model.taxonomy, least_distance) if model.flat else decide_levels(answers)


def entries(decisions: Decisions, data: LabelledData) -> list[dict[str, Any]]:
    """The entry of every level, coarse to fine."""
    return [
        level_metrics(
            columns, decisions.confidence[level], data.labels[:, data.taxonomy.level_index(level)], data.taxonomy, level
        )
        for level, columns in decisions.columns.items()
    ]


def mean_over_seeds(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every number over seeds; each level's entry gets ``std``, the sample standard deviation."""
    if len(metrics) == 1:
        return metrics[0]
    result: dict[str, Any] = {}
    for key, value in metrics[0].items():
        values = [m[key] for m in metrics]
        if isinstance(value, dict):
            result[key] = mean_over_seeds(values)
        elif isinstance(value, list):
            result[key] = [_mean_entry(list(entry)) for entry in zip(*values, strict=True)]
        else:
            result[key] = value if isinstance(value, str) else _mean(values)
    return result


def _mean_entry(entries: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [key for key in entries[0] if key not in ("name", "n")]
    return {
        "name": entries[0]["name"],
        **{key: _mean([e[key] for e in entries]) for key in numbers},
        "n": entries[0]["n"],
        "std": {key: _std([e[key] for e in entries]) for key in numbers},
    }


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _std(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
