"""The training loop: what it trains and leaves alone, which epoch it keeps, rates, plans, faults, two processes."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nestling.config import apply, read_config
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.engine import keep
from nestling.engine import stage as engine_stage
from nestling.engine.checkpoint import Checkpoints, pick
from nestling.engine.fit import cut_rows
from nestling.engine.optim import build_optimizer, num_plateaus, rate
from nestling.engine.plan import plan
from nestling.errors import DivergedError, UsageError
from nestling.files import read_lines
from nestling.methods import recipe_class
from nestling.methods.recipe import Context, Optimizer, Recipe, Select, Stage
from nestling.models.model import Model, Outputs
from nestling.objectives.terms import CrossEntropy, Term
from small import (
    RECIPES,
    Watch,
    assert_same_weights,
    checkpoint_every_epoch,
    dropout_model,
    one_stage,
    partly_labelled,
    quick,
    small_model,
)


@pytest.fixture(scope="module")
def data(toy_data: LabelledData) -> LabelledData:
    return partly_labelled(toy_data)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What is written -----------------------------------------------------------------------------------------------------


def test_without_a_folder_nothing_is_written(
    data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint_every_epoch(monkeypatch)
    opened: list[str] = []
    monkeypatch.setattr("nestling.files.tempfile.mkstemp", lambda *a, **k: opened.append("file"))
    monkeypatch.setattr("nestling.files.tempfile.mkdtemp", lambda *a, **k: opened.append("folder"))
    run = quick(RECIPES["nested"], data)
    assert run.path is None and run.history
    assert list(tmp_path.iterdir()) == [] and opened == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_folder_explains_itself(name: str, data: LabelledData, tmp_path: Path) -> None:
    run = quick(RECIPES[name], data, tmp_path / "run", seed=5)
    assert run.path == tmp_path / "run"
    stages = [f"{number:02d}-{stage.name}" for number, stage in enumerate(plan_of(RECIPES[name], data))]
    assert sorted(p.name for p in (tmp_path / "run" / "stages").iterdir()) == stages
    assert {p.name for p in run.path.iterdir()} <= {"recipe.toml", "metrics.jsonl", "stages", "checkpoints", "run.lock"}
    recipe = tomllib.loads((run.path / "recipe.toml").read_text())
    assert recipe.keys() == {"given", "derived"}
    # As a --config: options, then the fields of the method's recipe.
    given = read_config(run.path / "recipe.toml")
    assert (given.pop("seed"), given.pop("backbone")) == (5, "conv:4/8")
    kind = recipe_class(given.pop("method"))
    assert apply(kind(), given) == RECIPES[name]
    assert {"device", "precision", "backbone", "rows"} <= recipe["derived"].keys()
    assert all(entry["reason"] for entry in recipe["derived"].values())
    assert recipe["derived"]["rows"]["value"] == "192 training, 24 validation, 24 calibration"


def plan_of(recipe: Recipe, data: LabelledData) -> list:
    train, _ = cut_rows(data, None, 0)
    return plan(recipe, small_model(data, method=recipe.method, options=recipe.network()), train)


def test_a_refused_recipe_leaves_nothing(toy_data: LabelledData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training row is labelled at level 'fine'"):
        quick(RECIPES["nested"], toy_data.keep({"fine": 0.0}), tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_callers_random_state_is_left_alone(data: LabelledData) -> None:
    torch.manual_seed(17)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    quick(RECIPES["nested, the paper's"], data)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_the_callers_random_state_does_not_matter(data: LabelledData) -> None:
    torch.manual_seed(1)
    first = quick(RECIPES["nested"], data)
    torch.manual_seed(2)
    assert_same_weights(first.model, quick(RECIPES["nested"], data).model)


def test_seeds_decide(data: LabelledData) -> None:
    one, same, other = (quick(RECIPES["flat-marginal"], data, seed=seed) for seed in (1, 1, 2))
    assert_same_weights(one.model, same.model)
    assert one.history == same.history
    assert not torch.equal(one.model.state_dict()["head.fine.weight"], other.model.state_dict()["head.fine.weight"])
    assert one.history != other.history


def test_random_numbers_are_a_function_of_the_step(toy_data: LabelledData) -> None:
    """What dropout and random terms draw: new in every step, the same in another run, others for another seed."""

    def drawn(seed: int) -> list[float]:
        found: list[float] = []

        class Drawing(CrossEntropy):
            def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
                found.append(float(torch.rand(())))
                return super().forward(outputs, batch)

        quick(one_stage(lambda model, rows: {"objective": Drawing("fine")}, epochs=3), toy_data, seed=seed)
        return found

    first = drawn(0)
    assert len(first) == 3 * 4 == len(set(first))
    assert drawn(0) == first and not set(drawn(1)) & set(first)


def test_losses_are_means_over_the_epoch(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []

    class Spying(CrossEntropy):
        def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
            values, weights = super().forward(outputs, batch)
            losses.append(float(values.detach().mean()))
            return values, weights

    run = quick(one_stage(lambda model, rows: {"objective": 2.0 * Spying("fine")}, epochs=2), toy_data)
    assert [record["loss"] for record in run.history] == pytest.approx(
        [2 * np.mean(losses[:4]), 2 * np.mean(losses[4:])], rel=1e-5
    )


# What is trained -----------------------------------------------------------------------------------------------------


def test_a_trainable_parameter_without_gradient_is_named(data: LabelledData) -> None:
    recipe = one_stage(lambda model, rows: {"trainable": [model]})
    with pytest.raises(ValueError, match=r"stage only declares model\.head\.coarse\.weight trainable.*4 such"):
        quick(recipe, data)
    # Of the objective's own parameters none may lie idle either.
    idle = CrossEntropy("fine")
    idle.extra = nn.Parameter(torch.ones(2))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"objective\.terms\.0\.extra"):
        quick(one_stage(lambda model, rows: {"objective": idle}), data)


def test_what_is_frozen_stays(toy_data: LabelledData) -> None:
    """Parameters and batch-norm statistics, bit for bit; dropout before frozen weights is off."""
    model = dropout_model(toy_data)
    model.backbone.first[1].running_mean += 0.3  # type: ignore[index,union-attr,operator]
    before = weights(model)
    modes: dict[str, bool] = {}

    class Spying(CrossEntropy):
        def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
            modes.update({name: module.training for name, module in model.named_modules()})
            assert not outputs.embedding.requires_grad, "the frozen prefix records a graph"
            return super().forward(outputs, batch)

    def build(model: Model, rows: LabelledData) -> dict:
        trainable = [model.decoder["fine"], model.head["fine"]]  # type: ignore[index]
        return {"trainable": trainable, "objective": Spying("fine")}

    quick(one_stage(build), toy_data, model=model)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("decoder.fine", "head.fine"))}
    training = {name for name, on in modes.items() if on}
    assert training == {name for name in modes if name.startswith(("decoder.fine", "head.fine"))}


def test_what_is_trained_moves(toy_data: LabelledData) -> None:
    """The other side of the test before: trained, the same batch norms and weights do change."""
    model = dropout_model(toy_data)
    before = weights(model)
    quick(one_stage(), toy_data, model=model)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(before[name], tensor)}
    assert same == {name for name in before if name.startswith(("head.coarse", "head.middle", "calibration"))}


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_is_what_is_trained(name: str, data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, watch = RECIPES[name], Watch(monkeypatch)
    trainable: dict[str, int] = {}
    original = keep.mark_trainable

    def mark(stage: Stage, *arguments: Any) -> dict[str, nn.Parameter]:
        found = original(stage, *arguments)
        trainable[stage.name] = sum(p.numel() for p in found.values())
        return found

    monkeypatch.setattr(keep, "mark_trainable", mark)
    planned = plan_of(recipe, data)
    quick(recipe, data)
    counted = {stage.name: sum(taken[0] == stage.name for taken in watch.taken) for stage in planned}
    assert {stage.name: stage.steps for stage in planned} == counted
    assert {stage.name: stage.num_trainable for stage in planned} == trainable
    assert sum(counted.values()) > 10
    epochs = {stage.name: len({taken[1] for taken in watch.taken if taken[0] == stage.name}) for stage in planned}
    assert {stage.name: stage.epochs for stage in planned} == epochs


def test_the_plan_leaves_the_model_alone(data: LabelledData) -> None:
    model = small_model(data)
    before, config, state = weights(model), json.dumps(model.config), torch.get_rng_state()
    grads = [p.requires_grad for p in model.parameters()]
    for selection in ("last", "likelihood"):
        planned = plan(replace(RECIPES["nested, the paper's"], selection=selection), model, data)
        assert [stage.name for stage in planned] == ["coarse", "middle", "fine", "rejection", "temperature"]
        assert [stage.chosen for stage in planned] == [selection == "likelihood"] * 3 + [False, False]
        assert [stage.metric for stage in planned] == ["validation loss"] * 3 + [None, None]
    assert model.state_dict().keys() == before.keys(), "the rejection layers were added"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert json.dumps(model.config) == config
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


# Which epoch is kept -------------------------------------------------------------------------------------------------


def scripted(scores: list[float], mode: str = "min", **changes: Any) -> tuple[Recipe, list[dict[str, Tensor]]]:
    """A recipe whose epochs score as told, and its weights after each epoch."""
    seen: list[dict[str, Tensor]] = []
    left = iter(scores)

    def metric(probabilities: dict[str, Tensor], labels: Tensor, levels: tuple[str, ...]) -> float:
        assert labels.shape == (24, 3) and levels == ("coarse", "middle", "fine")
        assert {level: p.shape for level, p in probabilities.items()} == {"fine": (24, 6)}
        return next(left)

    def build(model: Model, rows: LabelledData) -> dict:
        select = Select(metric, "score", mode, ("fine",))
        return {"select": select, "after_epoch": lambda context: seen.append(weights(context.model)), **changes}

    return one_stage(build, epochs=len(scores), steps_per_epoch=2), seen


@pytest.mark.parametrize(
    ("scores", "mode", "best"),
    [
        ([3.0, 1.0, 2.0, 4.0], "min", 1),
        ([3.0, 1.0, 2.0, 4.0], "max", 3),
        ([2.0, 1.0, 1.0, 1.0], "min", 1),  # of equals the first
        ([4.0, 3.0, 2.0, 1.0], "min", 3),
    ],
)
def test_the_best_epoch_is_restored(scores: list[float], mode: str, best: int, toy_data: LabelledData) -> None:
    recipe, seen = scripted(scores, mode)
    run = quick(recipe, toy_data)
    assert len(seen) == len(scores)
    final = run.model.state_dict()
    equal = [all(torch.equal(final[name], tensor) for name, tensor in epoch.items()) for epoch in seen]
    assert equal == [number == best for number in range(len(scores))]
    assert [record["score"] for record in run.history] == scores
    assert [record["epoch"] for record in run.history] == [1, 2, 3, 4]


def test_a_model_fitted_again_begins_without_its_calibration(toy_data: LabelledData, tmp_path: Path) -> None:
    """Epochs are chosen by what is trained now; a resume, which is given the same model, finds the same."""

    def given() -> Model:
        model = small_model(toy_data, method="end-to-end")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(1)
            model.calibration.add_rejection()
        model.config["rejection"] = True
        for level in model.calibration.heads:
            model.calibration.set_temperatures(level, 7.0, 5.0)
        return model

    fresh = quick(RECIPES["end-to-end"], toy_data, model=small_model(toy_data, method="end-to-end"))
    for _ in range(2):
        again = quick(RECIPES["end-to-end"], toy_data, tmp_path / "run", model=given())
        assert_same_weights(again.model, fresh.model)
        assert again.history == fresh.history
        assert again.model.config["rejection"] is False


def test_without_a_choice_the_last_epoch_is_kept(toy_data: LabelledData) -> None:
    seen: list[dict[str, Tensor]] = []
    hook = {"after_epoch": lambda context: seen.append(weights(context.model))}
    run = quick(one_stage(lambda model, rows: hook, epochs=3), toy_data)
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in seen[-1].items())


def test_without_labelled_validation_rows_the_last_epoch_is_kept(toy_data: LabelledData) -> None:
    """Nothing can be compared, which is no divergence."""
    unlabelled = toy_data.keep({"coarse": 0.0})
    run = quick(RECIPES["end-to-end"], toy_data, validation=unlabelled)
    assert len(run.history) == 3 and all("validation loss" not in record for record in run.history)
    empty = quick(RECIPES["end-to-end"], toy_data, validation=toy_data.subset([]))
    assert_same_weights(run.model, empty.model)
    assert empty.metrics == {}


@pytest.mark.parametrize(
    ("patience", "epochs"),
    # Scores: better at 1, 2 and 5; two epochs without a better one end at 4, three at 8.
    [(1, 3), (2, 4), (3, 8), (None, 9)],
)
def test_patience(patience: int | None, epochs: int, toy_data: LabelledData) -> None:
    recipe, seen = scripted([5.0, 4.0, 4.5, 4.0, 3.0, 3.5, 3.5, 3.5, 9.0], patience=patience)
    run = quick(recipe, toy_data)
    assert len(run.history) == len(seen) == epochs


@pytest.mark.parametrize("name", ["flat-marginal", "end-to-end"])
def test_validation_loss_chooses_where_it_is_asked_to(name: str, data: LabelledData) -> None:
    """At a rate that is too high epochs rise and fall; what is kept is what training up to the best of them gives, or
    up to the last, whose losses are recorded all the same."""
    last = replace(RECIPES[name], epochs=6, optimizer=Optimizer(lr=0.1, schedule="constant"), patience=1)
    recipe = replace(last, selection="likelihood", patience=None)
    run = quick(recipe, data)
    losses = [record["validation loss"] for record in run.history]
    best = int(np.argmin(losses))
    assert best < 5, "no test: the last epoch is the best"
    shorter = quick(replace(recipe, epochs=best + 1), data)
    assert [record["validation loss"] for record in shorter.history] == losses[: best + 1]
    assert_same_weights(run.model, shorter.model)
    assert "patience" in last.idle and "patience" not in recipe.idle
    longest = quick(last, data)
    assert [record["validation loss"] for record in longest.history] == losses
    assert not torch.equal(longest.model.head["fine"].weight, shorter.model.head["fine"].weight)
    shortest = quick(replace(last, epochs=best + 1), data)
    assert_same_weights(shortest.model, shorter.model)


# Rates ---------------------------------------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    def at(schedule: str, progress: float) -> float:
        return rate(Optimizer(schedule=schedule), progress, [1.0])

    assert [at("constant", p) for p in (0, 0.5, 0.99)] == [1, 1, 1]
    # (1 + cos(pi p)) / 2
    assert [at("cosine", p) for p in (0, 0.25, 0.5, 0.75)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    # Up from 1/25 over three tenths, half of the way at 0.15: 1/25 + (24/25) / 2 = 0.52; down over the other seven.
    assert [at("one-cycle", p) for p in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx([0.04, 0.52, 1, 0.5, 1e-5])
    assert at("one-cycle", 0.3 - 1e-9) == pytest.approx(1)
    # cos(pi / 3) = 1/2: at a third of the ascent a quarter of it is done.
    assert at("one-cycle", 0.1) == pytest.approx(0.04 + 0.96 / 4)


def test_plateaus_by_hand() -> None:
    assert num_plateaus([], 2) == 0
    assert num_plateaus([3, 2, 1], 1) == 0
    assert num_plateaus([1, 1, 1], 1) == 2
    assert num_plateaus([1, 2, 3], 2) == 1
    # 1 · (2 2) divides · 0.5 better · (0.6 0.7) divides · 0.8, one stale
    assert num_plateaus([1, 2, 2, 0.5, 0.6, 0.7, 0.8], 2) == 2
    settings = Optimizer(schedule="plateau", factor=5, patience=2)
    assert rate(settings, 0.9, [1, 2, 3]) == pytest.approx(0.2)
    assert rate(settings, 0.9, [1, 2, 3, 3, 3]) == pytest.approx(0.04)
    assert rate(settings, 0.9, [3, 2, 1]) == 1


def test_the_rate_is_applied(toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What metrics.jsonl says is what the optimiser's groups hold at the step."""
    used: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        used.extend(group["lr"] for group in self.param_groups)
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    cosine = Optimizer(schedule="cosine")
    recipe = one_stage(lambda model, rows: {"lr": 0.02}, epochs=2, steps_per_epoch=4, optimizer=cosine)
    run = quick(recipe, toy_data, tmp_path / "run")
    expected = [0.02 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert used == pytest.approx(expected)
    logged = {record["step"]: record["lr"] for record in read_lines(run.path / "metrics.jsonl")}  # type: ignore[operator]
    assert logged == {1: expected[0], 4: expected[3], 8: expected[7]}


def test_plateau_reads_the_validation_history(toy_data: LabelledData, tmp_path: Path) -> None:
    optimizer = Optimizer(name="sgd", schedule="plateau", factor=10, patience=1)
    recipe, _ = scripted([1.0, 2.0, 0.5, 0.6, 0.7])
    run = quick(replace(recipe, optimizer=optimizer), toy_data, tmp_path / "run")
    rates = {record["epoch"]: record["lr"] for record in read_lines(run.path / "metrics.jsonl")}  # type: ignore[operator]
    assert [rates[epoch] for epoch in range(5)] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


@pytest.mark.parametrize(
    ("settings", "kind", "options"),
    [
        (Optimizer(name="adamw", weight_decay=0.1), torch.optim.AdamW, {"weight_decay": 0.1}),
        (Optimizer(name="adam", weight_decay=0.2), torch.optim.Adam, {"weight_decay": 0.2}),
        (Optimizer(name="sgd", momentum=0.8), torch.optim.SGD, {"momentum": 0.8, "weight_decay": 1e-4}),
    ],
)
def test_optimisers(settings: Optimizer, kind: type, options: dict) -> None:
    """One step equals the plain, unfused optimiser's."""
    parameters = [nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    ours, theirs = build_optimizer(settings, 0.1, parameters[:1]), kind(parameters[1:], lr=0.1, **options)
    assert type(ours) is kind
    for optimizer, parameter in zip((ours, theirs), parameters):
        for gradient in ([0.5, 0.5], [-1.0, 2.0]):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-6, atol=1e-7)


# Hooks ---------------------------------------------------------------------------------------------------------------


def test_hooks_run_when_they_should(toy_data: LabelledData) -> None:
    calls: list[str] = []
    scores = iter([2.0, 1.0, 3.0])
    best: list[dict[str, Tensor]] = []

    def perturb(loss: Callable[[Batch], Tensor], batch: Batch) -> Batch:
        calls.append("perturb")
        return replace(batch, inputs=torch.zeros_like(batch.inputs))

    class Spying(CrossEntropy):
        def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
            assert not batch.inputs.any(), "the step did not see what perturb returned"
            return super().forward(outputs, batch)

    def at_end(context: Context) -> None:
        calls.append("at_end")
        assert not context.model.training
        assert all(torch.equal(context.model.state_dict()[name], t) for name, t in best[1].items()), "not the best"
        outputs, labels = context.predict(context.validation)  # type: ignore[arg-type]
        assert outputs.logits["fine"].shape == (24, 6) and labels.shape == (24, 3)
        context.note("answer", 42, "it was asked")

    def build(model: Model, rows: LabelledData) -> dict:
        return {
            "objective": Spying("fine"),
            "perturb": perturb,
            "after_step": lambda context: calls.append("after_step"),
            "after_epoch": lambda context: (calls.append("after_epoch"), best.append(weights(context.model))),
            "at_end": at_end,
            "select": Select(lambda *_: next(scores), "score"),
        }

    run = quick(one_stage(build, epochs=3, steps_per_epoch=2), toy_data)
    epoch = ["perturb", "after_step"] * 2 + ["after_epoch"]
    assert calls == epoch * 3 + ["at_end"]
    assert run.decisions[-1] == ("answer", 42, "it was asked")


def test_hooks_see_no_test_rows(data: LabelledData) -> None:
    """Training and validation rows are parts of what fit was given, and the calibration rows are in neither."""
    seen: list[Context] = []

    def build(model: Model, rows: LabelledData) -> dict:
        return {"at_end": seen.append}

    quick(one_stage(build), data)
    context = seen[0]
    holds_rows = ["model", "objective", "train", "validation", "predict", "batches"]
    assert [f.name for f in fields(Context)] == [*holds_rows, "note", "epochs", "epoch"]
    train, validation = set(context.train.index.tolist()), set(context.validation.index.tolist())  # type: ignore[union-attr]
    assert (len(train), len(validation)) == (192, 24)
    assert not train & validation and train | validation < set(range(240))
    # Nor do models and terms hold any: nothing that a hook reaches has rows besides these two.
    held = [m for root in (context.model, context.objective) for m in root.modules()]
    assert not [m for m in held for value in vars(m).values() if isinstance(value, LabelledData)]


def test_given_validation_rows_are_used(toy_data: LabelledData) -> None:
    seen: list[Context] = []
    quick(one_stage(lambda model, rows: {"at_end": seen.append}), toy_data, validation=toy_data.subset(range(12)))
    assert seen[0].validation.index.tolist() == list(range(12))  # type: ignore[union-attr]
    assert len(seen[0].train) == 216


# Faults --------------------------------------------------------------------------------------------------------------


class NotFinite(CrossEntropy):
    """A loss, or a gradient alone, that is not finite from one call on."""

    def __init__(self, what: str, call: int) -> None:
        super().__init__("fine")
        self.what, self.call, self.calls = what, call, 0

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        values, weights = super().forward(outputs, batch)
        self.calls += 1
        if self.calls == self.call:
            if self.what == "loss":
                values = values * torch.tensor([math.nan] + [1.0] * (len(values) - 1))
            else:
                # The root's slope at 0 is infinite, and 0 times infinity is no number.
                values = values + (outputs.logits["fine"].sum(1) * 0).sqrt()
        return values, weights


def fault(what: str) -> Callable[[Model, LabelledData], dict[str, Any]]:
    """A stage of 2 steps an epoch that fails in its third epoch, at the second step or in validation."""
    calls = 0

    def perturb(loss: Callable[[Batch], Tensor], batch: Batch) -> Batch:
        nonlocal calls
        calls += 1
        return replace(batch, inputs=batch.inputs * math.inf) if calls == 6 else batch

    def metric(*_: object) -> float:
        nonlocal calls
        calls += 1
        return -float(calls) if calls < 3 else float(what.split()[1])

    def build(model: Model, rows: LabelledData) -> dict[str, Any]:
        if what in ("loss", "gradient"):
            return {"objective": NotFinite(what, 6), "select": Select(lambda p, l, n: -1.0, "score")}
        if what == "input":
            return {"perturb": perturb, "select": Select(lambda p, l, n: -1.0, "score")}
        return {"select": Select(metric, "score")}

    return build


@pytest.mark.parametrize("what", ["loss", "gradient", "input", "metric nan", "metric inf", "metric -inf"])
def test_what_is_not_finite_stops_the_run(
    what: str, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_every_epoch(monkeypatch)
    rows: list[list[int]] = []
    original = engine_stage.DeviceData.batch

    def batch(self: Any, *arguments: Any, **options: Any) -> Batch:
        made = original(self, *arguments, **options)
        if self.data.index.shape == (192,):
            rows.append(made.index.tolist())
        return made

    monkeypatch.setattr(engine_stage.DeviceData, "batch", batch)
    with pytest.raises(DivergedError) as error:
        quick(one_stage(fault(what), epochs=5, steps_per_epoch=2), toy_data, tmp_path / "run")
    assert error.value.exit_code == 4
    said = str(error.value)
    if what.startswith("metric"):
        assert said.startswith("the score is not finite in stage only epoch 2: ")
    else:
        assert len(rows) == 6
        first = ", ".join(map(str, rows[-1][:8]))
        named = "gradient" if what == "gradient" else "loss"
        assert said.startswith(f"the {named} is not finite in stage only epoch 2 step 1, rows {first} and 40 more: ")
    assert said.endswith("the last checkpoint is kept")
    saved, complaints = Checkpoints(tmp_path / "run").latest(0)
    assert saved is not None and complaints == []
    assert (saved.state["epoch"], saved.state["step"]) == (2, 0)
    assert saved.state["best"] == (-2.0 if what.startswith("metric") else -1.0)
    assert pick("best", saved.tensors), "no best weights were kept"
    assert all(torch.isfinite(tensor).all() for tensor in saved.tensors.values())


def test_a_broken_input_is_a_loss_that_is_not_finite(toy_data: LabelledData) -> None:
    """Infinite pixels: batch norm makes them NaN at once, and no weight takes it in."""
    model = small_model(toy_data)
    with pytest.raises(DivergedError, match="the loss is not finite"):
        quick(one_stage(fault("input"), epochs=5, steps_per_epoch=2), toy_data, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_no_row_to_train_on(toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match="no row to train on"):
        cut_rows(toy_data.subset([]), None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "unknown device tpu: expected one of 'auto', 'cpu'"),
        ({"precision": "fp8"}, "unknown precision fp8"),
        ({"precision": "fp16"}, "precision fp16 needs a GPU"),
        ({"backbone": "resnet11"}, "unknown backbone resnet11"),
    ],
)
def test_impossible_options(options: dict, message: str, toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match=message):
        quick(RECIPES["end-to-end"], toy_data, **options)


# Terms over time -----------------------------------------------------------------------------------------------------


def test_a_weight_follows_progress(toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A term that is switched on half-way: it is neither computed nor logged before."""
    calls: list[int] = []

    class Late(Term):
        def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
            calls.append(1)
            return CrossEntropy("fine")(outputs, batch)

    def build(model: Model, rows: LabelledData) -> dict:
        return {"objective": CrossEntropy("fine") + (lambda progress: 3.0 * (progress >= 0.5)) * Late("late")}

    monkeypatch.setattr(engine_stage, "LOG_EVERY", 2)
    run = quick(one_stage(build, epochs=2, steps_per_epoch=4), toy_data, tmp_path / "run")
    assert len(calls) == 4
    records = read_lines(run.path / "metrics.jsonl")  # type: ignore[operator]
    assert [sorted(record["terms"]) for record in records] == [["fine"]] * 3 + [["fine", "late"]] * 3
    assert records[-1]["loss"] == pytest.approx(4 * records[-1]["terms"]["fine"])


# Compiled ------------------------------------------------------------------------------------------------------------


def test_a_compiled_network_trains_to_the_same_weights(
    data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The backend is not ours to test, and its compiler may not be there: what is traced runs as it is.
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(model, backend="eager", **options))
    plain = quick(RECIPES["end-to-end"], data)
    run = quick(RECIPES["end-to-end"], data, tmp_path / "run", compile=True)
    assert_same_weights(run.model, plain.model)
