"""Layerwise training: the network, its classifiers, Algorithm 1 and the two propositions of the paper."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import SMALL, Stages, by_hand, inputs_of, layers, layers_of, recipe, train
from nestling.bundle import load_bundle, save_bundle
from nestling.data.dataset import LabelledData
from nestling.data.transforms import Preprocessing
from nestling.engine.stage import StageRun
from nestling.errors import UsageError
from nestling.methods import Layerwise, Optimizer
from nestling.methods.identity import training_risk
from nestling.methods.prune import Compression
from nestling.models.auxiliary import AuxiliaryClassifier
from nestling.models.backbones import build_backbone
from nestling.models.build import LayerOptions, build_model
from nestling.models.convnet import DOWNSAMPLINGS, Block
from nestling.models.layerwise import LayerwiseModel
from nestling.models.lean import InPlaceReLU, quadrant_averages
from nestling.objectives.functional import combine_levels
from nestling.taxonomy import Taxonomy
from running import refuse
from small import Crash, Watch, assert_same_weights, checkpoint_every_epoch, partly_labelled

# The network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsampling", DOWNSAMPLINGS)
def test_widths_double_where_the_map_is_halved(downsampling: str, toy_taxonomy: Taxonomy) -> None:
    options = {"num_blocks": 5, "width": 4, "aux_width": 5, "downsample_at": (1, 3), "downsampling": downsampling}
    model = build_model(toy_taxonomy, (3, 16, 24), method="layerwise", options=options)
    assert isinstance(model, LayerwiseModel)
    x, shapes = torch.rand(2, 3, 16, 24), []
    for block in model.blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 16, 24), (8, 8, 12), (8, 8, 12), (16, 4, 6), (16, 4, 6)]
    assert [model.add_auxiliary_head(after=j).width for j in range(5)] == [5, 10, 10, 20, 20]


def test_the_first_layer_has_the_first_width(toy_taxonomy: Taxonomy) -> None:
    """M is the width of the first convolution (Section 4), also where that follows a downsampling."""
    options = {"num_blocks": 3, "width": 4, "aux_width": 5, "downsample_at": (0, 2)}
    model = build_model(toy_taxonomy, (3, 16, 16), method="layerwise", options=options)
    assert [model.out_channels(j) for j in range(3)] == [4, 4, 8]  # type: ignore[operator]
    assert model.widths == [5, 5, 10]


@pytest.mark.parametrize("downsampling", DOWNSAMPLINGS)
def test_a_block_against_its_formula(downsampling: str) -> None:
    """x_{j+1} = rho W P x (Eq. 1)."""
    block, x = Block(3, 5, downsampling, "none"), torch.randn(2, 3, 6, 8)
    corners = torch.stack([x[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)], dim=2)
    if downsampling == "strided":
        expected = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)[:, :, ::2, ::2]
    else:
        small = {"space-to-depth": corners.flatten(1, 2), "average": corners.mean(2), "max": corners.amax(2)}
        expected = F.conv2d(small[downsampling], block.conv.weight, block.conv.bias, padding=1)
    torch.testing.assert_close(block(x), expected.clamp_min(0), rtol=1e-4, atol=1e-5)


def test_the_image_may_be_halved_first(toy_taxonomy: Taxonomy) -> None:
    options = {**SMALL, "halve_input": True}
    model = build_model(toy_taxonomy, (3, 16, 16), method="layerwise", options=options)
    assert model.blocks[0].conv.in_channels == 12  # type: ignore[index,union-attr]
    assert model.blocks[0](torch.rand(1, 3, 16, 16)).shape == (1, 4, 8, 8)  # type: ignore[index,operator]
    assert model.widths == [5, 10, 10]


@pytest.mark.parametrize(("k", "final", "printed"), [(2, None, 64.4), (3, None, 102.1), (3, 512, 46.4)])
def test_parameters_of_the_imagenet_networks(k: int, final: int | None, printed: float) -> None:
    """Table 6: trunk and last auxiliary network, in millions; no image is needed for that."""
    taxonomy = Taxonomy.from_paths([str(number) for number in range(1000)])
    options = LayerOptions(k=k, width=128, aux_width=256, num_blocks=8, downsample_at=(2, 4, 6), halve_input=True)
    with torch.device("meta"):
        model = build_model(taxonomy, (3, 224, 224), method="layerwise", options=options)
        assert isinstance(model, LayerwiseModel)
        model.add_auxiliary_head(after=7, width=final)
    assert model.widths[-1] == 2048
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(printed, abs=0.1)


@pytest.mark.parametrize(("name", "count", "parameters"), [("vgg11", 8, 9_220_480), ("vgg13", 10, 9_404_992)])
def test_vgg_layer_by_layer(name: str, count: int, parameters: int, toy_taxonomy: Taxonomy) -> None:
    """The convolutions of torchvision's networks, by number; the classifiers double where the trunk does."""
    with torch.device("meta"):
        model = build_model(toy_taxonomy, (3, 32, 32), name, "layerwise", {"norm": "none", "aux_width": 4})
        assert isinstance(model, LayerwiseModel)
        assert len(model.blocks) == count and sum(p.numel() for p in model.blocks.parameters()) == parameters
        assert model.widths == [4 * model.channels[j] // 64 for j in range(count)]
        assert model(torch.empty(2, 3, 32, 32)).embedding.shape == (2, 512)


def test_residual_blocks_as_layers(toy_data: LabelledData) -> None:
    """The stem and eight blocks, which together are the backbone."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet18-4", toy_data.image_shape).eval()
    model = layers(toy_data, backbone="resnet18-4", aux_width=3)
    assert len(model.blocks) == 9 and model.widths == [3, 3, 3, 6, 6, 12, 12, 24, 24]
    theirs = nn.Sequential(backbone.stem, *(b for stage in backbone.stages for b in stage))  # type: ignore[union-attr]
    model.blocks.load_state_dict(theirs.state_dict())
    images = torch.rand(3, *toy_data.image_shape)
    torch.testing.assert_close(model(images).embedding, backbone(images)[-1].mean((2, 3)))


# Classifiers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_auxiliary_classifier_against_its_formula(k: int, toy_data: LabelledData) -> None:
    """Eq. 2: k - 1 convolutions with ReLU, averages over the quadrants, a linear layer."""
    model = layers(toy_data, k=k, norm="none")
    images = torch.randn(4, *toy_data.image_shape)
    head = model.auxiliary["layer-2"]
    assert [type(module.conv) for module in head.hidden] == [nn.Conv2d] * (k - 1)  # type: ignore[union-attr]
    assert head.linear.in_features == 4 * (10 if k > 1 else 8)  # type: ignore[union-attr]
    for layer in (1, 2, 3):
        logits = model(images).logits[f"layer-{layer}"]
        torch.testing.assert_close(logits, by_hand(model, images, layer), rtol=1e-4, atol=1e-5)


def test_the_averages_are_normalised() -> None:
    """With batch norm on: after the averages, before the linear layer (papers' README)."""
    head, x = AuxiliaryClassifier(3, 0, 9, 5, "batch").train(), torch.randn(6, 3, 4, 4)
    averages = F.avg_pool2d(x, 2)
    expected = (averages - averages.mean((0, 2, 3), keepdim=True)) / averages.var(
        (0, 2, 3), unbiased=False, keepdim=True
    ).add(1e-5).sqrt()
    torch.testing.assert_close(head(x)[1], expected.flatten(1), rtol=1e-4, atol=1e-5)


def test_the_ensemble_weighs_logits_by_two_to_the_depth(toy_data: LabelledData) -> None:
    model, images = layers(toy_data), torch.randn(4, *toy_data.image_shape)
    logits = model(images).logits
    expected = (2 * logits["layer-1"] + 4 * logits["layer-2"] + 8 * logits["layer-3"]) / 14
    torch.testing.assert_close(logits["fine"], expected)
    alone = layers(toy_data, ensemble=False)(images).logits
    assert torch.equal(alone["fine"], alone["layer-3"])


def test_a_level_is_answered_by_its_own_classifiers(toy_data: LabelledData) -> None:
    model = layers(toy_data, levels_at=("coarse", "fine", "fine"))
    logits = model(torch.randn(4, *toy_data.image_shape)).logits
    assert torch.equal(logits["coarse"], logits["layer-1"]) and logits["coarse"].shape == (4, 2)
    torch.testing.assert_close(logits["fine"], (logits["layer-2"] + 2 * logits["layer-3"]) / 3)
    assert "middle" not in logits


def test_early_exit(toy_data: LabelledData) -> None:
    """Layers behind the exit do not run, and other classifiers do not either."""
    model, images, ran = layers(toy_data), torch.randn(4, *toy_data.image_shape), []
    whole = model(images).logits
    for name, module in model.named_modules():
        if name.count(".") == 1 and name.startswith(("blocks", "auxiliary")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    logits = model(images, until="layer-2").logits
    assert ran == ["blocks.0", "blocks.1", "auxiliary.layer-2"]
    assert logits.keys() == {"layer-2", "fine"} and torch.equal(logits["layer-2"], whole["layer-2"])
    assert torch.equal(logits["fine"], logits["layer-2"])


@pytest.mark.parametrize("since", [1, 2, 3])
def test_maps_instead_of_images(since: int, toy_data: LabelledData) -> None:
    """From the maps that the first blocks made: the classifier on them, and all behind."""
    model, images = layers(toy_data), torch.randn(4, *toy_data.image_shape)
    whole, maps = model(images).logits, nn.Sequential(*model.blocks[:since])(images)
    logits = model(maps, since=since).logits
    names = [f"layer-{j}" for j in range(since, 4)]
    assert [name for name in logits if name != "fine"] == names
    assert all(torch.equal(logits[name], whole[name]) for name in names)
    assert torch.equal(model(maps, f"layer-{since}", since).logits["fine"], whole[f"layer-{since}"])


@pytest.mark.parametrize("layers_kept", [1, 2, 3])
def test_every_prefix_is_a_model(layers_kept: int, toy_data: LabelledData, tmp_path: Path) -> None:
    model = layers(toy_data, levels_at=("coarse", "middle", "fine"))
    model.calibration.temperature.fill_(3)
    images = torch.randn(4, *toy_data.image_shape)
    prefix, name = model.prefix(layers_kept), f"layer-{layers_kept}"
    assert len(model.blocks) == 3 and len(model.outputs) == 3, "the whole model stays as it is"
    assert torch.equal(prefix(images).logits[name], model(images).logits[name])
    assert prefix.calibration.heads == toy_data.taxonomy.levels[:layers_kept]
    assert (prefix.calibration.temperature == 1).all()
    save_bundle(tmp_path / "bundle", prefix, Preprocessing(1, 8, 8, (0.5,), (0.2,)))
    loaded = load_bundle(tmp_path / "bundle").model.eval()
    assert isinstance(loaded, LayerwiseModel) and len(loaded.blocks) == layers_kept
    assert_same_weights(loaded, prefix)
    answers = loaded.answers(loaded(images)).combined
    assert tuple(answers) == toy_data.taxonomy.levels[:layers_kept]
    expected = prefix.answers(prefix(images)).combined
    assert all(torch.equal(answers[level], expected[level]) for level in answers)


def test_a_prefix_needs_its_classifier(toy_data: LabelledData) -> None:
    model = layers(toy_data)
    del model.auxiliary["layer-2"]
    for number in (0, 2, 4):
        with pytest.raises(UsageError, match=f"no classifier behind layer {number}: choose one of layer-1, layer-3"):
            model.prefix(number)


# Algorithm 1 ---------------------------------------------------------------------------------------------------------


def test_only_the_newest_layer_moves(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms included: the layers below are frozen, in evaluation mode, and record no graph."""
    stages, seen, original = Stages(monkeypatch), set(), StageRun.accumulate

    def accumulate(run: StageRun, *arguments: Any) -> Any:
        model, newest = run.engine.model, int(run.stage.name[-1])
        handles = []
        for number, block in enumerate(model.blocks):  # type: ignore[arg-type]

            def look(module: nn.Module, _: Any, output: Tensor, number: int = number) -> None:
                frozen = not any(m.training for m in module.modules()) and not output.requires_grad
                seen.add((newest, number + 1, frozen))

            handles.append(block.register_forward_hook(look))
        try:
            return original(run, *arguments)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(StageRun, "accumulate", accumulate)
    train(recipe(norm="batch", keep_features=False), toy_data)
    assert stages.names == ["layer-1", "layer-2", "layer-3"]
    assert seen == {(j, below, below < j) for j in (1, 2, 3) for below in range(1, j + 1)}
    for number, name in enumerate(stages.names):
        mine = (f"blocks.{number}.", f"auxiliary.{name}.")
        moved, model = stages.changed(name), stages.before[name]
        assert moved == {key for key in model.state_dict() if key.startswith(mine)}


def step_by_hand(before: LayerwiseModel, images: Tensor, labels: Tensor, layer: int, trained: list[int]) -> Any:
    """One step of gradient descent on the mean cross-entropy of all rows, at a rate of 0.1."""
    model = copy.deepcopy(before).requires_grad_(True)
    names = (*(f"blocks.{number}." for number in trained), f"auxiliary.layer-{layer}.")
    mine = {name: p for name, p in model.named_parameters() if name.startswith(names)}
    loss = F.cross_entropy(by_hand(model, images, layer), labels[:, -1])
    gradients = torch.autograd.grad(loss, list(mine.values()))
    return {name: p.detach() - 0.1 * g for (name, p), g in zip(mine.items(), gradients)}


ONE_STEP = {"epochs": 1, "steps_per_epoch": 1, "batch_size": 192}
PLAIN = Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"together": 3},
        {"together": 2},
        {"micro_batch": 45},
        {"micro_batch": 45, "recompute": True, "together": 3},
        {"keep_features": False},
    ],
    ids=str,
)
def test_a_step_is_gradient_descent(
    options: dict[str, Any], toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One full batch against autograd: one layer, several, all of them (end-to-end); in parts; computed again."""
    stages = Stages(monkeypatch)
    run = train(recipe(optimizer=PLAIN, **ONE_STEP, **options), toy_data)
    images, labels, rows = inputs_of(run, toy_data)
    assert len(rows) == 192, "a batch is every row once"
    ends = {1: [1, 2, 3], 2: [2, 3], 3: [3]}[options.get("together", 1)]
    assert stages.names == [f"layer-{end}" for end in ends]
    for first, last in zip([0, *ends], ends):
        name = f"layer-{last}"
        expected = step_by_hand(stages.before[name], images, labels, last, list(range(first, last)))
        after = stages.after[name].state_dict()
        for key, tensor in expected.items():
            torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-6)
        assert stages.changed(name) == expected.keys()


def test_what_is_computed_again_counts_once(toy_data: LabelledData) -> None:
    """Batch norm's running statistics too, which a second pass would move a second time."""
    plain, again = (layers_of(train(recipe(norm="batch", together=3, recompute=r), toy_data)) for r in (False, True))
    assert_same_weights(again, plain)


def test_recomputing_keeps_less(toy_data: LabelledData) -> None:
    model, images = layers(toy_data, num_blocks=6, width=8).train(), torch.randn(16, *toy_data.image_shape)

    def kept() -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(images, until="layer-6")
        assert outputs.logits["layer-6"].requires_grad
        return sum(found.values())

    plain = kept()
    model.recompute = True
    assert kept() < 0.6 * plain


def test_the_last_classifier_may_be_replaced(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """M~_f: one more auxiliary problem on the last layer (Section 4.3)."""
    stages = Stages(monkeypatch)
    model = layers_of(train(recipe(final_aux_width=3, epochs=(1, 1, 1, 2)), toy_data))
    assert stages.names == ["layer-1", "layer-2", "layer-3", "reduced"]
    assert model.auxiliary["layer-3"].hidden[0].conv.out_channels == 3  # type: ignore[index,union-attr]
    assert stages.stages["reduced"].epochs == 2
    moved = {key for key in stages.changed("reduced") if not key.startswith("auxiliary.layer-3.")}
    assert moved == {"blocks.2.conv.weight", "blocks.2.conv.bias"}
    torch.testing.assert_close(
        stages.before["reduced"].blocks[2].state_dict(), stages.after["layer-3"].blocks[2].state_dict(), rtol=0, atol=0
    )


def test_layerwise_learns(toy_data: LabelledData) -> None:
    """A quarter of the image and its stripes; the second takes a convolution."""
    run = train(recipe(norm="batch", width=8, epochs=6, steps_per_epoch=10, batch_size=32, num_blocks=2), toy_data)
    assert run.metrics["accuracy"]["fine"] > 0.9


# Levels --------------------------------------------------------------------------------------------------------------


def test_coarse_levels_early_and_fine_ones_late(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """From rows with missing labels; answers combine by Eq. 2 of nested learning."""
    data, stages = partly_labelled(toy_data), Stages(monkeypatch)
    levels = ("coarse", "middle", "fine")
    made = recipe(levels_at=levels, norm="batch", width=8, epochs=6, steps_per_epoch=10, batch_size=32)
    run = train(made, data)
    model = layers_of(run)
    for name, level in zip(stages.names, levels):
        assert model.auxiliary[name].linear.out_features == data.taxonomy.width(level)  # type: ignore[union-attr]
        assert stages.stages[name].objective.level == level
        assert len(stages.stages[name].rows) == len(stages.stages[name].data), "every row has some label"
    images = run.preprocessing(data.images(np.arange(20)))
    with torch.no_grad():
        answers = model.answers(model(images))
    assert tuple(answers.combined) == levels and not model.flat
    expected = combine_levels([answers.separate[level] for level in levels], data.taxonomy)
    for level, p in zip(levels, expected):
        torch.testing.assert_close(answers.combined[level], p)
    assert run.metrics["accuracy"]["coarse"] > 0.95 and run.metrics["accuracy"]["fine"] > 0.8


# Proposition 3.1 -----------------------------------------------------------------------------------------------------

IDENTITY: dict[str, Any] = {"init": "identity", "downsample_at": (), "num_blocks": 4, "width": 6}
TOO_FAST = Optimizer(name="sgd", lr=(0.1, 20.0, 0.05, 20.0), schedule="constant")
"""Layers 2 and 4 only get worse."""


def risks_of(model: LayerwiseModel, images: Tensor, labels: Tensor) -> list[float]:
    """The training risk at every depth, by a formula of its own."""
    found = []
    for layer in range(1, len(model.blocks) + 1):
        logits = by_hand(model, images, layer).double()
        found.append(float((logits.logsumexp(1) - logits.gather(1, labels[:, -1:])[:, 0]).mean()))
    return found


@pytest.mark.parametrize("k", [1, 2])
def test_the_training_risk_never_rises(k: int, toy_data: LabelledData) -> None:
    """Proposition 3.1, exactly: a layer that finds nothing better stays the identity, and the risk is equal."""
    run = train(recipe(k=k, optimizer=TOO_FAST, **IDENTITY), toy_data)
    model = layers_of(run)
    images, labels, _ = inputs_of(run, toy_data)
    with torch.no_grad():
        risks = risks_of(model, images, labels)
    assert all(later <= earlier for earlier, later in itertools.pairwise(risks)), risks
    assert risks[2] < risks[1], "a layer that is trained well does better"
    if k == 2:
        assert risks[1] == risks[0] and risks[3] == risks[2]
        weight = model.blocks[1].conv.weight  # type: ignore[union-attr]
        assert torch.equal(weight, nn.init.dirac_(torch.empty(6, 6, 3, 3)))
    recorded = [min(r["training risk"] for r in run.history if r["stage"] == f"layer-{j}") for j in (1, 3)]
    np.testing.assert_allclose(recorded, [risks[0], risks[2]], rtol=1e-5)


@pytest.mark.parametrize("broken", ["the start does not count", "no copy of the classifier", "no identity"])
def test_each_part_of_the_proposition_is_needed(
    broken: str, toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    if broken == "the start does not count":
        original = Layerwise.problem

        def problem(*arguments: Any) -> Any:
            stage = original(*arguments)
            return replace(stage, select=replace(stage.select, start=False))  # type: ignore[type-var]

        monkeypatch.setattr(Layerwise, "problem", problem)
    elif broken == "no identity":
        monkeypatch.setattr(Block, "make_identity", lambda block: None)
    else:
        monkeypatch.setattr("nestling.methods.layerwise.start_as_identity", lambda model, j: model.blocks[j])
    run = train(recipe(optimizer=TOO_FAST, **IDENTITY), toy_data)
    images, labels, _ = inputs_of(run, toy_data)
    with torch.no_grad():
        risks = risks_of(layers_of(run), images, labels)
    assert risks[1] > risks[0]


def test_the_risk_is_what_training_minimises(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows known only to a coarser level included."""
    data, stages = partly_labelled(toy_data), Stages(monkeypatch)
    run = train(recipe(**IDENTITY), data)
    images, labels, rows = inputs_of(run, data)
    with torch.no_grad():
        logits = by_hand(stages.after["layer-1"], images, 1)
    value = 0.0
    for row in range(len(rows)):
        level = int((labels[row] >= 0).sum()) - 1
        below = data.taxonomy.ancestor(level, of=2) == int(labels[row, level])
        value -= float(logits[row].softmax(0)[torch.from_numpy(below)].sum().log()) / len(rows)
    assert (labels < 0).any()
    risk = training_risk(data.taxonomy, {"fine": logits.softmax(1)}, labels, data.taxonomy.levels)
    assert risk == pytest.approx(value, rel=1e-5)
    assert run.history[1]["training risk"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample_at": (1,)}, "layer 2 cannot start as the identity"),
        ({"levels_at": ("fine", "fine", "fine", "coarse")}, "layer 4 cannot start as the identity"),
        ({"norm": "batch"}, "set norm = 'none'"),
        ({"augmentation": "affine"}, "set norm = 'none'"),
        ({"together": 2}, "together = 1"),
    ],
)
def test_where_the_proposition_does_not_hold(options: dict[str, Any], message: str, toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match=message):
        train(recipe(**{**IDENTITY, **options}), toy_data)


def test_the_classifier_before_must_answer_the_same_question(toy_data: LabelledData) -> None:
    """Of two levels with as many classes the weights would fit, and mean something else."""
    taxonomy = Taxonomy.from_paths(["a/x", "b/y"])
    labels = np.repeat(np.arange(240)[:, None] % 2, 2, axis=1)
    data = LabelledData(toy_data.inputs, labels, taxonomy)
    levels = ("coarse", "coarse", "fine", "fine")
    with pytest.raises(UsageError, match=r"layer 3 cannot start as the identity.*and the same level"):
        train(recipe(**IDENTITY, levels_at=levels), data)


# Proposition 3.2 -----------------------------------------------------------------------------------------------------


def contraction(generator: torch.Generator, size: float = 1.0) -> Tensor:
    """3x3 filters whose operator norm is at most ``size``: rotations of the channels at two taps, 0.8 and 0.2."""
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    for share, (row, column) in ((0.8, (1, 1)), (0.2, (0, 2))):
        rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        weight[:, :, row, column] = size * share * rotation
    return weight


def gaps(depth: int, epsilon: float, norm_of: float, bias: float, seed: int) -> tuple[list[float], float]:
    """How far approximate layers are from the optimal ones at each depth, and the norm of the input."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 4, 6, 6, generator=generator, dtype=torch.float64)
    best, found, ours = x, [0.0], x
    for _ in range(depth):
        block = Block(4, 4, None, "none").double().requires_grad_(False)
        optimum = contraction(generator, norm_of)
        for part, other in (("best", optimum), ("ours", optimum + epsilon / 2 * (contraction(generator) - optimum))):
            block.conv.weight.copy_(other)
            # B and 1 bound the norms of the whole map of biases, and of their errors.
            direction = torch.randn(4, generator=generator, dtype=torch.float64)
            unit = direction / (direction.norm() * 6)
            assert block.conv.bias is not None
            if part == "best":
                shift = bias * unit
                block.conv.bias.copy_(shift)
                best = block(best)
            else:
                block.conv.bias.copy_(shift + epsilon * unit)
                ours = block(ours)
        found.append(float((ours - best).norm()))
    return found, float(x.norm())


def bound(epsilon: float, depth: int, bias: float, size: float) -> float:
    """Appendix A: epsilon (j (j - 1) / 2 B + j |x| + j)."""
    return epsilon * (depth * (depth - 1) / 2 * bias + depth * size + depth)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_of_layers_add_up_within_the_bound(epsilon: float, seed: int) -> None:
    """Eq. 3, on 1-Lipschitz layers; those that stretch break it, so that the bound says something."""
    found, size = gaps(20, epsilon, 1.0, 0.5, seed)
    assert found[1] > 0
    assert all(gap <= bound(epsilon, depth, 0.5, size) for depth, gap in enumerate(found))
    stretched, size = gaps(20, epsilon, 3.0, 0.5, seed)
    assert any(gap > bound(epsilon, depth, 0.5, size) for depth, gap in enumerate(stretched))


def test_the_growth_is_quadratic() -> None:
    """The identity with a bias, each layer short by epsilon: the bound is met but for the term of the bias's error."""
    epsilon, bias, depth = 1e-5, 0.5, 40
    block = Block(1, 1, None, "none").double().requires_grad_(False)
    x = best = ours = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    block.make_identity()
    assert block.conv.bias is not None
    block.conv.bias.fill_(bias)
    for _ in range(depth):
        block.conv.weight[0, 0, 1, 1] = 1.0
        best = block(best)
        block.conv.weight[0, 0, 1, 1] = 1 - epsilon
        ours = block(ours)
    quadratic = bound(epsilon, depth, bias, float(x.norm())) - epsilon * depth
    assert float((best - ours).norm()) == pytest.approx(quadratic, rel=1e-3)


# The schedule of steps -----------------------------------------------------------------------------------------------

DROPS = Optimizer(name="sgd", lr=0.1, schedule="steps", factor=5.0, drops=(0.5, 0.75))


def test_the_rate_drops_and_the_optimiser_is_made_anew(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], StageRun.accumulate

    def accumulate(run: StageRun, *arguments: Any) -> Any:
        seen.append((run.optimizer.param_groups[0]["lr"], len(run.optimizer.state) == 0))
        return original(run, *arguments)

    monkeypatch.setattr(StageRun, "accumulate", accumulate)
    train(recipe(optimizer=DROPS, epochs=4, steps_per_epoch=2, num_blocks=1, downsample_at=()), toy_data)
    assert [anew for _, anew in seen] == [True, False, False, False, True, False, True, False]
    np.testing.assert_allclose([lr for lr, _ in seen], [0.1] * 4 + [0.02] * 2 + [0.004] * 2)


@pytest.mark.parametrize("crash_at", [16, 17, 19])
def test_resume_across_a_drop(
    crash_at: int, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the step with the new optimiser, and behind it: bit for bit."""
    made = recipe(optimizer=DROPS, epochs=4, num_blocks=2, downsample_at=())
    whole = train(made, toy_data, tmp_path / "whole").model
    checkpoint_every_epoch(monkeypatch)
    watch = Watch(monkeypatch)
    watch.crash_at = crash_at
    with pytest.raises(Crash):
        train(made, toy_data, tmp_path / "broken")
    assert watch.taken[-1][0] == "layer-2"
    assert_same_weights(train(made, toy_data, tmp_path / "broken").model, whole)
    assert len(set(watch.taken)) == 24 and len(watch.taken) - 24 == crash_at % 3


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample_at": (0, 1, 2, 3), "num_blocks": 4}, "layer 4 would halve a map of 1x1, whose size is odd"),
        ({"downsample_at": (3,)}, "downsample_at = 3 is no layer: the 3 layers count from 0"),
        ({"halve_input": True, "downsample_at": (0,)}, "leave 0 out of downsample_at"),
        ({"levels_at": ("coarse", "fine")}, "levels_at names 2 levels for 3 layers"),
        ({"levels_at": ("coarse", "mid", "fine")}, "Did you mean 'middle'?"),
        ({"downsampling": "averge"}, "Did you mean 'average'?"),
        ({"init": "identiti"}, "Did you mean 'identity'?"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"epochs": (1, 1)}, "epochs has 2 values for 3 stages"),
        ({"optimizer": Optimizer(lr=(0.1, 0.1))}, "optimizer.lr has 2 values for 3 stages"),
    ],
    ids=str,
)
def test_what_layerwise_refuses(options: dict[str, Any], message: str, toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        train(recipe(**options), toy_data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "compression.share must be above 0"),
        ({"share": 1.5}, "at most 1"),
        ({"epochs": 0}, "compression.epochs must be at least 1"),
    ],
)
def test_what_compression_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Compression(**options)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("auto", {"k": 0}, "k must be at least 1, got 0"),
        ("auto", {"num_blocks": 0}, "num_blocks must be at least 1"),
        ("auto", {"depth": 3}, "unknown network option depth"),
        ("vgg12", {}, "unknown backbone vgg12.*Did you mean 'vgg1[13]'"),
        ("resnet19", {}, "unknown backbone resnet19"),
        ("vgg11", {}, "would halve a map of 1x1"),
    ],
)
def test_what_the_network_refuses(backbone: str, options: dict[str, Any], message: str, toy_taxonomy: Taxonomy) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(toy_taxonomy, (1, 8, 8), backbone, "layerwise", options)


def test_no_level_may_be_named_as_an_output() -> None:
    taxonomy = Taxonomy.from_paths(["a/b", "c/d"], levels=["coarse", "layer-2"])
    with pytest.raises(UsageError, match="a level is named 'layer-2'"):
        build_model(taxonomy, (1, 8, 8), method="layerwise", options={"num_blocks": 2, "downsample_at": ()})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("k=0", "k must be at least 1, got 0"),
        ("downsample_at=[0,1,2,3]", "layer 4 would halve a map of 1x1, whose size is odd"),
        ("compression.share=0.01", "compression.share = 0.01 leaves none of the 32 filters of layer 1"),
    ],
)
def test_the_command_refuses(setting: str, message: str, tmp_path: Path) -> None:
    """One line, exit code 2, and nothing is written."""
    out = tmp_path / "run"
    refuse(2, [message], "train", "digits", "--method", "layerwise", "--set", setting, "--out", out)
    assert not out.exists()


def test_sgd_is_the_default() -> None:
    """As in the paper: momentum 0.9, weight decay 5e-4, a rate of 0.1 (papers' README)."""
    optimizer = Layerwise().optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.1, 0.9, 5e-4)


# Less memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (8, 8), (5, 6), (1, 1)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_lean_layers_equal_torchs(size: tuple[int, int], layout: torch.memory_format) -> None:
    """ReLU and quadrant averages: values, and gradients through weights, inputs and a second reader of the map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, *size, generator=generator).contiguous(memory_format=layout)
    found = []
    for relu, average in ((InPlaceReLU(), quadrant_averages), (nn.ReLU(), lambda y: F.adaptive_avg_pool2d(y, 2))):
        inputs, scale = (
            x.clone(memory_format=torch.preserve_format).requires_grad_(),
            torch.tensor(1.5, requires_grad=True),
        )
        y = relu(inputs * scale)
        value = (average(y) ** 2).sum() + y.mean((2, 3)).prod(1).sum() + y.sum()
        value.backward()
        found.append((value, inputs.grad, scale.grad))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs)


def test_recomputed_layers_go_in_runs_of_the_square_root(toy_data: LabelledData) -> None:
    options = {"num_blocks": 7, "width": 4, "downsample_at": ()}
    model = build_model(toy_data.taxonomy, toy_data.image_shape, "auto", "layerwise", options)
    assert isinstance(model, LayerwiseModel)
    model.add_auxiliary_head(6)
    assert model.steps(0, "layer-7") == [[0], [1], [2], [3], [4], [5], [6]]
    model.recompute = True
    assert model.steps(0, "layer-7") == [[0, 1, 2], [3, 4, 5], [6]]
    model.blocks[:2].requires_grad_(False)
    assert model.steps(0, "layer-7") == [[0], [1], [2, 3, 4], [5, 6]]
    assert model.steps(2, "layer-7") == [[], [2, 3, 4], [5, 6]]
    with torch.no_grad():
        assert model.steps(0, None) == [[j] for j in range(7)]
