"""What a recipe will do, found by walking through its stages without training."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.data.loader import RowOrder
from nestling.methods.recipe import Recipe, Stage
from nestling.models.model import Model


@dataclass(frozen=True)
class StagePlan:
    """One stage to come."""

    name: str
    epochs: int
    steps: int
    """In all, at most."""
    num_rows: int
    batch_size: int
    num_trainable: int
    """Parameters."""
    chosen: bool
    """Whether the epochs are compared, and the best one is kept."""
    metric: str | None = None
    """What the epochs are compared by, as a run's history names it; None where they are not."""
    mode: str = "min"
    """Whether less of it is better, or more: min or max."""
    assumes: str | None = None
    """What was assumed of the hook at its end, which a plan does not run."""
    follows: bool = True
    """Whether the recipe's ``epochs`` are this stage's."""


def plan(recipe: Recipe, model: Model, data: LabelledData) -> list[StagePlan]:
    """The stages of ``recipe``, walked through on a throw-away copy on the meta device.

    Raises whatever the recipe would raise later: a level without labels, a wrong number of values per stage.
    """
    ghost = copy.deepcopy(model).to("meta")
    plans = []
    for stage in recipe.stages(ghost, data):
        described = describe(stage)
        # What comes after a hook that changes shapes is planned on the shapes that it is expected to leave.
        plans.append(replace(described, assumes=stage.assume(ghost)) if stage.assume is not None else described)
    return plans


def describe(stage: Stage) -> StagePlan:
    """The plan of one stage."""
    rows = np.arange(len(stage.data)) if stage.rows is None else stage.rows
    trainable = sum(p.numel() for module in stage.trainable for p in module.parameters())
    steps = order_of(stage, 0).steps if stage.epochs else 0
    return StagePlan(
        name=stage.name,
        epochs=stage.epochs,
        steps=stage.epochs * steps,
        num_rows=len(rows),
        batch_size=stage.batch_size,
        num_trainable=trainable,
        chosen=stage.select is not None and stage.select.keeps,
        metric=stage.select.name if stage.select is not None else None,
        mode=stage.select.mode if stage.select is not None else "min",
        follows=stage.epochs > 0 and not stage.own_epochs,
    )


def order_of(stage: Stage, key: int) -> RowOrder:
    """The order in which a stage sees its rows; ``key`` is derived from the run's seed and the stage's number.

    Rows that are known to the stage's ``balance_level`` or finer are of one kind.
    """
    finest = stage.data.finest_known()
    if stage.balance_level is not None:
        finest = np.minimum(finest, stage.data.taxonomy.level_index(stage.balance_level))
    return RowOrder(
        finest if stage.rows is None else finest[stage.rows],
        stage.batch_size,
        stage.balance,
        stage.steps_per_epoch,
        key,
    )
