"""Backbones by name. A backbone returns one feature map per stage, from the finest resolution to the coarsest.

The stage protocol, which a backbone of one's own follows: ``backbone(images) -> list of maps`` and
``backbone.channels: tuple[int, ...]``, the channels of each map.
"""

from __future__ import annotations

import math
import re
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from nestling.data.text import is_text
from nestling.errors import UsageError, unknown
from nestling.models.resnet import BOTTLENECKED, RESNETS, ResNet
from nestling.models.text import PREFIX as TEXT
from nestling.models.text import TextBackbone
from nestling.models.timm_backbones import PREFIX, timm_backbone

WIDEST = 2**16
LONGEST_NAME = 1000
MOST_CONVOLUTIONS = 256


@runtime_checkable
class Backbone(Protocol):
    """What a model asks of its backbone."""

    channels: tuple[int, ...]

    def __call__(self, images: Tensor) -> list[Tensor]: ...


def conv_block(inputs: int, outputs: int, norm: str, kernel: tuple[int, int] = (3, 3)) -> nn.Sequential:
    """Convolution that keeps the size, batch norm (``norm`` 'batch' or 'none') and ReLU."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=norm == "none")]
    if norm == "batch":
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


class ConvBackbone(nn.Module):
    """Stages of 3x3 convolutions, with 2x2 max pooling between stages.

    Parameters
    ----------
    channels: channels of the input images.
    widths: for each stage the widths of its convolutions, e.g. ``[[8, 16], [32], [64]]``.
    norm: 'batch' or 'none'.
    dropout: the share of a map that is dropped after each pooling.
    """

    def __init__(self, channels: int, widths: list[list[int]], norm: str = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        stages, previous = [], channels
        for number, stage in enumerate(widths):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            if number and dropout:
                layers.append(nn.Dropout(dropout))
            for width in stage:
                layers.append(conv_block(previous, width, norm))
                previous = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(stage[-1] for stage in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps


def auto_backbone(input_shape: tuple[int, int, int]) -> str:
    """The name behind ``auto`` for images of ``(channels, height, width)``: small networks that train on two cores."""
    channels, height, width = input_shape
    if is_text(input_shape):
        return "text:48/64/96"
    side = min(height, width)
    if side <= 16:
        return "conv:8-16/32/64"
    if channels == 1 and side <= 32:
        return "conv:16/32-32/64-64"
    return "conv:32/64/128-128" if side <= 64 else "resnet18"


def build_backbone(
    name: str, input_shape: tuple[int, int, int], norm: str = "batch", dropout: float = 0.0
) -> nn.Module:
    """A backbone by name: ``conv:8-16/32/64`` (widths; ``/`` pools), ``resnet18``, ``resnet18-16`` (first width).

    ``timm:NAME`` is a model of timm, ``text:48/64/96`` a network for texts. ``auto`` is resolved by ``auto_backbone``
    before. Raises UsageError for an unknown name, inputs that it does not take or that are too small for it, or
    ``dropout``, after each pooling, where there is no such place.
    """
    channels, height, width = input_shape
    if is_text(input_shape) != name.startswith(TEXT):
        takes, are = ("texts", "pictures") if name.startswith(TEXT) else ("pictures", "texts")
        raise UsageError(f"the backbone {name!r:.80} takes {takes}, and the inputs are {are}: leave --backbone out")
    if name.startswith(TEXT):
        return TextBackbone(widths_of(name.removeprefix(TEXT), name, "text:48/64/96"), norm, dropout)
    if dropout and not name.startswith("conv:"):
        raise UsageError(f"the backbone {name!r} has no dropout: use dropout = 0, or a 'conv:…' backbone")
    if name.startswith(PREFIX):
        return timm_backbone(name, input_shape, norm)
    if name.startswith("conv:"):
        convolutions = 1 + name.count("-") + name.count("/")
        if len(name) > LONGEST_NAME or convolutions > MOST_CONVOLUTIONS:
            raise UsageError(
                f"the backbone {name!r:.80} has {len(name)} characters and {convolutions} convolutions: expected at "
                f"most {LONGEST_NAME} and {MOST_CONVOLUTIONS}"
            )
        try:
            widths = [[int(w) for w in stage.split("-")] for stage in name.removeprefix("conv:").split("/")]
        except ValueError:
            widths = []
        if not widths or min(map(min, widths)) < 1 or max(map(max, widths)) > WIDEST:
            raise UsageError(
                f"cannot read the backbone {name!r:.80}: expected widths of 1 to {WIDEST} like 'conv:8-16/32/64', "
                "where '/' halves the map"
            )
        smallest = 2 ** (len(widths) - 1)
        if min(height, width) < smallest:
            raise UsageError(
                f"the backbone {name!r:.80} needs images of at least {smallest} pixels a side, got {height}x{width}: "
                "use fewer stages or a larger --image-size"
            )
        return ConvBackbone(channels, widths, norm, dropout)
    match = re.fullmatch(r"(resnet\d+)(?:-(\d{1,4}))?", name)
    if match is None or match[1] not in RESNETS:
        raise unknown("backbone", name, ["auto", "conv:8-16/32/64", *RESNETS, "timm:NAME", "text:48/64/96"])
    if norm != "batch":
        raise UsageError(
            f"the backbone {name!r} has batch norm in every block: use norm = 'batch', or a 'conv:…' backbone"
        )
    first = int(match[2] or 64)
    if first < 1:
        raise UsageError(f"the first width of the backbone {name!r} must be at least 1, such as {match[1]}-16")
    small = min(height, width) <= 64
    return ResNet(channels, RESNETS[match[1]], first, small, bottlenecks=match[1] in BOTTLENECKED)


def widths_of(text: str, name: str, example: str) -> list[int]:
    """``48/64/96`` as numbers. Raises UsageError for anything else."""
    try:
        widths = [int(width) for width in text.split("/")] if len(text) < LONGEST_NAME else []
    except ValueError:
        widths = []
    if not 1 <= len(widths) <= 8 or min(widths) < 1 or max(widths) > WIDEST:
        raise UsageError(
            f"cannot read the backbone {name!r:.80}: expected up to 8 widths of 1 to {WIDEST} like {example!r}"
        )
    return widths


def num_parameters(module: nn.Module) -> int:
    """How many numbers the module learns."""
    return sum(math.prod(p.shape) for p in module.parameters())
