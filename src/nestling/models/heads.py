"""Calibration of a model's heads: a temperature and, optionally, a rejection class for each (nested learning, Section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.rejection = nn.ModuleDict()

    def add_rejection(self) -> nn.ModuleDict:
        """Give every head a second linear layer, on normalised features, with one more class: the last one rejects."""
        device = self.temperature.device
        for head, (dimension, width) in self.sizes.items():
            self.rejection[head] = nn.Linear(dimension, width + 1, device=device)
        return self.rejection

    def rejection_logits(self, head: str, features: Tensor) -> Tensor:
        """The logits (b, width + 1) of the rejection layer, from bottlenecks (b, d) that it normalises."""
        return self.rejection[head](F.normalize(features.float(), dim=1))

    def set_temperatures(self, head: str, temperature: float, rejection: float = 1.0) -> None:
        """Divide the logits of ``head``, and those of its rejection layer, from now on."""
        self.temperature[self.heads.index(head)] = temperature
        self.rejection_temperature[self.heads.index(head)] = rejection

    def forward(self, head: str, logits: Tensor, features: Tensor, reject: bool = True) -> tuple[Tensor, Tensor]:
        """Probabilities of the real classes (b, width), summing to 1 - rejection, and the rejection (b,).

        Without a rejection layer, or with ``reject=False``, the rejection is 0.
        """
        number = self.heads.index(head)
        if reject and head in self.rejection:
            probabilities = (self.rejection_logits(head, features) / self.rejection_temperature[number]).softmax(1)
            return probabilities[:, :-1], probabilities[:, -1]
        probabilities = (logits.float() / self.temperature[number]).softmax(1)
        return probabilities, torch.zeros_like(probabilities[:, 0])
