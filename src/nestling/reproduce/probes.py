"""What the layerwise tables measure beside accuracies: separability, pruning, reduction, transfer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.engine.fit import fit
from nestling.engine.runtime import Runtime
from nestling.evaluate.separability import Probe, cnn_separability, linear_separability, maps_of
from nestling.evaluate.transfer import transfer_accuracy
from nestling.methods.layerwise import Layerwise
from nestling.methods.recipe import Stage
from nestling.models.layerwise import LayerwiseModel
from nestling.models.model import Model
from nestling.reproduce.measures import Trained, by_depth, trained
from nestling.reproduce.table import Cell, Place, Trial
from nestling.seeds import derive


def layers_of(found: Trained) -> LayerwiseModel:
    """The network of a layerwise trial."""
    assert isinstance(found.run.model, LayerwiseModel)
    return found.run.model


def separability(trial: Trial, place: Place) -> list[Cell]:
    """Linear, CNN-1 and CNN-2 separability of ``layers``. ``options``: ``epochs`` and ``width`` of the CNN probes."""
    found = trained(trial, place)
    model, preprocessing, count = layers_of(found), found.run.preprocessing, len(found.test)
    labels = [torch.from_numpy(data.labels[:, -1]) for data in (found.train, found.test)]
    assert isinstance(trial.recipe, Layerwise)
    optimizer = trial.recipe.optimizer
    probe = Probe(
        epochs=trial.options["epochs"], width=trial.options["width"], batch_size=trial.recipe.batch_size,
        steps_per_epoch=trial.recipe.steps_per_epoch, optimizer=optimizer,
    )  # fmt: skip
    cells = []
    for layer in trial.options["layers"]:
        maps = [maps_of(model, data, layer, preprocessing, 2, place.device) for data in (found.train, found.test)]
        share = linear_separability(maps[0], labels[0], maps[1], labels[1])
        cells.append(Cell(trial.row, f"linear layer {layer}", share, count=count))
        for p in (1, 2):
            share = cnn_separability(
                p, model, layer, found.train, found.test, preprocessing, probe, place.seed, place.device,
                found.runtime.precision,
            )  # fmt: skip
            cells.append(Cell(trial.row, f"CNN-{p} layer {layer}", share, count=count))
    return cells


PRUNED = re.compile(r"validation accuracy ([\d.]+) % before, ([\d.]+) % after")


def pruning(trial: Trial, place: Place) -> list[Cell]:
    """Accuracies, and the validation accuracy of each layer before and after its filters were removed, and after
    tuning, as the run noted them."""
    found = trained(trial, place)
    cells = by_depth(trial.row, found, found.test)
    for name, value, reason in found.run.decisions:
        layer = name.rpartition("-")[2]
        if match := PRUNED.search(reason):
            cells.append(Cell(trial.row, f"before pruning layer {layer}", float(match[1]) / 100))
            cells.append(Cell(trial.row, f"after pruning layer {layer}", float(match[2]) / 100))
        elif name.startswith("validation accuracy of layer-"):
            # Noted after each tuning, and once more after the last layer's reduction.
            cells.append(Cell(trial.row, f"after tuning layer {layer}", float(str(value).split()[0]) / 100))
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.column, cell)
    return list(first.values())


@dataclass(frozen=True, kw_only=True)
class Reduction(Layerwise):
    """The extra problem of Section 4.3 alone, on a network that is trained: its last layer under a narrower
    classifier of ``final_aux_width`` channels."""

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        assert isinstance(model, LayerwiseModel)
        last = len(model.blocks)
        model.add_auxiliary_head(after=last - 1, width=self.final_aux_width)
        yield self.problem(model, data, "reduced", 0, last - 1, last)


def reductions(trial: Trial, place: Place) -> list[Cell]:
    """Accuracies with the classifier that the last layer was trained under, and with narrower ones.

    ``options``: ``narrower`` = {row: width}; ``top`` as for accuracies; ``train`` = n adds the figures on so many
    training rows, without augmentation.
    """
    found = trained(trial, place)
    assert isinstance(trial.recipe, Layerwise)
    cells = figures(trial, found, trial.row)
    values = {**vars(trial.recipe), "final_aux_width": None}
    for row, width in trial.options.get("narrower", {}).items():
        recipe = Reduction(**{**values, "final_aux_width": width})
        folder = place.training(trial, narrower=width)
        run = fit(
            recipe, found.train, copy.deepcopy(found.run.model), folder, place.seed, place.device, place.precision,
            verbose=False, whole=trial.whole,
        )  # fmt: skip
        cells += figures(trial, replace(found, run=run), row)
    return cells


def figures(trial: Trial, found: Trained, row: str) -> list[Cell]:
    """Accuracies on test rows and, per layer, on training rows; parameters of the trunk and the last classifier."""
    cells = by_depth(row, found, found.test, trial.options.get("top"))
    if rows := trial.options.get("train"):
        some = found.train.subset(np.arange(min(rows, len(found.train))))
        every = by_depth(row, found, some, trial.options.get("top"))
        cells += [Cell(row, f"training {c.column}", c.value) for c in every if "layer" in c.column]
    return [*cells, Cell(row, "parameters", float(num_parameters(layers_of(found))))]


def num_parameters(model: LayerwiseModel) -> int:
    """Of the trunk and the last classifier."""
    last = model.auxiliary[f"layer-{len(model.blocks)}"]
    return sum(p.numel() for module in (model.blocks, last) for p in module.parameters())


def transfer(trial: Trial, place: Place) -> list[Cell]:
    """Table 8: a linear classifier on a layer's features of another set, over random splits.

    ``options``: ``layers``; ``targets`` = {set: split}; ``per_class``; ``splits``; ``first`` rows of the set.
    """
    found = trained(trial, place)
    cells = [c for c in by_depth(trial.row, found, found.test) if c.column == "single"]
    cells = [Cell(c.row, "source", c.value, c.samples) for c in cells]
    for target, split in trial.options["targets"].items():
        data = target_rows(target, split, place.data_dir, trial.options.get("first"))
        for layer in trial.options["layers"]:
            maps = maps_of(layers_of(found), data, layer, found.run.preprocessing, 1, place.device)
            scores = transfer_accuracy(
                maps, data.labels[:, -1], trial.options["per_class"], trial.options["splits"], seed=place.seed
            )
            cells.append(Cell(trial.row, f"{target} layer {layer}", scores.mean, scores.splits))
    return cells


@lru_cache(maxsize=2)
def target_rows(target: str, split: str, data_dir: str | None, first: int | None) -> LabelledData:
    """The rows of a target at the size of the source's images, held for the next trial."""
    return load_data(target, split, data_dir, image_size=32, first=first)


def from_scratch(trial: Trial, place: Place) -> list[Cell]:
    """The same network trained end-to-end on the target's own training rows, average per-class accuracy on the rest.

    ``options``: as for transfer; ``scratch_splits`` of the splits.
    """
    cells = []
    for target, split in trial.options["targets"].items():
        data = target_rows(target, split, place.data_dir, trial.options.get("first"))
        scores = []
        for number in range(trial.options["scratch_splits"]):
            chosen = per_class(data.labels[:, -1], trial.options["per_class"], derive(place.seed, "scratch", number))
            run = fit(
                trial.recipe, data.subset(chosen), out=place.training(trial, target=target, split=number),
                seed=place.seed, device=place.device, precision=place.precision, verbose=False, whole=True,
            )  # fmt: skip
            rest = data.subset(~chosen)
            runtime = Runtime.choose(place.device, place.precision)
            logits, labels = Trained(run=run, train=rest, validation=rest, test=rest, runtime=runtime).logits(rest)
            right = logits[rest.taxonomy.levels[-1]].argmax(1) == labels
            scores.append(float(np.mean([right[labels == c].float().mean() for c in labels.unique()])))
        cells.append(Cell(trial.row, f"{target} layer {trial.options['layers'][-1]}", float(np.mean(scores))))
    return cells


def per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A mask (n,): ``count`` random rows of each class."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for code in np.unique(labels):
        chosen[generator.choice(np.flatnonzero(labels == code), count, replace=False)] = True
    return chosen
