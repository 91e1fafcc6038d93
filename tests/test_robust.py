"""Robust training: the reducers that weight concepts, the second pass, the recipe, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nestling.commands.rivals import rivals
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.engine.plan import StagePlan, order_of
from nestling.errors import DataError, DivergedError, UsageError
from nestling.functional import concept_weights_step, group_dro_step, slow_start
from nestling.methods import Coins, Nested, Robust
from nestling.methods.concepts import concept_table
from nestling.methods.recipe import Stage
from nestling.methods.robust import along_the_gradient
from nestling.models.build import build_model
from nestling.models.nested import NestedModel
from nestling.objectives.reducers import ConceptReducer, ConceptWeighted, GroupDRO
from nestling.objectives.terms import CrossEntropy, MarginalCrossEntropy, Objective
from nestling.report.gather import curve
from nestling.taxonomy import Taxonomy
from small import BACKBONE, one_stage, quick, rows, small_model

CONCEPTS = torch.tensor([0, 1, 1, 2, 0, 1])
COUNTS = torch.tensor([2, 3, 1])
NAMES = ("a", "b", "c")


def batch(*numbers: int) -> Batch:
    return Batch(torch.zeros(len(numbers), 1), torch.zeros(len(numbers), 1), torch.tensor(numbers), ("only",))


def reducer_of(stage: Stage) -> ConceptReducer:
    (term,) = (term for _, term in Objective.of(stage.objective).weighted())
    assert isinstance(term.reducer, ConceptReducer)
    return term.reducer


# Reducers ------------------------------------------------------------------------------------------------------------


def test_q_moves_as_the_formula_says() -> None:
    """Batch after batch, at the step sizes of the paper; the loss is weighted by q as it was before."""
    reducer = ConceptWeighted(CONCEPTS, COUNTS, NAMES, strength=3.0, s=2, c=5.0)
    q = prior = COUNTS / 6
    for t in range(1, 5):
        numbers = [t % 6, (2 * t) % 6, 5]
        losses = torch.tensor([1.0, 0.3 * t, 2.0])
        scalar = reducer(losses, torch.ones(3), batch(*numbers))
        weights = (6 / COUNTS * q)[CONCEPTS[numbers]]
        assert scalar.item() == pytest.approx(float((losses * weights).mean()), rel=1e-5)
        eta = 1 / (3.0 * t * (5.0 if t <= 2 else 1))
        q = concept_weights_step(q, losses, CONCEPTS[numbers], COUNTS, prior, eta, 3.0)
        torch.testing.assert_close(reducer.q, q)
    assert reducer.figures() == dict(zip(NAMES, reducer.q.tolist()))


def test_group_dro_moves_as_its_formula_says() -> None:
    reducer = GroupDRO(CONCEPTS, COUNTS, NAMES, eta=0.5)
    q = COUNTS / 6
    for t in range(1, 4):
        losses = torch.tensor([1.0, 0.3 * t])
        reducer(losses, torch.ones(2), batch(0, 3))
        q = group_dro_step(q, 6 / COUNTS * torch.tensor([1.0, 0.0, 0.3 * t]) / 2, 0.5)
        torch.testing.assert_close(reducer.q, q)


def test_rows_without_the_label_do_not_count() -> None:
    """Neither in the loss nor in q, whatever their concept and value."""
    found = []
    for numbers, values, weights in (
        ((0, 3), [1.0, 2.0], [1.0, 1.0]),
        ((0, 3, 6), [1.0, 2.0, 99.0], [1.0, 1.0, 0.0]),
    ):
        reducer = ConceptWeighted(torch.cat([CONCEPTS, torch.tensor([-1])]), COUNTS, NAMES, strength=1.0)
        scalar = reducer(torch.tensor(values), torch.tensor(weights), batch(*numbers))
        found.append((scalar.item(), reducer.q.tolist()))
    assert found[0][0] == pytest.approx(found[1][0]) and found[0][1] == pytest.approx(found[1][1])


def test_the_schedule_is_measured_on_the_first_batches() -> None:
    reducer = ConceptWeighted(CONCEPTS, COUNTS, NAMES, strength=0.01, total=5000)
    largest = 0.0
    for t in range(10):
        assert torch.equal(reducer.q, reducer.prior)
        value = float(1 + t % 4)
        reducer(torch.tensor([value, 0.0]), torch.ones(2), batch(3, 0))
        largest = max(largest, 6.0 * value / 2)
    assert float(reducer.mu) == pytest.approx(largest)
    s, c = slow_start(5000, largest, 0.01)
    assert (int(reducer.s), float(reducer.c)) == (s, pytest.approx(c)) and s > 10 and c > 1
    reducer(torch.tensor([1.0, 0.0]), torch.ones(2), batch(3, 0))
    assert int(reducer.t) == 1 and not torch.equal(reducer.q, reducer.prior)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": 0.0}, UsageError, "strength, lambda, must be above 0, got 0.0: 'off' leaves the concepts alone"),
        ({"strength": math.inf}, UsageError, "must be above 0, got inf"),
        ({"prior": torch.tensor([0.5, 0.5, 0.5])}, UsageError, "sum to 1, got .*, which sum to 1.5"),
        ({"prior": torch.tensor([0.5, 0.7, -0.2])}, UsageError, "shares of at least 0"),
        ({"prior": torch.tensor([0.5, 0.5])}, UsageError, "must be 3 shares"),
        ({"counts": torch.tensor([2, 0, 1])}, DataError, "no training row is of the concept 'b'"),
    ],
)
def test_what_reducers_refuse(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"concept_of": CONCEPTS, "counts": COUNTS, "names": NAMES, "strength": 1.0, **options}
    with pytest.raises(error, match=message):
        ConceptWeighted(**given)
    if "strength" not in options:
        with pytest.raises(error, match=message):
            GroupDRO(**{name: value for name, value in given.items() if name != "strength"})


@pytest.mark.parametrize("kind", [partial(ConceptWeighted, strength=1.0), GroupDRO], ids=["projected", "group-dro"])
def test_a_row_without_a_concept_weighs_nothing(kind: Callable[..., ConceptReducer]) -> None:
    """The loss, its gradient and q are those of the batch without it."""
    found = []
    for numbers in ([0, 1, 2], [0, 3, 1, 2]):
        reducer = kind(torch.tensor([0, 1, 2, -1]), torch.tensor([2, 1, 1]), NAMES)
        values = torch.tensor([1.0, 2.0, 3.0, 50.0])[numbers].requires_grad_()
        loss = reducer(values, torch.ones(len(numbers)), batch(*numbers))
        (gradient,) = torch.autograd.grad(loss, values)
        found.append((loss.item(), [g for g, row in zip(gradient.tolist(), numbers) if row < 3], reducer.q.tolist()))
        assert all(g == 0 for g, row in zip(gradient.tolist(), numbers) if row == 3)
    assert found[0] == found[1]


def test_group_dro_refuses_a_step_of_nothing() -> None:
    with pytest.raises(UsageError, match="eta, the step size of group DRO, must be above 0, got 0"):
        GroupDRO(CONCEPTS, COUNTS, NAMES, eta=0.0)


def test_a_loss_that_is_not_finite_is_the_engine_s_to_report(toy_data: LabelledData) -> None:
    """With stage, step and rows, not as a vector that cannot be projected."""

    class Spoiled(CrossEntropy):
        def forward(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
            values, weights = super().forward(outputs, batch)
            return torch.where(batch.index == 7, torch.nan, values), weights

    def build(model: Any, data: LabelledData) -> dict[str, Any]:
        table = concept_table(data, np.arange(len(data)), "coarse", batch_size=48, balance="rows")
        reducer = ConceptWeighted(table.concept_of, table.counts, table.names, strength=1.0)
        return {"objective": Spoiled("fine", reducer=reducer)}

    with pytest.raises(DivergedError, match="the loss is not finite in stage only"):
        quick(one_stage(build, epochs=5), toy_data)


def test_micro_batches_are_refused(toy_data: LabelledData) -> None:
    def build(model: Any, data: LabelledData) -> dict[str, Any]:
        table = concept_table(data, np.arange(len(data)), "coarse", batch_size=48, balance="rows")
        reducer = ConceptWeighted(table.concept_of, table.counts, table.names, strength=1.0)
        return {"objective": CrossEntropy("fine", reducer=reducer), "micro_batch": 8}

    with pytest.raises(ValueError, match="keeps something of each batch: leave micro_batch out"):
        quick(one_stage(build), toy_data)


# Concepts of rows ----------------------------------------------------------------------------------------------------


def test_counts_are_how_often_batches_draw_a_concept() -> None:
    """Balanced batches draw rare kinds of rows more often: N_k / N is measured on 400 of them."""
    data = rows()
    for balance in ("rows", "levels"):
        table = concept_table(data, np.arange(len(data)), "coarse", batch_size=24, balance=balance)
        recipe = Robust(epochs=1, batch_size=24, steps_per_epoch=400, balance=balance)
        stage = next(iter(recipe.stages(small_model(data, method="robust"), data)))
        order = order_of(stage, 0)
        drawn = np.concatenate([order.batch(0, step)[0] for step in range(400)])
        share = np.bincount(data.labels[drawn, 0], minlength=2) / len(drawn)
        np.testing.assert_allclose(table.counts / table.counts.sum(), share, atol=0.01)
        assert float(table.counts.sum()) == pytest.approx(len(data))
        assert table.concept_of.tolist() == data.labels[:, 0].tolist() and table.names == ("a", "b")
    plain = concept_table(data, np.arange(len(data)), "coarse", batch_size=24, balance="rows")
    assert plain.counts.tolist() == np.bincount(data.labels[:, 0]).tolist()


def test_the_prior_is_the_mix_of_the_rows_however_they_are_drawn() -> None:
    """Half of the rows are of each concept; batches have fewer of the one that is known coarsely alone."""
    data = rows()
    labels = data.labels.copy()
    labels[labels[:, 0] == 0, 1:] = -1
    data = replace(data, labels=labels)
    table = concept_table(data, np.arange(120), "coarse", batch_size=24, balance="levels")
    assert table.prior.tolist() == [0.5, 0.5] and float(table.counts[0] / table.counts.sum()) < 0.35
    reducer = reducer_of(stage_of(data, batch_size=24, balance="levels"))
    assert reducer.prior.tolist() == reducer.q.tolist() == [0.5, 0.5]
    torch.testing.assert_close(reducer.scale, (table.counts.sum() / table.counts).float())


def test_a_row_without_a_concept_is_refused() -> None:
    data = rows()
    message = r"\d+ of 120 training rows have no concept, since they are not labelled at level 'middle' \('made row"
    with pytest.raises(DataError, match=message + r".*: drop these rows, or name their concepts"):
        list(Robust(concept_level="middle").stages(small_model(data, method="robust"), data))
    # Of rows that do not count, none need be known.
    counted = data.labels[:, 1] >= 0
    table = concept_table(data, np.arange(120), "middle", batch_size=9, balance="rows", counted=counted)
    assert float(table.counts.sum()) == counted.sum() and (table.concept_of[torch.from_numpy(~counted)] == -1).all()


def test_a_concept_without_a_row_is_refused(toy_data: LabelledData) -> None:
    some = toy_data.subset(toy_data.labels[:, 0] == 0)
    with pytest.raises(DataError, match=r"no training row is of the concept 'plant', so there is nothing to weight"):
        list(Robust().stages(small_model(some, method="robust"), some))


def test_concepts_of_a_ragged_tree() -> None:
    """A leaf that ended above the level is a concept of its own."""
    taxonomy = Taxonomy.from_paths(["a/1", "a/2", "b"])
    labels = taxonomy.encode([["a", "1"], ["a", "2"], ["b", None], ["b", None]])
    data = LabelledData(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), labels, taxonomy)
    table = concept_table(data, np.arange(4), "fine", batch_size=4, balance="rows")
    assert table.counts.tolist() == [1, 1, 2] and table.names == ("1", "2", "b")


# The second pass -----------------------------------------------------------------------------------------------------


def loss_of(weight: Tensor, offset: Tensor):
    """The mean of a quadratic per row, with one row's loss a thousand times the others'."""

    def loss(seen: Batch) -> Tensor:
        scale = torch.tensor([1000.0, 1.0, 1.0, 0.0])
        return (scale * ((seen.inputs.flatten(1) @ weight - offset) ** 2) / 2).mean()

    return loss


def test_every_row_moves_along_its_own_gradient() -> None:
    """By tau, whatever the size of its loss; a row whose loss does not depend on it stays in place."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(4, 1, 2, 3, generator=generator), torch.randn(6, generator=generator)
    given = Batch(inputs, torch.zeros(4, 1), torch.arange(4), ("only",))
    moved = along_the_gradient(0.7)(loss_of(weight, torch.ones(4)), given)
    way = (moved.inputs - inputs).flatten(1)
    assert way.norm(dim=1).tolist() == pytest.approx([0.7, 0.7, 0.7, 0.0], rel=1e-5)
    sign = (inputs.flatten(1) @ weight - 1).sign()
    expected = 0.7 * sign[:3, None] * weight / weight.norm()
    torch.testing.assert_close(way[:3], expected, rtol=1e-4, atol=1e-5)
    assert not moved.inputs.requires_grad and not given.inputs.requires_grad
    assert (moved.labels is given.labels, moved.index is given.index) == (True, True)


def test_theorem_2_s_own_step() -> None:
    """A row's gradient over 3 L_x: of its own loss, though the loss that is minimised is a mean."""
    inputs, weight = torch.ones(4, 1, 1, 2), torch.tensor([1.0, 2.0])
    given = Batch(inputs, torch.zeros(4, 1), torch.arange(4), ("only",))
    moved = along_the_gradient(0.7, smoothness=10.0)(loss_of(weight, torch.full((4,), 2.0)), given)
    # (3 - 2) * (1, 2) times the row's scale, over 30.
    found = (moved.inputs - inputs).flatten(1)
    expected = torch.tensor([[1000.0, 2000.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]) / 30
    torch.testing.assert_close(found, expected)


def test_running_statistics_move_once_a_step(toy_data: LabelledData) -> None:
    """Example robustness counts the rows of a step once."""
    for tau in (0.0, 0.5):
        run = quick(Robust(tau=tau, strength="off", epochs=1, batch_size=24, steps_per_epoch=7), toy_data)
        norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(int(norm.num_batches_tracked) == 7 for norm in norms)


# The recipe ----------------------------------------------------------------------------------------------------------


def stage_of(data: LabelledData, **fields: Any) -> Stage:
    recipe = Robust(**fields)
    return next(iter(recipe.stages(small_model(data, method="robust", options=recipe.network()), data)))


@pytest.mark.parametrize(
    ("fields", "moves", "weights"),
    [
        ({"tau": 0.0, "strength": "off"}, False, False),
        ({"tau": 0.3, "strength": "off"}, True, False),
        ({"tau": 0.0, "strength": 2.0}, False, True),
        ({"tau": 0.3, "strength": 2.0}, True, True),
        ({"tau": 0.0, "smoothness": 3.0, "strength": "off"}, True, False),
    ],
    ids=["ERM", "EL", "CL", "HRRL", "EL by Theorem 2"],
)
def test_every_combination(fields: dict[str, Any], moves: bool, weights: bool, toy_data: LabelledData) -> None:
    stage = stage_of(toy_data, **fields)
    (term,) = (term for _, term in Objective.of(stage.objective).weighted())
    assert isinstance(term, MarginalCrossEntropy)
    assert (stage.perturb is not None, isinstance(term.reducer, ConceptWeighted)) == (moves, weights)
    assert stage.select is not None
    assert stage.select.mode == ("max" if weights else "min")
    for selection, mode in (("worst-concept", "max"), ("likelihood", "min")):
        chosen = stage_of(toy_data, **fields, selection=selection).select
        assert chosen is not None and chosen.mode == mode
    assert stage_of(toy_data, **fields, selection="last").select is None


def test_the_network_is_one_softmax_on_the_backbone(toy_data: LabelledData) -> None:
    """The features that a linear SVM is given are those that the last layer reads."""
    model = small_model(toy_data, method="robust")
    assert isinstance(model, NestedModel) and model.outputs == ("fine",) and not len(model.decoder)
    outputs = model(torch.zeros(2, 1, 8, 8))
    torch.testing.assert_close(outputs.features["fine"], outputs.embedding)
    assert model.config["options"] == {
        "skips": True, "norm": "batch", "plain": True, "hidden": (), "dropout": 0.0,
    }  # fmt: skip
    torch.testing.assert_close(outputs.logits["fine"], model.head["fine"](outputs.embedding))


def test_without_robustness_it_is_flat_training(toy_data: LabelledData) -> None:
    """tau = 0 and concepts held hard to the prior give the gradient of the plain mean."""
    runs = []
    for strength in ("off", 1e9):
        recipe = Robust(tau=0.0, strength=strength, selection="likelihood", epochs=1, batch_size=24, steps_per_epoch=6)
        runs.append(quick(recipe, toy_data))
    one, other = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_concepts_and_priors(toy_data: LabelledData) -> None:
    assert reducer_of(stage_of(toy_data)).names == ("animal", "plant")
    assert reducer_of(stage_of(toy_data, concept_level="middle")).names == ("bird", "fish", "tree")
    table = reducer_of(stage_of(toy_data, prior=("animal=0.9", "plant=0.1")))
    assert table.prior.tolist() == pytest.approx([0.9, 0.1]) and torch.equal(table.q, table.prior)
    # The level is that of the names; a name that is not given has no share.
    of_middle = reducer_of(stage_of(toy_data, prior=("fish=0.25", "tree=0.75")))
    assert of_middle.names == ("bird", "fish", "tree") and of_middle.prior.tolist() == pytest.approx([0, 0.25, 0.75])
    dro = reducer_of(stage_of(toy_data, ascent="group-dro", eta=0.2))
    assert isinstance(dro, GroupDRO) and dro.eta == 0.2
    auto = reducer_of(stage_of(toy_data, schedule="auto", epochs=3, steps_per_epoch=7))
    assert isinstance(auto, ConceptWeighted) and auto.total == 21


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0}, "strength, lambda, must be above 0, got 0: .* strength = 'off' leaves the concepts alone"),
        ({"strength": -3.0}, "must be above 0, got -3.0"),
        ({"strength": "on"}, "unknown strength on: expected one of 'off', 'a number above 0'"),
        ({"tau": -0.5}, "tau must be at least 0, got -0.5"),
        ({"smoothness": 0.0}, "smoothness must be above 0, got 0.0"),
        ({"schedule": "aut"}, "Did you mean 'auto'"),
        ({"ascent": "dro"}, "unknown ascent dro"),
        ({"selection": "best"}, "unknown selection best"),
        ({"s": 0}, "s must be at least 1"),
        ({"c": 0.5}, "c must be at least 1"),
        ({"eta": 0.0}, "eta must be above 0"),
        ({"concept_level": "midle"}, "unknown level midle: .* Did you mean 'middle'"),
        ({"prior": ("animal=0.9", "plant=0.2")}, "shares of the prior must sum to 1, got 1.1"),
        ({"prior": ("animal",)}, "prior must hold CONCEPT=SHARE"),
        ({"prior": ("animal=-0.1", "plant=1.1")}, "shares of at least 0"),
        ({"prior": ("animal=0.5", "animal=0.5")}, "gives the share of 'animal' twice"),
        ({"prior": ("animal=0.5", "plannt=0.5")}, "unknown concept of the prior at level 'coarse' plannt: .*'plant'"),
        ({"prior": ("animal=0.5", "fish=0.5"), "concept_level": "middle"}, "at level 'middle' animal"),
    ],
)
def test_what_the_recipe_refuses(fields: dict[str, Any], message: str, toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match=message):
        stage_of(toy_data, **fields)


def test_no_label_at_all(toy_data: LabelledData) -> None:
    bare = replace(toy_data, labels=np.full_like(toy_data.labels, -1))
    with pytest.raises(UsageError, match="no training row is labelled, and robust training needs labels"):
        stage_of(bare)


def test_the_schedule_is_said_once(toy_data: LabelledData) -> None:
    """Also where the first epoch is too short to measure it."""
    recipe = Robust(schedule="auto", strength=0.1, epochs=5, batch_size=24, steps_per_epoch=4)
    run = quick(recipe, toy_data)
    said = [(value, reason) for name, value, reason in run.decisions if name == "s and c"]
    assert len(said) == 1 and "the largest gradient of q over the first batches is" in said[0][1]
    held = quick(replace(recipe, strength=1e6), toy_data)
    ((value, reason),) = ((value, reason) for name, value, reason in held.decisions if name == "s and c")
    assert str(value).endswith("and 1") and "warning: Theorem 3 has no slow start" in reason


def test_a_training_too_short_to_move_q_says_so(toy_data: LabelledData) -> None:
    """The first ten batches measure: of ten, none is left."""
    recipe = Robust(schedule="auto", strength=0.1, epochs=2, batch_size=24, steps_per_epoch=5)
    for steps, warned in ((5, True), (6, False)):
        run = quick(replace(recipe, steps_per_epoch=steps), toy_data)
        ((value, reason),) = ((value, reason) for name, value, reason in run.decisions if name == "s and c")
        assert (value == "none" and "there are 10, so the concepts keep their weights" in reason) == warned


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "worst concept's accuracy"),
        ({"concept_level": "fine"}, "worst concept's accuracy"),
        ({"strength": "off"}, "validation loss"),
        ({"selection": "likelihood"}, "validation loss"),
    ],
)
def test_rivals_choose_their_epoch_by_the_same_rule(fields: dict[str, Any], rule: str, toy_data: LabelledData) -> None:
    recipe = Robust(epochs=2, **fields)
    stages = [StagePlan("robust", epochs=2, steps=6, num_rows=90, batch_size=24, num_trainable=1, chosen=True)]
    level = recipe.concepts_at(toy_data)
    for method, several in rivals(recipe, False, stages, level).items():
        for one in several:
            model = small_model(toy_data, method=method, options=one.network())
            select = next(iter(one.stages(model, toy_data))).select
            assert select is not None and select.name == rule
            if rule == "worst concept's accuracy":
                assert select.concepts == level


def test_rivals_of_a_run_that_keeps_its_last_epoch() -> None:
    """Whose stages nothing chooses: they take as many steps all the same."""
    stages = [StagePlan("robust", epochs=2, steps=6, num_rows=90, batch_size=24, num_trainable=1, chosen=False)]
    found = rivals(Robust(epochs=2, selection="last"), False, stages, "coarse")
    others = [one for method, several in found.items() if method != "robust" for one in several]
    assert others and all((one.epochs, one.steps_per_epoch, one.batch_size) == (2, 3, 24) for one in others)


def test_q_is_logged(toy_data: LabelledData, tmp_path: Any) -> None:
    """At every logged step and after every epoch; it stays on the simplex, and moves."""
    from nestling.files import read_lines

    run = quick(Robust(epochs=3, batch_size=24, steps_per_epoch=11, strength=1.0), toy_data, tmp_path / "run")
    logged = [record["reducers"]["fine"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(logged) == 6
    for q in [*logged, *(record["reducers"]["fine"] for record in run.history)]:
        assert q.keys() == {"animal", "plant"} and sum(q.values()) == pytest.approx(1) and min(q.values()) >= 0
    assert len({q["animal"] for q in logged}) == 6
    # The worst concept chose the epoch, so that there is no validation loss to draw.
    drawn = curve("robust", 0, run).metrics
    assert "worst concept's accuracy" in drawn and "validation loss" not in drawn


def test_rare_concepts_gain(toy_data: LabelledData) -> None:
    """A concept of a fifth of the rows that starts at its share gets more weight while its loss is the larger."""
    kept = np.flatnonzero((toy_data.labels[:, 0] == 0) | (np.arange(240) % 8 < 2))
    data = toy_data.subset(kept)
    run = quick(
        Robust(tau=0.0, strength=1.0, s=1, epochs=4, batch_size=32, steps_per_epoch=10), data, backbone=BACKBONE
    )
    weights = [record["reducers"]["fine"]["plant"] for record in run.history]
    share = (data.labels[:, 0] == 1).mean()
    assert max(weights) > share + 0.05
    assert run.model.config["method"] == "robust"


# With nested learning ------------------------------------------------------------------------------------------------


def nested_reducers(data: LabelledData, **fields: Any) -> list[list[ConceptWeighted]]:
    """Of every term of each stage that trains levels."""
    stages = [s for s in Nested(**fields).stages(small_model(data), data) if s.epochs]
    found = [[term.reducer for _, term in Objective.of(stage.objective).weighted()] for stage in stages]
    assert all(isinstance(reducer, ConceptWeighted) for reducers in found for reducer in reducers)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("level", ["coarse", "middle", "fine"])
def test_nested_weights_concepts_at_any_level(level: str, toy_data: LabelledData) -> None:
    """Every level's loss in every stage; the counts are those of the rows that it counts."""
    found = nested_reducers(toy_data, concept_weights=level, concept_strength=3.0)
    assert [len(reducers) for reducers in found] == [1, 2, 3]
    column = toy_data.labels[:, toy_data.taxonomy.level_index(level)]
    for reducers in found:
        for reducer in reducers:
            assert reducer.names == toy_data.taxonomy.classes[level] and reducer.strength == 3.0
            assert reducer.counts.tolist() == np.bincount(column).tolist()
    run = quick(Nested(concept_weights=level, epochs=1, batch_size=24, steps_per_epoch=4), toy_data)
    assert {tuple(record["reducers"]) for record in run.history} == {
        ("coarse",), ("coarse", "middle"), ("coarse", "middle", "fine"),
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["cos", "coins-imp", "coinsp"])
def test_coins_weights_concepts_in_its_coarse_loss(variant: str, toy_data: LabelledData) -> None:
    """And nowhere else: instances have no concept to fare by."""
    recipe = Coins(variant=variant, concept_weights="coarse", concept_strength=2.0, epochs=2, batch_size=24)
    network = build_model(toy_data.taxonomy, toy_data.image_shape, BACKBONE, "coins", recipe.network())
    stage = next(recipe.stages(network, toy_data))
    first, *others = [term.reducer for _, term in Objective.of(stage.objective).weighted()]
    assert isinstance(first, ConceptWeighted) and first.strength == 2.0
    assert first.counts.tolist() == np.bincount(toy_data.labels[:, 0]).tolist()
    assert not any(isinstance(reducer, ConceptWeighted) for reducer in others)
    run = quick(replace(recipe, steps_per_epoch=4), toy_data)
    q = [record["reducers"]["coarse"] for record in run.history if record["stage"] == "search"]
    assert q and all(sum(each.values()) == pytest.approx(1, abs=1e-5) for each in q)
    assert q[0] != dict(zip(first.names, (first.counts / first.counts.sum()).tolist()))


def test_nested_s_concepts_are_counted_where_labels_are() -> None:
    """The paper's loss gives a row without a level's label no value there, and its concept no count."""
    data = rows()
    fields = {"marginal": False, "balance": "rows", "concept_weights": "coarse"}
    last = nested_reducers(data, **fields)[-1]
    known = data.labels[data.finest_known() == 2, 0]
    assert [reducer.counts.tolist() for reducer in last] == [np.bincount(known).tolist()] * 3
    with pytest.raises(DataError, match="have no concept, since they are not labelled at level 'fine'"):
        nested_reducers(data, concept_weights="fine")
    with pytest.raises(UsageError, match="unknown level of: expected one of 'coarse'"):
        nested_reducers(data, concept_weights="of")


def test_nested_weights_no_concepts_by_itself(toy_data: LabelledData) -> None:
    stage = next(iter(Nested().stages(small_model(toy_data), toy_data)))
    assert not Objective.of(stage.objective).figures()
