"""Models of timm as backbones: on a module with its interface, and on timm itself where that can be imported."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fake_timm
from layers import recipe
from nestling.bundle import load_bundle, save_bundle
from nestling.data.dataset import LabelledData
from nestling.data.transforms import Preprocessing
from nestling.errors import MissingExtraError, UsageError
from nestling.methods import Nested
from nestling.models.backbones import Backbone, build_backbone
from nestling.models.build import build_model
from nestling.models.convnet import named_trunk
from nestling.models.layerwise import LayerwiseModel
from nestling.models.timm_backbones import TimmBackbone
from nestling.taxonomy import Taxonomy
from running import refuse, succeed
from small import assert_same_weights, quick

SHAPE = (3, 16, 16)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_timm.install(monkeypatch)


def enlarged(data: LabelledData) -> LabelledData:
    """Of 16x16 pixels."""
    assert isinstance(data.inputs, Tensor)
    return replace(data, inputs=data.inputs.repeat_interleave(2, 2).repeat_interleave(2, 3))


# Maps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", ["stages", "stages.a1_in1k", "doubled", "tokens"])
def test_its_maps_are_the_models(name: str) -> None:
    """From the finest to the coarsest; what they do not depend on is gone, and the weights are torch's to seed."""
    torch.manual_seed(0)
    backbone = build_backbone(f"timm:{name}", SHAPE)
    assert isinstance(backbone, TimmBackbone) and isinstance(backbone, Backbone) and backbone.training
    assert backbone.channels == (4, 6, 8)
    torch.manual_seed(0)
    model = fake_timm.create_model(name, in_chans=3, num_classes=0)
    images = torch.rand(2, *SHAPE)
    expected = model.forward_intermediates(images, intermediates_only=True)  # type: ignore[operator]
    assert [tuple(m.shape) for m in expected] == [(2, 4, 8, 8), (2, 6, 4, 4), (2, 8, 2, 2)]
    torch.testing.assert_close(backbone(images), expected)
    assert not [key for key in backbone.state_dict() if "head" in key]
    sum(m.sum() for m in backbone(images)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.usefixtures("timm")
def test_a_nested_network_over_it(toy_data: LabelledData, tmp_path: Path) -> None:
    """Trained, saved and loaded by its name alone."""
    data = enlarged(toy_data)
    run = quick(Nested(epochs=1, steps_per_epoch=2, batch_size=16), data, backbone="timm:stages")
    assert run.model.config["backbone"] == "timm:stages"
    run.save_pretrained(tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle").model
    assert_same_weights(loaded, run.model)
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["model"]["backbone"] == "timm:stages"


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("timm")
def test_its_stages_are_layers() -> None:
    """One up to each map, in evaluation mode as it is in training; together they are the backbone."""
    torch.manual_seed(0)
    trunk = named_trunk("timm:stages", SHAPE, "batch")
    torch.manual_seed(0)
    backbone = build_backbone("timm:stages", SHAPE)
    assert (trunk.channels, trunk.shapes) == ([4, 6, 8], [(8, 8), (4, 4), (2, 2)])
    assert all(block.training for block in trunk.blocks)
    assert sum(p.numel() for block in trunk.blocks for p in block.parameters()) == sum(
        p.numel() for p in backbone.parameters()
    )
    images = torch.rand(2, *SHAPE)
    for mode in (True, False):
        x, maps = images, backbone.train(mode)(images)
        for block, expected in zip(trunk.blocks, maps, strict=True):
            x = block.train(mode)(x)
            torch.testing.assert_close(x, expected)


@pytest.mark.usefixtures("timm")
def test_layerwise_training_of_it(toy_data: LabelledData, tmp_path: Path) -> None:
    data = enlarged(toy_data)
    run = quick(recipe(norm="batch", epochs=1, similarity=0.5), data, tmp_path / "run", backbone="timm:stages")
    assert isinstance(run.model, LayerwiseModel) and run.model.outputs == ("layer-1", "layer-2", "layer-3")
    save_bundle(tmp_path / "bundle", run.model.prefix(2), run.preprocessing)
    loaded = load_bundle(tmp_path / "bundle").model
    assert_same_weights(loaded, run.model.prefix(2))
    again = quick(recipe(norm="batch", epochs=1, similarity=0.5), data, tmp_path / "run", backbone="timm:stages")
    assert_same_weights(again.model, run.model)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", ["doubled", "tokens"])
def test_what_is_no_sequence_is_refused(name: str) -> None:
    """Its modules one after the other do not give its maps."""
    with pytest.raises(UsageError, match=f"the backbone 'timm:{name}' is no sequence of layers: use one whose stages"):
        named_trunk(f"timm:{name}", SHAPE, "batch")


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("name", "shape", "norm", "message"),
    [
        ("stags", SHAPE, "batch", "unknown backbone of timm stags: .*Did you mean 'stages'"),
        ("", SHAPE, "batch", "unknown backbone of timm : expected one of 'distilled'"),
        ("hf-hub:someone/stages", SHAPE, "batch", "unknown backbone of timm hf-hub:someone/stages"),
        ("local-dir:stages", SHAPE, "batch", "unknown backbone of timm local-dir:stages"),
        ("stages", SHAPE, "none", "has norms of its own: use norm = 'batch'"),
        ("plain", SHAPE, "batch", r"'timm:plain' gives no maps of its stages \(forward_intermediates in timm\)"),
        ("distilled", SHAPE, "batch", "has weights that its maps do not depend on, such as token: choose another"),
        ("tokens", (3, 32, 32), "batch", "takes no images of 3x32x32 .Input height .32. doesn't match .* --image-size"),
        ("stages", (3, 1, 1), "batch", "takes no images of 3x1x1 .* choose another --image-size"),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, shape: tuple[int, int, int], norm: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        build_backbone(f"timm:{name}", shape, norm)
    assert "\n" not in str(raised.value)


class Broken:
    """A finder of modules that finds a timm whose import fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "timm":
            raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'timm'", name="timm"), r"pip install 'nestling\[timm\]'$"),
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "named 'torchvision'.: it takes"),
        (RuntimeError("operator torchvision::nms\ndoes not exist"), "RuntimeError: operator .* exist.: it takes the"),
    ],
)  # fmt: skip
def test_timm_may_be_missing_or_broken(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=message) as raised:
        build_backbone("timm:resnet18", SHAPE)
    assert str(raised.value).startswith("the backbone 'timm:resnet18' needs the package 'timm'")
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


def test_a_bundle_without_timm(toy_taxonomy: Taxonomy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not damaged: something is missing here."""
    with monkeypatch.context() as context:
        fake_timm.install(context)
        model = build_model(toy_taxonomy, SHAPE, "timm:stages")
        save_bundle(tmp_path / "bundle", model, Preprocessing(*SHAPE, (0.5,) * 3, (0.2,) * 3))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="'timm:stages' needs the package 'timm'"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("method", ["nested", "layerwise"])
def test_the_command(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, and nothing is written; with timm there, it trains."""
    out, given = tmp_path / "run", ("train", "digits", "--method", method, "--backbone", "timm:stages")
    monkeypatch.setitem(sys.modules, "timm", None)
    refuse(2, ["needs the package 'timm'", "nestling[timm]"], *given, "--out", out)
    assert not out.exists()
    fake_timm.install(monkeypatch)
    short = ("--set", "epochs=1", "steps_per_epoch=1", "--image-size", "16", "--device", "cpu", "--precision", "fp32")
    succeed(*given, *short, "--out", out)
    assert "the backbone" not in succeed("show", out).out


# timm itself ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "regnetx_002"])
def test_on_timm_itself(name: str) -> None:
    """Maps, layers that give the same, and the meta device, where a bundle is planned."""
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    shape = (3, 64, 64)
    backbone = build_backbone(f"timm:{name}", shape)
    maps = backbone(torch.rand(2, *shape))
    assert tuple(m.shape[1] for m in maps) == backbone.channels
    assert all(a.shape[2] > b.shape[2] for a, b in itertools.pairwise(maps))
    sum(m.square().sum() for m in maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []
    trunk = named_trunk(f"timm:{name}", shape, "batch")
    assert [(c, *size) for c, size in zip(trunk.channels, trunk.shapes)] == [tuple(m.shape[1:]) for m in maps]
    with torch.device("meta"):
        planned = build_backbone(f"timm:{name}", shape)
    mine, theirs = (
        {key: (tensor.shape, tensor.dtype) for key, tensor in module.state_dict().items()}
        for module in (planned, backbone)
    )
    assert mine == theirs and all(isinstance(p, Tensor) and p.is_meta for p in planned.parameters())
    assert isinstance(planned, nn.Module)
