"""Inputs of no known class: how surely a model knows them, at every level, and what it says of them.

A row is unknown from the level on at which its class is none of the model's: a new kind of dog from the breeds on, a
teapot among animals from the coarsest level on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nestling.errors import UsageError
from nestling.evaluate.guarantee import check_share, rows_needed_on_average, set_threshold
from nestling.evaluate.scores import Scores, path_of
from nestling.models.model import Model, Outputs
from nestling.taxonomy import Taxonomy

FALSE_ALARM = 0.05
"""Of rows of known classes, called unknown: where nothing else is asked for."""
NAMED = 5
"""Classes that a text names."""


def auroc(known: ArrayLike, unknown: ArrayLike) -> float:
    """The probability that an unknown row scores above a known one; a tie counts half."""
    known, unknown = np.sort(np.asarray(known, np.float64)), np.asarray(unknown, np.float64)
    below = np.searchsorted(known, unknown, "left") + np.searchsorted(known, unknown, "right")
    return float(below.mean() / (2 * len(known)))


def fpr95(known: ArrayLike, unknown: ArrayLike) -> float:
    """The share of unknown rows that pass for known where 95 % of the known rows do."""
    known, unknown = np.sort(np.asarray(known, np.float64)), np.asarray(unknown, np.float64)
    limit = known[int(np.ceil(0.95 * len(known))) - 1]
    return float((unknown <= limit).mean())


@torch.no_grad()
def novelty(model: Model, outputs: Outputs) -> dict[str, NDArray[np.float64]]:
    """Scores (n, levels), higher for what is less known: ``path``, 1 - the confidence of the path; ``rejection``, where
    there is such a class; ``softmax``, 1 - a head's largest probability (Hendrycks and Gimpel, 2017); ``energy``,
    - log sum exp of its logits (Liu et al., 2020). At a level without a head of its own, the next finer head's energy.
    """
    answers = model.answers(outputs)
    confidence, _ = path_of(answers, model.taxonomy, model.flat)
    plain = model.answers(outputs, reject=False).separate
    energies: list[torch.Tensor] = []
    for level in reversed(list(answers.combined)):
        logits = outputs.logits.get(level)
        energies.append(energies[-1] if logits is None else -logits.double().logsumexp(1))
    found = {
        "path": 1 - confidence,
        "softmax": _stack([1 - p.double().amax(1) for p in plain.values()]),
        "energy": _stack(energies[::-1]),
    }
    if model.config.get("rejection"):
        found["rejection"] = _stack(list(answers.rejection.values()))
    return found


@dataclass(frozen=True, eq=False)
class Alarm:
    """When a path is called unknown."""

    taxonomy: Taxonomy
    levels: tuple[str, ...]
    least: NDArray[np.float64]
    """(levels,): a confidence below it raises the alarm."""

    def level(self, confidence: NDArray[np.float64]) -> NDArray[np.int64]:
        """int64 (n,): the number of the coarsest level that is alarmed, -1 for none."""
        raised = confidence < self.least
        return np.where(raised.any(1), raised.argmax(1), -1)

    def describe(self, confidence: NDArray[np.float64], paths: Sequence[Sequence[str]]) -> list[dict[str, str] | None]:
        """For every row ``{"level", "text"}``, such as "a new kind of dog"; None where it is known."""
        found: list[dict[str, str] | None] = []
        for at, path in zip(self.level(confidence).tolist(), paths, strict=True):
            # Below the end of a ragged path there is nothing to be new of.
            if at < 0 or (at > 0 and at >= len(path)):
                found.append(None)
                continue
            text = f"a new kind of {path[at - 1]}" if at else f"not {_any_of(self.taxonomy.classes[self.levels[0]])}"
            found.append({"level": self.levels[at], "text": text})
        return found


def alarm(calibration: Scores | None, validation: Scores | None, rate: float) -> Alarm:
    """The alarm that at most ``rate`` of the rows of known classes raise, at any level, on average over calibration
    rows: split conformal, on the least rank of a row's confidences among those of validation rows at their levels.

    Without validation rows each level has its share of the rate. Raises UsageError for too few calibration rows.
    """
    check_share("false-alarm", rate)
    ranked = validation is not None and len(validation) > 0
    share = rate if ranked or calibration is None else rate / len(calibration.levels)
    needed, count = rows_needed_on_average(share), 0 if calibration is None else len(calibration)
    if calibration is None or count < needed:
        raise UsageError(
            f"a false-alarm rate of {100 * rate:g} % needs {needed} calibration rows, and this model has {count}: ask "
            "for a higher rate, or train on more rows"
        )
    if validation is None or not ranked:
        least = [set_threshold(calibration.confidence[:, i], share) for i in range(len(calibration.levels))]
    else:
        columns = list(zip(np.sort(validation.confidence, axis=0).T, calibration.confidence.T, strict=True))
        ranks = [np.searchsorted(others, mine, "right") for others, mine in columns]
        rank = int(set_threshold(np.min(ranks, axis=0), rate))
        # A rank below it is a confidence below this one.
        least = [others[rank - 1] if rank else -np.inf for others, _ in columns]
    return Alarm(calibration.taxonomy, calibration.levels, np.array(least))


def unknown_metrics(
    raised: Alarm,
    known: Mapping[str, NDArray],
    others: Mapping[str, tuple[Mapping[str, NDArray], NDArray]],
    rate: float,
) -> dict[str, Any]:
    """The entry ``unknown`` of metrics.json.

    ``known``: ``novelty`` of rows of known classes; ``others``: by name, that of other rows and the number (n,) of the
    level from which each is unknown. For each level the share of known rows that raise the alarm there or above, and of
    each set: ``n`` rows unknown there, how many of these do, AUROC and FPR95 of every score; ``placed``, the share of a
    set's rows that are called unknown at just the level from which they are.
    """
    levels = []
    for i, level in enumerate(raised.levels):
        entry: dict[str, Any] = {
            "name": level,
            "false_alarms": float((1 - known["path"][:, : i + 1] < raised.least[: i + 1]).any(1).mean()),
            "n": len(known["path"]),
        }
        for name, (scores, since) in others.items():
            rows = since <= i
            if rows.any():
                entry[name] = {
                    "n": int(rows.sum()),
                    "detected": float((1 - scores["path"][rows, : i + 1] < raised.least[: i + 1]).any(1).mean()),
                    "auroc": {kind: auroc(known[kind][:, i], scores[kind][rows, i]) for kind in scores},
                    "fpr95": {kind: fpr95(known[kind][:, i], scores[kind][rows, i]) for kind in scores},
                }
        levels.append(entry)
    placed = {
        name: float((raised.level(1 - scores["path"]) == since).mean()) for name, (scores, since) in others.items()
    }
    return {"rate": rate, "levels": levels, "sets": list(others), "placed": placed}


def unknown_since(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 (n,): the level from which rows of held-out classes are unknown, the first that ``labels`` lack."""
    return (labels >= 0).sum(1)


def _stack(columns: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    return torch.stack(list(columns), 1).double().cpu().numpy()


def _any_of(names: Sequence[str]) -> str:
    shown = list(names[:NAMED])
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown) + (
        " or any other known class" if len(names) > NAMED else ""
    )
