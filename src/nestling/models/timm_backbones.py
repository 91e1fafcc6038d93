"""Backbones of timm (PyTorch Image Models): any of its models that gives its feature maps, with fresh weights.

timm is imported when one is built, and nothing is ever downloaded.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nestling.errors import MissingExtraError, UsageError, missing_extra, unknown

M = TypeVar("M", bound=nn.Module)

PREFIX = "timm:"
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
"""A model, and which of its published weights: timm would look for other names on a hub or in a folder."""


class TimmBackbone(nn.Module):
    """The maps that a model of timm gives between its stages, from the finest resolution to the coarsest.

    Parameters
    ----------
    model: has timm's ``forward_intermediates``.
    channels: of each map.
    """

    def __init__(self, model: nn.Module, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.channels = channels

    def forward(self, images: Tensor) -> list[Tensor]:
        return maps_of(self.model, images)


def timm_backbone(name: str, input_shape: tuple[int, int, int], norm: str = "batch") -> TimmBackbone:
    """The backbone ``timm:NAME`` for images of ``(channels, height, width)``.

    Raises MissingExtraError where timm cannot be imported, UsageError for what it does not know, for a model that gives
    no maps and for images that it does not take.
    """
    model, maps = build(name, input_shape, norm)
    return placed(TimmBackbone(model, tuple(m.shape[1] for m in maps)))


def timm_layers(
    name: str, input_shape: tuple[int, int, int], norm: str = "batch"
) -> tuple[list[nn.Module], list[tuple[int, int, int]]]:
    """The same model as a sequence of layers, one up to each of its maps, and these maps' channels, height and width.

    Raises UsageError, beside what ``timm_backbone`` does, where the modules one after the other do not give the maps.
    """
    model, maps = build(name, input_shape, norm)
    layers = cut(model)
    try:
        found, current = [], images_for(input_shape)
        with torch.no_grad():
            for layer in layers:
                current = layer(current)
                found.append(current)
        same = len(found) == len(maps) and all(
            mine.shape == m.shape and torch.allclose(mine, m, rtol=1e-4, atol=1e-5) for mine, m in zip(found, maps)
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        same = False
    if not same:
        raise UsageError(
            f"the backbone {name!r} is no sequence of layers: use one whose stages follow each other, such as "
            "timm:resnet18, or another method"
        )
    return [placed(layer) for layer in layers], [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]


def build(name: str, input_shape: tuple[int, int, int], norm: str) -> tuple[nn.Module, list[Tensor]]:
    """A model without what its maps do not use, on the CPU, in evaluation mode; and the maps of some images."""
    timm, wanted = imported(name), name.removeprefix(PREFIX)
    if NAME.fullmatch(wanted) is None or not timm.is_model(wanted):
        raise unknown("backbone of timm", wanted, timm.list_models())
    if norm != "batch":
        raise UsageError(f"the backbone {name!r} has norms of its own: use norm = 'batch', or a 'conv:…' backbone")
    # On the meta device, where a bundle is planned, some models cannot be made.
    with torch.device("cpu"):
        model = timm.create_model(wanted, pretrained=False, in_chans=input_shape[0], num_classes=0)
        if not callable(getattr(model, "forward_intermediates", None)):
            raise UsageError(
                f"the backbone {name!r} gives no maps of its stages (forward_intermediates in timm): choose another"
            )
        model.eval()
        try:
            with torch.enable_grad():
                maps = maps_of(model, images_for(input_shape))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            size, reason = "x".join(map(str, input_shape)), " ".join(str(error).split())
            raise UsageError(
                f"the backbone {name!r} takes no images of {size} ({reason:.200}): choose another --image-size, or "
                "another backbone"
            ) from error
        drop_unused(model, maps, name)
    return model, [m.detach() for m in maps]


def imported(name: str) -> Any:
    """timm. Raises MissingExtraError where it is not there, or there and broken: torchvision's often is."""
    try:
        return import_module("timm")
    except (ImportError, RuntimeError, AttributeError) as error:
        missing = missing_extra("timm", "timm", f"the backbone {name!r}")
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise missing from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MissingExtraError(
            f"{missing}; what is installed cannot be imported ({reason:.200}): it takes the torchvision that was built "
            "for this torch"
        ) from error


def maps_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What a model of timm gives between its stages, (b, channels, h, w) each."""
    return model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)  # type: ignore[operator]


def images_for(input_shape: tuple[int, int, int]) -> Tensor:
    """Two images on which a model is tried."""
    return torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0), device="cpu")


def drop_unused(model: nn.Module, maps: list[Tensor], name: str) -> None:
    """Take away the modules that no map depends on, such as the norm before a classifier.

    Raises UsageError where a module that is used has a weight that is not: it could not be trained.
    """
    weights = dict(model.named_parameters())
    gradients = torch.autograd.grad([m.sum() for m in maps], list(weights.values()), allow_unused=True)
    used = {key for key, gradient in zip(weights, gradients, strict=True) if gradient is not None}

    def idle(path: str) -> bool:
        mine = [key for key in weights if key.startswith(f"{path}.")]
        return bool(mine) and used.isdisjoint(mine)

    paths = [path for path, _ in model.named_modules() if path and idle(path)]
    for path in paths:
        above, _, leaf = path.rpartition(".")
        if above not in paths:
            model.get_submodule(above).add_module(leaf, nn.Identity())
    if left := [key for key in dict(model.named_parameters()) if key not in used]:
        raise UsageError(
            f"the backbone {name!r} has weights that its maps do not depend on, such as {left[0]}: choose another"
        )


def cut(model: nn.Module) -> list[nn.Module]:
    """The model's modules in their order, a layer up to each place that timm takes a map from."""
    points = [info["module"] for info in model.feature_info]  # type: ignore[union-attr]
    layers: list[nn.Module] = []
    current: list[nn.Module] = []
    for path, module in opened(model, points):
        current.append(module)
        if len(layers) < len(points) and path == points[len(layers)]:
            layers.append(nn.Sequential(*current))
            current = []
    return layers


def opened(model: nn.Module, points: list[str]) -> list[tuple[str, nn.Module]]:
    """Children by path; those that hold a place to take a map from are opened, however deep."""
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, above: str) -> None:
        for leaf, child in module.named_children():
            path = f"{above}{leaf}"
            if any(point.startswith(f"{path}.") for point in points):
                walk(child, f"{path}.")
            else:
                found.append((path, child))

    walk(model, "")
    return found


def placed(module: M) -> M:
    """In training mode, on the device that modules are being made on."""
    return module.train().to(torch.get_default_device())
