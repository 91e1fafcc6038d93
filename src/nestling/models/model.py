"""What every model of nestling is: a module from images to ``Outputs``, with a taxonomy and a calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nestling.models.heads import Calibration
from nestling.objectives import functional
from nestling.taxonomy import Taxonomy


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a forward pass returns; keys are names of outputs, which for a classifier of levels are the levels."""

    logits: dict[str, Tensor]
    """(b, width) each."""
    features: dict[str, Tensor]
    """(b, d) each: the bottleneck that enters the last linear layer; behind it, of texts, what the words say."""
    embedding: Tensor
    """(b, D): the pooled last map of the backbone, which search compares; of texts, but in training, the words, too."""
    apart: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """(b, width) each: of an output whose logits are a sum the parts that learn, each as if it stood alone."""

    def learners(self, name: str) -> list[Tensor]:
        """The scores (b, width), fp32, that labels of an output teach: its logits, or their parts."""
        return [scores.float() for scores in self.apart.get(name, (self.logits[name],))]


@dataclass(frozen=True, eq=False)
class Answers:
    """Probabilities over the columns of every level, coarse to fine, calibrated."""

    combined: dict[str, Tensor]
    """(b, width): Equation 2 of nested learning for a model with a head per level, sums for a flat one."""
    separate: dict[str, Tensor]
    """(b, width): each head by itself; real classes only, so a row sums to 1 - rejection."""
    rejection: dict[str, Tensor]
    """(b,): the probability of the rejection class."""


class Model(nn.Module, ABC):
    """Abstract. ``model(images, until=None) -> Outputs``; ``until`` names the last output that is needed."""

    calibration: Calibration

    def __init__(self, taxonomy: Taxonomy, config: dict[str, Any]) -> None:
        super().__init__()
        self.taxonomy = taxonomy
        self.config = config
        """What ``build_model`` needs to make this model again; JSON."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, in the order in which they are computed."""

    @abstractmethod
    def forward(self, images: Tensor, until: str | None = None) -> Outputs:
        """Images (b, c, h, w), normalised, to the outputs up to ``until``."""

    @abstractmethod
    def parts(self, until: str) -> list[nn.Module]:
        """The modules that the outputs up to ``until`` are computed by."""

    def answers(self, outputs: Outputs, reject: bool = True) -> Answers:
        """The calibrated probabilities of every level from which, or from a finer one, ``outputs`` has logits.

        ``reject=False`` leaves the rejection layers out, where there are any.
        """
        separate: dict[str, Tensor] = {}
        rejection: dict[str, Tensor] = {}
        real: dict[str, Tensor] = {}
        for level, logits in outputs.logits.items():
            answers = self.calibration(level, logits, outputs.features[level], reject)
            separate[level], rejection[level], real[level] = answers
        for finer, level in _finer_first(self.taxonomy.levels):
            if level not in separate and finer in separate:
                separate[level], real[level] = (
                    functional.aggregate(p[finer], self.taxonomy, level, of=finer) for p in (separate, real)
                )
                rejection[level] = rejection[finer]
        levels = [level for level in self.taxonomy.levels if level in separate]
        shares = [real[level] for level in levels]
        combined = shares if self.flat else functional.combine_levels(shares, self.taxonomy, levels)
        return Answers(
            dict(zip(levels, combined, strict=True)),
            {level: separate[level] for level in levels},
            {level: rejection[level] for level in levels},
        )

    def describe(self) -> dict[str, Any]:
        """What ``rebuild`` needs to make this model as it has become: ``config``, and what training changed."""
        return self.config

    @property
    def flat(self) -> bool:
        """Whether one head answers for all levels: then coarser answers are the ancestors of its finest one."""
        return len(self.outputs) == 1 and len(self.taxonomy.levels) > 1


def _finer_first(levels: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(levels[:0:-1], levels[-2::-1], strict=True))
