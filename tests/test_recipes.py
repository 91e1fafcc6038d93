"""The methods stage by stage: which rows, which weights, which loss, for how long; then what calibration does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.engine.fit import cut_rows
from nestling.errors import UsageError
from nestling.methods import RECIPES as METHODS
from nestling.methods import EndToEnd, FlatMarginal, Nested, Optimizer, recipe_class
from nestling.methods.calibrate import fit_temperatures
from nestling.methods.recipe import LEAST_STEPS, Context, Recipe, Stage, check, of_stage
from nestling.models.model import Model
from nestling.objectives.calibration import negative_log_likelihood
from nestling.objectives.terms import CrossEntropy, MarginalCrossEntropy, Objective, RejectionCrossEntropy
from nestling.taxonomy import Taxonomy
from small import PAPER, partly_labelled, quick, small_model

LEVELS = ("coarse", "middle", "fine")


@pytest.fixture(scope="module")
def data(toy_data: LabelledData) -> LabelledData:
    """240 rows: 144 known to the middle level, 120 of them to the fine one."""
    return partly_labelled(toy_data)


def stages_of(recipe: Recipe, data: LabelledData, model: Model | None = None) -> list[Stage]:
    if model is None:
        model = small_model(data, method=recipe.method, options=recipe.network())
    return list(recipe.stages(model, data))


def weighted(stage: Stage) -> list[tuple[float, str, type]]:
    objective = Objective.of(stage.objective)
    return [(weight, term.name, type(term)) for weight, term in objective.weighted()]  # type: ignore[misc]


# Nested --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The rows of each stage, as the sets of finest levels that they are known to.
        ({"marginal": False, "reading": "exact"}, [{0}, {1}, {2}]),
        ({"marginal": False, "reading": "at-least"}, [{0, 1, 2}, {1, 2}, {2}]),
        ({"marginal": True}, [{0, 1, 2}, {0, 1, 2}, {0, 1, 2}]),
    ],
)
def test_the_rows_of_every_stage(changes: dict, expected: list[set[int]], data: LabelledData) -> None:
    finest = data.finest_known()
    assert np.bincount(finest).tolist() == [96, 24, 120]
    for stage, known in zip(stages_of(Nested(**changes), data), expected):
        assert stage.rows is not None
        assert set(stage.rows.tolist()) == {row for row in range(240) if finest[row] in known}
        assert len(set(stage.rows.tolist())) == len(stage.rows)


def test_rows_without_any_label_train_nothing(toy_data: LabelledData) -> None:
    data = toy_data.keep({"coarse": 0.8, "middle": 0.5, "fine": 0.25})
    assert (data.finest_known() < 0).any()
    for recipe in (Nested(), Nested(**PAPER), FlatMarginal(), EndToEnd()):
        for stage in stages_of(recipe, data)[:3]:
            if stage.epochs and stage.name != "rejection":
                assert stage.rows is not None and (data.finest_known()[stage.rows] >= 0).all()


def test_the_cascade(data: LabelledData) -> None:
    """P_i trains everything that the levels 1..i are computed by, and chooses by these levels."""
    recipe = Nested(**PAPER, epochs=(4, 5, 6), optimizer=Optimizer(lr=(0.3, 0.2, 0.1)), batch_size=7, steps_per_epoch=3)
    model = small_model(data)
    stages = list(recipe.stages(model, data))
    assert [stage.name for stage in stages] == [*LEVELS, "rejection", "temperature"]
    for i, stage in enumerate(stages[:3]):
        trained = {id(p) for module in stage.trainable for p in module.parameters()}
        below = [model.backbone, *(model.decoder[level] for level in LEVELS[1 : i + 1])]  # type: ignore[attr-defined,index]
        below += [model.head[level] for level in LEVELS[: i + 1]]  # type: ignore[attr-defined,index]
        assert trained == {id(p) for module in below for p in module.parameters()}  # type: ignore[union-attr]
        assert stage.until == LEVELS[i]
        assert stage.select is not None and stage.select.levels == LEVELS[: i + 1] and stage.select.mode == "min"
        assert stage.select.metric is negative_log_likelihood
        assert (stage.lr, stage.epochs, stage.batch_size, stage.steps_per_epoch) == ((0.3, 0.2, 0.1)[i], 4 + i, 7, 3)
        assert stage.augmentation is not None and stage.augmentation.rotation > 0
    assert [stage.select for stage in stages[3:]] == [None, None]
    assert stages[4].epochs == 0 and stages[4].trainable == []


def test_the_papers_loss_weights(data: LabelledData) -> None:
    """Coarse 1, middle c/m, fine c/f: 240 / 144 and 240 / 120; later stages go on training the coarser levels."""
    stages = stages_of(Nested(marginal=False), data)
    ce = CrossEntropy
    assert weighted(stages[0]) == [(1.0, "coarse", ce)]
    assert weighted(stages[1]) == [(1.0, "coarse", ce), (pytest.approx(240 / 144), "middle", ce)]
    assert weighted(stages[2]) == [(1.0, "coarse", ce), (pytest.approx(240 / 144), "middle", ce), (2.0, "fine", ce)]
    marginal = stages_of(Nested(), data)
    assert weighted(marginal[2]) == [(1.0, level, MarginalCrossEntropy) for level in LEVELS]


def test_epochs_of_trees_of_any_depth(data: LabelledData) -> None:
    def epochs(depth: int, **changes: Any) -> list[int]:
        path = ["/".join([f"{name}{i}" for i in range(depth)]) for name in "ab"]
        taxonomy = Taxonomy.from_paths(path)
        made = LabelledData(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), taxonomy.encode(path * 20), taxonomy)
        model = small_model(made)
        return [stage.epochs for stage in Nested(calibration="none", **changes).stages(model, made)]

    assert epochs(3, epochs=(4, 5, 6)) == [4, 5, 6]
    assert [epochs(depth) for depth in (1, 2, 3, 5)] == [[60], [3, 60], [3, 3, 60], [3, 3, 3, 3, 60]]
    assert epochs(5, epochs=(1, 2, 3, 4, 5)) == [1, 2, 3, 4, 5]
    assert epochs(2, epochs=9) == [9, 9]
    for wrong in ((1, 2, 3, 4), (1, 2, 3)):
        with pytest.raises(UsageError, match=f"epochs has {len(wrong)} values for 2 stages"):
            epochs(2, epochs=wrong)


def test_a_pass_is_over_the_rows_of_the_level(data: LabelledData) -> None:
    """With the marginal loss coarser rows come along without making the epoch longer; few rows get LEAST_STEPS."""
    assert [s.steps_per_epoch for s in stages_of(Nested(batch_size=6, calibration="none"), data)] == [40, 24, 20]
    many = stages_of(Nested(batch_size=100, calibration="none"), data)
    assert [stage.steps_per_epoch for stage in many] == [LEAST_STEPS] * 3
    # An exact pass, every row once, has no number of steps.
    exact = stages_of(Nested(batch_size=12, marginal=False, calibration="none"), data)
    assert [stage.steps_per_epoch for stage in exact] == [None, None, None]
    assert [s.steps_per_epoch for s in stages_of(Nested(steps_per_epoch=3), data)[:3]] == [3, 3, 3]


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        ("none", []),
        ("temperature", ["temperature"]),
        ("rejection", ["rejection"]),
        ("both", ["rejection", "temperature"]),
    ],
)
def test_calibration_stages(calibration: str, expected: list[str], data: LabelledData) -> None:
    model = small_model(data)
    stages = stages_of(Nested(calibration=calibration, rejection_epochs=5), data, model)
    assert [stage.name for stage in stages[3:]] == expected
    assert model.config["rejection"] is ("rejection" in expected)
    if "rejection" in expected:
        stage = stages[3]
        assert stage.epochs == 5 and stage.optimizer.name == "adam"
        assert list(stage.trainable) == [model.calibration.rejection]
        assert [(w, n, t) for w, n, t in weighted(stage)] == [
            (1.0, f"rejection-{level}", RejectionCrossEntropy) for level in LEVELS
        ]
        # At most ten synthetic rows for each labelled one.
        assert all(term.ratio == 10 for term in stage.objective.terms)  # type: ignore[union-attr]


def test_networks_follow_the_recipe(data: LabelledData) -> None:
    assert Nested(skips=False).network().skips is False and Nested().network().skips is True
    assert Nested(norm="none").network().norm == FlatMarginal(norm="none").network().norm == "none"


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_without_labels_is_named(level: str, toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match=f"no training row is labelled at level '{level}'.*--known {level}="):
        stages_of(Nested(), toy_data.keep({level: 0.0}))


# Baselines -----------------------------------------------------------------------------------------------------------


def test_what_the_baselines_see(data: LabelledData) -> None:
    """End-to-end the finely labelled rows alone, flat + marginal all; both train every part, then a temperature."""
    for recipe, count, kind in ((EndToEnd(), 120, CrossEntropy), (FlatMarginal(), 240, MarginalCrossEntropy)):
        model = small_model(data, method=recipe.method)
        flat, temperature = stages_of(recipe, data, model)
        assert (flat.name, temperature.name) == ("flat", "temperature")
        assert flat.rows is not None and len(flat.rows) == count
        assert weighted(flat) == [(1.0, "fine", kind)]
        assert {id(p) for m in flat.trainable for p in m.parameters()} == {id(p) for p in model.parameters()}
        assert flat.select is not None and flat.select.levels == LEVELS
        assert temperature.at_end is fit_temperatures
    assert (data.finest_known()[stages_of(EndToEnd(), data)[0].rows] == 2).all()
    assert stages_of(FlatMarginal(), data)[0].balance == "levels"


def test_baselines_without_rows(toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match="no training row is labelled for end-to-end: label some at level 'fine'"):
        stages_of(EndToEnd(), toy_data.keep({"fine": 0.0}))
    with pytest.raises(UsageError, match="no training row is labelled for flat-marginal"):
        stages_of(FlatMarginal(), toy_data.keep({"coarse": 0.0}))


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nested(reading="some"), r"unknown reading some: expected one of 'exact', 'at-least'"),
        (lambda: Nested(calibration="temprature"), r"unknown calibration temprature: .*Did you mean 'temperature'"),
        (lambda: Nested(reading="exact"), r"marginal = true trains finer heads on coarser rows.*set marginal = false"),
        (lambda: Nested(rejection_epochs=0), r"rejection_epochs must be at least 1, got 0"),
        (lambda: Nested(epochs=(3, 0, 3)), r"epochs must be at least 1.*, got 0"),
        (lambda: EndToEnd(batch_size=0), r"batch_size must be at least 1.*, got 0"),
        (lambda: EndToEnd(patience=0), r"patience must be at least 1, got 0"),
        (lambda: EndToEnd(steps_per_epoch=-1), r"steps_per_epoch must be at least 1.*, got -1"),
        (lambda: FlatMarginal(norm="group"), r"unknown norm group: expected one of 'batch', 'none'"),
        (lambda: FlatMarginal(balance="classes"), r"unknown balance classes"),
        (lambda: FlatMarginal(augmentation="flip"), r"unknown augmentation flip"),
        (lambda: Optimizer(name="adamz"), r"unknown optimizer\.name adamz: .*Did you mean 'adam'"),
        (lambda: Optimizer(schedule="cos"), r"unknown optimizer\.schedule cos"),
        (lambda: Optimizer(lr=0.0), r"optimizer\.lr must be above 0, got 0\.0"),
        (lambda: Optimizer(lr=(1e-3, float("nan"))), r"optimizer\.lr must be above 0, got nan"),
        (lambda: Optimizer(lr=float("inf")), r"optimizer\.lr must be above 0, got inf"),
        (lambda: Optimizer(momentum=1.5), r"optimizer\.momentum must be at least 0 and at most 1, got 1\.5"),
        (lambda: Optimizer(weight_decay=-1.0), r"optimizer\.weight_decay must be at least 0, got -1\.0"),
        (lambda: Optimizer(factor=1.0), r"optimizer\.factor must be above 1, got 1\.0"),
        (lambda: Optimizer(patience=0), r"optimizer\.patience must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_methods_by_name() -> None:
    assert {name: recipe_class(name).method for name in METHODS} == {name: name for name in METHODS}
    with pytest.raises(UsageError, match=r"unknown method nestd: .*Did you mean 'nested'\?"):
        recipe_class("nestd")


def test_values_per_stage() -> None:
    assert [of_stage("lr", 0.1, i, 3) for i in range(3)] == [0.1] * 3
    assert [of_stage("lr", (1, 2, 3), i, 3) for i in range(3)] == [1, 2, 3]
    with pytest.raises(UsageError, match="lr has 2 values for 3 stages: give one value, or one per stage"):
        of_stage("lr", (1, 2), 0, 3)
    check("x", None, least=1)
    with pytest.raises(UsageError, match="x must be at least 1, got 'two'"):
        check("x", "two", least=1)


# Calibration ---------------------------------------------------------------------------------------------------------


def overconfident(model: Model, data: LabelledData, scale: float = 8.0) -> tuple[dict[str, Tensor], Tensor]:
    """Logits that are right for seven rows of ten, and far too sure."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(data.taxonomy.columns(data.labels))
    logits = {}
    for number, level in enumerate(LEVELS):
        width = data.taxonomy.width(level)
        wrong = torch.rand(len(data), generator=generator) < 0.3
        chosen = torch.where(wrong, (labels[:, number] + 1) % width, labels[:, number].clamp_min(0))
        logits[level] = scale * torch.nn.functional.one_hot(chosen, width) + torch.randn(
            len(data), width, generator=generator
        )
    return logits, labels


def test_temperatures_change_probabilities_not_decisions(toy_data: LabelledData) -> None:
    from nestling.models.model import Outputs

    model = small_model(toy_data)
    logits, labels = overconfident(model, toy_data)
    outputs = Outputs(logits, {level: torch.zeros(240, 8) for level in LEVELS}, torch.zeros(240, 8))
    noted: list[tuple[str, Any, str]] = []

    def unasked(data: LabelledData) -> tuple[Outputs, Tensor]:
        assert data is toy_data
        return outputs, labels

    before = model.answers(outputs)
    context = Context(
        model=model,
        objective=1.0 * CrossEntropy("fine"),
        train=toy_data.subset([]),
        validation=toy_data,
        predict=unasked,
        batches=lambda _: iter(()),
        note=lambda *given: noted.append(given),
    )
    fit_temperatures(context)
    after = model.answers(outputs)
    assert [name for name, _, _ in noted] == [f"temperature of {level}" for level in LEVELS]
    for level, (_, value, reason) in zip(LEVELS, noted):
        assert value > 2 and reason.startswith("lowers confidences, which on ")
        torch.testing.assert_close(before.separate[level].argmax(1), after.separate[level].argmax(1), rtol=0, atol=0)
        assert after.separate[level].max(1).values.mean() < before.separate[level].max(1).values.mean() - 0.1
        torch.testing.assert_close(after.separate[level], (logits[level] / value).softmax(1), rtol=1e-3, atol=1e-4)
    assert negative_log_likelihood(after.separate, labels, LEVELS) < negative_log_likelihood(
        before.separate, labels, LEVELS
    )


def test_without_validation_rows_temperatures_stay() -> None:
    taxonomy = Taxonomy.from_paths(["a/1", "b/2"])
    data = LabelledData(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), taxonomy.encode(["a/1", "b/2"]), taxonomy)
    for validation in (None, data.subset([])):
        model = small_model(data)
        context = Context(
            model=model, objective=1.0 * CrossEntropy("fine"), train=data, validation=validation,
            predict=lambda _: pytest.fail("there is nothing to predict"), batches=lambda _: iter(()),
            note=lambda *_: None,
        )  # fmt: skip
        fit_temperatures(context)
        assert model.calibration.temperature.tolist() == [1.0, 1.0]


def test_the_temperature_stage_of_a_run(data: LabelledData) -> None:
    """It changes the temperatures alone, from validation rows, and is noted with its reason."""
    recipe = FlatMarginal(epochs=1, batch_size=32, steps_per_epoch=10)
    run = quick(recipe, data)
    said = {name: (value, reason) for name, value, reason in run.decisions}
    value, reason = said["temperature of fine"]
    _, validation = cut_rows(data, None, 0)
    assert f"{(validation.labels[:, 2] >= 0).sum()} validation rows" in reason
    assert run.model.calibration.temperature.item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("calibration", ["rejection", "both"])
def test_rejection_layers_of_a_run(calibration: str, data: LabelledData) -> None:
    """Trained on frozen features: the rest of the network is that of a run without them."""
    settings = {**PAPER, "epochs": 1, "batch_size": 32, "steps_per_epoch": 5, "augmentation": "none"}
    run = quick(Nested(**{**settings, "calibration": calibration}), data)
    plain = quick(Nested(**{**settings, "calibration": "none"}), data)
    mine, theirs = run.model.state_dict(), plain.model.state_dict()
    assert {name.split(".")[1] for name in mine.keys() - theirs.keys()} == {"rejection"}
    for name, tensor in theirs.items():
        if not name.startswith("calibration"):
            assert torch.equal(mine[name], tensor), name
    torch.manual_seed(0)
    noise = torch.rand(200, 8)
    real = run.model(torch.zeros(1, 1, 8, 8)).features["coarse"]
    with torch.no_grad():
        rejected = run.model.calibration("coarse", torch.zeros(200, 2), noise)[1].mean()
        kept = run.model.calibration("coarse", torch.zeros(1, 2), real)[1].mean()
    assert 0 < kept < 1 and 0 < rejected < 1
    assert (run.model.calibration.rejection_temperature != 1).any() or calibration == "rejection"


# What they learn -----------------------------------------------------------------------------------------------------


LEARNING: dict[str, Any] = {
    "batch_size": 32,
    "steps_per_epoch": 12,
    "augmentation": "none",
    "optimizer": Optimizer(lr=0.03),
}


@pytest.mark.parametrize(
    "recipe",
    [
        Nested(**LEARNING, epochs=(2, 2, 8)),
        Nested(**LEARNING, **{**PAPER, "rejection_epochs": 8, "reading": "at-least"}, epochs=(2, 4, 8)),
        FlatMarginal(**LEARNING, epochs=12),
        EndToEnd(**LEARNING, epochs=12),
    ],
    ids=["nested", "nested, the paper's", "flat-marginal", "end-to-end"],
)
def test_the_toy_set_is_learned(recipe: Recipe, toy_data: LabelledData) -> None:
    """Answers at every level, on 60 rows that fit never saw; half of the others have no fine label."""
    order = np.random.default_rng(1).permutation(240)
    run = quick(recipe, partly_labelled(toy_data.subset(order[:180])), backbone="conv:8/16")
    held = toy_data.subset(order[180:])
    with torch.no_grad():
        answers = run.model.answers(run.model(run.preprocessing(held.images(np.arange(60)))))
    accuracy = {
        level: float((answers.combined[level].argmax(1).numpy() == held.labels[:, number]).mean())
        for number, level in enumerate(LEVELS)
    }
    assert min(accuracy.values()) >= 0.9, accuracy
