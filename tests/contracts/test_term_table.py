"""One row for every term: an independent value of one row, and inputs that it refuses. A class without a row fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from discover import final_subclasses
from torch import Tensor

from nestling.data.batch import Batch
from nestling.errors import UsageError
from nestling.models.heads import Calibration
from nestling.models.model import Outputs
from nestling.objectives.reducers import Mean
from nestling.objectives.terms import (
    CrossEntropy,
    MarginalCrossEntropy,
    RejectionCrossEntropy,
    SimilarityMatching,
    Term,
)
from nestling.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q/3", "b/r/4", "b/r/5", "b/r/6"])
LABELS = torch.tensor([[0, 0, 1], [1, 2, -1], [0, -1, -1], [-1, -1, -1], [1, 2, 5], [0, 1, 2], [1, -1, -1]])


def calibration() -> Calibration:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        made = Calibration({level: (4, TREE.width(level)) for level in TREE.levels})
        made.add_rejection()
    return made


def log_softmax(logits: Tensor) -> list[float]:
    scores = [math.exp(x) for x in logits.tolist()]
    return [math.log(score / sum(scores)) for score in scores]


def cross_entropy(outputs: Outputs, row: int) -> float:
    return -log_softmax(outputs.logits["middle"][row])[LABELS[row, 1]]


def marginal(outputs: Outputs, row: int) -> float:
    known = int((LABELS[row] >= 0).sum()) - 1
    p = [math.exp(x) for x in log_softmax(outputs.logits["fine"][row])]
    above = TREE.ancestor(known, of="fine")
    return -math.log(sum(x for x, ancestor in zip(p, above) if ancestor == LABELS[row, known]))


def similarity(outputs: Outputs, row: int) -> float:
    """To every row with a middle label, of three classes: 1 within a class, -1/2 between two."""
    rows = [[x - sum(each) / 4 for x in each] for each in outputs.features["middle"].tolist()]
    known = [j for j in range(7) if LABELS[j, 1] >= 0]
    value = 0.0
    for j in known:
        lengths = math.hypot(*rows[row]) * math.hypot(*rows[j])
        cosine = sum(x * y for x, y in zip(rows[row], rows[j])) / lengths
        value += (cosine - (1.0 if LABELS[row, 1] == LABELS[j, 1] else -0.5)) ** 2 / len(known)
    return value


@dataclass(frozen=True)
class Row:
    kind: type[Term]
    make: Callable[[], Term]
    known: list[bool]
    """Which rows of LABELS count."""
    value: Callable[[Outputs, int], float] | None
    """By plain arithmetic; None where the term draws at random (its test is in test_objectives)."""
    wrong: Callable[[Outputs, Batch], tuple[Outputs, Batch]]
    """To inputs that it refuses."""
    message: str


def narrow(level: str) -> Callable[[Outputs, Batch], tuple[Outputs, Batch]]:
    """The labels of a level beyond the width of its logits."""

    def change(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
        return replace(outputs, logits={**outputs.logits, level: outputs.logits[level][:, :2]}), batch

    return change


def ragged(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    """Fewer rows of features than of labels."""
    return replace(outputs, features={"middle": outputs.features["middle"][:5]}), batch


def nameless(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    return outputs, replace(batch, levels=("coarse", "middle", "other"))


TABLE = [
    Row(
        CrossEntropy,
        lambda: CrossEntropy("middle"),
        [True, True, False, False, True, True, False],
        cross_entropy,
        narrow("middle"),
        r"expected columns in \[0, 2\) or -1",
    ),
    Row(
        MarginalCrossEntropy,
        lambda: MarginalCrossEntropy("fine", TREE),
        [True, True, True, False, True, True, True],
        marginal,
        narrow("fine"),
        r"expected logits \(b, 6\) at level 'fine', got \(7, 2\)",
    ),
    Row(
        SimilarityMatching,
        lambda: SimilarityMatching("middle", TREE.width("middle")),
        [True, True, False, False, True, True, False],
        similarity,
        ragged,
        r"expected features \(b, 4\) and labels \(b,\), got \(5, 4\) and \(7,\)",
    ),
    Row(
        RejectionCrossEntropy,
        lambda: RejectionCrossEntropy("fine", _CALIBRATION, 3),
        [True, False, False, False, True, True, False],
        None,
        nameless,
        "unknown level fine: expected one of 'coarse', 'middle', 'other'",
    ),
]
_CALIBRATION = calibration()


def inputs(requires_grad: bool = False) -> tuple[Outputs, Batch]:
    generator = torch.Generator().manual_seed(0)
    logits = {
        level: torch.randn(7, TREE.width(level), generator=generator).requires_grad_(requires_grad)
        for level in TREE.levels
    }
    features = {level: torch.rand(7, 4, generator=generator).requires_grad_(requires_grad) for level in TREE.levels}
    return Outputs(logits, features, torch.zeros(7, 4)), Batch(
        torch.zeros(7, 1, 2, 2), LABELS, torch.arange(7), TREE.levels
    )


def called(term: Term, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        return term(outputs, batch)


def test_every_term_has_a_row() -> None:
    assert final_subclasses("objectives", Term) == {row.kind for row in TABLE}


@pytest.fixture(params=TABLE, ids=lambda row: row.kind.__name__)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def test_values_and_weights(row: Row) -> None:
    """(b,) each in float32, weight 0 where the label is lacking, and the values of an independent sum."""
    term = row.make()
    assert type(term) is row.kind and term.name and isinstance(term.reducer, Mean)
    outputs, batch = inputs()
    values, weights = called(term, outputs, batch)
    assert values.shape == weights.shape == (7,)
    assert values.dtype == weights.dtype == torch.float32
    assert torch.isfinite(values).all() and (values >= 0).all(), "rows without a label must be finite too"
    assert weights.tolist() == [float(known) for known in row.known]
    if row.value is not None:
        for number, known in enumerate(row.known):
            if known:
                assert values[number].item() == pytest.approx(row.value(outputs, number), rel=1e-5)


def test_unlabelled_rows_have_no_gradient(row: Row) -> None:
    outputs, batch = inputs(requires_grad=True)
    total, reported = (1.0 * row.make())(outputs, batch)
    assert set(reported) == {row.make().name}
    total.backward()
    gradients = [t.grad for t in [*outputs.logits.values(), *outputs.features.values()] if t.grad is not None]
    assert gradients
    for gradient in gradients:
        assert not gradient[~torch.tensor(row.known)].any()
    assert any(gradient[torch.tensor(row.known)].any() for gradient in gradients)


def test_a_batch_without_labels_is_zero_and_finite(row: Row) -> None:
    outputs, batch = inputs(requires_grad=True)
    total, _ = (1.0 * row.make())(outputs, replace(batch, labels=torch.full_like(LABELS, -1)))
    total.backward()
    assert total.item() == 0
    gradients = [t.grad for t in [*outputs.logits.values(), *outputs.features.values()] if t.grad is not None]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("row", [row for row in TABLE if row.value is not None], ids=lambda row: row.kind.__name__)
def test_rows_stand_for_themselves(row: Row) -> None:
    """Another order gives the values in that order (terms that draw at random have other draws there)."""
    order = torch.tensor([4, 2, 0, 6, 5, 3, 1])
    outputs, batch = inputs()
    logits, features = ({level: t[order] for level, t in given.items()} for given in (outputs.logits, outputs.features))
    shuffled = Outputs(logits, features, outputs.embedding)
    values, _ = called(row.make(), outputs, batch)
    again, _ = called(row.make(), shuffled, replace(batch, labels=LABELS[order]))
    torch.testing.assert_close(again, values[order])


def test_terms_save_no_weights_of_the_model(row: Row) -> None:
    term = row.make()
    assert not list(term.parameters()) and term.state_dict() == {}


def test_what_terms_refuse(row: Row) -> None:
    outputs, batch = row.wrong(*inputs())
    with pytest.raises(UsageError, match=row.message):
        row.make()(outputs, batch)
