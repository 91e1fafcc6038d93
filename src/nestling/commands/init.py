"""``--init RUN``: the backbone of a trained run, under a new head and for other classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.bundle import load_bundle
from nestling.commands.weights import load_weights
from nestling.data.dataset import LabelledData
from nestling.errors import UsageError
from nestling.methods.recipe import Recipe
from nestling.models.build import build_model
from nestling.models.model import Model
from nestling.models.nested import NestedModel


def start_from(run: str, train: LabelledData, backbone: str, recipe: Recipe) -> Model:
    """The recipe's network for ``train`` with the weights of the backbone of ``run``; everything else is fresh.

    ``backbone`` is auto, or the run's. Raises UsageError where the two networks do not fit each other.
    """
    import torch

    # A plan is made on the meta device, where there would be no weights.
    with torch.device("cpu"):
        given = load_bundle(run).model
    if not isinstance(given, NestedModel):
        raise UsageError(f"--init takes a run with a backbone of stages; {run} was trained by {given.config['method']}")
    name = given.config["backbone"]
    if backbone not in ("auto", name):
        raise UsageError(f"{run} has the backbone {name!r}, not {backbone!r}: leave --backbone out")
    model = build_model(train.taxonomy, train.image_shape, name, recipe.method, recipe.network())
    if not isinstance(model, NestedModel):
        raise UsageError(f"--init gives a backbone of stages, which {recipe.method} has not: take another method")
    mine, theirs = model.backbone.state_dict(), given.backbone.state_dict()
    for key in sorted(mine.keys() | theirs.keys()):
        shapes = [list(state[key].shape) if key in state else None for state in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the backbone of {run} does not fit: {key} has the shape {shapes[1]} there and {shapes[0]} here, for "
                f"images of {'x'.join(map(str, train.image_shape))} with norm = {recipe.norm!r}"
            )
    if not any(t.is_meta for t in mine.values()):
        with torch.no_grad():
            for key, tensor in mine.items():
                tensor.copy_(theirs[key])
    return model


def begin(options: Mapping[str, Any], train: LabelledData, backbone: str, recipe: Recipe) -> Model:
    """The recipe's network for ``train``: fresh, or with the weights that ``--init`` or ``--weights`` gives."""
    run, file = options.get("init"), options.get("weights")
    if run and file:
        raise UsageError("--init and --weights both give the backbone's weights: leave one of them out")
    if run:
        return start_from(run, train, backbone, recipe)
    model = build_model(train.taxonomy, train.image_shape, backbone, recipe.method, recipe.network())
    if file:
        load_weights(file, model)
    return model
