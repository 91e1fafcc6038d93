"""Calibration of heads: a temperature and, optionally, a rejection class for each (nested learning, Section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.models.by_level import ByLevel


class Calibration(nn.Module):
    """Turns the logits of a head into probabilities of its real classes and the probability of rejection.

    Parameters
    ----------
    sizes: for each head the dimension of its bottleneck and its number of columns.
    """

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes
        self.heads = tuple(sizes)
        self.temperature: Tensor
        self.rejection_temperature: Tensor
        self.register_buffer("temperature", torch.ones(len(sizes)))
        self.register_buffer("rejection_temperature", torch.ones(len(sizes)))
        self.rejection = ByLevel()

    def add_rejection(self) -> ByLevel:
        """Give every head a second linear layer, on normalised features, with one more class: the last one rejects."""
        device = self.temperature.device
        for head, (dimension, width) in self.sizes.items():
            self.rejection[head] = nn.Linear(dimension, width + 1, device=device)
        return self.rejection

    def reset(self) -> None:
        """Forget what was fitted: temperatures of 1, no rejection layers."""
        self.temperature.fill_(1)
        self.rejection_temperature.fill_(1)
        self.rejection.clear()

    def rejection_logits(self, head: str, features: Tensor) -> Tensor:
        """The logits (b, width + 1) of the rejection layer, from bottlenecks (b, d) that it normalises."""
        return self.rejection[head](F.normalize(features.float(), dim=1))

    def set_temperatures(self, head: str, temperature: float, rejection: float = 1.0) -> None:
        """Divide the logits of ``head``, and those of its rejection layer, from now on."""
        self.temperature[self.heads.index(head)] = temperature
        self.rejection_temperature[self.heads.index(head)] = rejection

    def forward(
        self, head: str, logits: Tensor, features: Tensor, reject: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From logits (b, width) and features (b, d) of a head: probabilities, rejection, and renormalised ones.

        The probabilities of the real classes (b, width) sum to 1 - rejection; the rejection (b,) is 0 without a
        rejection layer or with ``reject=False``. The last, (b, width), are those of the real classes alone: they sum to
        1 also where the rejection leaves nothing that float32 can hold.
        """
        number = self.heads.index(head)
        if reject and head in self.rejection:
            scores = self.rejection_logits(head, features) / self.rejection_temperature[number]
            probabilities = scores.softmax(1)
            return probabilities[:, :-1], probabilities[:, -1], scores[:, :-1].softmax(1)
        probabilities = (logits.float() / self.temperature[number]).softmax(1)
        return probabilities, torch.zeros_like(probabilities[:, 0]), probabilities
