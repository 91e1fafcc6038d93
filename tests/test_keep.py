"""What a stage keeps, and what it refuses: states that hooks and terms bring along."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.engine.checkpoint import Checkpoints
from nestling.errors import DivergedError
from nestling.methods.recipe import Context
from nestling.models.model import Model, Outputs
from nestling.objectives.terms import CrossEntropy, Objective, Term
from small import Crash, Watch, assert_same_weights, checkpoint_every_epoch, one_stage, quick, small_model


class Own(Term):
    """A row of its own, which moves by its gradient; ``spoiled`` makes the gradient NaN at one call."""

    def __init__(self, spoiled: int | None = None) -> None:
        super().__init__("own")
        self.row: Tensor
        self.register_buffer("row", torch.zeros(1))
        self.leaf: Tensor | None = None
        self.calls, self.moves, self.spoiled = 0, 0, spoiled

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        self.leaf = self.row.clone().requires_grad_()
        if self.calls == self.spoiled:
            self.leaf.register_hook(lambda gradient: gradient * torch.nan)
        self.calls += 1
        # Something of the model, so that backward reaches it too.
        return (self.leaf - 3).square() + 0 * outputs.embedding.sum(1), torch.ones(len(batch.index))

    def own_gradients(self) -> list[Tensor]:
        assert self.leaf is not None and self.leaf.grad is not None
        return [self.leaf.grad]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.moves += 1
        self.row -= lr * self.own_gradients()[0]


def with_term(term: Term, weight: Any = 1.0, **more: Any) -> Any:
    """A recipe of 2 epochs of 3 steps that trains the fine head beside ``term``."""
    return one_stage(
        lambda model, rows: {"objective": CrossEntropy("fine") + Objective([(weight, term)]), **more}, steps_per_epoch=3
    )


@pytest.mark.parametrize(("weight", "moves"), [(1.0, 6), (lambda p: float(p >= 0.5), 3), (lambda p: float(p < 0.5), 3)])
def test_a_term_moves_its_rows_while_it_is_on(weight: Any, moves: int, toy_data: LabelledData) -> None:
    term = Own()
    quick(with_term(term, weight), toy_data)
    assert term.moves == moves
    assert 0 < term.row < 3


def test_a_gradient_of_its_own_that_is_not_finite(toy_data: LabelledData, tmp_path: Path) -> None:
    """Stopped at its step, before the row takes it in."""
    term = Own(spoiled=4)
    with pytest.raises(DivergedError, match=r"the gradient is not finite in stage only epoch 1 step 1, rows"):
        quick(with_term(term), toy_data, tmp_path / "run")
    assert torch.isfinite(term.row).all() and term.moves == 4


def test_micro_batches_need_an_objective_that_adds_up(toy_data: LabelledData) -> None:
    with pytest.raises(ValueError, match="keeps something of each batch: leave micro_batch out"):
        quick(with_term(Own(), micro_batch=8), toy_data)


def test_a_stage_that_trains_nothing(toy_data: LabelledData) -> None:
    with pytest.raises(ValueError, match="declares nothing trainable"):
        quick(one_stage(lambda model, rows: {"trainable": []}), toy_data)


# Hooks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["after_epoch", "at_end"])
@pytest.mark.parametrize("where", ["weight", "buffer"])
def test_a_hook_that_writes_what_is_not_finite(
    moment: str, where: str, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither checkpoint nor stage file holds it."""
    checkpoint_every_epoch(monkeypatch)

    @torch.no_grad()
    def spoil(context: Context) -> None:
        if context.epoch >= 1:
            tensors = context.model.parameters() if where == "weight" else context.objective.buffers()
            next(iter(tensors)).fill_(torch.nan)

    with pytest.raises(DivergedError, match=r"the weight .* is not finite in stage only epoch"):
        quick(with_term(Own(), **{moment: spoil}), toy_data, tmp_path / "run")
    kept = Checkpoints(tmp_path / "run")
    assert kept.stage(0, "only") is None
    saved, _ = kept.latest(0)
    assert saved is not None
    assert all(torch.isfinite(t).all() for t in saved.tensors.values() if t.is_floating_point())


class Growing(CrossEntropy):
    """Keeps a buffer that a hook makes longer."""

    def __init__(self) -> None:
        super().__init__("fine")
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        values, weights = super().forward(outputs, batch)
        return values * (1 + 0.1 * len(self.seen)), weights


def growing() -> Any:
    def build(model: Model, rows: LabelledData) -> dict[str, Any]:
        term = Growing()

        def grow(context: Context) -> None:
            term.seen = torch.cat([term.seen, torch.ones(1)])

        return {"objective": 1.0 * term, "after_epoch": grow, "at_end": grow}

    return one_stage(build, epochs=3, steps_per_epoch=3)


@pytest.mark.parametrize("crash_at", [4, 7, 8])
def test_buffers_that_a_hook_makes_longer_are_resumed(
    crash_at: int, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_every_epoch(monkeypatch)
    whole = quick(growing(), toy_data, tmp_path / "whole").model
    watch = Watch(monkeypatch)
    watch.crash_at = crash_at
    with pytest.raises(Crash):
        quick(growing(), toy_data, tmp_path / "run")
    taken = len(watch.taken)
    assert_same_weights(quick(growing(), toy_data, tmp_path / "run").model, whole)
    assert len(watch.taken) - taken < 9
    # And replayed, from the file of the finished stage.
    assert_same_weights(quick(growing(), toy_data, tmp_path / "run").model, whole)
    saved = Checkpoints(tmp_path / "run").stage(0, "only")
    assert saved is not None and saved.tensors["objective.terms.0.seen"].shape == (5,)


# What is left alone --------------------------------------------------------------------------------------------------


def test_planning_leaves_the_random_generator_alone(toy_data: LabelledData) -> None:
    """Recipes may draw while they build."""

    def build(model: Model, rows: LabelledData) -> dict[str, Any]:
        torch.rand(7)
        return {}

    state = torch.get_rng_state()
    quick(one_stage(build, epochs=1), toy_data, model=small_model(toy_data))
    assert torch.equal(torch.get_rng_state(), state)


def test_schedules_multiply() -> None:
    """A function of progress scales a sum of terms, scaled ones too."""
    half = Objective([(lambda progress: 0.5 * progress, CrossEntropy("a"))])
    objective = (lambda progress: 4.0 * progress) * (half + 2.0 * CrossEntropy("b"))  # type: ignore[operator]
    weights: Iterator[Any] = iter(weight for weight, _ in objective.weighted())
    assert [weight(0.5) for weight in weights] == [0.5, 4.0]


def test_a_first_pass_leaves_batch_norm_alone(toy_data: LabelledData) -> None:
    """Statistics are those of the second pass's batches alone."""

    def run(perturb: Any) -> nn.Module:
        return quick(
            one_stage(lambda model, rows: {"perturb": perturb}, epochs=1), toy_data, model=small_model(toy_data)
        ).model

    def look(loss: Any, batch: Batch) -> Batch:
        loss(batch)
        return batch

    assert_same_weights(run(look), run(None))
