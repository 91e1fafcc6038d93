"""How much of images, labels and each other a nested network's bottlenecks hold: its paper's Sections 2.1 and 3.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.data.transforms import Preprocessing
from nestling.engine.predict import predict
from nestling.engine.runtime import Runtime
from nestling.evaluate.information import Estimate, Mine, entropy, mutual_information
from nestling.models.model import Model


@dataclass(frozen=True)
class Bottlenecks:
    """Lower bounds in nats, by level, coarse to fine."""

    inputs: Mapping[str, Estimate]
    """I(X; f_i). A bottleneck is a function of the image, so this has no bound but log n, and compares networks only
    where the same rows are read by the same critic."""
    labels: Mapping[str, Estimate]
    """I(f_i; Y_i), which Section 2.1 wants close to H(Y_i) where the label is a function of the image."""
    entropies: Mapping[str, float]
    """H(Y_i), of the rows labelled at the level."""
    ends: Estimate
    """I(f_1; f_m), of the coarsest bottleneck and the finest."""

    @property
    def lost(self) -> float:
        """I(X; f_1) - I(X; f_m): at least 0 without skips, by the data-processing inequality."""
        first, *_, last = self.inputs.values()
        return first.value - last.value

    @property
    def missing(self) -> float:
        """By how much I(X; f_1) or I(X; f_m) is below I(f_1; f_m) at least.

        The true ones never are, since both bottlenecks are functions of the image: above 0 the critic of the images
        has missed that much, and smaller differences between such estimates say nothing.
        """
        first, *_, last = self.inputs.values()
        return max(self.ends.value - min(first.value, last.value), 0.0)


def bottleneck_information(
    model: Model,
    preprocessing: Preprocessing,
    data: LabelledData,
    runtime: Runtime,
    seed: int = 0,
    settings: Mine | None = None,
) -> Bottlenecks:
    """Estimate them on rows that the model was not trained on; each critic learns from three fifths of them.

    Raises UsageError for fewer than 50 rows, in all or labelled at a level, and warns ``SaturatedWarning`` above log n.
    """
    runtime.prepare(model)
    outputs, _ = predict(model, DeviceData(data, preprocessing, runtime.device), runtime)
    images = preprocessing(data.images(np.arange(len(data)))).flatten(1).cpu()
    features = {level: f.cpu() for level, f in outputs.features.items() if level in data.taxonomy.levels}
    inputs = {level: mutual_information(images, f, seed, settings) for level, f in features.items()}
    labels, entropies = {}, {}
    for level, f in features.items():
        codes = data.labels[:, data.taxonomy.level_index(level)]
        known = codes >= 0
        one_hot = torch.eye(len(data.taxonomy.classes[level]))[torch.from_numpy(codes[known])]
        labels[level] = mutual_information(f[torch.from_numpy(known)], one_hot, seed, settings)
        entropies[level] = entropy(codes[known]) if known.any() else math.nan
    first, *_, last = features.values()
    return Bottlenecks(inputs, labels, entropies, mutual_information(first, last, seed, settings))
