"""From runs and measurements to the content of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nestling.data.dataset import LabelledData
from nestling.data.text import AnyPreprocessing
from nestling.engine.run import Run
from nestling.engine.runtime import Runtime
from nestling.evaluate.decide import describe_paths
from nestling.evaluate.measure import CLEAN, Measurement, outputs_of
from nestling.models.model import Model
from nestling.report.content import Content, Curve, Example

NUM_EXAMPLES = 24
MOST_ROWS = 2000
"""Among so many test rows the examples are chosen."""


def gather(
    *,
    title: str,
    source: str,
    metrics: Mapping[str, Any],
    method: str,
    runs: Mapping[str, Sequence[Run]],
    seeds: Sequence[int],
    measurements: Mapping[str, Sequence[Measurement]],
    test: LabelledData,
    model: Model,
    preprocessing: AnyPreprocessing,
    notes: Sequence[str],
    theory: Mapping[str, Sequence[float]] | None = None,
) -> Content:
    """Everything that the report of a training command shows."""
    return Content(
        title=title,
        source=source,
        metrics=metrics,
        method=method,
        taxonomy=test.taxonomy,
        notes=notes,
        curves=[curve(name, seed, run) for name, found in runs.items() for seed, run in zip(seeds, found, strict=True)],
        reliability={name: reliability(found, test) for name, found in measurements.items() if len(test)},
        node_accuracy=node_accuracy(measurements[method], test),
        concept_weights=concept_weights(runs[method][0]),
        theory=theory or {},
        examples=examples(model, preprocessing, test),
        settings=runs[method][0].decisions,
    )


def curve(method: str, seed: int, run: Run) -> Curve:
    """One value per epoch, over all stages."""
    history = run.history
    levels = {level for record in history for level in record.get("accuracy", {})}
    metrics: dict[str, list[float | None]] = {"validation loss": [record.get("validation loss") for record in history]}
    # Where epochs were compared by an accuracy of their own: the worst concept's.
    for name in sorted({name for record in history for name in record if name.endswith("'s accuracy")}):
        metrics[name] = [record.get(name) for record in history]
    for level in model_levels(run, levels):
        metrics[f"{level} accuracy"] = [record.get("accuracy", {}).get(level) for record in history]
    # Where epochs were not compared by a loss there is none to draw.
    metrics = {name: values for name, values in metrics.items() if any(value is not None for value in values)}
    return Curve(
        method=method,
        seed=seed,
        stage_of_epoch=[record["stage"] for record in history],
        epochs=list(range(1, len(history) + 1)),
        loss=[record["loss"] for record in history],
        metrics=metrics,
    )


def concept_weights(run: Run) -> dict[str, list[float]]:
    """Concept -> its weight after each epoch of the last stage that weights concepts, of its last term."""
    stages = [record["stage"] for record in run.history if record.get("reducers")]
    if not stages:
        return {}
    epochs = [list(record["reducers"].values())[-1] for record in run.history if record["stage"] == stages[-1]]
    return {name: [figures[name] for figures in epochs] for name in epochs[0]}


def model_levels(run: Run, levels: set[str]) -> list[str]:
    """``levels`` in the order of the taxonomy."""
    return [level for level in run.model.taxonomy.levels if level in levels]


def reliability(found: Sequence[Measurement], test: LabelledData) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Level -> (confidence, correct), the rows of all seeds one after the other."""
    return {
        level: (
            np.concatenate([m.confidence(test, level) for m in found]),
            np.concatenate([m.correct(test, level) for m in found]) > 0,
        )
        for level in found[0].decisions[CLEAN].columns
    }


def node_accuracy(found: Sequence[Measurement], test: LabelledData) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Level -> (right rows, rows) per class, over all seeds."""
    result = {}
    for level in found[0].decisions[CLEAN].columns:
        labels = test.labels[:, test.taxonomy.level_index(level)]
        known, width = labels[labels >= 0], len(test.taxonomy.classes[level])
        right = sum(np.bincount(known, weights=m.correct(test, level), minlength=width) for m in found)
        result[level] = np.asarray(right).round().astype(int), np.bincount(known, minlength=width) * len(found)
    return result


def examples(model: Model, preprocessing: AnyPreprocessing, test: LabelledData) -> list[Example]:
    """Test rows with what the model says: the least sure third of them, and others at even distances."""
    if not len(test):
        return []
    # Tables are often sorted by class: the rows that are looked at lie all over.
    shown = test.subset(np.linspace(0, len(test) - 1, min(len(test), MOST_ROWS)).round().astype(np.int64))
    runtime = Runtime.choose(str(next(model.parameters()).device.type), "fp32")
    with torch.no_grad():
        answers = model.answers(outputs_of(model, preprocessing, shown, runtime)[CLEAN])
    described = describe_paths(answers, model.taxonomy, model.flat)
    sureness = np.array([d["confidence"][-1] for d in described])
    unsure = np.argsort(sureness, kind="stable")[: NUM_EXAMPLES // 3]
    others = np.setdiff1d(np.linspace(0, len(shown) - 1, 2 * NUM_EXAMPLES).round().astype(int), unsure)[
        : 2 * len(unsure)
    ]
    rows = [*unsure.tolist(), *others.tolist()]
    names = [test.taxonomy.classes[level] for level in test.taxonomy.levels]
    texts = shown.inputs if isinstance(shown.inputs, list) else None
    images = None if texts is not None else shown.images(np.array(rows)).numpy()
    result = []
    for place, row in enumerate(rows):
        truth = tuple(names[i][code] if code >= 0 else None for i, code in enumerate(shown.labels[row]))
        d = described[row]
        result.append(
            Example(
                image=None if images is None else images[place],
                truth=truth,
                path=tuple(d["path"]),
                confidence=tuple(d["confidence"]),
                answer=d["answer"],
                item=(shown.items[row] if texts is None else f"{shown.items[row]}: {beginning(texts[row])}")
                .encode("utf-8", "backslashreplace")
                .decode(),
            )
        )
    return result


def beginning(text: str, most: int = 200) -> str:
    """The first characters of a text, on one line."""
    short = " ".join(text[: 4 * most].split())
    return short if len(short) <= most and len(text) <= 4 * most else f"{short[:most]}…"
