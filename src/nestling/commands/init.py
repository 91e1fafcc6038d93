"""``--init RUN``: the backbone of a trained run, under a new head and for other classes.

Search from coarse labels goes on from a run of its own with the head of two layers and the instance rows, too: how
training rows are added later.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestling.bundle import load_bundle
from nestling.commands.train import say
from nestling.commands.weights import load_weights
from nestling.data.dataset import LabelledData
from nestling.data.sides import Sides
from nestling.data.text import input_shape
from nestling.engine.checkpoint import Checkpoints, pick
from nestling.errors import UsageError
from nestling.methods.recipe import Recipe
from nestling.models.build import build_model
from nestling.models.model import Model
from nestling.models.nested import NestedModel
from nestling.models.search import EarlierRows, SearchModel


def start_from(run: str, train: LabelledData, backbone: str, recipe: Recipe) -> Model:
    """The recipe's network for ``train`` with the weights of the backbone of ``run``; everything else is fresh.

    ``backbone`` is auto, or the run's. Raises UsageError where the two networks do not fit each other.
    """
    import torch

    # A plan is made on the meta device, where there would be no weights.
    with torch.device("cpu"):
        given = load_bundle(run).model
    if not isinstance(given, NestedModel | SearchModel):
        raise UsageError(f"--init takes a run with a backbone of stages; {run} was trained by {given.config['method']}")
    name = given.config["backbone"]
    if backbone not in ("auto", name):
        raise UsageError(f"{run} has the backbone {name!r}, not {backbone!r}: leave --backbone out")
    model = build_model(train.taxonomy, input_shape(train), name, recipe.method, recipe.network())
    if not isinstance(model, NestedModel | SearchModel):
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
        if isinstance(given, SearchModel) and isinstance(model, SearchModel):
            go_on(run, given, model)
    return model


def begin(options: Mapping[str, Any], train: LabelledData, backbone: str, recipe: Recipe) -> Model:
    """The recipe's network for ``train``: fresh, or with the weights that ``--init`` or ``--weights`` gives."""
    run, file = options.get("init"), options.get("weights")
    if run and file:
        raise UsageError("--init and --weights both give the backbone's weights: leave one of them out")
    if run:
        return start_from(run, train, backbone, recipe)
    model = build_model(train.taxonomy, input_shape(train), backbone, recipe.method, recipe.network())
    if file:
        load_weights(file, model)
    return model


def shared_rows(run: str, earlier: Sides | None, sides: Sides | None) -> list[str]:
    """What the rows that ``run`` was trained on mean for the figures and the promises of a run that begins from it."""
    if earlier is None or sides is None:
        return [
            f"figures of test rows, and a risk that predict guarantees, hold if {run} was trained on none of these rows"
        ]
    notes = []
    tested, trained = earlier.trained(sides.test), earlier.trained(sides.train)
    if tested:
        notes.append(
            f"warning: {run} was trained on {tested:,} of these {len(sides.test):,} test rows, and the figures are "
            "better than the model is: test on rows of their own, or train without --init"
        )
    if trained:
        notes.append(
            f"warning: {run} was trained on {trained:,} of these {len(sides.train):,} rows, of which the calibration "
            "rows are taken: a risk that predict guarantees may not hold; train without --init where it must"
        )
    return notes


def go_on(run: str, given: SearchModel, model: SearchModel) -> None:
    """What search has beyond the backbone: the head, and the rows that were learned behind it, if they fit."""
    heads = [part.projection.state_dict() for part in (given, model)]
    shapes = [{name: tensor.shape for name, tensor in head.items()} for head in heads]
    found = earlier_rows(Path(run))
    if found is None or shapes[0] != shapes[1] or found.weight.shape[1] != model.dimension:
        reason = "its folder has none" if found is None else "they are of another head"
        say(f"instance rows of {run} are not taken over ({reason}): all start afresh")
        return
    model.projection.load_state_dict(heads[0])
    model.earlier = found
    say(f"{len(found.numbers)} instance rows of {run} go on, each where a training row has its number in the source")


def earlier_rows(run: Path) -> EarlierRows | None:
    """Those that a run folder's finished stage ended with. Raises StorageError where its file is damaged."""
    saved = Checkpoints(run).stage(0, "search")
    tensors = pick("objective", saved.tensors) if saved else {}
    (prefix,) = [name.removesuffix("numbers") for name in tensors if name.endswith(".numbers")] or [None]
    if prefix is None:
        return None
    return EarlierRows(tensors[f"{prefix}numbers"], tensors[f"{prefix}rows.weight"], tensors[f"{prefix}rows.velocity"])
