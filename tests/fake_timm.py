"""A module with timm's interface, as far as nestling uses it: small models of every kind that timm has.

timm itself needs a torchvision that imports, which an installation of torch for the CPU does not have.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Stages(nn.Module):
    """As timm's ResNet and ConvNeXt: a stem, two stages one after the other, a norm and a classifier at the end."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 4, 3, 2, 1)
        self.act1 = nn.ReLU()
        self.feature_info = [
            {"num_chs": 4, "reduction": 2, "module": "act1"},
            {"num_chs": 6, "reduction": 4, "module": "stages.0"},
            {"num_chs": 8, "reduction": 8, "module": "stages.1"},
        ]
        self.pool = nn.MaxPool2d(2)
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.BatchNorm2d(8), nn.Linear(8, num_classes) if num_classes else nn.Identity())

    def after(self, x: Tensor, number: int) -> Tensor:
        """What happens to a stage's map before the next one."""
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        assert indices is None and not norm and not stop_early and output_fmt == "NCHW"
        maps = [self.act1(self.conv1(x))]
        x = self.pool(maps[0])
        for number, stage in enumerate(self.stages):
            x = stage(self.after(x, number))
            maps.append(x)
        return maps if intermediates_only else (x, maps)


class Doubled(Stages):
    """What a stage gets is not what the one before gave."""

    def after(self, x: Tensor, number: int) -> Tensor:
        return 2 * x if number else x


class Tokens(Stages):
    """As a vision transformer: weights of the model itself, and images of one size."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__(in_chans, num_classes)
        self.position = nn.Parameter(torch.ones(4, 4, 4))

    def after(self, x: Tensor, number: int) -> Tensor:
        assert number or x.shape[2:] == (4, 4), f"Input height ({4 * x.shape[2]}) doesn't match model (16)."
        return x if number else x + self.position


class Distilled(Stages):
    """A weight of the model itself that only its classifier reads."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__(in_chans, num_classes)
        self.token = nn.Parameter(torch.ones(4))


class Plain(nn.Module):
    """A model that gives no maps."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(in_chans, 4, 3)


MODELS: dict[str, type[nn.Module]] = {
    "stages": Stages, "doubled": Doubled, "tokens": Tokens, "distilled": Distilled, "plain": Plain,
}  # fmt: skip


def create_model(model_name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    assert not pretrained, "weights would be downloaded"
    # As in some models of timm, which cannot be made on the meta device.
    assert torch.linspace(0, 1, 2)[1].item() == 1
    return MODELS[model_name.split(".")[0]](**options)


def is_model(model_name: str) -> bool:
    return model_name.split(".")[0] in MODELS


def list_models() -> list[str]:
    return sorted(MODELS)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """In timm's place, until the test ends."""
    module = ModuleType("timm")
    for function in (create_model, is_model, list_models):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "timm", module)
