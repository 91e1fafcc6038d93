"""One row for every term: an independent value of one row, and inputs that it refuses. A class without a row fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from discover import final_subclasses
from torch import Tensor, nn

from nestling.data.batch import Batch
from nestling.errors import UsageError
from nestling.models.heads import Calibration
from nestling.models.model import Answers, Outputs
from nestling.objectives.instance_terms import Instance, InstanceProxy, InstanceWithin, SupervisedContrastive
from nestling.objectives.momentum import MomentumContrast
from nestling.objectives.reducers import Mean
from nestling.objectives.self_training import SelfTraining
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


ROW_3_UNKNOWN = [True, True, True, False, True, True, True]


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
    labelled: bool = True
    """Whether a row counts for its label, or for the training row that it is."""


def narrow(level: str) -> Callable[[Outputs, Batch], tuple[Outputs, Batch]]:
    """The labels of a level beyond the width of its logits."""

    def change(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
        return replace(outputs, logits={**outputs.logits, level: outputs.logits[level][:, :2]}), batch

    return change


def ragged(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    """Fewer rows of features than of labels."""
    return replace(outputs, features={"middle": outputs.features["middle"][:5]}), batch


def unheard_of(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    return replace(outputs, features={"fine": outputs.features["fine"]}), batch


def wide(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
    return replace(outputs, features={level: torch.zeros(7, 5) for level in outputs.features}), batch


def rows_within() -> InstanceWithin:
    """Rows 1, 0, 2 … of the batch's source, by coarse class; row 3 has none."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(6)
        return InstanceWithin("coarse", np.array([1, 0, 2, 3, 4, 5, 6]), np.array([1, 0, 0, -1, 1, 0, 1]), 4)


def all_rows() -> Instance:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(6)
        return Instance("coarse", np.arange(7), 4)


def proxies() -> InstanceProxy:
    term = InstanceProxy(rows_within(), 3)
    term.cluster(0)
    return term


def told_from(outputs: Outputs, row: int, term: Instance | InstanceWithin, others: list[int]) -> float:
    """-log of the softmax of a row's score among those of ``others``, by their numbers in the source."""
    rows = {other: term.rows.weight[int(term.place[other])].tolist() for other in others}
    feature = outputs.features["coarse"][row].tolist()
    scores = {other: sum(a * b for a, b in zip(feature, w)) for other, w in rows.items()}
    return math.log(sum(map(math.exp, scores.values()))) - scores[row]


def within(outputs: Outputs, row: int) -> float:
    return told_from(outputs, row, rows_within(), [0, 2, 5] if row in (0, 2, 5) else [1, 4, 6])


def among_all(outputs: Outputs, row: int) -> float:
    return told_from(outputs, row, all_rows(), list(range(7)))


def proxy(outputs: Outputs, row: int) -> float:
    term = proxies()
    scores = [float(outputs.features["coarse"][row] @ mean) for mean in term.proxies]
    own = int(term.membership[int(term.instances.place[row])])
    return math.log(sum(map(math.exp, scores))) - scores[own]


def contrast(outputs: Outputs, row: int) -> float:
    z = outputs.features["coarse"]
    others = [j for j in range(7) if j != row and LABELS[j, 0] >= 0]
    scores = {j: float(z[row] @ z[j] / z[j].norm()) for j in others}
    mine = [j for j in others if LABELS[j, 0] == LABELS[row, 0]]
    return math.log(sum(map(math.exp, scores.values()))) - sum(scores[j] for j in mine) / len(mine)


class Seen(nn.Module):
    """Pictures of four pixels to features: the smallest network that momentum contrast can copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Outputs:
        seen = self.linear(images.flatten(1))
        return Outputs({}, {"coarse": seen}, seen)


def momentum() -> MomentumContrast:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(6)
        return MomentumContrast("coarse", Seen(), 4, queue=3)


def other_view(outputs: Outputs, row: int) -> float:
    """Of the other view among the queue's three."""
    term, (_, batch) = momentum(), inputs()
    assert batch.other is not None
    z, key = outputs.features["coarse"][row], term.slow.linear(batch.other[row].flatten())  # type: ignore[operator,union-attr]
    scores = [float(z @ key / key.norm()), *(float(z @ old) for old in term.queue)]
    return math.log(sum(map(math.exp, scores))) - scores[0]


class Guessing(Seen):
    """Answers for every level of TREE by one linear layer each: the smallest network that self-training can copy."""

    taxonomy = TREE

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({level: nn.Linear(4, TREE.width(level)) for level in TREE.levels})

    def forward(self, images: Tensor, until: str | None = None) -> Outputs:
        logits = {level: head(images.flatten(1)) for level, head in self.heads.items()}
        return Outputs(logits, {}, images.flatten(1))

    def answers(self, outputs: Outputs, reject: bool = True) -> Answers:
        return Answers({level: logits.softmax(1) for level, logits in outputs.logits.items()}, {}, {})


def self_training() -> SelfTraining:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(6)
        return SelfTraining(Guessing())  # type: ignore[arg-type]


def guessed(outputs: Outputs, row: int) -> float:
    """At every level without a label, what the copy says of the classes below the finest known one."""
    _, batch = inputs()
    assert batch.other is not None
    guesses = self_training().slow(batch.other[row : row + 1]).logits
    depth, total = int((LABELS[row] >= 0).sum()), 0.0
    for level in TREE.levels[depth:]:
        scores = [math.exp(x) for x in guesses[level][0].tolist()]
        above = TREE.ancestor(depth - 1, of=level) if depth else [-1] * len(scores)
        inside = [x if a == LABELS[row, depth - 1] or not depth else 0.0 for x, a in zip(scores, above)]
        total -= sum(x / sum(inside) * y for x, y in zip(inside, log_softmax(outputs.logits[level][row])))
    return total


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
    Row(Instance, all_rows, [True] * 7, among_all, wide, r"expected features \(b, 4\) of 'coarse', got \(7, 5\)"),
    Row(
        InstanceWithin, rows_within, ROW_3_UNKNOWN, within, unheard_of, "unknown output coarse: expected one of 'fine'"
    ),
    Row(InstanceProxy, proxies, ROW_3_UNKNOWN, proxy, unheard_of, "unknown output coarse: expected one of 'fine'"),
    Row(
        SupervisedContrastive,
        lambda: SupervisedContrastive("coarse", "coarse"),
        ROW_3_UNKNOWN,
        contrast,
        lambda outputs, batch: (outputs, replace(batch, levels=("top", "middle", "fine"))),
        "unknown level coarse: expected one of 'top', 'middle', 'fine'",
    ),
    Row(
        MomentumContrast,
        momentum,
        [True] * 7,
        other_view,
        lambda outputs, batch: (outputs, replace(batch, other=None)),
        "two views of a row, and the batch has one: set Stage.pairs",
        labelled=False,
    ),
    Row(
        SelfTraining,
        self_training,
        [False, True, True, True, False, False, True],
        guessed,
        nameless,
        "unknown level fine: expected one of 'coarse', 'middle', 'other'",
        labelled=False,
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
    other = torch.rand(7, 1, 2, 2, generator=generator)
    return Outputs(logits, features, torch.zeros(7, 4)), Batch(
        torch.zeros(7, 1, 2, 2), LABELS, torch.arange(7), TREE.levels, other
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


@pytest.mark.parametrize("row", [row for row in TABLE if row.labelled], ids=lambda row: row.kind.__name__)
def test_a_batch_without_labels_is_zero_and_finite(row: Row) -> None:
    outputs, batch = inputs(requires_grad=True)
    nothing = replace(batch, labels=torch.full_like(LABELS, -1), index=batch.index + 7)
    total, _ = (1.0 * row.make())(outputs, nothing)
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
    assert batch.other is not None
    moved = replace(batch, labels=LABELS[order], index=batch.index[order], other=batch.other[order])
    again, _ = called(row.make(), shuffled, moved)
    torch.testing.assert_close(again, values[order])


def test_terms_that_compare_rows_say_so(row: Row) -> None:
    """Other features and logits of the last row change what the others have, or not, as ``compares`` says."""
    outputs, batch = inputs()
    values, _ = called(row.make(), outputs, batch)
    turn = torch.tensor([1.0] * 6 + [-1.0])[:, None]
    logits, features = ({level: t * turn for level, t in given.items()} for given in (outputs.logits, outputs.features))
    if row.kind is SimilarityMatching:
        batch = replace(batch, labels=torch.where(torch.arange(7)[:, None] == 6, LABELS[5], LABELS))
        values, _ = called(row.make(), outputs, batch)
    again, _ = called(row.make(), Outputs(logits, features, outputs.embedding), batch)
    assert torch.equal(values[:6], again[:6]) != row.kind.compares


def test_terms_save_no_weights_of_the_model(row: Row) -> None:
    term = row.make()
    assert not list(term.parameters())
    kept = {"weight", "velocity", "behind", "membership", "proxies", "queue", "place", "numbers", "taken"}
    # A slow copy is no longer the model's weights.
    own = [name for name in term.state_dict() if not name.startswith("slow.")]
    assert {name.rpartition(".")[2] for name in own} <= kept, "rows, clusters and queues of its own alone"


def test_what_terms_refuse(row: Row) -> None:
    outputs, batch = row.wrong(*inputs())
    with pytest.raises(UsageError, match=row.message):
        row.make()(outputs, batch)
