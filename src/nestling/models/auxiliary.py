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
    cells: 4, or 1 for a map of one position, whose four averages would be the same.
    matching: what similarity is matched on, where the layer is trained so.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        width: int,
        classes: int,
        norm: str,
        *,
        cells: int = 4,
        matching: Matching | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.cells = cells
        self.matching = matching
        widths = [inputs, *[width] * hidden]
        self.hidden = nn.Sequential(*(Block(a, b, None, norm) for a, b in itertools.pairwise(widths)))
        self.norm = nn.BatchNorm2d(widths[-1]) if norm == "batch" else nn.Identity()
        self.linear = nn.Linear(cells * widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (b, inputs, h, w) to logits (b, classes) and features (b, cells x width)."""
        maps = self.hidden(x)
        features = self.norm(quadrant_averages(maps) if self.cells == 4 else maps).flatten(1)
        return self.linear(features), features


class Matching(nn.Module):
    """What similarity is matched on (Nøkland and Eidnes 2019): a convolution, and each channel's standard deviation.

    Parameters
    ----------
    channels: of the layer's map, and of the convolution.
    size: 3, or 1 for a map of one position, whose channels stand for themselves.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, channels, h, w) to features (b, channels) in float32."""
        positions = self.conv(x).flatten(2).float()
        return positions.std(2) if positions.shape[2] > 1 else positions[:, :, 0]
