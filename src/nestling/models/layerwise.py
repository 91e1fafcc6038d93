"""A network whose every prefix is a classifier (*Shallow Learning for Deep Networks*, Section 3.1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestling.errors import UsageError
from nestling.models.auxiliary import AuxiliaryClassifier, Matching
from nestling.models.by_level import ByLevel
from nestling.models.convnet import Block, Trunk
from nestling.models.heads import Calibration
from nestling.models.model import Answers, Model, Outputs
from nestling.models.prune import narrow
from nestling.models.recompute import in_parts, recomputed
from nestling.taxonomy import Taxonomy


class LayerwiseModel(Model):
    """Blocks, and an auxiliary classifier behind each that has been trained.

    Outputs are named ``layer-1`` … after the block that they stand behind. A level is answered by the last classifier
    of that level or, with ``ensemble``, by the average of all of them, weighted 2^j on logits (Section 4).

    Parameters
    ----------
    trunk: the blocks.
    taxonomy: of the labels.
    config: how to build this model again.
    levels_at: the level that each block's classifier predicts.
    hidden, width, norm: of the classifiers; the width doubles where the trunk's does.
    ensemble: whether a level's classifiers answer together.

    Raises UsageError for a level that is named as an output.
    """

    def __init__(
        self,
        trunk: Trunk,
        taxonomy: Taxonomy,
        config: dict[str, Any],
        levels_at: Sequence[str],
        hidden: int,
        width: int,
        norm: str,
        ensemble: bool,
    ) -> None:
        super().__init__(taxonomy, config)
        if taken := {f"layer-{j + 1}" for j in range(len(trunk.blocks))} & set(taxonomy.levels):
            raise UsageError(f"a level is named {min(taken)!r}, as the output behind a layer is: rename the level")
        self.blocks = nn.ModuleList(trunk.blocks)
        self.auxiliary = ByLevel()
        self.levels_at = tuple(levels_at)
        self.hidden, self.norm, self.ensemble = hidden, norm, ensemble
        self.widths = [width * 2**times for times in trunk.doublings()]
        """Channels of each auxiliary classifier's convolutions."""
        self.channels = list(trunk.channels)
        self.cells = [1 if max(shape) == 1 else 4 for shape in trunk.shapes]
        """Averages that a classifier takes of each channel of a block's map."""
        self.recompute = False
        """Whether a layer that is trained keeps its input alone, and computes the rest again on the way back."""
        answered = [level for level in taxonomy.levels if level in levels_at]
        last = {level: len(levels_at) - 1 - self.levels_at[::-1].index(level) for level in answered}
        self.calibration = Calibration(
            {
                level: (self.cells[j] * (self.widths[j] if hidden else self.channels[j]), taxonomy.width(level))
                for level, j in last.items()
            }
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Of the blocks that have a classifier."""
        return tuple(self.auxiliary)

    @property
    def flat(self) -> bool:
        return len(self.calibration.heads) == 1

    def add_auxiliary_head(self, after: int, width: int | None = None, matching: bool = False) -> nn.Module:
        """A fresh classifier behind block ``after``, from 0, in place of an older one; ``width`` is M~_j by default.

        ``matching``: while it is trained, the features ``similarity-layer-…`` are there to be compared.
        """
        name, level, cells = f"layer-{after + 1}", self.levels_at[after], self.cells[after]
        channels = self.out_channels(after)
        head = AuxiliaryClassifier(
            channels,
            self.hidden,
            width or self.widths[after],
            self.taxonomy.width(level),
            self.norm,
            cells=cells,
            matching=Matching(channels, 1 if cells == 1 else 3) if matching else None,
        )
        device = self.calibration.temperature.device
        self.auxiliary[name] = head.to(device)
        return head

    def drop_matching(self, but: str | None = None) -> None:
        """Take away what similarity was matched on, behind the layer ``but`` excepted: it serves training alone."""
        for name in self.outputs:
            if name != but:
                self.head(name).matching = None

    def head(self, output: str) -> AuxiliaryClassifier:
        """The classifier of an output."""
        head = self.auxiliary[output]
        assert isinstance(head, AuxiliaryClassifier)
        return head

    def out_channels(self, block: int) -> int:
        """Of a block's map, which pruning makes fewer."""
        module = self.blocks[block]
        return module.conv.out_channels if isinstance(module, Block) else self.channels[block]

    def parts(self, until: str) -> list[nn.Module]:
        """The blocks up to an output, and its classifier."""
        return [*self.blocks[: self.number(until) + 1], self.auxiliary[until]]

    def level_of(self, output: str) -> str:
        """The level that an output predicts."""
        return self.levels_at[self.number(output)]

    def number(self, output: str) -> int:
        """The block, from 0, that an output stands behind."""
        return int(output.removeprefix("layer-")) - 1

    def forward(self, images: Tensor, until: str | None = None, since: int = 0) -> Outputs:
        """``since``: ``images`` are maps that so many blocks made; the classifiers of these and later maps answer."""
        current, logits, features = images, {}, {}
        for numbers in self.steps(since, until):
            current = self.run(numbers, current)
            name = f"layer-{(numbers or [since - 1])[-1] + 1}"
            if name in self.auxiliary and until in (None, name):
                logits[name], found = self.answer(name, current)
                features.update(found)
            if name == until:
                break
        for level in self.calibration.heads:
            voices = [name for name in self.outputs if name in logits and self.level_of(name) == level]
            if voices:
                logits[level] = self.vote(logits, voices) if self.ensemble else logits[voices[-1]]
                features[level] = features[voices[-1]]
        return Outputs(logits, features, current.mean((2, 3)))

    def steps(self, since: int, until: str | None) -> list[list[int]]:
        """The blocks to run, behind the maps that are given (no block at all comes first), up to an output.

        One at a time, unless maps are computed again: then those that are trained go in sqrt(n) runs of sqrt(n).
        """
        last = len(self.blocks) if until is None else self.number(until) + 1
        singles = [[]] * (since > 0) + [[j] for j in range(since, last)]
        if not self.recompute or until is None or not torch.is_grad_enabled():
            return singles
        trained = [j for j in range(since, last) if any(p.requires_grad for p in self.blocks[j].parameters())]
        size = math.ceil(math.sqrt(len(trained) or 1))
        return singles[: len(singles) - len(trained)] + [trained[i : i + size] for i in range(0, len(trained), size)]

    def run(self, numbers: list[int], x: Tensor) -> Tensor:
        """The map behind these blocks. A run of several keeps its input alone, the last one of all excepted."""
        blocks = [self.blocks[j] for j in numbers]
        if len(blocks) > 1 and numbers[-1] + 1 < len(self.blocks):
            return recomputed(nn.Sequential(*blocks), x)
        for block in blocks:
            x = block(x)
        return x

    def answer(self, name: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits of a classifier and the features of a map, those that similarity is matched on included."""
        head, matched = self.head(name), {}
        if head.matching is not None and head.training:
            if self.recompute:
                x, compared = in_parts(head.matching, x)
            else:
                compared = head.matching(x)
            matched[f"similarity-{name}"] = compared
        logits, features = head(x)
        return logits, {name: features, **matched}

    def vote(self, logits: dict[str, Tensor], names: list[str]) -> Tensor:
        """Z = sum_j 2^j z_j (Section 4), divided by the sum of the weights."""
        weights = [2.0 ** self.number(name) for name in names]
        total = sum(w / sum(weights) * logits[name] for w, name in zip(weights, names, strict=True))
        assert isinstance(total, Tensor)
        return total

    def answers(self, outputs: Outputs, reject: bool = True) -> Answers:
        """Of the levels; the layers' own answers are ``outputs.logits``."""
        answered = {level: outputs.logits[level] for level in self.calibration.heads if level in outputs.logits}
        return super().answers(Outputs(answered, outputs.features, outputs.embedding), reject)

    def prefix(self, layers: int) -> LayerwiseModel:
        """A working model of the first so many layers, uncalibrated. Raises UsageError without a classifier there."""
        if not 1 <= layers <= len(self.blocks) or f"layer-{layers}" not in self.auxiliary:
            raise UsageError(
                f"there is no classifier behind layer {layers}: choose one of {', '.join(self.outputs) or 'none yet'}"
            )
        model = copy.deepcopy(self)
        model.cut(layers)
        return model

    def become(self, blocks: Sequence[int], heads: Mapping[str, int], matching: Sequence[str] = ()) -> None:
        """Make the blocks as narrow, and give them the classifiers, that ``describe`` told of another model."""
        if len(blocks) > len(self.blocks):
            raise UsageError(f"{len(blocks)} layers are described, the network has {len(self.blocks)}")
        if len(blocks) < len(self.blocks):
            self.cut(len(blocks))
        for j, width in enumerate(blocks):
            if width != self.out_channels(j):
                narrow(self, j, torch.arange(width))
        for name, width in heads.items():
            self.add_auxiliary_head(self.number(name), width, name in matching)

    def cut(self, layers: int) -> None:
        """Drop all that comes behind the first so many layers."""
        self.blocks = self.blocks[:layers]
        for name in self.outputs:
            if self.number(name) >= layers:
                del self.auxiliary[name]
        self.levels_at = self.levels_at[:layers]
        sizes = {level: self.calibration.sizes[level] for level in self.taxonomy.levels if level in self.levels_at}
        self.calibration = Calibration(sizes).to(self.calibration.temperature.device)

    def describe(self) -> dict[str, Any]:
        """How to build this model again, as it has become: its blocks' widths and its classifiers."""
        heads = {name: self.head(name).width for name in self.outputs}
        matching = [name for name in self.outputs if self.head(name).matching is not None]
        widths = [self.out_channels(j) for j in range(len(self.blocks))]
        return {**self.config, "blocks": widths, "heads": heads, **({"matching": matching} if matching else {})}
