"""Attacks: by hand, against foolbox and the Adversarial Robustness Toolbox, and aimed at every level of a model."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.data.text import TextEncoding
from nestling.data.transforms import Preprocessing
from nestling.engine.fit import fit
from nestling.engine.run import Run
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate.attack_specs import KINDS, parse_attack
from nestling.evaluate.attacked import (
    attack_metrics,
    attackable_level,
    outputs_by_epsilon,
    strength_at_error,
    under_attack,
)
from nestling.evaluate.attacks import (
    HALVINGS,
    LADDER,
    Classify,
    deepfool,
    fgsm,
    fgsm_until_flip,
    saliency_map,
)
from nestling.methods import Coins, EndToEnd, Nested
from nestling.methods.layerwise import Layerwise
from nestling.models.build import build_model
from nestling.taxonomy import Taxonomy
from running import QUICK, refuse, succeed, table
from small import quick

ALL: dict[str, Callable[..., object]] = {
    "fgsm": lambda c, x, y: fgsm(c, x, y, 0.1),
    "fgsm until flip": fgsm_until_flip,
    "deepfool": deepfool,
    "saliency": saliency_map,
}
EVERY = pytest.mark.parametrize("attack", ALL.values(), ids=list(ALL))
RUNTIME = Runtime.choose("cpu", "fp32")


def optional(name: str) -> ModuleType:
    """A reference, skipped where it is not installed; old names of SciPy that it uses are its own business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.split(".")[0])
        return importlib.import_module(name)


# By hand: two classes, logits (0, w . x + b) of images of 1 x 1 x 2.

W, B = torch.tensor([1.0, -2.0]), -0.1


def line(pixels: Tensor) -> Tensor:
    score = pixels.flatten(1) @ W + B
    return torch.stack([torch.zeros_like(score), score], 1)


def image(*numbers: float) -> Tensor:
    return torch.tensor(numbers).view(1, 1, 1, -1)


def test_fgsm_by_hand() -> None:
    # The score is 0.6 - 0.8 - 0.1 = -0.3: class 0. Away from it: the first number up, the second down.
    found = fgsm(line, image(0.6, 0.4), torch.tensor([0]), 0.05)
    torch.testing.assert_close(found.pixels, image(0.65, 0.35))
    assert not found.flipped.item() and found.strength.item() == pytest.approx(0.05)
    torch.testing.assert_close(fgsm(line, image(0.98, 0.6), torch.tensor([0]), 0.05).pixels, image(1.0, 0.55))


def test_fgsm_until_flip_by_hand() -> None:
    # The score rises by 3 epsilon from -0.3: it flips at 0.1, and the ladder's step there is halved five times.
    found = fgsm_until_flip(line, image(0.6, 0.4), torch.tensor([0]))
    step = next(high - low for low, high in pairwise(LADDER) if high > 0.1)
    assert 0.1 <= found.strength.item() <= 0.1 + step / 2**HALVINGS + 1e-6
    assert found.flipped.item()
    # Wrong from the start: nothing is moved.
    found = fgsm_until_flip(line, image(0.6, 0.4), torch.tensor([1]))
    assert torch.equal(found.pixels, image(0.6, 0.4)) and (found.strength.item(), found.flipped.item()) == (0, True)
    # No epsilon flips what is constant.
    found = fgsm_until_flip(lambda x: torch.stack([x.sum((1, 2, 3)) + 1, 0 * x.sum((1, 2, 3))], 1), image(0.5, 0.5),
                            torch.tensor([0]))  # fmt: skip
    assert (found.strength.item(), found.flipped.item()) == (1, False)


def test_deepfool_by_hand() -> None:
    # The boundary is 0.3 / sqrt(5) away, along (1, -2) / sqrt(5); 1e-4 further, and 2 % more.
    found = deepfool(line, image(0.6, 0.4), torch.tensor([0]))
    length = 1.02 * (0.3 / 5**0.5 + 1e-4)
    assert found.strength.item() == pytest.approx(length, rel=1e-5) and found.flipped.item()
    torch.testing.assert_close(found.pixels, image(0.6, 0.4) + length * image(1, -2) / 5**0.5)


def test_the_saliency_map_by_hand() -> None:
    # Of logits (0, 3a + b - 2c + d), a and d are the pair that favours class 1 most, once b is white already.
    slopes = torch.tensor([3.0, 1.0, -2.0, 0.5])

    def score(pixels: Tensor) -> Tensor:
        found = pixels.flatten(1) @ slopes - 4.6
        return torch.stack([torch.zeros_like(found), found], 1)

    start = image(0.1, 1.0, 0.2, 0.3)
    found = saliency_map(score, start, torch.tensor([0]), fraction=0.5)
    torch.testing.assert_close(found.pixels, image(1.0, 1.0, 0.2, 1.0))
    # 3 + 1 - 0.4 + 0.5 is below 4.6, and the budget is spent.
    assert (found.strength.item(), found.flipped.item()) == (0.5, False)
    # A fraction that has no room for a pair changes nothing. By tenths, a pair is raised until one of it is white.
    assert torch.equal(saliency_map(score, start, torch.tensor([0]), fraction=0.4).pixels, start)
    small = saliency_map(score, start, torch.tensor([0]), fraction=0.5, theta=0.1)
    torch.testing.assert_close(small.pixels, image(0.8, 1.0, 0.2, 1.0))
    # No pair favours class 0 that could still be raised.
    still = saliency_map(score, image(1.0, 1.0, 1.0, 1.0), torch.tensor([1]), targets=torch.tensor([0]), fraction=1.0)
    assert torch.equal(still.pixels, image(1.0, 1.0, 1.0, 1.0))


@EVERY
def test_a_classifier_without_gradients_is_refused(attack) -> None:
    with pytest.raises(UsageError, match="passes no gradient"):
        attack(lambda x: line(x.detach()), image(0.6, 0.4), torch.tensor([0]))


# On the digits, against the references.


class Net(nn.Module):
    def __init__(self, classify: Classify) -> None:
        super().__init__()
        self.classify = classify

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classify(pixels)


@pytest.fixture(scope="module")
def digits() -> tuple[Net, Tensor, Tensor]:
    """A small network that was trained on the digits for a moment, and 60 rows of which it knows nearly all."""
    data = load_data("digits", "test").subset(range(60))
    images, labels = load_data("digits", "train").inputs.float() / 255, load_data("digits", "train").labels[:, -1]  # type: ignore[union-attr]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for rows in torch.randperm(len(images)).repeat(3).split(128):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), torch.from_numpy(labels)[rows]).backward()
            optimizer.step()
    net.requires_grad_(False)
    return Net(net), data.inputs.float() / 255, torch.from_numpy(data.labels[:, -1])  # type: ignore[union-attr]


@EVERY
def test_attacks_keep_the_range_and_treat_each_row_by_itself(attack, digits) -> None:
    net, x, y = digits
    found = attack(net, x, y)
    assert found.pixels.shape == x.shape and 0 <= found.pixels.min() <= found.pixels.max() <= 1
    assert torch.equal(found.flipped, net(found.pixels).argmax(1) != y)
    # A pair that is all but a tie may be taken the other way round in another batch.
    some = attack(net, x[7:12], y[7:12])
    torch.testing.assert_close(some.strength, found.strength[7:12], rtol=0.05, atol=0.05)
    wrong = net(x).argmax(1) != y
    if attack is not ALL["fgsm"]:
        assert torch.equal(found.pixels[wrong], x[wrong]) and (found.strength[wrong] == 0).all()
        right = (found.flipped & ~wrong).float()
        assert right.sum() / (~wrong).sum() > 0.8 and (found.strength[~wrong] > 0).all()


def test_fgsm_is_foolboxs(digits) -> None:
    foolbox = optional("foolbox")
    net, x, y = digits
    model = foolbox.PyTorchModel(net.eval(), bounds=(0, 1), device="cpu")
    for epsilon in (0.03, 0.2):
        theirs = foolbox.attacks.LinfFastGradientAttack(random_start=False)(model, x, y, epsilons=epsilon)[1]
        torch.testing.assert_close(fgsm(net, x, y, epsilon).pixels, theirs, rtol=0, atol=1e-6)


def test_deepfool_goes_as_far_as_foolboxs(digits) -> None:
    foolbox = optional("foolbox")
    net, x, y = digits
    model = foolbox.PyTorchModel(net.eval(), bounds=(0, 1), device="cpu")
    theirs, _, success = foolbox.attacks.L2DeepFoolAttack()(model, x, y, epsilons=None)
    ours = deepfool(net, x, y)
    assert success.all() and ours.flipped.all()
    assert ours.strength.mean().item() == pytest.approx((theirs - x).flatten(1).norm(dim=1).mean().item(), rel=0.02)


@pytest.mark.parametrize("theta", [1.0, 0.2])
def test_the_saliency_attack_succeeds_as_often_as_arts(digits, theta: float) -> None:
    """On the same targets, with the same share of numbers."""
    evasion, classification = optional("art.attacks.evasion"), optional("art.estimators.classification")
    net, x, y = digits
    targets = (y + 1 + torch.arange(len(y)) % 9) % 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Probabilities, as in the paper's derivation: of logits it reads the target's alone.
        classifier = classification.PyTorchClassifier(
            nn.Sequential(net, nn.Softmax(1)), loss=nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10,
            clip_values=(0, 1), device_type="cpu",
        )  # fmt: skip
        theirs = evasion.SaliencyMapMethod(classifier, theta=theta, gamma=0.14, batch_size=len(x), verbose=False)
        moved = theirs.generate(x.numpy(), np.eye(10, dtype=np.float32)[targets.numpy()])
    success = (net(torch.from_numpy(moved)).argmax(1) == targets).float().mean().item()
    ours = saliency_map(net, x, y, 0.14, theta, targets)
    found = (net(ours.pixels).argmax(1) == targets).float().mean().item()
    assert 0.1 < success < 1 and found == pytest.approx(success, abs=0.1)
    assert ours.strength.max() <= 0.14


# Models of levels.


@pytest.fixture(scope="module")
def nested(toy_data: LabelledData) -> Run:
    return quick(Nested(epochs=(1, 1, 6), batch_size=24, steps_per_epoch=10, augmentation="none"), toy_data)


@pytest.fixture(scope="module")
def flat(toy_data: LabelledData) -> Run:
    return quick(EndToEnd(epochs=6, batch_size=24, steps_per_epoch=10, augmentation="none"), toy_data)


def figures(run: Run, data: LabelledData, spec: str, level: str | None = None):
    found = under_attack(run.model, run.preprocessing, data, RUNTIME, spec, level)
    return found, attack_metrics(run.model, found, data)


@pytest.mark.parametrize("level", ["coarse", "middle", "fine"])
@pytest.mark.parametrize("spec", ["fgsm:flip", "deepfool", "saliency:1"])
def test_the_attacked_head_is_the_one_that_falls(nested: Run, toy_data: LabelledData, spec: str, level: str) -> None:
    data = toy_data.subset(range(60))
    found, metrics = figures(nested, data, spec, level)
    own = {entry["name"]: entry["accuracy"] for entry in metrics["levels_uncombined"]}
    number = data.taxonomy.level_index(level)
    wrong = found.outputs.logits[level].argmax(1).numpy() != data.labels[:, number]
    assert np.array_equal(found.flipped, wrong) and own[level] == pytest.approx(1 - wrong.mean())
    assert metrics["flipped"] == wrong.mean() > {"fgsm:flip": 0.6, "deepfool": 0.6, "saliency:1": 0.5}[spec]
    assert (metrics["level"], [entry["name"] for entry in metrics["levels"]]) == (level, ["coarse", "middle", "fine"])
    if level == "fine" and spec == "deepfool":
        assert own["coarse"] > 0.3
    if level == "fine":
        assert found.strength[found.flipped].mean() == metrics["strength"]["mean"]


def test_a_model_of_one_output_answers_by_ancestors(flat: Run, toy_data: LabelledData) -> None:
    data = toy_data.subset(range(60))
    found, metrics = figures(flat, data, "deepfool")
    leaf = found.outputs.logits["fine"].argmax(1).numpy()
    for entry, level in zip(metrics["levels_uncombined"], data.taxonomy.levels):
        ancestors = data.taxonomy.ancestor(level, of="fine")[leaf]
        assert entry["accuracy"] == pytest.approx(
            (ancestors == data.labels[:, data.taxonomy.level_index(level)]).mean()
        )
    with pytest.raises(UsageError, match=r"no head at that level .*'fine'"):
        figures(flat, data, "deepfool", "coarse")


def test_rows_without_the_level_are_attacked_as_what_they_are_taken_for(nested: Run, toy_data: LabelledData) -> None:
    data = toy_data.subset(range(30))
    hidden = data.keep({"fine": 0.0})
    before = nested.model.eval()(nested.preprocessing(data.inputs)).logits["fine"].argmax(1)
    found, metrics = figures(nested, hidden, "deepfool")
    assert (found.outputs.logits["fine"].argmax(1) != before)[torch.from_numpy(found.flipped)].all()
    assert found.flipped.mean() > 0.9 and metrics["levels_uncombined"][2]["n"] == 0


def test_the_model_is_left_as_it_was(nested: Run, toy_data: LabelledData) -> None:
    nested.model.train()
    before = [p.requires_grad for p in nested.model.parameters()]
    state = {name: t.clone() for name, t in nested.model.state_dict().items()}
    figures(nested, toy_data.subset(range(8)), "deepfool")
    assert all(module.training for module in nested.model.modules())
    assert before == [p.requires_grad for p in nested.model.parameters()]
    assert all(torch.equal(t, state[name]) for name, t in nested.model.state_dict().items())
    nested.model.eval()


def test_layerwise_and_search_models_are_attacked_too(toy_data: LabelledData) -> None:
    data = toy_data.subset(range(24))
    layers = Layerwise(num_blocks=2, width=4, epochs=1, downsample_at=(), levels_at=("coarse", "fine"))
    run = fit(layers, toy_data, precision="fp32", verbose=False)
    for level in ("coarse", "fine"):
        assert figures(run, data, "deepfool", level)[0].flipped.mean() > 0.9
    search = quick(Coins(variant="coins", epochs=1, batch_size=24), toy_data)
    assert figures(search, data, "fgsm:0.1")[1]["level"] == "coarse"
    probe = quick(Coins(variant="ins", epochs=1, batch_size=24), toy_data)
    with pytest.raises(UsageError, match="passes no gradient"):
        figures(probe, data, "fgsm:0.1")


def test_the_error_curve_is_fgsm_at_every_strength(nested: Run, toy_data: LabelledData) -> None:
    data = toy_data.subset(range(40))
    epsilons = [0.0, 0.02, 0.1]
    curve = outputs_by_epsilon(nested.model, nested.preprocessing, data, RUNTIME, epsilons)
    for epsilon, outputs in zip(epsilons, curve):
        alone, _ = figures(nested, data, f"fgsm:{epsilon}")
        torch.testing.assert_close(outputs.logits["coarse"], alone.outputs.logits["coarse"])
    with pytest.raises(UsageError, match="impossible attack 'fgsm:2'"):
        outputs_by_epsilon(nested.model, nested.preprocessing, data, RUNTIME, [2])


def test_the_strength_at_an_error() -> None:
    epsilons, errors = (0.0, 0.1, 0.2, 0.4), (0.05, 0.25, 0.2, 0.8)
    assert strength_at_error(epsilons, errors, 0.15) == pytest.approx(0.05)
    assert strength_at_error(epsilons, errors, 0.5) == pytest.approx(0.3)
    assert strength_at_error(epsilons, errors, 0.01) == 0
    assert strength_at_error(epsilons, errors, 0.9) is None


# Bad input.


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("fgms:0.1", "unknown attack fgms: expected one of 'fgsm', 'deepfool', 'saliency'. Did you mean 'fgsm'?"),
        ("", "unknown attack"),
        *((spec, f"impossible attack '{spec}'") for spec in (
            "fgsm", "fgsm:", "fgsm:1.1", "fgsm:-0.1", "fgsm:nan", "fgsm:x", "deepfool:0", "deepfool:1.5", "deepfool:",
            "deepfool:99999", "saliency:0", "saliency:1.1", "saliency:nan", "saliency:",
        )),
    ],
)  # fmt: skip
def test_impossible_attacks(spec: str, part: str) -> None:
    with pytest.raises(UsageError) as found:
        parse_attack(spec)
    assert part in str(found.value)
    if part.startswith("impossible"):
        assert KINDS[spec.split(":")[0]].usage in str(found.value)


def test_a_level_of_a_single_class(toy_data: LabelledData) -> None:
    model = build_model(Taxonomy.from_paths(["all/a", "all/b"]), (1, 8, 8), "conv:4")
    with pytest.raises(UsageError, match="single class"):
        attackable_level(model, "coarse")
    assert attackable_level(model, None) == "fine"


def test_texts_have_no_pixels(toy_taxonomy: Taxonomy) -> None:
    model = build_model(toy_taxonomy, (1, 8, 8), "conv:4")
    labels = np.zeros((2, 3), dtype=np.int64)
    texts = LabelledData(inputs=["a", "b"], labels=labels, taxonomy=toy_taxonomy, name="texts")
    preprocessing = Preprocessing(1, 8, 8, (0.5,), (0.5,))
    with pytest.raises(UsageError, match="moves pixels, and the source has texts"):
        under_attack(model, preprocessing, texts, RUNTIME, "deepfool")
    with pytest.raises(UsageError, match="moves pixels, and this model reads texts"):
        under_attack(model, TextEncoding(), texts, RUNTIME, "deepfool")


def test_on_the_command_line(tmp_path: Path) -> None:
    run, flat = tmp_path / "run", tmp_path / "flat"
    succeed("train", "digits", "--out", run, *QUICK)
    specs = ("fgsm:0.05", "deepfool:3")
    found = json.loads(succeed("evaluate", run, "--attack", *specs, "--attack-level", "middle", "--json", "-").out)[
        "attacks"
    ]
    assert tuple(found) == specs
    for spec, entry in found.items():
        assert {"levels", "levels_uncombined"} <= entry.keys() and entry["level"] == "middle"
        assert entry["flipped"] == pytest.approx(1 - entry["levels_uncombined"][1]["accuracy"]), spec
    said = succeed("evaluate", run, "--attack", "fgsm:0.05", "--distort", "mirror").out
    assert "fgsm:0.05 at fine: " in said and "each head by itself: coarse " in said and "mirror" in said
    refuse(2, ["unknown --attack-level midle", "Did you mean 'middle'?"], "evaluate", run, "--attack", "deepfool",
           "--attack-level", "midle")  # fmt: skip
    refuse(2, ["--attack-level fine", "without --attack"], "evaluate", run, "--attack-level", "fine")
    refuse(2, ["impossible attack 'fgsm:2'", "fgsm:EPS"], "evaluate", run, "--attack", "deepfool", "fgsm:2")
    succeed("train", "digits", "--method", "end-to-end", "--out", flat, *QUICK)
    refuse(2, ["--attack-level coarse", "no head", "'fine'"], "evaluate", flat, "--attack", "deepfool",
           "--attack-level", "coarse")  # fmt: skip
    texts = table(tmp_path / "texts.csv", ["text", "coarse", "middle", "fine"], [["words", "", "", "7"]] * 3)
    refuse(2, ["texts"], "evaluate", run, "--source", texts, "--split", "all", "--attack", "deepfool")
