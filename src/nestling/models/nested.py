"""The network of Figure 1 of *Nested Learning for Multi-Level Classification* (Achddou et al. 2021), over any backbone.

The coarsest level is read from the deepest, narrowest map. Every finer level upsamples the map of the level before,
joins a skip from an earlier map of the backbone, and has its own low-dimensional bottleneck and linear head (Section
2.1): without the skips X -> f_i -> f_{i+1} is a Markov chain, and a finer bottleneck cannot know more than a coarser;
not so of texts, whose words enter every bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.errors import UsageError
from nestling.models.backbones import conv_block
from nestling.models.by_level import ByLevel
from nestling.models.heads import Calibration
from nestling.models.model import Model, Outputs
from nestling.models.text import TextBackbone
from nestling.models.words import NETWORK, LinearWords, beside
from nestling.taxonomy import Taxonomy


class NestedModel(Model):
    """One network, one bottleneck and head per level.

    Parameters
    ----------
    backbone: follows the stage protocol of ``models.backbones``. Of texts a linear model of the words stands beside it,
        whose scores are added to the logits, and which learns by itself; their softmax joins the features.
    taxonomy: its levels are the outputs, coarse to fine.
    config: how to build this model again.
    heads: the levels that have a head; by default all. The end-to-end twin and the flat baselines are this same
        network with a head on the finest level alone.
    skips: whether finer levels see earlier maps of the backbone.
    norm: 'batch' or 'none', for the decoder's convolutions.
    plain: no decoder: every head reads the last map, as one softmax on a backbone usually does.
    hidden: units of a hidden layer between a level's pooled map and its linear layer, coarse to fine, as the authors'
        network for CIFAR-10 has them: their output is then the bottleneck. 0, or nothing at all, is none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        taxonomy: Taxonomy,
        config: dict[str, Any],
        heads: tuple[str, ...] | None = None,
        skips: bool = True,
        norm: str = "batch",
        plain: bool = False,
        hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__(taxonomy, config)
        if hidden and (len(hidden) != len(taxonomy.levels) or min(hidden) < 0):
            raise UsageError(
                f"hidden must be a number of units for each of the levels {', '.join(taxonomy.levels)}, 0 for none; "
                f"got {hidden!r}"
            )
        heads = heads or taxonomy.levels
        channels: tuple[int, ...] = backbone.channels  # type: ignore[assignment]
        self.backbone = backbone
        self.skips = skips
        width = max(channels[-1] // 2, 4)
        texts = isinstance(backbone, TextBackbone)
        self.decoder = ByLevel()
        self.hidden = ByLevel()
        self.head = ByLevel()
        self.source: dict[str, int] = {}
        previous, sizes = channels[-1], {}
        for number, level in enumerate(taxonomy.levels):
            if number and not plain:
                # With more levels than maps, the finest levels share the first map.
                self.source[level] = max(len(channels) - 1 - number, 0)
                joined = previous + (channels[self.source[level]] if skips else 0)
                self.decoder[level] = conv_block(joined, width, norm, (1, 3) if texts else (3, 3))
                previous = width
            if level in heads:
                size = previous
                if hidden and hidden[number]:
                    size = hidden[number]
                    self.hidden[level] = nn.Sequential(nn.Linear(previous, size), nn.ReLU(inplace=True))
                self.head[level] = nn.Linear(size, taxonomy.width(level))
                sizes[level] = (size, taxonomy.width(level))
        self.words: LinearWords | None = None
        if texts:
            self.words = LinearWords({level: width for level, (_, width) in sizes.items()})
            sizes = {level: (size + width, width) for level, (size, width) in sizes.items()}
        self.calibration = Calibration(sizes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The levels that have a head, coarse to fine."""
        return tuple(self.head)

    def parts(self, until: str) -> list[nn.Module]:
        """The modules that levels up to ``until`` are computed by: (theta_j, eta_j), j = 1..i, in P_i (Section 2.2)."""
        levels = self.taxonomy.levels[: self.taxonomy.level_index(until) + 1]
        return [
            self.backbone,
            *(self.decoder[level] for level in levels if level in self.decoder),
            *(self.hidden[level] for level in levels if level in self.hidden),
            *(self.head[level] for level in levels if level in self.head),
            *([] if self.words is None else [self.words]),
        ]

    def forward(self, images: Tensor, until: str | None = None) -> Outputs:
        maps = self.backbone(images)
        current = maps[-1]
        embedding = pooled = current.mean((2, 3))
        logits, features, apart = {}, {}, {}
        linear: dict[str, Tensor] = {}
        if self.words is not None:
            read = self.words.read(images)
            linear = self.words.score(read)
            # Losses do not look at it.
            embedding = embedding if self.training else beside(embedding, read)
        for level in self.taxonomy.levels:
            if level in self.decoder:
                skip = maps[self.source[level]]
                current = F.interpolate(current, size=skip.shape[-2:], mode="nearest")
                current = self.decoder[level](torch.cat([current, skip], 1) if self.skips else current)
                pooled = current.mean((2, 3))
            if level in self.head:
                features[level] = self.hidden[level](pooled) if level in self.hidden else pooled
                logits[level] = self.head[level](features[level])
                if self.words is not None:
                    apart[level] = logits[level], linear[level]
                    logits[level] = NETWORK * logits[level] + linear[level]
                    shares = linear[level].softmax(1).to(features[level].dtype)
                    features[level] = torch.cat([features[level], shares], 1)
            if level == until:
                break
        return Outputs(logits, features, embedding, apart)
