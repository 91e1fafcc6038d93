"""What lets a classifier teach itself, and answer by averaged weights: options of every recipe of labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

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
    """Each stage ends with the weights of the slow copy."""

    def check_self_training(self) -> None:
        """Raise UsageError for a field out of its range."""
        check("self_training", self.self_training, least=0)
        check("certain", self.certain, least=0, most=1)
        check("slow", self.slow, least=0, most=1)

    def taught(self, stage: Stage, model: Model) -> Stage:
        """The stage, with what these options add to it."""
        if not self.self_training and not self.averaged:
            return stage
        term = SelfTraining(model, stage.until, self.slow, self.certain)
        return replace(
            stage,
            objective=Objective.of(stage.objective) + self.self_training * term,
            pairs=self.self_training > 0,
            after_step=Following(term),
            at_end=Averaged(term) if self.averaged else None,
        )
