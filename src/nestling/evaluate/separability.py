"""How separable a layer's maps are (*Shallow Learning for Deep Networks*, Section 4.2).

Linear separability is the test accuracy of one-versus-rest logistic regression on the map averaged to 2x2,
CNN-p-separability that of a network with p hidden convolutions on the map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.data.text import AnyPreprocessing
from nestling.engine.fit import Engine
from nestling.engine.log import Reporter
from nestling.engine.predict import predict
from nestling.engine.runtime import Runtime
from nestling.errors import DataError, UsageError
from nestling.methods.recipe import Recipe, Stage, check, of_stage
from nestling.models.layerwise import LayerwiseModel
from nestling.models.model import Model
from nestling.objectives.terms import CrossEntropy


@torch.no_grad()
def maps_of(
    model: LayerwiseModel,
    data: LabelledData,
    layer: int,
    preprocessing: AnyPreprocessing,
    size: int | None = None,
    device: str = "auto",
) -> Tensor:
    """The maps of every row behind ``layer``, from 1, in evaluation mode, in fp32 and without augmentation.

    Parameters
    ----------
    size: averages each map to ``size`` x ``size`` at once; None leaves it as it is.

    Returns
    -------
    (n, channels, h, w) float32 on the CPU. Raises UsageError for a layer that the model lacks.
    """
    check_layer(model, layer)
    runtime = Runtime.choose(device, "fp32")
    model = copy.deepcopy(model).eval()
    runtime.prepare(model)
    maps = []
    for batch in DeviceData(data, preprocessing, runtime.device).batches():
        current = batch.inputs
        for block in model.blocks[:layer]:
            current = block(current)
        maps.append((current if size is None else F.adaptive_avg_pool2d(current, size)).float().cpu().contiguous())
    return torch.cat(maps)


def linear_separability(train_maps: Tensor, train_labels: Tensor, test_maps: Tensor, test_labels: Tensor) -> float:
    """The test accuracy of one-versus-rest logistic regression on maps averaged to 2x2.

    Parameters
    ----------
    train_maps, test_maps: (n, channels, h, w); columns are standardised by the training rows.
    train_labels, test_labels: (n,) int; rows with -1 do not count.

    Raises DataError where training rows have fewer than two classes, or no test row is labelled.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = []
    for maps, labels in ((train_maps, train_labels), (test_maps, test_labels)):
        target = np.asarray(labels)
        columns = F.adaptive_avg_pool2d(maps.float(), 2).flatten(1).numpy()
        sets.append((columns[target >= 0], target[target >= 0]))
    (train, targets), (test, truth) = sets
    if len(np.unique(targets)) < 2 or len(truth) == 0:
        raise DataError(
            f"separability needs two classes among the training rows and a labelled test row, got "
            f"{len(np.unique(targets))} classes and {len(truth)} test rows"
        )
    probe = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(max_iter=1000)))
    return float(probe.fit(train, targets).score(test, truth))


@dataclass(frozen=True, kw_only=True)
class Probe(Recipe):
    """A fresh classifier behind the last layer of a model that stays as it is."""

    method: ClassVar[str] = "layerwise"

    epochs: int = 20
    width: int = 128
    """Channels of its convolutions."""

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        assert isinstance(model, LayerwiseModel)
        last = len(model.blocks)
        head = model.add_auxiliary_head(after=last - 1, width=self.width)
        rows = np.flatnonzero(data.labels[:, data.taxonomy.level_index(model.levels_at[-1])] >= 0)
        batch_size = self.batch_for(len(rows))
        yield Stage(
            name="probe",
            data=data,
            rows=rows,
            objective=CrossEntropy(f"layer-{last}", model.levels_at[-1]),
            trainable=[head],
            optimizer=self.optimizer,
            lr=of_stage("optimizer.lr", self.optimizer.lr, 0, 1),
            epochs=self.epochs,
            batch_size=batch_size,
            steps_per_epoch=self.steps_for(len(rows), batch_size),
            until=f"layer-{last}",
            prefix=list(model.blocks),
            views=1,
        )


def cnn_separability(
    p: int,
    model: LayerwiseModel,
    layer: int,
    train: LabelledData,
    test: LabelledData,
    preprocessing: AnyPreprocessing,
    recipe: Probe | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> float:
    """CNN-p-separability of a layer's maps, at the level that the layer predicts.

    A classifier of ``p`` convolutions, 2x2 averages and one linear layer is trained on the frozen layer's maps of all
    rows of ``train``, without augmentation; what is returned is its accuracy on ``test`` after the last epoch.
    The paper can be read as if its probes saw the 2x2 averages alone: these see the map.

    Raises UsageError for p < 1 or a layer that the model lacks, DataError where no row of either set is labelled.
    """
    check("p", p, least=1)
    check_layer(model, layer)
    level = train.taxonomy.level_index(model.levels_at[layer - 1])
    for what, data in (("training", train), ("test", test)):
        if not (data.labels[:, level] >= 0).any():
            raise DataError(f"no {what} row is labelled at level {train.taxonomy.levels[level]!r}: choose another set")
    probe = copy.deepcopy(model)
    probe.cut(layer)
    probe.hidden = p
    runtime = Runtime.choose(device, precision)
    nothing = train.subset([])
    Engine(recipe or Probe(), probe, train, nothing, None, seed, runtime, preprocessing, Reporter(False)).run()
    name = f"layer-{layer}"
    outputs, labels = predict(probe, DeviceData(test, preprocessing, runtime.device), runtime, name)
    target = labels[:, level]
    return float((outputs.logits[name].argmax(1) == target)[target >= 0].float().mean())


def check_layer(model: LayerwiseModel, layer: int) -> None:
    """Raise UsageError for a layer that the model lacks."""
    if not 1 <= layer <= len(model.blocks):
        raise UsageError(f"there is no layer {layer}: choose one from 1 to {len(model.blocks)}")
