"""Epochs of layerwise training that are compared, each as ``fit`` runs it."""

from __future__ import annotations

from dataclasses import replace

from loops import Size, made
from networks import Network
from paired import in_turns

from nestling.data.dataset import LabelledData
from nestling.data.transforms import Preprocessing
from nestling.engine.features import Features
from nestling.engine.fit import Engine
from nestling.engine.keep import Progress
from nestling.engine.log import Reporter
from nestling.engine.runtime import Runtime, seeded
from nestling.engine.stage import StageRun
from nestling.methods import Layerwise
from nestling.models.build import build_model
from nestling.objectives.terms import Objective


class Epochs:
    """One problem of a recipe, on a model of its own, that trains for one more epoch at each call."""

    def __init__(self, recipe: Layerwise, stage: str, data: LabelledData) -> None:
        """``stage`` is the problem's name; the layers below have the weights that they are built with."""
        with seeded(0):
            model = build_model(data.taxonomy, data.image_shape, "auto", recipe.method, recipe.network())
            runtime = Runtime.choose("cpu", "fp32")
            pixels = Preprocessing.from_data(data.images(data.index))
            nothing = data.subset(range(0))
            engine = Engine(recipe, model, data, nothing, None, 0, runtime, pixels, Reporter(verbose=False))
            number, found = next(
                (number, found) for number, found in enumerate(recipe.stages(model, data)) if found.name == stage
            )
            runtime.prepare(model)
            self.run = StageRun(engine, number, found, Objective.of(found.objective))
            self.data, self.since = self.run.data()

    def __call__(self) -> None:
        self.run.progress = Progress()
        with seeded(0):
            self.run.train_epochs(self.data, self.since)


def against_checkpointing(size: Size) -> tuple[list[float], list[float]]:
    """Seconds of an epoch of the last layer, all below it computed anew, and of one of all layers by checkpoints."""
    network = size.networks["k=1"]
    last = f"layer-{network.num_blocks}"
    return turns(size, network, *((network.recipe(way), last) for way in ("layerwise", "checkpointing")))


def deep_against_early(size: Size) -> tuple[list[float], list[float]]:
    """Seconds of an epoch of layer 5 and of one of layer 2, both on kept maps, of equal size."""
    # Smaller batches are shorter bursts: more of them, in pairs that lie closer together.
    network = replace(size.networks["k=1"], batch=size.networks["k=1"].batch // 4)
    recipe = network.recipe("layerwise", augmentation="none")
    return turns(size, network, (recipe, "layer-5"), (recipe, "layer-2"), kept=True)


def turns(
    size: Size, network: Network, ours: tuple[Layerwise, str], theirs: tuple[Layerwise, str], kept: bool = False
) -> tuple[list[float], list[float]]:
    """Seconds of the epochs of two problems, in turns; ``kept``: both are trained on kept maps."""
    data = made(Size(side=network.side, num_rows=2 * network.batch))
    sides = [Epochs(*problem, data) for problem in (ours, theirs)]
    if kept and not all(isinstance(side.data, Features) for side in sides):
        raise SystemExit("there is no room for the maps that this row keeps: free some memory or disk")
    in_turns(*sides, 1)
    return in_turns(*sides, size.rounds, size.most)
