"""What the nested tables are made of: label mixes, equal budgets, curves and what is read from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nestling.config import apply, read_config
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.engine.plan import plan
from nestling.errors import DataError, UsageError
from nestling.evaluate.decide import Decisions
from nestling.methods.nested import Nested
from nestling.models.build import build_model
from nestling.reproduce.nested import (
    CIFAR10,
    MARGINAL,
    MNIST,
    MORE,
    NESTED,
    OURS,
    TWIN,
    compare,
    mix,
    setting,
)
from nestling.reproduce.nested_ablations import judged
from nestling.reproduce.nested_distortion import FINE, GAP, OVER, over_sets, spent
from nestling.reproduce.nested_measures import TURBULENCE, accuracy, cells_of, gap, overconfidence, robustness
from nestling.reproduce.nested_table1 import SETTINGS
from nestling.reproduce.rows import Rows, known_to
from nestling.reproduce.table import Cell


def test_the_authors_rates() -> None:
    assert mix(60_000) == (18_000, 18_000, 12_000)
    at = setting("paper", "mnist")
    assert [spent(at, share).known for share in (0.0, 0.5)] == [(18_000, 18_000, 12_000), (9_000, 9_000, 15_000)]


def test_disjoint_subsets() -> None:
    data = load_data("digits")
    kept = known_to(data, (300, 200, 100), seed=0)
    assert np.bincount(kept.finest_known()).tolist() == [300, 200, 100]
    assert len(set(kept.index)) == 600
    # Every beginning holds each class in its share, up to one row: a tenth of the rows each, nearly.
    fine = kept.labels[kept.labels[:, -1] >= 0, -1]
    share = np.bincount(data.labels[:, -1]) / len(data)
    assert np.abs(np.bincount(fine) - 100 * share).max() <= 2
    # The same labels as in the data, where there are any.
    known = kept.labels >= 0
    assert (kept.labels[known] == data.labels[kept.index][known]).all()


def test_more_fine_labels_are_the_same_and_more() -> None:
    data = load_data("digits")
    few, many = (known_to(data, (0, 0, count), 1) for count in (100, 150))
    mixed, other = (known_to(data, (300, 200, 100), seed) for seed in (1, 2))
    fine = set(mixed.index[mixed.labels[:, -1] >= 0])
    assert fine == set(few.index) < set(many.index)
    assert fine != set(other.index[other.labels[:, -1] >= 0])


def test_fewer_rows_keep_the_proportions() -> None:
    assert np.bincount(known_to(load_data("digits"), (4_500, 4_500, 9_000), 0).finest_known()).tolist() == [
        336,
        336,
        673,
    ]
    for wrong in ((1, 1), (0, 0, 0), (-1, 1, 1)):
        with pytest.raises(DataError, match="known must count rows for each of the levels coarse, middle, fine"):
            known_to(load_data("digits"), wrong, 0)


def test_rows_of_a_mix() -> None:
    rows = Rows(source="digits", known=(300, 200, 100), validation=0.1)
    parts = rows.load(None, 0)
    assert parts.validation is not None
    assert np.bincount(parts.train.finest_known()).tolist() == [270, 180, 90]
    assert np.bincount(parts.validation.finest_known()).tolist() == [30, 20, 10]
    alone = replace(rows, fine_only=True).load(None, 0)
    assert (len(alone.train), alone.train.labels.min()) == (90, 0)
    assert rows.key() == {"source": "digits", "known": (300, 200, 100), "validation": 0.1}


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_all_methods_take_as_many_steps(source: str, nestling_data: object) -> None:
    at = setting("small", source)
    digits = load_data("digits")
    steps = {}
    for made in compare("small", at, robustness):
        known = made.rows.known
        assert known is not None
        labels = np.repeat(np.eye(3, dtype=int).cumsum(0), [int(0.9 * count) for count in known], axis=0) - 1
        if made.rows.fine_only:
            labels = labels[labels[:, -1] >= 0]
        data = LabelledData(torch.zeros((len(labels), 1, 28, 28), dtype=torch.uint8), labels, digits.taxonomy)
        with torch.device("meta"):
            model = build_model(
                data.taxonomy, data.image_shape, made.backbone, made.recipe.method, made.recipe.network()
            )
        steps[made.row] = sum(stage.steps for stage in plan(made.recipe, model, data) if stage.chosen)
    assert set(steps) == {NESTED, OURS, TWIN, MORE, MARGINAL}
    assert max(steps.values()) <= 1.03 * min(steps.values())


def test_the_papers_counts() -> None:
    by = {at.source: at for at in SETTINGS["paper"]}
    assert by["cifar100"].known == (25_000, 25_000) and by["plantvillage"].known == (4_500, 4_500, 9_000)
    assert {at.source: at.known for at in SETTINGS["small"]}["cifar100"] == (5_000, 5_000)


def test_the_authors_networks() -> None:
    """CIFAR-10's, by hand. Convolutions without bias and two numbers a map of batch norm: 928 + 9,280 + 18,560 +
    36,992 + 73,984 + 147,712 + 147,712; hidden layers 12,900 and 3,250; up 256 -> 64 and 128 -> 64: 147,584 + 73,856;
    heads 2·101, 4·51 and 10·65."""
    taxonomy = load_data("digits").taxonomy
    sizes = {level: taxonomy.width(level) for level in taxonomy.levels}
    model = build_model(
        taxonomy, (3, 32, 32), CIFAR10.backbone, options=Nested(hidden=CIFAR10.hidden, dropout=0.3).network()
    )
    trunk = 928 + 9_280 + 18_560 + 36_992 + 73_984 + 147_712 + 147_712
    heads = sizes["coarse"] * 101 + sizes["middle"] * 51 + sizes["fine"] * 65
    assert sum(p.numel() for p in model.parameters()) == trunk + 12_900 + 3_250 + 147_584 + 73_856 + heads
    outputs = model(torch.rand(2, 3, 32, 32))
    assert [f.shape[1] for f in outputs.features.values()] == [100, 50, 64]
    assert (outputs.features["coarse"] >= 0).all()
    assert sum(isinstance(m, torch.nn.Dropout) and m.p == 0.3 for m in model.modules()) == 3
    assert MNIST.backbone == "conv:2-4/8/16-32"


@pytest.mark.parametrize("size", [32, 224])
def test_the_decoder_over_resnet18(size: int) -> None:
    """Both stems: maps at strides 1, 2, 4, 8 and 4, 8, 16, 32; the finest level reads the third map from the end."""
    taxonomy = load_data("digits").taxonomy
    with torch.device("meta"):
        model = build_model(taxonomy, (3, size, size), "resnet18")
        outputs = model(torch.empty(2, 3, size, size))
        maps = model.backbone(torch.empty(2, 3, size, size))  # type: ignore[operator]
    stride = 1 if size == 32 else 4
    assert [m.shape[-1] for m in maps] == [size // stride // 2**i for i in range(4)]
    assert [f.shape[1] for f in outputs.features.values()] == [512, 256, 256]


def test_what_networks_refuse() -> None:
    taxonomy = load_data("digits").taxonomy
    with pytest.raises(UsageError, match="hidden must be a number of units for each of the levels coarse, middle"):
        build_model(taxonomy, (1, 8, 8), options={"hidden": [3, 3]})
    with pytest.raises(UsageError, match="has no dropout"):
        build_model(taxonomy, (3, 32, 32), "resnet18", options={"dropout": 0.3})
    with pytest.raises(UsageError, match="dropout must be at least 0 and at most"):
        Nested(dropout=1.5)
    with pytest.raises(UsageError, match="cascade = false trains one stage on every labelled row"):
        Nested(cascade=False, reading="exact", marginal=False)


def test_joint_training_is_one_stage_on_all_rows(toy_data: LabelledData) -> None:
    data = toy_data.keep({"middle": 0.5, "fine": 0.2})
    model = build_model(data.taxonomy, data.image_shape)
    stage, last = Nested(cascade=False, marginal=False, calibration="temperature").stages(model, data)
    assert (stage.name, len(stage.rows), stage.until, last.name) == ("joint", len(data), "fine", "temperature")  # type: ignore[arg-type]


def test_accuracy_and_overconfidence_by_hand() -> None:
    """Two of four right, confidence 0.75: 0.5 and 0.25; distorted none is right, at each strength."""
    taxonomy = load_data("digits").taxonomy
    digits = load_data("digits", "test").subset(range(4))
    truth = digits.labels[:, -1]
    sure = np.full(4, 0.75)

    def decisions(fine: np.ndarray) -> Decisions:
        columns = {level: digits.labels[:, i] for i, level in enumerate(taxonomy.levels)}
        return Decisions({**columns, "fine": fine}, dict.fromkeys(taxonomy.levels, sure))

    half, wrong = np.where(np.arange(4) < 2, truth, (truth + 1) % 10), (truth + 1) % 10
    cells = cells_of("a", {"clean": decisions(half), **dict.fromkeys(TURBULENCE, decisions(wrong))}, digits)
    values = {cell.column: cell.value for cell in cells}
    assert values[accuracy("fine", strength=0)] == 0.5 and values[overconfidence("fine", strength=0)] == 0.25
    assert values[FINE] == 0 and values[OVER] == 0.75 and values[accuracy("fine", strength=1.5)] == 0
    assert values[accuracy("coarse", distorted=True)] == 1
    # The coarse answers are all right and 0.75 sure: underconfident, and no nearer for it.
    coarse = {column: values[column("coarse", distorted=True)] for column in (overconfidence, gap)}
    assert coarse == {overconfidence: -0.25, gap: 0.25} and values[GAP] == 0.75
    mixed = [np.where(np.arange(4) < wrongs, wrong, truth) for wrongs in (0, 0, 4, 4)]
    cells = cells_of("a", {"clean": decisions(truth), **dict(zip(TURBULENCE, map(decisions, mixed)))}, digits)
    values = {cell.column: cell.value for cell in cells}
    assert values[OVER] == 0.25 and values[GAP] == 0.5
    alone = cells_of("a", {"clean": decisions(half)}, digits, ece=True)
    assert {c.column: c.value for c in alone}[accuracy("fine")] == 0.5
    assert {c.column: c.value for c in alone}["fine ECE"] == pytest.approx(0.25)


def test_curves_are_judged() -> None:
    """95 % of 0.8 is 0.76: passed at step 20, lost at 30, passed for good at 40; over the last fifth 0.78 and 0.8."""
    curve = [(10, 0.5), (20, 0.77), (30, 0.7), (40, 0.77), (90, 0.78), (100, 0.8)]
    assert judged(curve, 100) == (40.0, pytest.approx(0.01))
    assert judged([(10, 0.8), (20, 0.8)], 20) == (10.0, 0.0)


def test_means_over_sets_and_mixes_as_a_curve() -> None:
    cells = [
        Cell(f"{source}: nested, {share} f", FINE, value, (value, value))
        for source, value in (("mnist", 0.9), ("fashion_mnist", 0.7), ("cifar10", 0.5))
        for share in ("1", "1.25")
    ]
    found = {(cell.row, cell.column): cell for cell in over_sets(cells)}
    whole = found["all sets: nested, 1 f", FINE]
    assert whole.value == pytest.approx(0.7) and whole.samples == pytest.approx((0.7, 0.7))
    assert found["mnist: nested, by mix", f"{FINE} share 1.25"].value == 0.9
    assert not any(row.startswith("all sets") for row, _ in ((c.row, c.column) for c in over_sets(cells[:4])))


@pytest.mark.parametrize(("name", "source"), [("nested-paper", "mnist"), ("nested-paper-cifar10", "cifar10")])
def test_the_written_recipes_are_those_that_are_run(name: str, source: str) -> None:
    settings = read_config(Path(__file__).parent.parent / "recipes" / f"{name}.toml")
    made = compare("paper", setting("paper", source), robustness, (NESTED,))[0]
    assert settings.pop("method") == "nested" and settings.pop("backbone") == made.backbone
    assert apply(Nested(), settings) == made.recipe
