"""The trunk of *Shallow Learning for Deep Networks* (Belilovsky et al. 2019): blocks that are trained one by one.

x_{j+1} = rho W_j P_j x_j (Eq. 1): a downsampling where there is one, a 3x3 convolution, and ReLU. Widths double where
the map is halved (Section 4). Any other sequence of blocks does as well: VGG, residual blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from nestling.errors import UsageError, listed, unknown
from nestling.models.backbones import ConvBackbone, build_backbone
from nestling.models.lean import InPlaceReLU
from nestling.models.resnet import ResNet
from nestling.models.timm_backbones import PREFIX, timm_layers

DOWNSAMPLINGS = ("space-to-depth", "strided", "average", "max")


@dataclass(frozen=True, kw_only=True)
class Vgg:
    """What a VGG network is made of."""

    widths: tuple[int, ...]
    """Of the convolutions."""
    pooled: tuple[int, ...]
    """Which of them, from 0, follow a pooling."""
    connected: int | None = None
    """Width of a fully connected layer behind one pooling more."""
    dropout: float = 0.0
    """Share of a map that is left out before the next layer, in training."""


VGG = {
    "vgg11": Vgg(widths=(64, 128, 256, 256, 512, 512, 512, 512), pooled=(1, 2, 4, 6)),
    "vgg13": Vgg(widths=(64, 64, 128, 128, 256, 256, 512, 512, 512, 512), pooled=(2, 4, 6, 8)),
    "vgg8b": Vgg(widths=(128, 256, 256, 512, 512, 512), pooled=(2, 4, 5), connected=1024, dropout=0.2),
}
"""Simonyan and Zisserman 2015, A and B; Nøkland and Eidnes 2019, VGG8B."""


class Block(nn.Module):
    """One layer: an optional downsampling P, a 3x3 convolution, batch norm unless ``norm`` is 'none', ReLU.

    Maps (b, inputs, h, w) to (b, outputs, h / 2, w / 2) or, without downsampling, (b, outputs, h, w). ``dropout`` is
    that share of the inputs which is left out in training; a convolution that ``covers`` a map of that height and width
    is a fully connected layer, to (b, outputs, 1, 1).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        downsampling: str | None,
        norm: str,
        *,
        dropout: float = 0.0,
        covers: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.downsampling = downsampling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # Dinh et al. 2017: the four spatially decimated copies become channels; nothing is lost.
        pools = {"space-to-depth": nn.PixelUnshuffle(2), "average": nn.AvgPool2d(2), "max": nn.MaxPool2d(2)}
        self.down = pools.get(downsampling or "", nn.Identity())
        self.copies = 4 if downsampling == "space-to-depth" else 1
        """Channels that the convolution sees of each channel of the input."""
        stride, padding = 2 if downsampling == "strided" else 1, 0 if covers else 1
        self.conv = nn.Conv2d(inputs * self.copies, outputs, covers or 3, stride, padding, bias=norm == "none")
        self.norm = nn.BatchNorm2d(outputs) if norm == "batch" else nn.Identity()
        self.activation = InPlaceReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(self.down(self.dropout(x)))))

    @property
    def can_be_identity(self) -> bool:
        """Whether some weights leave non-negative maps as they are (Proposition 3.1)."""
        same = self.conv.in_channels == self.conv.out_channels and self.conv.kernel_size == (3, 3)
        return self.downsampling is None and same and isinstance(self.norm, nn.Identity)

    def make_identity(self) -> None:
        """W = Id and no bias: as rho(rho(x)) = rho(x), the block then changes nothing (Proposition 3.1)."""
        nn.init.dirac_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)


@dataclass(frozen=True)
class Trunk:
    """Blocks, and the channels, height and width of each one's map."""

    blocks: list[nn.Module]
    channels: list[int]
    shapes: list[tuple[int, int]]
    """Height and width of each map."""

    def doublings(self) -> list[int]:
        """How often the width has doubled up to each layer: where the map shrinks and the channels grow (Section 4)."""
        found = [0] * len(self.blocks)
        for j in range(1, len(self.blocks)):
            shrinks = self.shapes[j][0] < self.shapes[j - 1][0]
            found[j] = found[j - 1] + (shrinks and self.channels[j] > self.channels[j - 1])
        return found


def conv_trunk(
    input_shape: tuple[int, int, int],
    widths: list[int],
    downsample_at: tuple[int, ...],
    downsampling: str,
    norm: str,
    halve_input: bool = False,
    dropout: float = 0.0,
) -> Trunk:
    """Blocks of these widths on images (channels, height, width).

    ``downsample_at`` counts from 0; ``halve_input`` puts an invertible downsampling before the first block, as for
    ImageNet; ``dropout`` is of the maps, not of the images. Raises UsageError for an unknown downsampling, one of a map
    of odd size, or one at no block.
    """
    if downsampling not in DOWNSAMPLINGS:
        raise unknown("downsampling", downsampling, DOWNSAMPLINGS)
    if wrong := [j for j in downsample_at if not 0 <= j < len(widths)]:
        raise UsageError(f"downsample_at = {wrong[0]} is no layer: the {len(widths)} layers count from 0")
    channels, height, width = input_shape
    blocks, shapes = [], []
    for j, outputs in enumerate(widths):
        kinds = ["space-to-depth"] * (halve_input and j == 0) + [downsampling] * (j in downsample_at)
        for _ in kinds:
            height, width = halved(height, width, j)
        if len(kinds) == 2:
            raise UsageError("the first layer halves the image already: leave 0 out of downsample_at")
        blocks.append(Block(channels, outputs, kinds[0] if kinds else None, norm, dropout=dropout if j else 0.0))
        channels = outputs
        shapes.append((height, width))
    return Trunk(list(blocks), list(widths), shapes)


def halved(height: int, width: int, block: int) -> tuple[int, int]:
    """The size of a map behind the downsampling of a block, from 0. Raises UsageError where it is odd."""
    if height % 2 or width % 2:
        raise UsageError(
            f"layer {block + 1} would halve a map of {height}x{width}, whose size is odd: downsample at fewer "
            "layers, or choose an --image-size that can be halved"
        )
    return height // 2, width // 2


def doubling_widths(first: int, num_blocks: int, downsample_at: tuple[int, ...]) -> list[int]:
    """M, the first layer's, doubled at each downsampling behind it (Section 4)."""
    return [first * 2 ** sum(0 < d <= j for d in downsample_at) for j in range(num_blocks)]


def named_trunk(name: str, input_shape: tuple[int, int, int], norm: str) -> Trunk:
    """The layers of a known network: vgg11, vgg13, vgg8b (or vgg11-16, by first width), residual blocks, ``conv:…``.

    ``timm:NAME`` is a model of timm, each stage of which is a layer.
    """
    match = re.fullmatch(r"(vgg\d+b?)(?:-(\d{1,4}))?", name)
    if match and match[1] in VGG:
        return vgg_trunk(VGG[match[1]], int(match[2] or VGG[match[1]].widths[0]), input_shape, norm)
    if name.startswith("vgg"):
        raise unknown("backbone", name, VGG)
    if name.startswith(PREFIX):
        layers, maps = timm_layers(name, input_shape, norm)
        return Trunk(layers, [m[0] for m in maps], [m[1:] for m in maps])
    backbone = build_backbone(name, input_shape, norm)
    if isinstance(backbone, ResNet):
        blocks = [backbone.stem, *(block for stage in backbone.stages for block in stage)]  # type: ignore[union-attr]
    elif isinstance(backbone, ConvBackbone):
        blocks = list(backbone.stages)
    else:
        raise UsageError(
            f"the backbone {name!r} is no sequence of layers: use one of {listed(VGG)}, resnet18 or conv:…"
        )
    return measured(blocks, input_shape)


def vgg_trunk(vgg: Vgg, first: int, input_shape: tuple[int, int, int], norm: str) -> Trunk:
    """A VGG network whose first layer has so many channels, all others in proportion."""
    widths = [w * first // vgg.widths[0] or 1 for w in vgg.widths]
    trunk = conv_trunk(input_shape, widths, vgg.pooled, "max", norm, dropout=vgg.dropout)
    if vgg.connected is not None:
        covers = halved(*trunk.shapes[-1], len(widths))
        outputs = vgg.connected * first // vgg.widths[0] or 1
        trunk.blocks.append(Block(widths[-1], outputs, "max", norm, dropout=vgg.dropout, covers=covers))
        trunk.channels.append(outputs)
        trunk.shapes.append((1, 1))
    return trunk


def measured(blocks: list[nn.Module], input_shape: tuple[int, int, int]) -> Trunk:
    """A trunk of any blocks, whose maps are measured by running a copy on the meta device."""
    import copy

    import torch

    images = torch.empty((1, *input_shape), device="meta")
    channels, shapes = [], []
    for block in blocks:
        output = copy.deepcopy(block).to("meta").eval()(images)
        channels.append(output.shape[1])
        shapes.append((output.shape[2], output.shape[3]))
        images = output
    return Trunk(blocks, channels, shapes)
