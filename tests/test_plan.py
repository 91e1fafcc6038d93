"""The plan of a recipe, and the order in which a stage sees its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from layers import layers, recipe
from nestling.data.dataset import LabelledData
from nestling.engine.plan import order_of
from nestling.methods.recipe import Recipe, Stage
from nestling.models.model import Model
from small import RECIPES, partly_labelled, small_model


def known(stage: Stage) -> np.ndarray:
    """How finely the rows of a stage's first batch are known, up to the level that it balances by."""
    assert stage.balance_level is not None
    finest = stage.data.finest_known()[np.arange(len(stage.data)) if stage.rows is None else stage.rows]
    batch = order_of(replace(stage, balance="levels"), key=1).batch(0, 0)[0]
    return np.minimum(finest[batch], stage.data.taxonomy.level_index(stage.balance_level))


def stages(made: Recipe, model: Model, data: LabelledData) -> dict[str, Stage]:
    return {stage.name: stage for stage in made.stages(model, data) if stage.epochs}


def test_a_layer_is_balanced_by_its_level(toy_data: LabelledData) -> None:
    """To a coarse layer all rows are alike, however finely they are known; of a middle one's half are known so far."""
    data = partly_labelled(toy_data)
    at = ("coarse", "middle", "fine")
    found = stages(recipe(levels_at=at, balance="levels"), layers(data, levels_at=at), data)
    assert [stage.balance_level for stage in found.values()] == list(at)
    counts = [np.bincount(known(stage), minlength=3).tolist() for stage in found.values()]
    assert counts == [[24, 0, 0], [12, 12, 0], [6, 6, 12]]
    # The first layer's rows come as they are, though some kinds of them are few.
    first = order_of(found["layer-1"], key=1)
    assert len(first.streams) == 1


def test_a_level_of_the_cascade_is_balanced_by_itself(toy_data: LabelledData) -> None:
    data = partly_labelled(toy_data)
    found = stages(RECIPES["nested"], small_model(data), data)
    counts = [np.bincount(known(found[level]), minlength=3).tolist() for level in data.taxonomy.levels]
    assert counts == [[24, 0, 0], [12, 12, 0], [6, 6, 12]]


@pytest.mark.parametrize(("level", "kinds"), [(None, 3), ("fine", 3), ("middle", 2), ("coarse", 1)])
def test_kinds_of_rows(level: str | None, kinds: int, toy_data: LabelledData) -> None:
    """Whatever the last output is: `until` says nothing of the balance."""
    data = partly_labelled(toy_data)
    stage = replace(stages(RECIPES["nested"], small_model(data), data)["coarse"], balance="levels")
    assert len(order_of(replace(stage, balance_level=level), key=0).streams) == kinds
