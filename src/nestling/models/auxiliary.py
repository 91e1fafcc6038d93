"""What a layer is trained under (*Shallow Learning for Deep Networks*, Section 3.1)."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from nestling.models.convnet import Block
from nestling.models.lean import quadrant_averages


class AuxiliaryClassifier(nn.Module):
    """C_j of Eq. 2: k - 1 convolutions with ReLU, averages over 2x2 quadrants, one linear layer.

    Parameters
    ----------
    inputs: channels of the layer's map.
    hidden: k - 1, the number of convolutions.
    width: their channels.
    classes: columns of the answer.
    norm: 'batch' normalises after each convolution and before the linear layer (papers' README), 'none' nowhere.
    """

    def __init__(self, inputs: int, hidden: int, width: int, classes: int, norm: str) -> None:
        super().__init__()
        self.width = width
        widths = [inputs, *[width] * hidden]
        self.hidden = nn.Sequential(*(Block(a, b, None, norm) for a, b in itertools.pairwise(widths)))
        self.norm = nn.BatchNorm2d(widths[-1]) if norm == "batch" else nn.Identity()
        self.linear = nn.Linear(4 * widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (b, inputs, h, w) to logits (b, classes) and features (b, 4 width)."""
        features = self.norm(quadrant_averages(self.hidden(x))).flatten(1)
        return self.linear(features), features
