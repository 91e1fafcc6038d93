"""Compression while training: which filters go, that they are really gone, and that a killed run ends the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers import SGD, Stages, inputs_of, layers, layers_of, recipe, train
from nestling.bundle import load_bundle, save_bundle
from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.engine.plan import plan
from nestling.errors import UsageError
from nestling.methods import Optimizer
from nestling.methods.prune import Compression, Pruning
from nestling.methods.recipe import Context
from nestling.models.build import build_model
from nestling.models.convnet import DOWNSAMPLINGS
from nestling.models.layerwise import LayerwiseModel
from nestling.models.prune import filter_scores, narrow
from nestling.objectives.terms import CrossEntropy
from small import Crash, Watch, assert_same_weights

# Which filters go ----------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """Molchanov et al., Eq. 8: |mean of activation x gradient| of each row, added up."""
    maps = torch.tensor([[[[1.0, 2.0]], [[1.0, -1.0]]], [[[3.0, 0.0]], [[2.0, 2.0]]]])
    gradients = torch.tensor([[[[2.0, -2.0]], [[1.0, 1.0]]], [[[1.0, 5.0]], [[-1.0, 2.0]]]])
    torch.testing.assert_close(filter_scores(maps, gradients), torch.tensor([1.0 + 1.5, 0.0 + 1.0]))


def context_of(model: LayerwiseModel, data: LabelledData, noted: list[Any] | None = None) -> Context:
    from nestling.data.transforms import Preprocessing

    rows = DeviceData(data, Preprocessing(1, 8, 8, (0.4,), (0.3,)), torch.device("cpu"))
    return Context(
        model=model,
        objective=1.0 * CrossEntropy("fine"),
        train=data,
        validation=None,
        predict=lambda data: (_ for _ in ()).throw(AssertionError("no validation row is there")),
        batches=lambda data: rows.batches(7),
        note=lambda *note: noted.append(note) if noted is not None else None,
    )


@pytest.mark.parametrize("k", [1, 2])
def test_scores_are_what_removal_costs_to_first_order(k: int, toy_data: LabelledData) -> None:
    """Each filter of each row scaled down by a little, one at a time, in float64."""
    model, data = layers(toy_data, k=k, norm="none"), toy_data.subset(np.arange(10))
    scores = Pruning(1, 0.5).scores(context_of(model, data))
    exact, step = copy.deepcopy(model).double(), 1e-6
    naive = torch.zeros(8, dtype=torch.float64)
    with torch.no_grad():
        for part in context_of(model, data).batches(data):
            for image, label in zip(part.inputs.double(), part.labels[:, -1]):
                maps = exact.blocks[1](exact.blocks[0](image[None]))
                for number in range(8):
                    losses = []
                    for factor in (1 + step, 1 - step):
                        changed = maps.clone()
                        changed[:, number] *= factor
                        losses.append(F.cross_entropy(exact.auxiliary["layer-2"](changed)[0], label[None]))
                    naive[number] += ((losses[0] - losses[1]) / (2 * step) / maps[0, 0].numel()).abs()
    assert naive.max() > 3 * naive.min()
    torch.testing.assert_close(scores.double(), naive, rtol=1e-3, atol=1e-6)


def test_the_largest_scores_stay(toy_data: LabelledData) -> None:
    model, noted = layers(toy_data, norm="none"), []
    pruning, context = Pruning(1, 0.4), context_of(model, toy_data, noted)
    scores, before = pruning.scores(context), copy.deepcopy(model)
    pruning(context)
    kept = scores.argsort(descending=True)[:3].sort().values
    assert torch.equal(model.blocks[1].conv.weight, before.blocks[1].conv.weight[kept])  # type: ignore[union-attr,index]
    ((name, value, reason),) = noted
    assert (name, value) == ("filters of layer-2", "3 of 8") and "Taylor" in reason


# Really gone ---------------------------------------------------------------------------------------------------------


def masked(model: LayerwiseModel, block: int, kept: Tensor, images: Tensor) -> dict[str, Tensor]:
    """The outputs of the whole network where the removed filters' maps are zero."""
    mask = torch.zeros(model.out_channels(block), 1, 1, dtype=images.dtype).index_fill(0, kept, 1)
    handle = model.blocks[block].register_forward_hook(lambda module, inputs, output: output * mask)
    logits = model(images).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("downsampling", DOWNSAMPLINGS)
@pytest.mark.parametrize(("norm", "k"), [("none", 1), ("batch", 2), ("none", 2)])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_narrow_network_is_the_masked_one(
    block: int, norm: str, k: int, downsampling: str, toy_data: LabelledData
) -> None:
    """Weights, norms, classifier and the next layer, also behind a downsampling: the same outputs."""
    model = layers(toy_data, k=k, norm=norm, downsampling=downsampling).double()
    images = torch.randn(3, *toy_data.image_shape, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3])
    with torch.no_grad():
        expected = masked(model, block, kept, images)
        before = sum(p.numel() for p in model.parameters())
        narrow(model, block, kept)
        found = model(images).logits
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)
    assert sum(p.numel() for p in model.parameters()) < before
    conv = model.blocks[block].conv  # type: ignore[union-attr]
    assert (conv.out_channels, len(conv.weight)) == (3, 3)  # type: ignore[union-attr,arg-type]
    if block < 2:
        after = model.blocks[block + 1].conv  # type: ignore[union-attr]
        copies = 4 if block == 0 and downsampling == "space-to-depth" else 1
        assert after.in_channels == after.weight.shape[1] == 3 * copies  # type: ignore[union-attr]


def test_a_norm_before_the_linear_layer_is_narrowed(toy_data: LabelledData) -> None:
    """k = 1 with batch norm normalises a filter that is always 0 to a constant, which is no part of the new network."""
    model = layers(toy_data, k=1, norm="batch").double()
    images, kept = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    head = model.auxiliary["layer-1"]
    constant = copy.deepcopy(head.norm)  # type: ignore[arg-type]
    with torch.no_grad():
        zero = constant(torch.zeros(1, 4, 2, 2, dtype=torch.float64))
        zero[:, kept] = 0
        shift = head.linear.weight @ zero.flatten()  # type: ignore[union-attr,operator]
        expected = masked(model, 0, kept, images)["layer-1"] - shift
        narrow(model, 0, kept)
        torch.testing.assert_close(model(images).logits["layer-1"], expected, rtol=1e-10, atol=1e-10)


def test_a_narrow_network_survives_the_bundle(toy_data: LabelledData, tmp_path: Path) -> None:
    made = recipe(compression=Compression(share=0.5, epochs=1), final_aux_width=3, norm="batch", k=2, epochs=1)
    run = train(made, toy_data)
    model, images = layers_of(run), run.preprocessing(toy_data.images(np.arange(9)))
    assert [model.out_channels(j) for j in range(3)] == [2, 4, 4]
    for number in (2, 3):
        prefix = model.prefix(number)
        save_bundle(tmp_path / str(number), prefix, run.preprocessing)
        loaded = load_bundle(tmp_path / str(number)).model.eval()
        assert_same_weights(loaded, prefix)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images).logits, prefix.eval()(images).logits)
    save_bundle(tmp_path / "whole", model, run.preprocessing)
    assert_same_weights(load_bundle(tmp_path / "whole").model, model)


# While training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_pruning_layer_by_layer(k: int, toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, remove, fine-tune the classifier alone, go on with the narrower map (Section 4.3)."""
    stages = Stages(monkeypatch)
    rates = Optimizer(name="sgd", lr=(0.1, 0.2, 0.3), schedule="constant")
    run = train(recipe(k=k, compression=Compression(share=0.5, epochs=3), optimizer=rates), toy_data)
    assert stages.names == ["layer-1", "tune-1", "layer-2", "tune-2", "layer-3", "tune-3"]
    widths = {name: [model.out_channels(j) for j in range(3)] for name, model in stages.before.items()}
    assert widths == {
        "layer-1": [4, 8, 8],
        "tune-1": [2, 8, 8],
        "layer-2": [2, 8, 8],
        "tune-2": [2, 4, 8],
        "layer-3": [2, 4, 8],
        "tune-3": [2, 4, 4],
    }
    for number in (1, 2, 3):
        name = f"tune-{number}"
        assert stages.changed(name) == {
            f"auxiliary.layer-{number}.{key}" for key in stages.after[name].auxiliary[f"layer-{number}"].state_dict()
        }
        assert stages.stages[name].epochs == 3 and stages.stages[name].lr == pytest.approx(0.01 * number)
    noted = {name: value for name, value, _ in run.decisions}
    assert [noted[f"filters of layer-{j}"] for j in (1, 2, 3)] == ["2 of 4", "4 of 8", "4 of 8"]


def test_tuning_is_of_use(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier's loss on the filters that are left is lower after it."""
    stages = Stages(monkeypatch)
    made = recipe(compression=Compression(share=0.3, epochs=5), width=8, num_blocks=1, downsample_at=(), epochs=5)
    run = train(made, toy_data)
    images, labels, _ = inputs_of(run, toy_data)
    with torch.no_grad():
        before, after = (
            F.cross_entropy(model(images).logits["layer-1"], labels[:, -1])
            for model in (stages.before["tune-1"], stages.after["tune-1"])
        )
    assert after < before


def test_the_plan_knows_the_narrow_widths(toy_data: LabelledData) -> None:
    made = recipe(compression=Compression(share=0.5))
    model = build_model(toy_data.taxonomy, toy_data.image_shape, method="layerwise", options=made.network())
    planned = plan(made, model, toy_data)
    assert [stage.assumes for stage in planned if stage.assumes] == [
        "2 of the 4 filters of layer 1 are kept",
        "4 of the 8 filters of layer 2 are kept",
        "4 of the 8 filters of layer 3 are kept",
    ]
    second = next(stage for stage in planned if stage.name == "layer-2")
    # Four copies of the two filters that are left; two convolutions with bias; 4 averages of 10 channels.
    assert second.num_trainable == (2 * 4 * 9 + 1) * 8 + (8 * 9 + 1) * 10 + (4 * 10 + 1) * 6


@pytest.mark.parametrize("crash_at", [18, 20, 23])
def test_resume_in_the_third_layer(
    crash_at: int, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 1 and 2 are pruned, layer 3 is killed at its first, a middle and its last step: bit for bit."""
    from small import checkpoint_every_epoch

    pruned = Compression(share=0.5, epochs=1)
    made = recipe(compression=pruned, norm="batch", num_blocks=4, augmentation="affine", views=2)
    whole = train(made, toy_data, tmp_path / "whole").model
    checkpoint_every_epoch(monkeypatch)
    watch = Watch(monkeypatch)
    watch.crash_at = crash_at
    with pytest.raises(Crash):
        train(made, toy_data, tmp_path / "broken")
    assert watch.taken[-1][0] == ("tune-2" if crash_at == 18 else "layer-3")
    again = train(made, toy_data, tmp_path / "broken").model
    assert_same_weights(again, whole)
    # Four layers of two epochs and four tunings of one, three steps each.
    assert len(set(watch.taken)) == 36 and len(watch.taken) - 36 == (crash_at - 18) % 3
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1] and logs[0]


# Bad input -----------------------------------------------------------------------------------------------------------


def test_some_filter_must_be_left(toy_data: LabelledData) -> None:
    with pytest.raises(
        UsageError, match=r"compression.share = 0.2 leaves none of the 4 filters of layer 1: keep a larger"
    ):
        train(recipe(compression=Compression(share=0.2), optimizer=SGD), toy_data)
    with pytest.raises(UsageError, match="no filter of layer 1 would be left"):
        narrow(layers(toy_data), 0, torch.tensor([], dtype=torch.int64))


def test_only_single_convolutions_are_pruned(toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match="compression needs layers of one convolution each"):
        train(recipe(compression=Compression(share=0.5), norm="batch"), toy_data, backbone="resnet10-4")
    with pytest.raises(UsageError, match="layer 2 is no single convolution"):
        narrow(layers(toy_data, backbone="resnet10-4"), 1, torch.arange(2))
