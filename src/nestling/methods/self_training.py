"""What lets a classifier teach itself, and answer by averaged weights: options of every recipe of labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nestling.data.dataset import LabelledData
from nestling.methods.recipe import Context, Stage, check
from nestling.models.model import Model
from nestling.objectives.self_training import SelfTraining
from nestling.objectives.slow_copy import WithSlowCopy
from nestling.objectives.terms import Objective


@dataclass(frozen=True)
class Following:
    """After each step the slow copy moves towards the model."""

    term: WithSlowCopy

    def __call__(self, context: Context) -> None:
        self.term.follow(context.model)


@dataclass(frozen=True)
class Averaged:
    """The stage ends with the weights of the slow copy."""

    term: WithSlowCopy

    @torch.no_grad()
    def __call__(self, context: Context) -> None:
        context.model.load_state_dict(self.term.slow.state_dict())


@dataclass(frozen=True, kw_only=True)
class SelfTrainingOptions:
    """The fields of a recipe whose network may teach itself."""

    self_training: float = 0.0
    """Weight of what the network guesses inside the known classes, on another view of the row; 0 is off."""
    certain: float | None = None
    """Guesses of at least this probability alone are learned, as hard labels; all by default, with their doubts."""
    slow: float = 0.99
    """Of the slow copy that guesses, its share that is kept at a step."""
    averaged: bool = False
    """Each stage ends with the weights of the slow copy, and with its last epoch: the copy changes too little from one
    to the next to choose."""

    def check_self_training(self) -> None:
        """Raise UsageError for a field out of its range."""
        check("self_training", self.self_training, least=0)
        check("certain", self.certain, least=0, most=1)
        check("slow", self.slow, least=0, most=1)

    def idle_self_training(self, needs: str | None = None) -> dict[str, str]:
        """As ``Recipe.idle``, of these fields; ``needs``: what is missing where all rows that are seen are labelled."""
        found = {"self_training": needs} if needs else {}
        if not self.self_training or needs:
            found["certain"] = "self_training"
            if not self.averaged:
                found["slow"] = "self_training, or averaged"
        if self.averaged:
            found["patience"] = "a method that chooses its epoch, and averaged weights are those of the last one"
        return found

    def remarks(self, data: LabelledData) -> list[str]:
        """As ``Recipe.remarks``."""
        if not self.self_training or (data.finest_known() < len(data.taxonomy.levels) - 1).any():
            return []
        return ["warning: self_training has no effect: every training row is labelled at every level"]

    def taught(self, stage: Stage, model: Model) -> Stage:
        """The stage, with what these options add to it; as it is, where none of its rows lacks a label."""
        if not self.self_training and not self.averaged:
            return stage
        depth = model.taxonomy.level_index(stage.until or model.taxonomy.levels[-1]) + 1
        known = model.taxonomy.columns(stage.data.labels)[slice(None) if stage.rows is None else stage.rows, :depth]
        weight = self.self_training if (known < 0).any() else 0.0
        if not weight and not self.averaged:
            return stage
        term = SelfTraining(model, stage.until, self.slow, self.certain)
        taught = replace(
            stage,
            objective=Objective.of(stage.objective) + weight * term,
            pairs=weight > 0,
            after_step=Following(term),
        )
        return replace(taught, at_end=Averaged(term), select=None, patience=None) if self.averaged else taught
