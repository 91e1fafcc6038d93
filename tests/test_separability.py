"""How separable maps are: linear and small convolutional probes on layers that stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from layers import layers
from nestling.data.dataset import LabelledData
from nestling.data.transforms import Preprocessing
from nestling.errors import DataError, UsageError
from nestling.evaluate.separability import Probe, cnn_separability, linear_separability, maps_of
from nestling.models.layerwise import LayerwiseModel
from small import assert_same_weights

PREPROCESSING = Preprocessing(1, 8, 8, (0.4,), (0.3,))
QUICK = Probe(epochs=20, width=8, batch_size=15)


def hands_on(data: LabelledData, **options: Any) -> LayerwiseModel:
    """A network whose first layer hands the image on: the class is in the quarter and in the stripes."""
    model = layers(data, norm="none", width=1, **options)
    block = model.blocks[0]
    block.make_identity()  # type: ignore[operator,union-attr]
    block.conv.bias.data.fill_(3.0)  # type: ignore[union-attr,operator]
    return model


@pytest.fixture
def blind(toy_data: LabelledData) -> LayerwiseModel:
    return hands_on(toy_data)


def halves(data: LabelledData) -> tuple[LabelledData, LabelledData]:
    return data.subset(np.arange(0, 150)), data.subset(np.arange(150, 240))


def test_maps(toy_data: LabelledData) -> None:
    """In evaluation mode, which the model itself need not be in."""
    model = layers(toy_data).train()
    before = copy.deepcopy(model)
    found = maps_of(model, toy_data, 2, PREPROCESSING, device="cpu")
    small = maps_of(model, toy_data, 2, PREPROCESSING, size=2, device="cpu")
    assert model.training
    assert_same_weights(model, before)
    assert isinstance(toy_data.inputs, torch.Tensor)
    images = (toy_data.inputs.float() / 255 - 0.4) / 0.3
    with torch.no_grad():
        expected = before.eval().blocks[1](before.blocks[0](images))
    assert found.shape == (240, 8, 4, 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small, F.avg_pool2d(expected, 2), rtol=1e-4, atol=1e-5)


def test_linear_separability_by_hand() -> None:
    """Two classes that differ in the mean of one quadrant, on a scale of its own; then in nothing that is averaged."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    maps = torch.randn(80, 2, 4, 4, generator=generator)
    maps[:, 0] *= 1e6
    maps[:, 1, :2, 2:] += 8.0 * labels[:, None, None]
    assert linear_separability(maps[:40], labels[:40], maps[40:], labels[40:]) == 1.0
    checkers = torch.zeros(2, 4, 4)
    checkers[0, ::2, ::2] = checkers[1, 1::2, ::2] = 8.0
    hidden = checkers[labels][:, None] + torch.randn(80, 1, 4, 4, generator=generator)
    assert linear_separability(hidden[:40], labels[:40], hidden[40:], labels[40:]) < 0.75
    assert linear_separability(maps[:40], labels[:40], hidden[40:].expand(-1, 2, -1, -1), labels[40:]) < 0.75


def test_each_class_is_told_from_the_rest() -> None:
    """One-versus-rest and multinomial regression part where a class lies between the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    maps = (labels[:, None, None, None].float() + 0.4 * torch.randn(300, 1, 1, 1, generator=generator)).expand(
        -1, -1, 2, 2
    )
    columns = StandardScaler().fit_transform(maps.flatten(1).numpy())
    scores = np.stack(
        [LogisticRegression().fit(columns, labels.numpy() == c).decision_function(columns) for c in range(3)], axis=1
    )
    one_versus_rest = (scores.argmax(1) == labels.numpy()).mean()
    multinomial = LogisticRegression().fit(columns, labels.numpy()).score(columns, labels.numpy())
    assert linear_separability(maps, labels, maps, labels) == one_versus_rest != multinomial


def test_unlabelled_rows_do_not_count(toy_data: LabelledData) -> None:
    maps, labels = torch.randn(40, 2, 4, 4), torch.arange(40) % 2
    maps[:, 0] += 5.0 * labels[:, None, None]
    wrong = torch.cat([maps, -maps])
    known = torch.cat([labels, torch.full((40,), -1)])
    assert linear_separability(wrong, known, wrong, known) == 1.0
    for training, test in ((labels * 0, labels), (known[:40], known[40:])):
        with pytest.raises(DataError, match="two classes among the training rows and a labelled test row"):
            linear_separability(maps, training, maps, test)


@pytest.mark.parametrize("p", [1, 2])
def test_a_convolution_sees_what_averages_hide(p: int, blind: LayerwiseModel, toy_data: LabelledData) -> None:
    """Stripes: their averages over quadrants are equal, and one convolution tells them apart."""
    train, test = halves(toy_data)
    before = copy.deepcopy(blind)
    maps = [maps_of(blind, rows, 1, PREPROCESSING, device="cpu") for rows in (train, test)]
    linear = linear_separability(maps[0], torch.from_numpy(train.labels[:, 2]), maps[1], test.labels[:, 2])  # type: ignore[arg-type]
    assert 0.35 < linear < 0.65, "the quarter is known, the stripes are not"
    found = [cnn_separability(p, blind, 1, train, test, PREPROCESSING, QUICK, seed=3, device="cpu") for _ in range(2)]
    assert found[0] > 0.8 and found[0] == found[1]
    assert_same_weights(blind, before)
    assert len(blind.blocks) == 3 and blind.hidden == 1


def test_the_probe_is_what_it_says(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on every labelled row, at the layer's own level, its classifier alone."""
    from nestling.engine.stage import StageRun

    seen, original = [], StageRun.finish

    def finish(run: StageRun) -> None:
        seen.append((len(run.rows), sorted(run.trained)))
        original(run)

    monkeypatch.setattr(StageRun, "finish", finish)
    train, test = halves(toy_data)
    model = hands_on(toy_data, levels_at=("coarse", "fine", "fine"))
    train = train.keep({"coarse": 0.5})
    assert cnn_separability(2, model, 1, train, test, PREPROCESSING, QUICK, device="cpu") > 0.9
    ((rows, names),) = seen
    assert rows == (train.labels[:, 0] >= 0).sum() < 150
    head = "model.auxiliary.layer-1"
    assert names == sorted(
        f"{head}.{name}.{kind}" for name in ("hidden.0.conv", "hidden.1.conv", "linear") for kind in ("weight", "bias")
    )


def test_what_probes_refuse(blind: LayerwiseModel, toy_data: LabelledData) -> None:
    train, test = halves(toy_data)
    with pytest.raises(UsageError, match="p must be at least 1, got 0"):
        cnn_separability(0, blind, 1, train, test, PREPROCESSING)
    for layer in (0, 4):
        with pytest.raises(UsageError, match=f"there is no layer {layer}: choose one from 1 to 3"):
            cnn_separability(1, blind, layer, train, test, PREPROCESSING)
        with pytest.raises(UsageError, match=f"there is no layer {layer}"):
            maps_of(blind, train, layer, PREPROCESSING)
    with pytest.raises(DataError, match="no test row is labelled at level 'fine'"):
        cnn_separability(1, blind, 1, train, test.keep({"fine": 0}), PREPROCESSING)


def test_the_seed_of_a_probe(blind: LayerwiseModel, toy_data: LabelledData) -> None:
    """Decides weights and order: too short a training ends elsewhere."""
    train, test = halves(toy_data)
    short = Probe(epochs=1, width=4, batch_size=30)
    seeds = (0, 1, 2, 3)
    assert len({cnn_separability(1, blind, 1, train, test, PREPROCESSING, short, s, device="cpu") for s in seeds}) > 1
