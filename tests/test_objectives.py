"""Terms against naive loops over rows, how they add and scale, and what their gradients are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.data.batch import Batch
from nestling.models.heads import Calibration
from nestling.models.model import Outputs
from nestling.objectives.reducers import Mean
from nestling.objectives.terms import CrossEntropy, MarginalCrossEntropy, Objective, RejectionCrossEntropy, Term
from nestling.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q/3", "b/r/4", "b/r/5", "b/r/6"])
"""Widths 2, 3 and 6."""
LABELS = torch.tensor([[0, 0, 1], [1, 2, -1], [0, -1, -1], [-1, -1, -1], [1, 2, 5], [0, 1, 2]])
"""Known to the fine level, the middle, the coarse, not at all, and to the fine level twice."""


def batch_of(labels: Tensor = LABELS) -> Batch:
    return Batch(torch.zeros(len(labels), 1, 2, 2), labels, torch.arange(len(labels)), TREE.levels)


def outputs_of(rows: int = 6, seed: int = 0, requires_grad: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = {
        level: torch.randn(rows, TREE.width(level), generator=generator).requires_grad_(requires_grad)
        for level in TREE.levels
    }
    features = {level: torch.rand(rows, 4, generator=generator) for level in TREE.levels}
    return Outputs(logits, features, torch.zeros(rows, 4))


class Constant(Term):
    """The same value for every row that is labelled coarsely."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(name)
        self.value = value
        self.calls = 0

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return torch.full((len(batch.index),), self.value), (batch.at("coarse") >= 0).float()


# Algebra -------------------------------------------------------------------------------------------------------------


def test_terms_add_and_scale_by_hand() -> None:
    a, b, c = Constant("a", 1.0), Constant("b", 10.0), Constant("c", 100.0)
    for objective, expected in [
        (a + 0.5 * b, 6.0),
        (2 * (a + 0.5 * b) + c, 112.0),
        (a + (b + c), 111.0),
        (3 * (2 * a), 6.0),
        (0.1 * c + 2 * b + a, 31.0),
    ]:
        total, values = objective(outputs_of(), batch_of())
        assert total.item() == pytest.approx(expected)
        assert {name: value.item() for name, value in values.items()} == {
            name: {"a": 1.0, "b": 10.0, "c": 100.0}[name] for name in values
        }
        assert total.shape == () and total.dtype == torch.float32


def test_adding_leaves_the_parts_as_they_were() -> None:
    a, b = Constant("a", 1.0), Constant("b", 10.0)
    both = a + b
    tripled = 3 * both
    assert both(outputs_of(), batch_of())[0].item() == 11
    assert tripled(outputs_of(), batch_of())[0].item() == 33
    assert list(tripled.terms) == [a, b], "terms with parameters must be the same modules, not copies"


def test_weights_follow_progress() -> None:
    a, b = Constant("a", 1.0), Constant("b", 10.0)
    objective = a + 2.0 * ((lambda progress: progress**2) * b)
    for progress, expected in [(0.0, 1.0), (0.5, 6.0), (1.0, 21.0)]:
        assert objective(outputs_of(), batch_of(), progress)[0].item() == pytest.approx(expected)
    # Progress 0 switched b off: it was not computed, and is not reported.
    assert (a.calls, b.calls) == (3, 2)
    assert set(objective(outputs_of(), batch_of(), 0.0)[1]) == {"a"}


def test_terms_need_different_names() -> None:
    with pytest.raises(ValueError, match=r"need different names, got \['fine', 'fine'\]"):
        CrossEntropy("fine") + MarginalCrossEntropy("fine", TREE)


def test_reported_values_are_detached() -> None:
    total, values = (1.0 * CrossEntropy("fine"))(outputs_of(requires_grad=True), batch_of())
    assert total.requires_grad and not values["fine"].requires_grad


def test_what_is_not_a_term_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Term("none")  # type: ignore[abstract]


# Terms ---------------------------------------------------------------------------------------------------------------


def test_mean_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(50, generator=generator), torch.rand(50, generator=generator)
    weights[::3] = 0
    total = weight = 0.0
    for value, w in zip(values.tolist(), weights.tolist()):
        total, weight = total + value * w, weight + w
    assert Mean()(values, weights, batch_of()).item() == pytest.approx(total / weight, rel=1e-5)
    assert Mean()(torch.tensor([2.0, 8.0, 5.0]), torch.tensor([1.0, 0.5, 0.0]), batch_of()).item() == 4.0


def test_mean_of_no_labelled_row_is_zero_with_zero_gradient() -> None:
    values = torch.tensor([2.0, 8.0], requires_grad=True)
    result = Mean()(values, torch.zeros(2), batch_of())
    result.backward()
    assert result.item() == 0 and values.grad is not None and values.grad.tolist() == [0, 0]


@pytest.mark.parametrize("level", TREE.levels)
def test_cross_entropy_equals_a_loop(level: str) -> None:
    outputs, number = outputs_of(), TREE.level_index(level)
    expected, known = 0.0, 0
    for row in range(6):
        label = int(LABELS[row, number])
        if label >= 0:
            scores = [math.exp(x) for x in outputs.logits[level][row].tolist()]
            expected, known = expected - math.log(scores[label] / sum(scores)), known + 1
    total, _ = (1.0 * CrossEntropy(level))(outputs, batch_of())
    assert total.item() == pytest.approx(expected / known, rel=1e-5)
    _, weights = CrossEntropy(level)(outputs, batch_of())
    assert weights.tolist() == (LABELS[:, number] >= 0).float().tolist()


def test_cross_entropy_of_an_output_with_another_name() -> None:
    """An auxiliary head may be trained on any level."""
    outputs = outputs_of()
    outputs.logits["extra"] = outputs.logits["middle"]
    ours, theirs = CrossEntropy("extra", level="middle"), CrossEntropy("middle")
    assert ours.name == "extra"
    torch.testing.assert_close(ours(outputs, batch_of()), theirs(outputs, batch_of()))


def test_marginal_term_by_hand() -> None:
    """Logits are logarithms of 1..6: the fine classes have the probabilities 1/21 to 6/21."""
    outputs = outputs_of()
    outputs.logits["fine"] = torch.arange(1.0, 7.0).log().repeat(6, 1)
    values, weights = MarginalCrossEntropy("fine", TREE)(outputs, batch_of())
    # fine 2nd · middle r = 4 + 5 + 6 · coarse a = 1 + 2 + 3 · nothing · fine 6th · fine 3rd
    expected = [-math.log(x / 21) for x in (2, 15, 6, 21, 6, 3)]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    assert weights.tolist() == [1, 1, 1, 0, 1, 1]


def test_marginal_term_of_a_coarser_head() -> None:
    """Finer labels count by their ancestor; a row unknown at this level and above does not."""
    outputs = outputs_of()
    outputs.logits["middle"] = torch.tensor([1.0, 2.0, 3.0]).log().repeat(6, 1)
    values, weights = MarginalCrossEntropy("middle", TREE)(outputs, batch_of())
    assert values.tolist() == pytest.approx([-math.log(x / 6) for x in (1, 3, 1 + 2, 6, 3, 2)], abs=1e-5)
    assert weights.tolist() == [1, 1, 1, 0, 1, 1]
    coarse = MarginalCrossEntropy("coarse", TREE)(outputs, batch_of())
    torch.testing.assert_close(coarse, CrossEntropy("coarse")(outputs, batch_of()))


def test_the_gradient_of_the_marginal_term() -> None:
    """p_j - p_j [j below the known class] / P(known class), per row over the number of labelled rows."""
    outputs = outputs_of(requires_grad=True)
    total, _ = (1.0 * MarginalCrossEntropy("fine", TREE))(outputs, batch_of())
    total.backward()
    logits = outputs.logits["fine"]
    p = logits.detach().softmax(1)
    inside = torch.zeros(6, 6)
    inside[0, 1] = inside[4, 5] = inside[5, 2] = 1
    inside[1, 3:] = 1
    inside[2, :3] = 1
    expected = p - p * inside / (p * inside).sum(1, keepdim=True)
    expected[3] = 0
    torch.testing.assert_close(logits.grad, expected / 5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("term", [CrossEntropy("fine"), MarginalCrossEntropy("fine", TREE)])
def test_terms_in_half_precision_are_computed_in_full(term: Term) -> None:
    outputs = outputs_of()
    outputs.logits["fine"] = outputs.logits["fine"].bfloat16()
    values, weights = term(outputs, batch_of())
    assert values.dtype == weights.dtype == torch.float32
    outputs.logits["fine"] = outputs.logits["fine"].float()
    torch.testing.assert_close(values, term(outputs, batch_of())[0])


# Rejection -----------------------------------------------------------------------------------------------------------


def rejecting(ratio: int) -> tuple[Calibration, RejectionCrossEntropy]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        calibration = Calibration({level: (4, TREE.width(level)) for level in TREE.levels})
        calibration.add_rejection()
    return calibration, RejectionCrossEntropy("fine", calibration, ratio)


@pytest.mark.parametrize("ratio", [1, 3, 10])
def test_rejection_term_equals_a_loop(ratio: int) -> None:
    """The same synthetic rows drawn again, each L2-normalised by hand, and cross-entropies row by row."""
    calibration, term = rejecting(ratio)
    outputs = outputs_of()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(11)
        values, weights = term(outputs, batch_of())
        torch.manual_seed(11)
        drawn = torch.rand(6 * ratio, 4)
    weight, bias = (p.detach() for p in calibration.rejection["fine"].parameters())

    def losses(features: Tensor, label: int) -> float:
        length = math.sqrt(sum(x * x for x in features.tolist()))
        scores = weight @ (features / length) + bias
        return float(scores.exp().sum().log() - scores[label])

    for row in range(6):
        label = int(LABELS[row, 2])
        real = losses(outputs.features["fine"][row], max(label, 0))
        synthetic = sum(losses(drawn[row * ratio + k], 6) for k in range(ratio))
        assert values[row].item() == pytest.approx((real + synthetic) / (1 + ratio), rel=1e-4)
    assert weights.tolist() == [1, 0, 0, 0, 1, 1]
    assert term.name == "rejection-fine"


def test_rejection_term_trains_its_layer_alone() -> None:
    calibration, term = rejecting(2)
    outputs = outputs_of(requires_grad=True)
    total, _ = (1.0 * term)(outputs, batch_of())
    total.backward()
    trained = {name for name, p in calibration.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"rejection.fine.weight", "rejection.fine.bias"}
    assert outputs.logits["fine"].grad is None


def test_terms_hold_no_weights_of_the_model() -> None:
    """They would be saved twice, and safetensors refuses shared tensors."""
    _, term = rejecting(2)
    objective = Objective([(1.0, term), (1.0, MarginalCrossEntropy("fine", TREE)), (1.0, CrossEntropy("coarse"))])
    assert objective.state_dict() == {} and not list(objective.parameters())


def test_rejection_separates_features_from_noise() -> None:
    """A sanity check on the whole: features in one corner, noise everywhere else."""
    calibration, term = rejecting(4)
    features = F.normalize(torch.tensor([[1.0, 0.05, 0.0, 0.0], [0.0, 0.0, 0.05, 1.0]]), dim=1).repeat(3, 1)
    labels = torch.tensor([[0, 0, 1], [1, 2, 5]]).repeat(3, 1)
    outputs = Outputs({}, {"fine": features}, features)
    optimizer = torch.optim.Adam(calibration.parameters(), lr=0.1)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for _ in range(150):
            optimizer.zero_grad()
            (1.0 * term)(outputs, batch_of(labels))[0].backward()
            optimizer.step()
    with torch.no_grad():
        real = calibration("fine", torch.zeros(6, 6), features)
        noise = calibration("fine", torch.zeros(1, 6), torch.full((1, 4), 0.5))
    assert real[0].argmax(1).tolist() == [1, 5] * 3
    assert real[1].max() < 0.5 < 0.9 < noise[1].item()
