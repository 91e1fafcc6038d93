"""What the tests of layerwise training share: small networks with a classifier behind every layer, and quick runs."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.data.dataset import LabelledData
from nestling.engine import room
from nestling.engine.fit import cut_rows
from nestling.engine.run import Run
from nestling.engine.stage import StageRun
from nestling.methods import Layerwise, Optimizer
from nestling.models.build import build_model
from nestling.models.layerwise import LayerwiseModel
from small import quick

SGD = Optimizer(name="sgd", lr=0.1, weight_decay=5e-4, schedule="cosine")

SMALL: dict[str, Any] = {"k": 2, "width": 4, "aux_width": 5, "num_blocks": 3, "downsample_at": (1,)}
"""A network: 4, 8 and 8 channels, the second map halved."""


VIEWS: dict[str, Any] = {"augmentation": "affine", "views": 3, "steps_per_epoch": 16}
"""Four passes over the 192 rows, so that every view comes and the first one again."""


def recipe(**fields: Any) -> Layerwise:
    """Two epochs of three steps a layer, without batch norm and augmentation."""
    short = {"epochs": 2, "batch_size": 24, "steps_per_epoch": 3, "norm": "none", "augmentation": "none"}
    return Layerwise(**{**SMALL, **short, "balance": "rows", "optimizer": SGD, **fields})


def layers(data: LabelledData, seed: int = 0, backbone: str = "auto", **options: Any) -> LayerwiseModel:
    """A network with all its classifiers, in evaluation mode, whose norm layers have statistics of their own."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = build_model(data.taxonomy, data.image_shape, backbone, "layerwise", {**SMALL, **options})
        assert isinstance(model, LayerwiseModel)
        for number in range(len(model.blocks)):
            model.add_auxiliary_head(after=number)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                    assert isinstance(tensor, Tensor)
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


def train(made: Layerwise, data: LabelledData, out: Path | None = None, **options: Any) -> Run:
    """``fit`` on the recipe's own network."""
    return quick(made, data, out, **{"backbone": "auto", **options})


def layers_of(run: Run) -> LayerwiseModel:
    """What a run trained."""
    assert isinstance(run.model, LayerwiseModel)
    return run.model


def inputs_of(run: Run, data: LabelledData, seed: int = 0) -> tuple[Tensor, Tensor, LabelledData]:
    """The rows that the run trained on: normalised images, labels, and the rows themselves."""
    rows, _ = cut_rows(data, None, seed)
    assert isinstance(rows.inputs, Tensor)
    return run.preprocessing(rows.inputs), torch.from_numpy(rows.taxonomy.columns(rows.labels)), rows


class Stages:
    """The model before and after every stage that trains, by the stage's name."""

    def __init__(self, monkeypatch: Any) -> None:
        self.names: list[str] = []
        self.stages: dict[str, Any] = {}
        self.before: dict[str, LayerwiseModel] = {}
        self.after: dict[str, LayerwiseModel] = {}
        original = StageRun.train_epochs

        def train_epochs(run: StageRun, *arguments: Any) -> None:
            name = run.stage.name
            self.names.append(name)
            self.stages[name] = run.stage
            self.before[name] = copy.deepcopy(run.engine.model)  # type: ignore[assignment]
            original(run, *arguments)
            self.after[name] = copy.deepcopy(run.engine.model)  # type: ignore[assignment]

        monkeypatch.setattr(StageRun, "train_epochs", train_epochs)

    def changed(self, name: str) -> set[str]:
        """The weights and buffers that a stage moved."""
        before, after = self.before[name].state_dict(), self.after[name].state_dict()
        return {key for key in before if not torch.equal(before[key], after[key])}


def by_hand(model: LayerwiseModel, images: Tensor, layer: int) -> Tensor:
    """The logits of a classifier, written out: no batch norm, invertible downsampling."""
    x = images
    for block in model.blocks[:layer]:
        if block.downsampling is not None:  # type: ignore[union-attr]
            assert block.downsampling == "space-to-depth"  # type: ignore[union-attr]
            copies = [x[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)]
            x = torch.stack(copies, dim=2).flatten(1, 2)
        x = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1).clamp_min(0)  # type: ignore[union-attr,operator]
    head = model.auxiliary[f"layer-{layer}"]
    for block in head.hidden:  # type: ignore[union-attr]
        x = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1).clamp_min(0)
    height, width = x.shape[2] // 2, x.shape[3] // 2
    quarters = [x[:, :, a : a + height, b : b + width].mean((2, 3)) for a in (0, height) for b in (0, width)]
    return torch.stack(quarters, dim=2).flatten(1) @ head.linear.weight.T + head.linear.bias  # type: ignore[union-attr,operator]


def full(monkeypatch: pytest.MonkeyPatch, disk: int) -> None:
    """No memory is free, and so many bytes on the disk."""
    monkeypatch.setattr(room, "free_memory", lambda: 0)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
