"""Layers trained by similarity matching: what it is matched on, its place in a run, and the recipe that goes by it."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import SGD, SMALL, Stages, by_hand, inputs_of, layers, layers_of, recipe, train
from nestling.bundle import load_bundle, save_bundle
from nestling.commands.memory import variants
from nestling.config import apply, read_config
from nestling.data.dataset import LabelledData
from nestling.data.transforms import Preprocessing
from nestling.errors import UsageError
from nestling.methods import Layerwise, Optimizer
from nestling.methods.prune import Compression
from nestling.models.auxiliary import Matching
from nestling.models.build import build_model
from nestling.models.convnet import Block
from nestling.models.layerwise import LayerwiseModel
from nestling.models.prune import narrow
from nestling.models.recompute import in_parts
from nestling.objectives.terms import CrossEntropy, SimilarityMatching
from nestling.taxonomy import Taxonomy
from small import Crash, Watch, assert_same_weights, checkpoint_every_epoch, partly_labelled

# What is matched -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 8), (1, 3), (1, 1)])
def test_the_features_against_their_formula(size: tuple[int, int]) -> None:
    """A convolution, then the standard deviation of each channel; of one position, the value."""
    point = size == (1, 1)
    matching, maps = Matching(4, 1 if point else 3), torch.randn(5, 4, *size)
    convolved = F.conv2d(maps, matching.conv.weight, padding=0 if point else 1).flatten(2)
    gaps = convolved - convolved.mean(2, keepdim=True)
    expected = convolved[:, :, 0] if point else (gaps.square().sum(2) / (gaps.shape[2] - 1)).sqrt()
    torch.testing.assert_close(matching(maps), expected)


@pytest.mark.parametrize("shape", [(19, 4, 6, 6), (3, 4, 2, 3), (16, 4, 1, 1)])
@pytest.mark.parametrize("reader", ["averages", "convolution", "expanded"])
def test_in_parts_it_is_the_same(shape: tuple[int, ...], reader: str) -> None:
    """Features and gradients, also of a map that something else reads, whose gradient may be one number for all."""
    torch.manual_seed(0)
    matching, other, maps = Matching(4, 1 if shape[2] == 1 else 3), nn.Conv2d(4, 2, 1), torch.randn(shape)
    read = {"averages": lambda y: y.mean((2, 3)).prod(1), "convolution": other, "expanded": lambda y: y}[reader]
    found = []
    for parts in (False, True):
        x = maps.clone().requires_grad_()
        matching.zero_grad()
        again, features = in_parts(matching, x) if parts else (x, matching(x))
        ((features**3).sum() + (read(again) * 2).sum()).backward()
        found.append((features, x.grad, matching.conv.weight.grad.clone()))  # type: ignore[union-attr]
    for mine, plain in zip(*found):
        torch.testing.assert_close(mine, plain)


def test_in_parts_under_autocast() -> None:
    matching, maps = Matching(4, 3), torch.randn(8, 4, 6, 6)
    found = []
    for parts in (False, True):
        x = maps.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            features = in_parts(matching, x)[1] if parts else matching(x)
        features.square().sum().backward()
        found.append((features, x.grad))
    for mine, plain in zip(*found):
        torch.testing.assert_close(mine, plain, rtol=1e-2, atol=1e-2)
    assert found[1][0].dtype == torch.float32


# A step --------------------------------------------------------------------------------------------------------------

PLAIN = Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
ONE_STEP = {"epochs": 1, "steps_per_epoch": 1, "batch_size": 192, "optimizer": PLAIN}


def loss_by_hand(model: LayerwiseModel, images: Tensor, labels: Tensor, layer: int, share: float) -> Tensor:
    """Cross-entropy and, over all pairs, the squared gap between the correlations of rows and those of classes."""
    logits, read = by_hand(model, images, layer), {}
    handle = model.auxiliary[f"layer-{layer}"].register_forward_pre_hook(lambda _, given: read.update(map=given[0]))
    model(images, until=f"layer-{layer}")
    handle.remove()
    conv = model.head(f"layer-{layer}").matching.conv  # type: ignore[union-attr]
    features = F.conv2d(read["map"], conv.weight, padding=1).flatten(2).std(2)
    width = logits.shape[1]
    wanted = torch.corrcoef(torch.eye(width)[labels])
    matched = (torch.corrcoef(features) - wanted).square().mean()
    return (1 - share) * F.cross_entropy(logits, labels) + share * matched


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"together": 2, "recompute": True}], ids=str)
def test_a_step_is_gradient_descent(
    options: dict[str, Any], toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(monkeypatch)
    run = train(recipe(similarity=0.7, **ONE_STEP, **options), toy_data)
    images, labels, _ = inputs_of(run, toy_data)
    ends = [2, 3] if options.get("together") else [1, 2, 3]
    assert stages.names == [f"layer-{end}" for end in ends]
    for first, last in zip([0, *ends], ends):
        name = f"layer-{last}"
        before = copy.deepcopy(stages.before[name]).requires_grad_(True)
        mine = (*(f"blocks.{number}." for number in range(first, last)), f"auxiliary.{name}.")
        weights = {key: p for key, p in before.named_parameters() if key.startswith(mine)}
        loss = loss_by_hand(before, images, labels[:, -1], last, 0.7)
        after = stages.after[name].state_dict()
        for (key, weight), gradient in zip(weights.items(), torch.autograd.grad(loss, list(weights.values()))):
            torch.testing.assert_close(after[key], weight - 0.1 * gradient, rtol=1e-4, atol=1e-6)
        assert stages.changed(name) == weights.keys() >= {f"auxiliary.{name}.matching.conv.weight"}


def test_recomputing_changes_nothing_else(toy_data: LabelledData) -> None:
    """Batch norm's statistics, and what dropout leaves out, included; every layer of VGG8B, the connected one too."""
    made, images = recipe(similarity=0.5, norm="batch", k=1, epochs=1, steps_per_epoch=2), toy_data.inputs
    assert isinstance(images, Tensor)
    large = replace(toy_data, inputs=images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    plain, again = (layers_of(train(replace(made, recompute=r), large, backbone="vgg8b-4")) for r in (False, True))
    for one, other in zip(again.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def kept_by(model: LayerwiseModel, images: Tensor, until: str) -> int:
    """Bytes that a forward pass keeps for the way back, beside the weights; each storage once, on any device."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(images, until=until)
    assert outputs.logits[until].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_recomputing_keeps_no_map_of_the_matching(toy_data: LabelledData) -> None:
    model, images = layers(toy_data, width=8, downsample_at=()).train(), torch.randn(16, *toy_data.image_shape)
    model.add_auxiliary_head(0, matching=True)
    model.head("layer-1").train()
    found = {}
    for model.recompute in (False, True):
        found[model.recompute] = kept_by(model, images, "layer-1")
    # The map, and its standard deviations.
    assert found[False] - found[True] == 4 * 16 * 8 * (8 * 8 + 1)


def test_it_is_matched_only_while_training(toy_data: LabelledData) -> None:
    model, images = layers(toy_data), torch.randn(4, *toy_data.image_shape)
    before = model(images)
    model.add_auxiliary_head(1, matching=True).eval()
    assert model(images).features.keys() == before.features.keys()
    model.train()
    assert model(images).features["similarity-layer-2"].shape == (4, 8)


# Its place in a run --------------------------------------------------------------------------------------------------


def test_it_is_there_while_its_layer_is_trained(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved with the stage, gone from the model that is shipped; the last classifier's replacement has its own."""
    stages = Stages(monkeypatch)
    run = train(recipe(similarity=0.5, final_aux_width=3, compression=Compression(share=0.5, epochs=1)), toy_data)
    for name, model in stages.after.items():
        last = "layer-3" if name == "reduced" else f"layer-{name[-1]}"
        assert [key for key in model.state_dict() if "matching" in key] == [f"auxiliary.{last}.matching.conv.weight"]
    assert not [key for key in run.model.state_dict() if "matching" in key]
    assert "auxiliary.layer-2.matching.conv.weight" in stages.changed("tune-2"), "it is tuned with its classifier"
    shapes = [tuple(stages.after[f"tune-{j}"].head(f"layer-{j}").matching.conv.weight.shape) for j in (1, 2, 3)]  # type: ignore[union-attr]
    assert shapes == [(2, 2, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3)]


def test_each_layer_is_matched_at_the_level_that_it_predicts(
    toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, stages, levels = partly_labelled(toy_data), Stages(monkeypatch), ("coarse", "middle", "fine")
    run = train(recipe(similarity=0.5, levels_at=levels), data)
    for name, level in zip(stages.names, levels):
        _, matched = stages.stages[name].objective.terms
        assert isinstance(matched, SimilarityMatching)
        assert (matched.name, matched.level) == (f"similarity-{name}", level)
        assert matched.width == data.taxonomy.width(level)
    assert all(np.isfinite(record["loss"]) for record in run.history)


@pytest.mark.parametrize("crash_at", [18, 20, 23])
def test_resume_in_the_third_layer(
    crash_at: int, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 1 and 2 are pruned, layer 3 is killed at its first, a middle and its last step: bit for bit."""
    made = recipe(
        similarity=0.9,
        compression=Compression(share=0.5, epochs=1),
        norm="batch",
        final_aux_width=3,
        augmentation="crop-mirror-cutout",
    )
    whole = train(made, toy_data, tmp_path / "whole").model
    checkpoint_every_epoch(monkeypatch)
    watch = Watch(monkeypatch)
    watch.crash_at = crash_at
    with pytest.raises(Crash):
        train(made, toy_data, tmp_path / "broken")
    assert watch.taken[-1][0] == ("tune-2" if crash_at == 18 else "layer-3")
    assert_same_weights(train(made, toy_data, tmp_path / "broken").model, whole)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1] and "similarity-layer-3" in logs[0]


def test_a_bundle_may_hold_it(toy_data: LabelledData, tmp_path: Path) -> None:
    """Of a model that is saved in the middle, narrowed, by whoever wants it."""
    model = layers(toy_data, norm="batch")
    model.add_auxiliary_head(1, matching=True)
    narrow(model, 1, torch.tensor([0, 2, 3]))
    save_bundle(tmp_path / "bundle", model, Preprocessing(1, 8, 8, (0.5,), (0.2,)))
    loaded = load_bundle(tmp_path / "bundle").model
    assert isinstance(loaded, LayerwiseModel)
    assert_same_weights(loaded, model)
    assert loaded.head("layer-2").matching is not None and loaded.head("layer-1").matching is None


def test_narrowing_keeps_what_is_matched_on_the_filters_that_are_left(toy_data: LabelledData) -> None:
    model = layers(toy_data, norm="none").double()
    model.add_auxiliary_head(1, matching=True).double()
    matching, kept = model.head("layer-2").matching, torch.tensor([1, 4, 7])
    assert matching is not None
    maps = torch.rand(3, 8, 4, 4, dtype=torch.float64)
    maps[:, [0, 2, 3, 5, 6]] = 0
    expected = matching(maps)[:, kept]
    narrow(model, 1, kept)
    torch.testing.assert_close(matching(maps[:, kept]), expected)


def test_the_training_risk_still_never_rises(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposition 3.1, of the cross-entropy: the copy of the classifier before brings along what it is matched on."""
    stages = Stages(monkeypatch)
    fast = Optimizer(name="sgd", lr=(0.1, 20.0, 0.05), schedule="constant")
    network = {"downsample_at": (), "width": 6, "init": "identity"}
    run = train(recipe(similarity=0.5, optimizer=fast, **network), toy_data)
    images, labels, _ = inputs_of(run, toy_data)
    with torch.no_grad():
        risks = [float(F.cross_entropy(by_hand(layers_of(run), images, j), labels[:, -1])) for j in (1, 2, 3)]
    assert risks[0] == risks[1] > risks[2]
    first, second = (stages.before[f"layer-{j}"].head(f"layer-{j}") for j in (2, 3))
    assert first.matching is not None and second.matching is not None


def test_without_it_nothing_changes(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    train(recipe(), toy_data)
    assert stages.stages["layer-1"].objective.name == "layer-1"


def test_the_twin_is_plain_end_to_end() -> None:
    assert recipe(similarity=0.5).end_to_end(3).similarity == 0


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": 1.0}, "similarity must be below 1, got 1.0"),
        ({"similarity": -0.1}, "similarity must be at least 0, got -0.1"),
        ({"similarity": 0.5, "micro_batch": 8}, "leave micro_batch out, or set similarity = 0"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(**options)


def test_pairs_do_not_add_up_over_parts_of_a_batch() -> None:
    """Neither for the engine nor for --memory, which then offers no micro-batches; fp16 may scale them."""
    objective = CrossEntropy("a") + SimilarityMatching("b", 3)
    assert not objective.adds_up() and not objective.keeps()
    assert CrossEntropy("a").compares is False and (1.0 * CrossEntropy("a")).adds_up()
    found = [(v.micro_batch, v.recompute) for v in variants(Layerwise(similarity=0.5), 64, keeps=False)]
    assert found == [(None, False), (None, True)]


# VGG8B and its recipe ------------------------------------------------------------------------------------------------

CIFAR10 = Taxonomy.from_paths([str(number) for number in range(10)])


def test_vgg8b() -> None:
    """Six convolutions and a fully connected layer of 1,024: 8.9 million parameters with the last classifier."""
    with torch.device("meta"):
        model = build_model(CIFAR10, (3, 32, 32), "vgg8b", "layerwise", {"k": 1, "norm": "none"})
        assert isinstance(model, LayerwiseModel)
        shapes, x = [], torch.empty(2, 3, 32, 32)
        for block in model.blocks:
            x = block(x)
            shapes.append(tuple(x.shape[1:]))
        widths = (3, 128, 256, 256, 512, 512, 512)
        convolutions = sum(9 * a * b + b for a, b in itertools.pairwise(widths))
        assert sum(p.numel() for p in model.blocks.parameters()) == convolutions + 4 * 512 * 1024 + 1024
        assert model.add_auxiliary_head(6).linear.in_features == 1024  # type: ignore[union-attr]
    assert shapes == [
        (128, 32, 32),
        (256, 32, 32),
        (256, 16, 16),
        (512, 16, 16),
        (512, 8, 8),
        (512, 4, 4),
        (1024, 1, 1),
    ]
    small = build_model(CIFAR10, (1, 16, 32), "vgg8b-8", "layerwise")
    assert isinstance(small, LayerwiseModel) and [small.out_channels(j) for j in (0, 6)] == [8, 64]
    assert small.blocks[6].conv.kernel_size == (1, 2)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="layer 7 would halve a map of 3x3, whose size is odd"):
        build_model(CIFAR10, (3, 24, 24), "vgg8b", "layerwise")


def test_a_block_may_be_fully_connected() -> None:
    block, x = Block(3, 5, "max", "none", covers=(2, 3)), torch.randn(4, 3, 4, 6)
    pooled = F.max_pool2d(x, 2).flatten(1)
    expected = F.linear(pooled, block.conv.weight.flatten(1), block.conv.bias).clamp_min(0)
    torch.testing.assert_close(block(x).flatten(1), expected, rtol=1e-4, atol=1e-5)
    assert block(x).shape == (4, 5, 1, 1)
    assert not Block(3, 3, None, "none", covers=(1, 1)).can_be_identity


def test_dropout_is_of_maps_in_training() -> None:
    """Of what enters a layer, the image excepted; a fifth is left out, and the rest is scaled up."""
    model = build_model(CIFAR10, (3, 16, 16), "vgg8b-8", "layerwise")
    assert [type(block.dropout) for block in model.blocks] == [nn.Identity, *[nn.Dropout] * 6]  # type: ignore[union-attr]
    block, x = Block(4, 4, None, "none", dropout=0.2), torch.ones(64, 4, 8, 8)
    block.make_identity()
    values, counts = block(x).unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.25]))
    assert 0.17 < int(counts[0]) / x.numel() < 0.23
    assert torch.equal(block.eval()(x), x)


def test_the_linear_layer_reads_one_position_once(toy_data: LabelledData) -> None:
    """Its four averages would be the same; pruning and the calibration know its width."""
    model = layers(toy_data, downsample_at=(0, 1, 2), k=1)
    assert model.cells == [4, 4, 1] and model.head("layer-3").linear.in_features == 16
    assert model.calibration.sizes["fine"][0] == 16
    images, kept = torch.randn(3, *toy_data.image_shape), torch.tensor([0, 5])
    assert model(images).features["layer-3"].shape == (3, 16)
    narrow(model, 2, kept)
    assert model(images).features["layer-3"].shape == (3, 2)


def best() -> Layerwise:
    """The written recipe."""
    settings = read_config(Path(__file__).parent.parent / "recipes" / "layerwise-cifar10-best.toml")
    assert (settings.pop("method"), settings.pop("backbone")) == ("layerwise", "vgg8b")
    return apply(Layerwise(), settings)


def built(made: Layerwise) -> LayerwiseModel:
    """Its network, on the meta device."""
    with torch.device("meta"):
        model = build_model(CIFAR10, (3, 32, 32), "vgg8b", "layerwise", made.network())
    assert isinstance(model, LayerwiseModel)
    return model


def rows(count: int) -> LabelledData:
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    return LabelledData(images, np.arange(count)[:, None] % 10, CIFAR10)


def test_the_best_recipe_has_at_most_9_million_parameters() -> None:
    """With the classifiers of all layers, which answer together."""
    made = best()
    model = built(made)
    with torch.device("meta"):
        names = [stage.name for stage in made.stages(model, rows(256))]
    assert names == [*(f"layer-{j}" for j in range(1, 8)), "temperature"]
    assert 8.9e6 < sum(p.numel() for p in model.parameters()) <= 9e6


def bytes_of(made: Layerwise) -> int:
    """Of the largest step's weights, gradients, state of the optimiser, and maps kept for the way back."""
    most, model, size = 0, built(made), made.batch_size or 0
    with torch.device("meta"):
        for stage in made.stages(model, rows(2 * size)):
            if not stage.epochs:
                continue
            model.eval().requires_grad_(False)
            for module in stage.trainable:
                module.train().requires_grad_(True)
            held = sum(4 * t.numel() for t in (*model.parameters(), *model.buffers()))
            trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
            assert made.optimizer.name == "adam"
            assert stage.until is not None
            kept = kept_by(model, torch.empty(size, 3, 32, 32), stage.until)
            most = max(most, held + 3 * trained + kept)
    return most


def test_the_best_recipe_takes_at_most_40_percent_of_end_to_end() -> None:
    """Bytes of tensors at batch 128; end-to-end keeps all its maps."""
    made = best()
    assert made.batch_size == 128 and made.recompute
    share = bytes_of(made) / bytes_of(replace(made.end_to_end(1), recompute=False))
    assert 0.1 < share <= 0.4


def test_matching_helps_a_layer_to_tell_classes_apart(toy_data: LabelledData) -> None:
    """Rows of a class are alike behind it, those of two are not."""
    made = recipe(similarity=0.9, norm="batch", width=8, num_blocks=1, downsample_at=(), epochs=6, steps_per_epoch=10)
    run = train(replace(made, batch_size=32, optimizer=SGD), toy_data)
    losses = [record["loss"] for record in run.history]
    assert losses[-1] < 0.7 * losses[0]
    assert run.metrics["accuracy"]["fine"] > 0.5
    assert SMALL["k"] == 2
