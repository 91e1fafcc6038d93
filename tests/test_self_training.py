"""A network that teaches itself inside the known classes: the guesses, who counts, the slow copy, averaged weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.errors import UsageError
from nestling.methods import FlatMarginal, Nested
from nestling.methods.recipe import Recipe
from nestling.models.model import Model
from nestling.objectives import functional
from nestling.objectives.self_training import SelfTraining
from nestling.taxonomy import Taxonomy
from small import RECIPES, assert_same_weights, partly_labelled, quick, rows, small_model

RAGGED = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q", "b/r/3"])
TAUGHT = {
    "nested": replace(RECIPES["nested"], self_training=0.5, averaged=True, slow=0.5),
    "flat-marginal": replace(RECIPES["flat-marginal"], self_training=1.0, certain=0.2),
}


def test_probabilities_within_what_is_known() -> None:
    """Finest columns: 1 and 2 below a/p, 3 below b/r, then the leaf a/q that ended above."""
    p = torch.tensor([[0.1, 0.3, 0.4, 0.2]])
    for labels, expected in (
        ([-1, -1, -1], [0.1, 0.3, 0.4, 0.2]),
        ([0, -1, -1], [1 / 6, 1 / 2, 0.0, 1 / 3]),
        ([0, 0, -1], [0.25, 0.75, 0.0, 0.0]),
        ([1, 2, 2], [0.0, 0.0, 1.0, 0.0]),
    ):
        torch.testing.assert_close(functional.within_known(p, torch.tensor([labels]), RAGGED), torch.tensor([expected]))
    # A finer label counts by its ancestor, and a class without any mass is even.
    middle = functional.within_known(torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[1, 2, 2]]), RAGGED, "middle")
    assert middle.tolist() == [[0.0, 0.0, 1.0]]
    nothing = functional.within_known(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([[0, 0, -1]]), RAGGED)
    assert nothing.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    with pytest.raises(UsageError, match="labels"):
        functional.within_known(p, torch.tensor([[0, 0]]), RAGGED)


def batch_of(data: LabelledData, other: Tensor | None = None) -> Batch:
    labels = torch.from_numpy(data.taxonomy.columns(data.labels))
    inputs = data.images(np.arange(len(data))).float() / 255
    return Batch(inputs, labels, torch.arange(len(data)), data.taxonomy.levels, other)


@pytest.mark.parametrize("method", ["nested", "flat-marginal"])
def test_the_value_is_that_of_a_loop(method: str) -> None:
    """Cross-entropy to the slow copy's answer on the other view, at the levels that have no label."""
    data = rows().subset(np.arange(30))
    model: Model = small_model(data, method=method)  # type: ignore[assignment]
    term = SelfTraining(model).eval()
    with torch.no_grad():
        for tensor in term.slow.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.3)
    batch = batch_of(data, torch.rand(30, 1, 8, 8))
    model.eval().requires_grad_(False)
    outputs = model(batch.inputs)
    values, weights = term(outputs, batch)
    guesses = term.slow.answers(term.slow(batch.other)).combined  # type: ignore[operator]
    for row in range(30):
        expected, counts = 0.0, False
        for level, logits in outputs.logits.items():
            if batch.at(level)[row] >= 0:
                continue
            counts = True
            guess = functional.within_known(
                guesses[level][row : row + 1], batch.labels[row : row + 1], data.taxonomy, level
            )
            expected -= float((guess[0] * logits[row].log_softmax(0)).sum())
        assert values[row].item() == pytest.approx(expected, abs=1e-5) and bool(weights[row]) == counts
    assert 0 < weights.sum() < 30


def test_doubtful_guesses_are_left_out() -> None:
    """From one half of the known class on a guess is a hard label."""
    data = rows().subset(np.arange(30))
    model: Model = small_model(data, method="flat-marginal").eval()  # type: ignore[assignment]
    batch = batch_of(data)
    outputs = model(batch.inputs)
    guesses = functional.within_known(model.answers(outputs).combined["fine"], batch.labels, data.taxonomy)
    hard = -outputs.logits["fine"].log_softmax(1).gather(1, guesses.argmax(1, keepdim=True))[:, 0]
    unlabelled = batch.at("fine") < 0
    values, weights = SelfTraining(model, certain=0.5)(outputs, batch)
    sure = unlabelled & (guesses.amax(1) >= 0.5)
    torch.testing.assert_close(values, torch.where(sure, hard, 0.0))
    assert torch.equal(weights.bool(), unlabelled) and sure.any() and not sure[unlabelled].all()
    # What is known may leave one class only.
    certain = SelfTraining(model, certain=1.0)(outputs, batch)[0] > 0
    assert torch.equal(certain, unlabelled & (guesses.amax(1) == 1)) and certain.any()


def test_the_slow_copy_forgets_the_first_weights() -> None:
    """It keeps a tenth of itself at the first step, and ``momentum`` at last."""
    model: Model = small_model(rows(), method="flat-marginal")  # type: ignore[assignment]
    term = SelfTraining(model, momentum=0.15)
    bias = term.slow.get_buffer("head.fine.bias")
    with torch.no_grad():
        model.get_parameter("head.fine.bias").fill_(1.0)
        bias.zero_()
    for kept in (0.1, 0.15, 0.15):
        before = bias.clone()
        term.follow(model)
        torch.testing.assert_close(bias, 1 - kept * (1 - before))


@pytest.mark.parametrize("recipe", TAUGHT.values(), ids=list(TAUGHT))
def test_training_resumes(recipe: Recipe, tmp_path: Path) -> None:
    """Twice the same is the same, and so is what is read back."""
    data = partly_labelled(rows())
    first, second = quick(recipe, data, tmp_path / "a"), quick(recipe, data)
    assert_same_weights(first.model, second.model)
    assert_same_weights(first.model, quick(recipe, data, tmp_path / "a").model)


def test_averaged_weights_answer() -> None:
    """After one step the slow copy has a tenth of the first weights."""
    data = partly_labelled(rows())
    recipe = FlatMarginal(epochs=1, steps_per_epoch=1, batch_size=32, averaged=True)
    first, averaged, trained = (small_model(data, method="flat-marginal") for _ in range(3))
    quick(recipe, data, model=averaged)
    quick(replace(recipe, averaged=False), data, model=trained)
    name = "head.fine.weight"
    before, mixed, after = (model.get_parameter(name) for model in (first, averaged, trained))
    assert not torch.equal(before, after)
    torch.testing.assert_close(mixed, 0.1 * before + 0.9 * after)


@pytest.mark.parametrize("field", [{"self_training": -1.0}, {"certain": 1.5}, {"slow": 2.0}])
def test_impossible_settings(field: dict[str, float]) -> None:
    for method in (Nested, FlatMarginal):
        with pytest.raises(UsageError, match=next(iter(field))):
            method(**field)  # type: ignore[arg-type]


def test_a_full_set_of_labels_leaves_nothing_to_teach() -> None:
    data = rows()
    full = data.subset(np.flatnonzero(data.finest_known() == 2))
    taught = Nested(self_training=1.0)
    assert len(full) and "no effect" in taught.remarks(full)[0]
    assert not taught.remarks(data) and not Nested().remarks(data)
