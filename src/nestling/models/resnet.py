"""ResNet (He et al. 2016), for small and for large images, returning the map of every stage."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

RESNETS: dict[str, tuple[int, ...]] = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
}
"""Blocks per stage."""
BOTTLENECKED = ("resnet50",)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the middle ones of a quarter of the channels; the stride is the 3x3 one's."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Four stages of blocks; maps at strides 1, 2, 4, 8 for small images and 4, 8, 16, 32 otherwise.

    Parameters
    ----------
    channels: channels of the input images.
    blocks: blocks per stage.
    width: channels of the first stage, doubled at each of the others; of bottlenecks those of the middle ones.
    small_images: a 3x3 stem without downsampling (images of 32 or 64 pixels) instead of 7x7, stride 2 and pooling.
    bottlenecks: of three convolutions, with four times the channels, in place of basic blocks.
    """

    def __init__(
        self,
        channels: int,
        blocks: tuple[int, ...],
        width: int = 64,
        small_images: bool = True,
        bottlenecks: bool = False,
    ) -> None:
        super().__init__()
        block, wider = (Bottleneck, 4) if bottlenecks else (BasicBlock, 1)
        stem: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False)]
        if not small_images:
            stem = [nn.Conv2d(channels, width, 7, 2, 3, bias=False)]
        stem += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem, *([] if small_images else [nn.MaxPool2d(3, 2, 1)]))
        stages, previous = [], width
        for number, count in enumerate(blocks):
            outputs = wider * width * 2**number
            stages.append(
                nn.Sequential(
                    *(
                        block(previous if i == 0 else outputs, outputs, 2 if number and i == 0 else 1)
                        for i in range(count)
                    )
                )
            )
            previous = outputs
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(wider * width * 2**number for number in range(len(blocks)))

    def forward(self, images: Tensor) -> list[Tensor]:
        images = self.stem(images)
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps
