"""Networks: shapes and widths against the papers, counts by hand, trees of every kind, and calibration."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.data.catalogue import DIGIT_PATHS
from nestling.errors import StorageError, UsageError
from nestling.models.backbones import Backbone, auto_backbone, build_backbone, num_parameters
from nestling.models.build import METHODS, NetworkOptions, build_model, rebuild
from nestling.models.heads import Calibration
from nestling.models.model import Model, Outputs
from nestling.models.resnet import BOTTLENECKED, RESNETS
from nestling.models.weights import restore
from nestling.taxonomy import Taxonomy

DIGITS = Taxonomy.from_paths(DIGIT_PATHS)
"""Widths 2, 4 and 10."""
RAGGED = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q", "b/r/3", "c"])
"""Widths 3, 4 and 5."""
ONE = Taxonomy.from_paths(["x", "y", "z"], levels=["only"])
FIVE = Taxonomy.from_paths([f"{i // 8}/{i // 4}/{i // 2}/{i}/{i}{c}" for i in range(16) for c in "ab"])

ON_NESTED_NETWORK = [method for method in METHODS if method not in ("layerwise", "coins")]
"""The others have networks, and tests, of their own."""


def seeded(*arguments: object, **options: object) -> Model:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build_model(*arguments, **options).eval()  # type: ignore[arg-type]


def images(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


def conv_maps(model: nn.Module, inputs: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """Input channels and output (channels, height, width) of every convolution, in the order in which they run."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def hook(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        seen.append((given[0].shape[1], tuple(result.shape[1:])))

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model(inputs)
    for handle in hooks:
        handle.remove()
    return seen


# The papers' networks ------------------------------------------------------------------------------------------------


def test_the_digits_network() -> None:
    """REGIMES.md, B: 66,696 parameters; 8 and 16 at 8x8, 32 at 4x4, 64 at 2x2; 32 with the 4x4, 32 with the 8x8 map."""
    model = seeded(DIGITS, (1, 8, 8))
    assert model.config["backbone"] == "conv:8-16/32/64"
    assert num_parameters(model) == 66_696
    assert conv_maps(model, images(2, 1, 8, 8)) == [
        (1, (8, 8, 8)),
        (8, (16, 8, 8)),
        (16, (32, 4, 4)),
        (32, (64, 2, 2)),
        (64 + 32, (32, 4, 4)),
        (32 + 16, (32, 8, 8)),
    ]


def test_the_papers_mnist_network() -> None:
    """Widths 2, 4, pool, 8, pool, 16, 32; the maps before the second and the first pooling come back as skips.

    Parameters by hand, convolutions without bias, each with two numbers of batch norm per map:
    22 + 80 + 304 + 1,184 + 4,672 for the backbone; heads 66, 68 and 170; (32 + 8)·9·16 + 32 and (16 + 4)·9·16 + 32.
    """
    model = seeded(DIGITS, (1, 28, 28), "conv:2-4/8/16-32")
    assert conv_maps(model, images(2, 1, 28, 28)) == [
        (1, (2, 28, 28)),
        (2, (4, 28, 28)),
        (4, (8, 14, 14)),
        (8, (16, 7, 7)),
        (16, (32, 7, 7)),
        (32 + 8, (16, 14, 14)),
        (16 + 4, (16, 28, 28)),
    ]
    assert num_parameters(model) == 6_262 + 66 + 68 + 170 + 5_792 + 2_912 == 15_270
    outputs = model(images(2, 1, 28, 28))
    assert {level: tuple(f.shape) for level, f in outputs.features.items()} == {
        "coarse": (2, 32),
        "middle": (2, 16),
        "fine": (2, 16),
    }


def test_without_skips_the_concatenations_are_dropped() -> None:
    with_skips, without = (
        conv_maps(seeded(DIGITS, (1, 28, 28), "conv:2-4/8/16-32", options={"skips": skips}), images(2, 1, 28, 28))
        for skips in (True, False)
    )
    assert [shape for _, shape in without] == [shape for _, shape in with_skips]
    assert [given for given, _ in without] == [1, 2, 4, 8, 16, 32, 16]


def test_without_skips_a_finer_level_knows_what_the_coarser_map_knows() -> None:
    """X -> f_coarse map -> f_middle map -> f_fine map is a chain: the same deepest map gives the same fine logits."""
    for skips in (False, True):
        model = seeded(DIGITS, (1, 8, 8), options={"skips": skips})
        original = model.backbone.forward

        def forward(inputs: Tensor, original=original) -> list[Tensor]:
            *earlier, last = original(inputs)
            return [*earlier, torch.ones_like(last)]

        model.backbone.forward = forward  # type: ignore[method-assign]
        outputs = model(images(2, 1, 8, 8))
        same = torch.equal(outputs.logits["fine"][0], outputs.logits["fine"][1])
        assert same is not skips


def naive(model: Model, inputs: Tensor) -> dict[str, Tensor]:
    """Figure 1, step by step: every level from the map above, nearest-neighbour upsampling by repeated pixels."""
    maps = model.backbone(inputs)  # type: ignore[operator]
    current, logits = maps[-1], {}
    for number, level in enumerate(model.taxonomy.levels):
        if number:
            skip = maps[max(len(maps) - 1 - number, 0)]
            rows = torch.arange(skip.shape[2]) * current.shape[2] // skip.shape[2]
            columns = torch.arange(skip.shape[3]) * current.shape[3] // skip.shape[3]
            joined = torch.cat([current[:, :, rows][:, :, :, columns], skip], dim=1)
            convolution, norm = model.decoder[level][0], model.decoder[level][1]  # type: ignore[index]
            current = norm(F.conv2d(joined, convolution.weight, padding=1)).clamp_min(0)
        head = model.head[level]  # type: ignore[index]
        logits[level] = current.flatten(2).sum(2) / (current.shape[2] * current.shape[3]) @ head.weight.T + head.bias
    return logits


@pytest.mark.parametrize(
    ("taxonomy", "backbone", "shape"),
    [
        (DIGITS, "conv:4/6/8", (1, 8, 8)),
        (DIGITS, "conv:4/6/8", (3, 9, 11)),  # pooling leaves 4x5 and 2x2, which are upsampled to 4x5 and 9x11
        (DIGITS, "conv:4/6/8", (1, 7, 4)),
        (ONE, "conv:4/8", (1, 5, 6)),
        (FIVE, "conv:4/6/8", (1, 8, 8)),  # five levels on three maps
        (FIVE, "conv:4", (1, 8, 8)),
        (RAGGED, "conv:4/8", (2, 6, 6)),
    ],
)
def test_the_network_of_figure_1(taxonomy: Taxonomy, backbone: str, shape: tuple[int, int, int]) -> None:
    model = seeded(taxonomy, shape, backbone)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    inputs = images(3, *shape)
    outputs, expected = model(inputs), naive(model, inputs)
    assert tuple(outputs.logits) == taxonomy.levels
    for level in taxonomy.levels:
        assert outputs.logits[level].shape == (3, taxonomy.width(level))
        torch.testing.assert_close(outputs.logits[level], expected[level], rtol=1e-4, atol=1e-5)
    last = model.backbone(inputs)[-1]  # type: ignore[operator]
    torch.testing.assert_close(outputs.embedding, last.mean((2, 3)))


@pytest.mark.parametrize("method", ON_NESTED_NETWORK)
@pytest.mark.parametrize("taxonomy", [DIGITS, ONE, FIVE, RAGGED])
def test_answers_for_every_level(taxonomy: Taxonomy, method: str) -> None:
    model = seeded(taxonomy, (1, 8, 8), "conv:4/8", method)
    flat = method != "nested"
    assert model.outputs == (taxonomy.levels[-1:] if flat else taxonomy.levels)
    assert model.flat is (flat and len(taxonomy.levels) > 1)
    answers = model.answers(model(images(5, 1, 8, 8)))
    assert tuple(answers.combined) == tuple(answers.separate) == tuple(answers.rejection) == taxonomy.levels
    for level in taxonomy.levels:
        assert answers.combined[level].shape == answers.separate[level].shape == (5, taxonomy.width(level))
        torch.testing.assert_close(answers.combined[level].sum(1), torch.ones(5))
        assert not answers.rejection[level].any()
    # A coarser answer is the sum of the finer one below it, for Equation 2 as for a flat head.
    for coarse, fine in pairwise(taxonomy.levels):
        expected = torch.zeros_like(answers.combined[coarse])
        for column, parent in enumerate(taxonomy.column_parent(fine)):
            expected[:, parent] += answers.combined[fine][:, column]
        torch.testing.assert_close(answers.combined[coarse], expected)


def test_flat_models_share_the_network() -> None:
    """The end-to-end twin: the same backbone and decoder, a head on the finest level alone."""
    nested, flat = (seeded(DIGITS, (1, 8, 8), method=method) for method in ("nested", "end-to-end"))
    assert flat.state_dict().keys() < nested.state_dict().keys()
    missing = {name.split(".")[1] for name in nested.state_dict().keys() - flat.state_dict().keys()}
    assert missing == {"coarse", "middle"}
    assert num_parameters(nested) - num_parameters(flat) == (64 * 2 + 2) + (32 * 4 + 4)


@pytest.mark.parametrize("until", DIGITS.levels)
def test_until_computes_what_is_needed(until: str) -> None:
    model = seeded(DIGITS, (1, 8, 8))
    ran: list[str] = []
    for kind in ("decoder", "head"):
        for level, module in getattr(model, kind).items():
            module.register_forward_hook(lambda *_, name=f"{kind}.{level}": ran.append(name))
    inputs = images(4, 1, 8, 8)
    whole = model(inputs)
    ran.clear()
    part = model(inputs, until=until)
    levels = DIGITS.levels[: DIGITS.level_index(until) + 1]
    assert ran == ["head.coarse", *(f"{kind}.{level}" for level in levels[1:] for kind in ("decoder", "head"))]
    assert tuple(part.logits) == levels
    for level in levels:
        assert torch.equal(part.logits[level], whole.logits[level])
    assert tuple(model.answers(part).combined) == levels


@pytest.mark.parametrize("method", ["nested", "flat-marginal"])
def test_parts_are_what_the_outputs_need(method: str) -> None:
    """Exactly the parameters that the loss of these outputs has a gradient for."""
    for level in DIGITS.levels:
        model = seeded(DIGITS, (1, 8, 8), method=method)
        parts = {id(p) for module in model.parts(level) for p in module.parameters()}
        outputs = model(images(2, 1, 8, 8), until=level).logits.values()
        if outputs:
            sum(logits.square().sum() for logits in outputs).backward()  # type: ignore[union-attr]
            assert {id(p) for p in model.parameters() if p.grad is not None} == parts


def test_channels_last_changes_nothing() -> None:
    model = seeded(DIGITS, (3, 9, 11), "conv:4/6/8")
    inputs = images(3, 3, 9, 11)
    expected = model(inputs).logits["fine"]
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert model.backbone.stages[1][1][0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index,union-attr]
    torch.testing.assert_close(model(inputs.contiguous(memory_format=torch.channels_last)).logits["fine"], expected)


# Building ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nest"}, r"unknown method nest: .* Did you mean 'nested'\?"),
        ({"backbone": "resnet19"}, r"unknown backbone resnet19: .*'auto'"),
        ({"backbone": "conv:"}, "cannot read the backbone 'conv:'"),
        ({"backbone": "conv:8-x/3"}, "cannot read the backbone 'conv:8-x/3'"),
        ({"backbone": "conv:8/0"}, "cannot read the backbone 'conv:8/0'"),
        ({"backbone": "conv:8//4"}, "cannot read the backbone"),
        ({"backbone": "conv:1/1/1/1/1"}, "needs images of at least 16 pixels a side, got 8x8"),
        ({"backbone": "resnet18", "options": {"norm": "none"}}, "has batch norm in every block"),
        ({"backbone": "resnet18-0"}, "the first width of the backbone 'resnet18-0' must be at least 1"),
        ({"options": {"skip": True}}, r"unknown network option skip: .* Did you mean 'skips'\?"),
        ({"options": {"norm": "layer"}}, "unknown norm layer"),
        ({"input_shape": (8, 8)}, r"input_shape must be \(channels, height, width\)"),
        ({"input_shape": (0, 8, 8)}, "input_shape must be"),
    ],
)
def test_models_that_cannot_be_built(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(**{"taxonomy": DIGITS, "input_shape": (1, 8, 8), **arguments})


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("conv:" + "-".join(["1"] * 256), True),
        ("conv:" + "-".join(["1"] * 257), False),
        ("conv:" + "0" * 994 + "1", True),
        ("conv:" + "0" * 995 + "1", False),
        ("conv:" + "1-" * 10**6, False),
    ],
)
def test_a_backbones_name_is_bounded(name: str, good: bool) -> None:
    if good:
        build_backbone(name, (1, 8, 8))
        return
    with pytest.raises(UsageError, match="expected at most 1000 and 256") as raised:
        build_backbone(name, (1, 8, 8))
    assert len(str(raised.value)) < 300


def test_norm_none_has_biases_in_place_of_norms() -> None:
    model = seeded(DIGITS, (1, 8, 8), options=NetworkOptions(norm="none"))
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert not list(model.backbone.buffers())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 8), "conv:8-16/32/64"),
        ((3, 16, 40), "conv:8-16/32/64"),
        ((1, 28, 28), "conv:16/32-32/64-64"),
        ((3, 32, 32), "conv:32/64/128-128"),
        ((3, 64, 64), "conv:32/64/128-128"),
        ((3, 96, 128), "resnet18"),
    ],
)
def test_auto_backbones(shape: tuple[int, int, int], expected: str) -> None:
    assert auto_backbone(shape) == expected
    assert build_model(DIGITS, shape).config["backbone"] == expected


@pytest.mark.parametrize("method", ON_NESTED_NETWORK)
@pytest.mark.parametrize("rejection", [False, True])
def test_a_model_is_rebuilt_from_its_config(method: str, rejection: bool) -> None:
    """Through JSON, as in a bundle: the same names and shapes, so that its weights fit, and then the same outputs."""
    model = seeded(RAGGED, (3, 9, 11), "conv:4-5/6", method, {"skips": False, "norm": "none"})
    if rejection:
        model.calibration.add_rejection()
        model.config["rejection"] = True
    again = rebuild(RAGGED, json.loads(json.dumps(model.config))).eval()
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    inputs = images(2, 3, 9, 11)
    assert not torch.equal(again(inputs).logits["fine"], model(inputs).logits["fine"])
    restore(again, model.state_dict(), "the bundle")
    assert torch.equal(again(inputs).logits["fine"], model(inputs).logits["fine"])
    assert again.config == model.config


def test_building_is_seeded_by_the_global_generator() -> None:
    one, same = (seeded(DIGITS, (1, 8, 8)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))


def test_restore_keeps_layouts_and_refuses_what_does_not_fit() -> None:
    one, other = (seeded(DIGITS, (3, 8, 8)).to(memory_format=torch.channels_last) for _ in range(2))  # type: ignore[call-overload]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    restore(one, {name: t.contiguous() for name, t in other.state_dict().items()}, "it")
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values()):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
    tensors = other.state_dict()
    with pytest.raises(StorageError, match=r"it does not fit this model: \['extra'\] is in only one"):
        restore(one, {**tensors, "extra": torch.ones(1)}, "it")
    with pytest.raises(StorageError, match=r"head\.fine\.bias has shape \(9,\), expected \(10,\)"):
        restore(one, {**tensors, "head.fine.bias": torch.ones(9)}, "it")


# ResNets -------------------------------------------------------------------------------------------------------------

# Torchvision's own counts, less the last layer's 512·1,000 + 1,000, of bottlenecks 2,048·1,000 + 1,000.
IMAGENET = {
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
}


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_maps(name: str) -> None:
    small = build_backbone(f"{name}-4", (3, 32, 32)).eval()
    assert isinstance(small, Backbone)
    maps = small(images(1, 3, 32, 32))
    bottlenecks = name in BOTTLENECKED
    channels = [4 * each if bottlenecks else each for each in (4, 8, 16, 32)]
    assert list(small.channels) == channels
    assert [tuple(m.shape) for m in maps] == [(1, c, side, side) for c, side in zip(channels, (32, 16, 8, 4))]
    odd = small(images(1, 3, 33, 47))
    assert [tuple(m.shape[2:]) for m in odd] == [(33, 47), (17, 24), (9, 12), (5, 6)]
    large = build_backbone(f"{name}-4", (3, 96, 65)).eval()
    assert [tuple(m.shape[2:]) for m in large(images(1, 3, 96, 65))] == [(24, 17), (12, 9), (6, 5), (3, 3)]
    convolutions = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    # As the name counts: the stem, two or three per block and the last layer; three or four shortcuts are projected.
    assert len(convolutions) - 3 - bottlenecks + 1 == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", IMAGENET)
def test_resnet_counts(name: str) -> None:
    with torch.device("meta"):
        assert num_parameters(build_backbone(name, (3, 224, 224))) == IMAGENET[name]


def test_a_block_by_hand() -> None:
    """Identity weights, no shift: relu(relu(x) + x) is 2x where x is positive, and 0 elsewhere."""
    from nestling.models.resnet import BasicBlock

    block = BasicBlock(2, 2, 1).eval()
    for convolution in (block.conv1, block.conv2):
        nn.init.dirac_(convolution.weight)
    x = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    expected = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    torch.testing.assert_close(block(x.clone()), expected, rtol=1e-4, atol=1e-4)


def test_a_bottleneck_by_hand() -> None:
    """Four channels, a middle one that the first picks: relu(x), widened into the third, and x beside it."""
    from nestling.models.resnet import Bottleneck

    block = Bottleneck(4, 4, 1).eval()
    for convolution, place in ((block.conv1, (0, 1, 0, 0)), (block.conv2, (0, 0, 1, 1)), (block.conv3, (2, 0, 0, 0))):
        nn.init.zeros_(convolution.weight)
        with torch.no_grad():
            convolution.weight[place] = 1
    x = torch.tensor([-1.0, 3.0, 0.5, 2.0]).view(1, 4, 1, 1).expand(1, 4, 3, 3)
    expected = torch.tensor([0.0, 3.0, 3.5, 2.0]).view(1, 4, 1, 1).expand(1, 4, 3, 3)
    torch.testing.assert_close(block(x.clone()), expected, rtol=1e-4, atol=1e-4)


def test_a_resnet_serves_nested_learning() -> None:
    model = seeded(DIGITS, (3, 32, 32), "resnet10-4")
    outputs = model(images(2, 3, 32, 32))
    assert outputs.embedding.shape == (2, 32) and outputs.logits["fine"].shape == (2, 10)
    assert [given for given, _ in conv_maps(model, images(2, 3, 32, 32))[-2:]] == [32 + 16, 16 + 8]


# Calibration ---------------------------------------------------------------------------------------------------------


def calibration(rejection: bool) -> Calibration:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        made = Calibration({"coarse": (5, 2), "fine": (4, 3)})
        if rejection:
            made.add_rejection()
    return made


def test_temperature_divides() -> None:
    logits, features = torch.tensor([[2.0, 0.0, -1.0]]), torch.rand(1, 4)
    head = calibration(False)
    head.set_temperatures("fine", 2.0)
    probabilities, rejection, real = head("fine", logits, features)
    # e^1, e^0, e^-0.5 over their sum
    expected = torch.tensor([[2.7182818, 1.0, 0.6065307]]) / 4.3248125
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(real, expected)
    assert rejection.tolist() == [0.0]
    torch.testing.assert_close(head("coarse", logits[:, :2], torch.rand(1, 5))[0], logits[:, :2].softmax(1))


def test_probabilities_and_rejection_sum_to_one() -> None:
    head = calibration(True)
    features, logits = torch.rand(20, 4) * 7, torch.randn(20, 3)
    probabilities, rejection, real = head("fine", logits, features)
    torch.testing.assert_close(probabilities.sum(1) + rejection, torch.ones(20))
    assert ((rejection > 0) & (rejection < 1)).all()
    torch.testing.assert_close(real, probabilities / (1 - rejection)[:, None])
    # The last column of a layer on normalised features rejects.
    layer = head.rejection["fine"]
    unit = features / features.norm(dim=1, keepdim=True)
    expected = (unit @ layer.weight.T + layer.bias).softmax(1)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(probabilities, expected[:, :3])
    torch.testing.assert_close(rejection, expected[:, 3])
    # The base head is not asked, unless rejection is left out.
    torch.testing.assert_close(head("fine", -logits, features)[0], probabilities)
    torch.testing.assert_close(head("fine", logits, features, reject=False)[0], logits.softmax(1))
    torch.testing.assert_close(head("fine", logits, 9 * features)[0], probabilities)


def test_rejection_has_its_own_temperature() -> None:
    head = calibration(True)
    features, logits = torch.rand(6, 4), torch.randn(6, 3)
    head.set_temperatures("fine", 3.0, 0.5)
    scores = head.rejection_logits("fine", features)
    torch.testing.assert_close(head("fine", logits, features)[1], (2 * scores).softmax(1)[:, -1])
    torch.testing.assert_close(head("fine", logits, features, reject=False)[0], (logits / 3).softmax(1))


def test_rejected_beyond_what_float32_holds_still_sums_to_one() -> None:
    """At a rejection of 1 - 1e-40 nothing is left to renormalise by division; the shares of real classes remain."""
    head = calibration(True)
    with torch.no_grad():
        head.rejection["fine"].weight.zero_()  # type: ignore[union-attr,operator]
        head.rejection["fine"].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 300.0]))  # type: ignore[union-attr,operator]
    probabilities, rejection, real = head("fine", torch.zeros(2, 3), torch.rand(2, 4))
    assert probabilities.max() == 0 and rejection.tolist() == [1.0, 1.0]
    torch.testing.assert_close(real, torch.tensor([[1.0, 0.0, 0.0]]).softmax(1).expand(2, 3))


def test_answers_combine_what_is_left_after_rejection() -> None:
    """Equation 2 on the renormalised probabilities; ``separate`` keeps what each head says, rejection apart."""
    model = seeded(DIGITS, (1, 8, 8))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        model.calibration.add_rejection()
    outputs = model(images(4, 1, 8, 8))
    answers = model.answers(outputs)
    for level in DIGITS.levels:
        torch.testing.assert_close(answers.separate[level].sum(1) + answers.rejection[level], torch.ones(4))
        torch.testing.assert_close(answers.combined[level].sum(1), torch.ones(4))
    coarse = answers.separate["coarse"] / answers.separate["coarse"].sum(1, keepdim=True)
    torch.testing.assert_close(answers.combined["coarse"], coarse)
    middle = answers.separate["middle"]
    parent = DIGITS.column_parent("middle")
    for row in range(4):
        for q in range(4):
            siblings = sum(middle[row, w] for w in range(4) if parent[w] == parent[q])
            torch.testing.assert_close(
                answers.combined["middle"][row, q], middle[row, q] / siblings * coarse[row, parent[q]]
            )
    without = model.answers(outputs, reject=False)
    torch.testing.assert_close(without.separate["fine"], outputs.logits["fine"].softmax(1))
    assert not any(rejection.any() for rejection in without.rejection.values())


def test_answers_of_a_flat_head_are_sums() -> None:
    model = seeded(DIGITS, (1, 8, 8), method="flat-marginal")
    answers = model.answers(
        Outputs({"fine": torch.arange(10.0)[None]}, {"fine": torch.zeros(1, 32)}, torch.zeros(1, 64))
    )
    p = torch.arange(10.0).softmax(0)
    middle = torch.zeros(4).index_add(0, torch.from_numpy(DIGITS.ancestor("middle", of="fine").copy()), p)
    for found in (answers.combined, answers.separate):
        torch.testing.assert_close(found["fine"][0], p)
        torch.testing.assert_close(found["middle"][0], middle)
