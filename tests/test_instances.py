"""Instance classification: formulas against naive loops, and rows of their own against dense SGD under autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling import functional as public
from nestling.data.batch import Batch
from nestling.errors import UsageError
from nestling.models.model import Outputs
from nestling.models.search import EarlierRows
from nestling.objectives.instance_terms import Instance, InstanceProxy, InstanceTerm, InstanceWithin
from nestling.objectives.instances import average_rows, supervised_contrastive
from nestling.objectives.rows import Part, grouped


def drawn(rows: int = 23, batch: int = 11, dimension: int = 5, classes: int = 4, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(batch, dimension, generator=g),
        "rows": torch.randn(rows, dimension, generator=g),
        "index": torch.randint(rows, (batch,), generator=g),
        "classes": torch.randint(classes, (rows,), generator=g),
    }


def naive(features: Tensor, rows: Tensor, index: Tensor, classes: Tensor) -> list[float]:
    losses = []
    for feature, own in zip(features.tolist(), index.tolist()):
        scores = {
            j: sum(a * b for a, b in zip(feature, rows[j].tolist()))
            for j in range(len(rows))
            if classes[j] == classes[own]
        }
        losses.append(-math.log(math.exp(scores[own]) / sum(math.exp(s) for s in scores.values())))
    return losses


# Formulas ------------------------------------------------------------------------------------------------------------


def test_losses_equal_naive_loops() -> None:
    d = drawn()
    within = public.instance_loss_within(d["features"], d["rows"], d["index"], d["classes"])
    torch.testing.assert_close(within, torch.tensor(naive(**d)), rtol=1e-5, atol=1e-5)
    every = {**d, "classes": torch.zeros_like(d["classes"])}
    over_all = public.instance_loss(d["features"], d["rows"], d["index"])
    torch.testing.assert_close(over_all, torch.tensor(naive(**every)), rtol=1e-5, atol=1e-5)


def test_losses_by_hand() -> None:
    """Scores 0, ln 3, 0, 0: of all four e^s = 1 + 3 + 1 + 1 = 6, of the first class 1 + 3."""
    rows = torch.tensor([[0.0, 0.0], [math.log(3), 1.0], [0.0, 2.0], [0.0, 5.0]])
    feature, index = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert public.instance_loss(feature, rows, index).item() == pytest.approx(math.log(2))
    classes = torch.tensor([0, 0, 1, 1])
    assert public.instance_loss_within(feature, rows, index, classes).item() == pytest.approx(math.log(4 / 3))
    # Clusters {0, 1} and {2, 3}: means (ln 3 / 2, ...) and (0, ...), e^s = sqrt 3 and 1.
    value = public.proxy_loss(feature, rows, torch.tensor([0, 0, 1, 1]), index).item()
    assert value == pytest.approx(math.log((math.sqrt(3) + 1) / math.sqrt(3)))


def test_proxies_equal_naive_loops() -> None:
    d = drawn()
    membership = torch.arange(23) % 6
    values = public.proxy_loss(d["features"], d["rows"], membership, d["index"])
    proxies = torch.stack([d["rows"][membership == p].mean(0) for p in range(6)])
    expected = [
        -(F.log_softmax(proxies @ f, 0)[membership[i]]).item() for f, i in zip(d["features"], d["index"].tolist())
    ]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert not average_rows(d["rows"], torch.zeros(23, dtype=torch.int64), 2)[1].any(), "a cluster without rows"


def test_a_class_of_one_row_is_no_loss() -> None:
    d = drawn(rows=3, batch=3)
    values = public.instance_loss_within(d["features"], d["rows"], torch.arange(3), torch.arange(3))
    assert values.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(23, 4)}, r"features \(b, d\) and rows \(n, d\), got \(11, 5\) and \(23, 4\)"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"expected index \(11,\)"),
        ({"index": torch.full((11,), 23)}, r"expected rows in \[0, 23\), got 23 to 23"),
        ({"classes": torch.zeros(4, dtype=torch.int64)}, r"expected classes \(23,\)"),
    ],
)
def test_what_the_formulas_refuse(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        public.instance_loss_within(**{**drawn(), **change})


def test_contrast_equals_a_naive_loop_and_a_value_by_hand() -> None:
    g = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(9, 4, generator=g), dim=1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0, 2, 3])
    values = supervised_contrastive(z / 0.2, z, labels[:, None] == labels, torch.eye(9, dtype=torch.bool))
    for i in range(9):
        others = [j for j in range(9) if j != i]
        total = sum(math.exp(float(z[i] @ z[j]) / 0.2) for j in others)
        mine = [j for j in others if labels[j] == labels[i]]
        expected = [-math.log(math.exp(float(z[i] @ z[j]) / 0.2) / total) for j in mine]
        assert values[i].item() == pytest.approx(sum(expected) / len(mine) if mine else 0.0, abs=1e-5)
    # Two of a class and one other, all orthogonal: one positive of two others at equal distance.
    pair = supervised_contrastive(
        torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1])[:, None] == torch.tensor([0, 0, 1]), torch.eye(3) > 0
    )
    assert pair.tolist() == pytest.approx([math.log(2), math.log(2), 0])


# Rows of their own ---------------------------------------------------------------------------------------------------


def outputs(features: Tensor) -> Outputs:
    return Outputs({}, {"coarse": features}, features)


def batch(index: Tensor) -> Batch:
    return Batch(torch.zeros(len(index), 1, 1, 1), torch.zeros(len(index), 1, dtype=torch.int64), index, ("coarse",))


def beside_dense(
    classes: np.ndarray,
    unit: bool,
    within: bool = True,
    steps: int = 12,
    drawn_classes: int = 2,
    dimension: int = 6,
    dtype: torch.dtype = torch.float32,
    momentum: float = 0.9,
) -> None:
    """The same steps by the term and by autograd with ``torch.optim.SGD``: values, gradients and all rows agree."""
    torch.manual_seed(0)
    n = len(classes)
    index = np.random.default_rng(0).permutation(n) + 100
    settings = {"momentum": momentum, "weight_decay": 5e-2, "unit": unit}
    term: InstanceTerm = (
        InstanceWithin("coarse", index, classes, dimension, **settings)
        if within
        else Instance("coarse", index, dimension, **settings)
    )
    # From now on in the order of `index`.
    back = np.argsort(term.rows.sorting)
    dense = torch.nn.Parameter(term.rows.weight[back].clone())
    optimizer = torch.optim.SGD([dense], lr=0.1, momentum=momentum, weight_decay=5e-2)
    groups = torch.from_numpy(classes if within else np.zeros(n, dtype=np.int64))
    generator = np.random.default_rng(1)
    for step in range(steps):
        lr = 0.3 / (1 + step)
        some = generator.choice(int(classes.max()) + 1, min(drawn_classes, int(classes.max()) + 1), replace=False)
        rows = torch.from_numpy(generator.choice(np.flatnonzero(np.isin(classes, some)), 9))
        features = torch.randn(9, dimension, dtype=dtype)
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        weights = torch.rand(9, dtype=dtype)
        values, known = term(outputs(ours), batch(torch.from_numpy(index)[rows]))
        (values * weights).sum().backward()
        compared = F.normalize(dense, dim=1) if unit else dense
        scores = (theirs @ compared.T).masked_fill(groups != groups[rows][:, None], -torch.inf)
        expected = F.cross_entropy(scores, rows, reduction="none")
        (expected * weights).sum().backward()
        assert known.all()
        tight = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(values.to(dtype), expected, **tight)
        torch.testing.assert_close(ours.grad, theirs.grad, **tight)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        term.step(lr)
    found = term.rows.current()[back]
    torch.testing.assert_close(found, F.normalize(dense, dim=1).detach() if unit else dense.detach(), **tight)
    if momentum:
        torch.testing.assert_close(term.rows.velocity[back], optimizer.state[dense]["momentum_buffer"], **tight)


@pytest.mark.parametrize("unit", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize(
    "classes",
    [np.arange(24) % 4, np.array([0] * 13 + [1] + [2] * 5 + [4] * 3), np.zeros(10, dtype=np.int64)],
    ids=["equal", "unequal, one of one row, one empty", "one class"],
)
def test_rows_move_as_under_dense_sgd(classes: np.ndarray, unit: bool) -> None:
    beside_dense(classes, unit)


@pytest.mark.parametrize("unit", [False, True], ids=["plain", "cosine"])
def test_all_rows_move_as_under_dense_sgd(unit: bool) -> None:
    beside_dense(np.arange(24) % 4, unit, within=False)


def test_a_thousand_classes_catch_up() -> None:
    """Each is drawn about once in three hundred steps, and moves at every one of them."""
    beside_dense(np.random.default_rng(0).integers(0, 1000, 4000), False, steps=600, drawn_classes=3, dimension=3)


def test_only_rows_of_the_classes_drawn_are_touched() -> None:
    term = InstanceWithin("coarse", np.arange(20), np.arange(20) % 4, 3)
    before = term.rows.weight.clone()
    features = torch.randn(2, 3, requires_grad=True)
    values, _ = term(outputs(features), batch(torch.tensor([1, 5])))
    values.sum().backward()
    assert [group.residual.shape for group in term.drawn.groups] == [(2, 5)]  # type: ignore[union-attr]
    term.step(0.1)
    touched = (term.rows.weight != before).any(1)
    assert (term.index[touched.numpy()] % 4 == 1).all() and touched.sum() == 5


@pytest.mark.parametrize("unit", [False, True], ids=["plain", "cosine"])
def test_rows_without_momentum(unit: bool) -> None:
    beside_dense(np.arange(30) % 5, unit, momentum=0.0)


def test_classes_are_grouped_with_little_padding() -> None:
    parts = [Part(number, size, 2 * number, 2 * number + 2) for number, size in enumerate((10, 9, 300, 200, 5, 6))]
    assert [[part.size for part in group] for group in grouped(parts)] == [[10, 9], [300, 200, 5], [6]]


def test_rows_without_coarse_label() -> None:
    classes = np.array([0, -1, 0, 1, -1, 1])
    skipping = InstanceWithin("coarse", np.arange(6), classes, 3)
    assert skipping.rows.starts == [0, 2, 4]
    features = torch.randn(6, 3, requires_grad=True)
    values, weights = skipping(outputs(features), batch(torch.arange(6)))
    values.sum().backward()
    assert weights.tolist() == [1, 0, 1, 1, 0, 1] and values[[1, 4]].tolist() == [0, 0]
    assert not features.grad[[1, 4]].any()  # type: ignore[index]
    # A row that the source has gained since is skipped as well.
    assert skipping(outputs(features[:1].detach()), batch(torch.tensor([77])))[1].tolist() == [0]
    taking = InstanceWithin("coarse", np.arange(6), classes, 3, unlabelled="instance")
    assert taking.rows.starts == [0, 2, 4, 6]
    values, weights = taking(outputs(features.detach()), batch(torch.arange(6)))
    assert weights.all() and (values > 0).all()


def test_rows_added_later_go_on_from_the_old_ones() -> None:
    old = InstanceWithin("coarse", np.arange(6), np.array([0, 0, 0, 1, 1, 1]), 3)
    features = torch.randn(6, 3, requires_grad=True)
    old(outputs(features), batch(torch.tensor([0, 1, 2, 0, 1, 2])))[0].sum().backward()
    old.step(0.1)
    new = InstanceWithin("coarse", np.arange(8), np.array([1, 0, 0, 0, 1, 1, 2, 1]), 3)
    fresh = new.rows.weight.clone()
    old.rows.current()
    new.adopt(EarlierRows(old.numbers, old.rows.weight, old.rows.velocity))
    for row in range(8):
        mine = int(new.place[row])
        for name in ("weight", "velocity"):
            kept = getattr(new.rows, name)[mine]
            if row < 6:
                assert torch.equal(kept, getattr(old.rows, name)[int(old.place[row])]), "decay of old rows included"
    assert torch.equal(new.rows.weight[int(new.place[6])], fresh[int(new.place[6])])
    assert old.rows.behind.equal(torch.eye(2, dtype=torch.float64).repeat(2, 1, 1))


def test_a_first_of_two_passes_keeps_nothing() -> None:
    term = InstanceWithin("coarse", np.arange(6), np.arange(6) % 2, 3)
    before = {name: tensor.clone() for name, tensor in term.state_dict().items()}
    term.eval()
    features = torch.randn(2, 3, requires_grad=True)
    term(outputs(features), batch(torch.tensor([1, 2])))[0].sum().backward()
    assert term.drawn is None and features.grad.any()  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before[name]) for name, tensor in term.state_dict().items())


def test_proxies_are_the_means_of_clusters_within_classes() -> None:
    torch.manual_seed(0)
    term = InstanceWithin("coarse", np.arange(30), np.arange(30) % 3, 4, unit=True)
    proxies = InstanceProxy(term, 9)
    proxies.cluster(seed=5)
    rows, membership = term.rows.current(), proxies.membership
    assert membership.unique().tolist() == list(range(9))
    assert [membership[10 * k : 10 * k + 10].unique().tolist() for k in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for p in range(9):
        torch.testing.assert_close(proxies.proxies[p], F.normalize(rows[membership == p].mean(0), dim=0))
    features = torch.randn(5, 4)
    index = torch.tensor([0, 7, 29, 4, 99])
    values, weights = proxies(outputs(features), batch(index))
    places = term.places(index)[:4]
    expected = F.cross_entropy(features[:4] @ proxies.proxies.T, membership[places], reduction="none")
    torch.testing.assert_close(values[:4], expected)
    assert weights.tolist() == [1, 1, 1, 1, 0] and values[4] == 0
    narrow = InstanceProxy(term, 9, within=True)
    narrow.cluster(seed=5)
    inside, _ = narrow(outputs(features), batch(index))
    for place, row in enumerate(places.tolist()):
        mine = slice(3 * (row // 10), 3 * (row // 10) + 3)
        scores = F.log_softmax(proxies.proxies[mine] @ features[place], 0)
        assert inside[place].item() == pytest.approx(-scores[membership[row] - mine.start].item(), abs=1e-5)
    assert "weight" not in " ".join(proxies.state_dict()), "the rows are saved once, by their own term"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InstanceWithin("coarse", np.arange(3), np.zeros(3, dtype=np.int64), 2, unlabelled="all"), "'skip'"),
        (lambda: InstanceWithin("coarse", np.zeros(3, dtype=np.int64), np.arange(3), 2), "3 different rows"),
        (lambda: InstanceProxy(Instance("coarse", np.arange(3), 2), 4), "number of rows, 3; got 4"),
        (lambda: InstanceProxy(Instance("coarse", np.arange(3), 2), 0), "number of rows, 3; got 0"),
    ],
)
def test_what_the_terms_refuse(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
