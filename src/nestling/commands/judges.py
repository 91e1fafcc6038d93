"""What a sweep compares its trials by: the score of the epoch that a method keeps, or a rule over all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nestling.errors import UsageError

if TYPE_CHECKING:
    from nestling.commands.pipeline import Pipeline
    from nestling.data.dataset import LabelledData
    from nestling.engine.plan import StagePlan
    from nestling.engine.run import Run
    from nestling.methods.coins import Coins

Trial = Mapping[str, Any]
"""Of a sweep.json: number, fields, value and folder."""
NO_ROW = "no validation row is labelled, so there is no score to search by"


class Judge(ABC):
    """Abstract. Scores a trained trial, and chooses among all."""

    metric: str
    mode: str

    @abstractmethod
    def score(self, run: Run) -> float:
        """What validation rows say of it. Raises UsageError where they say nothing."""

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """The best score first; trials without one are left out."""
        sign = -1 if self.mode == "max" else 1
        return sorted((t for t in trials if t["value"] is not None), key=lambda t: sign * t["value"])

    def choose(self, trials: Sequence[Trial]) -> tuple[Trial, dict[str, Any]]:
        """One of those with a score, and what sweep.json says of how it was chosen."""
        return self.ranked(trials)[0], {}


class BySelection(Judge):
    """The method compares its epochs by validation rows, and its settings by the same score."""

    def __init__(self, stages: Sequence[StagePlan], method: str) -> None:
        chosen = [stage for stage in stages if stage.metric]
        if not chosen:
            raise UsageError(f"{method} keeps its last epoch, so there is no validation score to search by")
        assert chosen[-1].metric is not None
        self.stage, self.metric, self.mode = chosen[-1].name, chosen[-1].metric, chosen[-1].mode
        self.last = not chosen[-1].chosen

    def score(self, run: Run) -> float:
        scores = [r[self.metric] for r in run.history if r["stage"] == self.stage and self.metric in r]
        if scores and self.last:
            # Of the weights that are kept, after the temperature, which is worth more to some settings than to others.
            return float(run.metrics[self.metric])
        if not scores:
            raise UsageError(NO_ROW)
        return max(scores) if self.mode == "max" else min(scores)


class ByRule(Judge):
    """Lambda of search from coarse labels, by a rule over the coarse R@1 of all trials: fine labels are not known."""

    FIELD = "instance_weight"

    def __init__(self, pipeline: Pipeline, train: LabelledData, validation: LabelledData | None) -> None:
        from nestling.engine.fit import cut_rows
        from nestling.engine.runtime import Runtime

        recipe: Coins = pipeline.recipe  # type: ignore[assignment]
        _, self.validation = cut_rows(train, validation, pipeline.seed)
        self.level = self.validation.taxonomy.level_index(recipe.label_level or self.validation.taxonomy.levels[0])
        self.rows = int((self.validation.labels[:, self.level] >= 0).sum())
        if self.rows == 0:
            raise UsageError(NO_ROW)
        self.runtime = Runtime.choose(pipeline.device, "fp32")
        self.metric, self.mode = f"{self.validation.taxonomy.levels[self.level]} R@1", "max"

    def score(self, run: Run) -> float:
        from nestling.data.loader import DeviceData
        from nestling.engine.predict import predict
        from nestling.evaluate.choice import coarse_recall

        self.runtime.prepare(run.model)
        rows = DeviceData(self.validation, run.preprocessing, self.runtime.device)
        return coarse_recall(*predict(run.model, rows, self.runtime), self.level)

    def choose(self, trials: Sequence[Trial]) -> tuple[Trial, dict[str, Any]]:
        from nestling.evaluate.choice import DEFAULT, RULES

        known = {trial["fields"][self.FIELD]: trial for trial in self.ranked(trials)[::-1]}
        recalls = {weight: trial["value"] for weight, trial in known.items()}
        choices = {name: rule(recalls, self.rows) for name, rule in RULES.items()}
        return known[choices[DEFAULT]], {"rule": DEFAULT, "choices": choices}
