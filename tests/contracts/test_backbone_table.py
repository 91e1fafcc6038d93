"""One row for every backbone: its maps, and what it refuses. A class without a row fails."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from discover import classes_of
from torch import nn

import fake_timm
from nestling.data.text import BUCKETS
from nestling.errors import UsageError
from nestling.models.backbones import Backbone, ConvBackbone, build_backbone
from nestling.models.convnet import Block
from nestling.models.resnet import RESNETS, BasicBlock, ResNet
from nestling.models.text import SideBySide, TextBackbone
from nestling.models.timm_backbones import TimmBackbone

BLOCKS = {BasicBlock, Block, SideBySide}
"""Parts of backbones, which return one tensor."""


@dataclass(frozen=True)
class Row:
    name: str
    kind: type[nn.Module]
    shape: tuple[int, int, int]
    maps: tuple[tuple[int, int, int], ...]
    """Channels, height, width; from the finest resolution to the coarsest."""
    wrong: tuple[str, tuple[int, int, int], str, str]
    """Name, input shape, norm and what the error says."""


TABLE = [
    Row(
        "conv:4-5/6/7-8",
        ConvBackbone,
        (2, 12, 9),
        ((5, 12, 9), (6, 6, 4), (8, 3, 2)),
        ("conv:4-5/6/7-8", (2, 12, 3), "batch", "at least 4 pixels a side, got 12x3"),
    ),
    Row(
        "text:6/7",
        TextBackbone,
        (2, 1, 9),
        ((6, 1, 9), (7, 1, 5)),
        ("text:6/7", (3, 16, 16), "batch", "takes texts, and the inputs are pictures"),
    ),
    Row("conv:6", ConvBackbone, (1, 1, 1), ((6, 1, 1),), ("conv:0", (1, 8, 8), "batch", "cannot read the backbone")),
    *(
        Row(
            f"{name}-4",
            ResNet,
            (3, 18, 32),
            ((4, 18, 32), (8, 9, 16), (16, 5, 8), (32, 3, 4)),
            (f"{name}-4", (3, 32, 32), "none", "has batch norm in every block"),
        )
        for name in RESNETS
    ),
    Row(
        "timm:stages",
        TimmBackbone,
        (3, 16, 24),
        ((4, 8, 12), (6, 4, 6), (8, 2, 3)),
        ("timm:stages", (3, 16, 24), "none", "has norms of its own"),
    ),
]


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_timm.install(monkeypatch)


def test_every_backbone_has_a_row() -> None:
    modules = {kind for kind in classes_of("models") if issubclass(kind, nn.Module)}
    backbones = {
        kind for kind in modules if kind.__module__.endswith(("backbones", "resnet", "convnet", "models.text"))
    } - BLOCKS
    assert backbones == {row.kind for row in TABLE}
    assert {row.name.removesuffix("-4") for row in TABLE if row.kind is ResNet} == set(RESNETS)


def inputs_for(row: Row, count: int) -> torch.Tensor:
    """Noise as the backbone takes it."""
    generator = torch.Generator().manual_seed(0)
    if row.kind is TextBackbone:
        return torch.randint(1, BUCKETS - 1, (count, *row.shape), generator=generator, dtype=torch.int32)
    return torch.randn(count, *row.shape, generator=generator)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_backbones(row: Row) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        backbone = build_backbone(row.name, row.shape)
    assert type(backbone) is row.kind and isinstance(backbone, Backbone)
    assert backbone.channels == tuple(channels for channels, _, _ in row.maps)
    images = inputs_for(row, 3)
    backbone.eval()
    with torch.no_grad():
        maps = backbone(images)
        assert [tuple(m.shape) for m in maps] == [(3, *shape) for shape in row.maps]
        assert all(torch.isfinite(m).all() and (m >= 0).all() for m in maps), "not finite, or not after a ReLU"
        # In evaluation mode a row does not depend on its batch, and every one is looked at.
        for whole, alone in zip(maps, backbone(images[1:2])):
            torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)
        images[0] += 1
        assert all(not torch.equal(before[0], after[0]) for before, after in zip(maps, backbone(images)))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_weight_of_a_backbone_is_used(row: Row) -> None:
    backbone = build_backbone(row.name, row.shape).train()
    sum(m.square().sum() for m in backbone(inputs_for(row, 4))).backward()  # type: ignore[union-attr]
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_what_backbones_refuse(row: Row) -> None:
    name, shape, norm, message = row.wrong
    with pytest.raises(UsageError, match=message):
        build_backbone(name, shape, norm)
