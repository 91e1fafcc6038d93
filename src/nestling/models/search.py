"""The network of *Weakly Supervised Representation Learning with Coarse Labels*: features for search, one classifier.

Search compares the backbone's pooled features, and of texts their words. The losses see the features through a head of
two layers, where there is one, which keeps what they ask for from deforming them (Table 2, CoIns**).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.errors import UsageError
from nestling.models.heads import Calibration
from nestling.models.model import Model, Outputs
from nestling.models.text import TextBackbone
from nestling.models.words import Words, beside
from nestling.taxonomy import Taxonomy


@dataclass(frozen=True, eq=False)
class EarlierRows:
    """The instance rows that a run before ended with."""

    numbers: Tensor
    """(n,) int64: of the training rows in their source."""
    weight: Tensor
    """(n, d)."""
    velocity: Tensor
    """(n, d)."""


class SearchModel(Model):
    """A backbone, an optional head of two layers, and a linear classifier of one level without bias.

    Parameters
    ----------
    backbone: follows the stage protocol of ``models.backbones``. Of texts search compares their words, too.
    taxonomy: of the labels.
    config: how to build this model again.
    level: the level that is classified, its only output.
    cosine: features become f / |f| / T and weights w / |w|: the cosine softmax.
    temperature: T; with ``learn_temperature`` it is where a weight of the model starts.
    mlp: features behind the head; None for no head.
    probe: the classifier's gradient ends at the features: it tells what they are worth and shapes nothing.

    Raises UsageError for an unknown level, and for a temperature that is not above 0.
    """

    def __init__(
        self,
        backbone: nn.Module,
        taxonomy: Taxonomy,
        config: dict[str, Any],
        *,
        level: str,
        cosine: bool = False,
        temperature: float = 0.1,
        learn_temperature: bool = False,
        mlp: int | None = None,
        probe: bool = False,
    ) -> None:
        super().__init__(taxonomy, config)
        if not temperature > 0:
            raise UsageError(f"temperature must be above 0, got {temperature}")
        if mlp is not None and mlp < 1:
            raise UsageError(f"mlp must be at least 1, got {mlp}")
        self.backbone, self.cosine, self.probe = backbone, cosine, probe
        self.words = Words() if isinstance(backbone, TextBackbone) else None
        self.earlier: EarlierRows | None = None
        """What instance rows begin with, where they go on from another run's."""
        self.level = taxonomy.levels[taxonomy.level_index(level)]
        channels: int = backbone.channels[-1]  # type: ignore[index]
        self.dimension = mlp or channels
        """Of the features that the losses see."""
        self.projection: nn.Module = nn.Identity()
        if mlp is not None:
            self.projection = nn.Sequential(
                nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, mlp)
            )
        self.classifier = nn.Linear(self.dimension, taxonomy.width(self.level), bias=False)
        self.first_temperature = temperature
        # As a factor on the first one, so that weight decay draws it there and not to 1.
        self.log_factor = nn.Parameter(torch.zeros(())) if cosine and learn_temperature else None
        self.calibration = Calibration({self.level: (self.dimension, taxonomy.width(self.level))})

    @property
    def outputs(self) -> tuple[str, ...]:
        """The one level that is classified."""
        return (self.level,)

    @property
    def flat(self) -> bool:
        return len(self.taxonomy.levels) > 1 and self.level == self.taxonomy.levels[-1]

    @property
    def temperature(self) -> Tensor | float:
        """T of the cosine softmax, as it is now."""
        return self.first_temperature if self.log_factor is None else self.first_temperature * self.log_factor.exp()

    def parts(self, until: str) -> list[nn.Module]:
        """All of it, the temperature included."""
        if until != self.level:
            raise UsageError(f"this network has one output, {self.level!r}; got {until!r}")
        return [self]

    def forward(self, images: Tensor, until: str | None = None) -> Outputs:
        embedding = self.backbone(images)[-1].mean((2, 3))
        features, weight = self.projection(embedding), self.classifier.weight
        if self.cosine:
            features = F.normalize(features.float(), dim=1) / self.temperature
            weight = F.normalize(weight, dim=1)
        logits = F.linear(features.detach() if self.probe else features, weight)
        if self.words is not None:
            # Read in training, too, where words are counted; losses do not look at the embedding.
            read = self.words.read(images)
            embedding = embedding if self.training else beside(embedding, read)
        return Outputs({self.level: logits}, {self.level: features}, embedding)
