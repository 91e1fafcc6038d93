"""Levels may have any name: also those that torch keeps for itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nestling import LabelledData, from_pretrained
from nestling.methods import Coins, EndToEnd, Layerwise, Nested
from nestling.methods.recipe import Recipe
from nestling.models.by_level import TAKEN, ByLevel
from small import quick

NAMES = ["type", "half", "train", "a.b", "a%2Eb", "%74ype", "keys", "_modules", "ä.ö", "fine", "state_dict"]


def test_every_name_is_a_key_and_comes_back() -> None:
    assert {"type", "half", "train", "_modules"} <= TAKEN
    modules = ByLevel()
    for number, name in enumerate(NAMES):
        modules[name] = nn.Linear(1, number + 1)
    assert list(modules) == list(modules.keys()) == [name for name, _ in modules.items()] == NAMES
    assert all(name in modules and modules[name].out_features == n + 1 for n, name in enumerate(NAMES))
    # Weights of usual names are named as they always were.
    assert "fine.weight" in modules.state_dict() and len(modules.state_dict()) == 2 * len(NAMES)
    modules.load_state_dict(modules.state_dict())
    del modules["type"]
    assert "type" not in modules and len(modules) == len(NAMES) - 1


@pytest.mark.parametrize(
    "recipe", [Nested(calibration="both"), EndToEnd(), Layerwise(), Coins()], ids=lambda r: r.method
)
@pytest.mark.parametrize("levels", [("type", "half"), ("a.b", "train")], ids="-".join)
def test_a_model_of_such_levels_is_trained_and_read_back(
    recipe: Recipe, levels: tuple[str, str], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    names = [(f"c{n % 2}", f"f{n % 4}") for n in range(60)]
    data = LabelledData.from_arrays(images, names, levels=levels)
    backbone = "auto" if isinstance(recipe, Layerwise) else "conv:4/8"
    run = quick(replace(recipe, epochs=1, steps_per_epoch=2, batch_size=8), data, backbone=backbone)
    run.save_pretrained(tmp_path / "bundle")
    predictor = from_pretrained(tmp_path / "bundle", device="cpu")
    assert levels[-1] in predictor.predict_proba(images[:2]) or recipe.method == "coins"
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(predictor.model.state_dict()[name], tensor)
