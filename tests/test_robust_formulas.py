"""The formulas of robust training: against loops, by hand, and the paper's theorems on closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.errors import UsageError
from nestling.evaluate.decide import Decisions
from nestling.evaluate.measure import by_concept
from nestling.functional import (
    adversarial_direction,
    adversarial_step,
    concept_step_size,
    concept_weights_step,
    group_dro_step,
    project_onto_simplex,
    regret_bound,
    slow_start,
    slow_start_factor,
    slow_start_gain,
    tightening,
    worst_concept_accuracy,
)
from nestling.objectives.reducers import ConceptWeighted
from nestling.taxonomy import Taxonomy

# The projection ------------------------------------------------------------------------------------------------------


def by_bisection(v: Tensor) -> Tensor:
    """The threshold at which what is above it sums to 1, which the KKT conditions ask for."""
    low, high = v.max() - 1, v.max()
    for _ in range(60):
        middle = (low + high) / 2
        if (v - middle).clamp_min(0).sum() > 1:
            low = middle
        else:
            high = middle
    return (v - (low + high) / 2).clamp_min(0)


def test_the_projection_against_bisection() -> None:
    """1,000 vectors of 2 to 10,000 numbers, at any scale, a third of them full of ties."""
    generator = torch.Generator().manual_seed(0)
    for number in range(1000):
        size = round(2 * 5000 ** (number / 999))
        v = torch.randn(size, generator=generator, dtype=torch.float64) * 10 ** (number % 7 - 4)
        if number % 3 == 0:
            v = (4 * v).round() / 4
        found = project_onto_simplex(v)
        assert found.shape == v.shape and found.min() >= 0 and abs(float(found.sum()) - 1) < 1e-9
        assert (found - by_bisection(v)).abs().max() < 1e-9, (number, size)


def test_the_projection_by_hand() -> None:
    assert project_onto_simplex(torch.tensor([0.5, 0.8, -3.0])).tolist() == pytest.approx([0.35, 0.65, 0.0])
    assert project_onto_simplex(torch.tensor([7.0])).tolist() == [1.0]
    assert project_onto_simplex(torch.zeros(4)).tolist() == [0.25] * 4
    both = project_onto_simplex(torch.tensor([[0.5, 0.8, -3.0], [0.2, 0.3, 0.5]]))
    assert both[1].tolist() == pytest.approx([0.2, 0.3, 0.5]) and both[0, 2] == 0
    large = project_onto_simplex(torch.tensor([1e30, 1e30, -1e30]))
    assert large.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_projection_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(UsageError, match="expected finite numbers to project on the simplex"):
        project_onto_simplex(torch.tensor([0.5, bad, 0.1]))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_the_projection_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="at least one number"):
        project_onto_simplex(torch.zeros(shape))


# One step of q -------------------------------------------------------------------------------------------------------


def test_a_step_of_q_by_hand() -> None:
    """N = 10, N_k = 8 and 2; the batch's sums of losses 3 and 2, m = 4."""
    q, prior, counts = torch.tensor([0.6, 0.4]), torch.tensor([0.8, 0.2]), torch.tensor([8, 2])
    losses, concepts = torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([0, 1, 0, 0])
    # 10/8 * 3/4 - 2 * (-0.2) = 1.3375, and 10/2 * 2/4 - 2 * 0.2 = 2.1; times 0.1; then less half of what is above 1.
    found = concept_weights_step(q, losses, concepts, counts, prior, 0.1, 2.0)
    assert found.tolist() == pytest.approx([0.56187500, 0.438125], abs=1e-7)


def test_a_step_of_q_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        k, m = 6, 17
        counts = torch.randint(1, 40, (k,), generator=generator)
        q = project_onto_simplex(torch.rand(k, generator=generator, dtype=torch.float64))
        prior = counts / counts.sum()
        losses = torch.rand(m, generator=generator, dtype=torch.float64) * 3
        # Some concepts have no row in the batch.
        concepts = torch.randint(0, 4, (m,), generator=generator)
        moved = []
        for concept in range(k):
            total = sum(float(x) for x, c in zip(losses, concepts) if c == concept)
            gradient = int(counts.sum()) / int(counts[concept]) * total / m
            moved.append(float(q[concept]) + 0.05 * (gradient - 3.0 * float(q[concept] - prior[concept])))
        expected = by_bisection(torch.tensor(moved, dtype=torch.float64))
        found = concept_weights_step(q, losses, concepts, counts, prior.double(), 0.05, 3.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.tensor([8, 0])}, r"expected a training row of every concept, got none of '1'"),
        ({"concepts": torch.tensor([0, -1, 0, 0])}, r"expected concepts in \[0, 2\), got -1 to 0: drop the rows"),
        ({"concepts": torch.tensor([0, 2, 0, 0])}, r"expected concepts in \[0, 2\), got 0 to 2"),
        ({"concepts": torch.tensor([0, 1])}, r"losses and concepts \(m,\)"),
        ({"losses": torch.zeros(0), "concepts": torch.zeros(0, dtype=torch.int64)}, "at least one row"),
        ({"prior": torch.ones(3) / 3}, r"q, counts and prior \(k,\)"),
    ],
)
def test_what_a_step_of_q_refuses(change: dict[str, Tensor], message: str) -> None:
    given = {
        "q": torch.tensor([0.6, 0.4]),
        "losses": torch.ones(4),
        "concepts": torch.tensor([0, 1, 0, 0]),
        "counts": torch.tensor([8, 2]),
        "prior": torch.tensor([0.8, 0.2]),
        **change,
    }
    with pytest.raises(UsageError, match=message):
        concept_weights_step(**given, step_size=0.1, strength=1.0)


def test_group_dro_by_hand() -> None:
    found = group_dro_step(torch.tensor([0.25, 0.75]), torch.tensor([math.log(3.0), 0.0]), 1.0)
    assert found.tolist() == pytest.approx([0.5, 0.5])


def test_step_sizes_by_hand() -> None:
    sizes = [float(concept_step_size(t, 4.0, s=2, c=5.0)) for t in (1, 2, 3, 10)]
    assert sizes == pytest.approx([1 / 20, 1 / 40, 1 / 12, 1 / 40])
    assert float(concept_step_size(torch.tensor(3), 4.0, torch.tensor(3), torch.tensor(5.0))) == pytest.approx(1 / 60)


class Line:
    """500 rows of a linear model under squared loss, of concepts of 400, 80 and 20 rows."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.counts = torch.tensor([400, 80, 20])
        self.concepts = torch.repeat_interleave(torch.arange(3), self.counts)
        self.inputs = torch.randn(500, 2, generator=generator, dtype=torch.float64) + self.concepts[:, None]
        self.target = torch.randn(500, generator=generator, dtype=torch.float64)

    def reducer(self) -> ConceptWeighted:
        return ConceptWeighted(self.concepts, self.counts, ("a", "b", "c"), strength=2.0, s=1, c=1.0)

    def losses(self, theta: Tensor, rows: Tensor) -> Tensor:
        return (self.inputs[rows] @ theta - self.target[rows]) ** 2 / 2

    def step(self, reducer: ConceptWeighted, theta: Tensor, rows: Tensor) -> tuple[float, Tensor]:
        """The reducer's value of a batch, and its gradient in theta."""
        theta = theta.clone().requires_grad_()
        batch = Batch(self.inputs[rows], self.concepts[rows, None], rows, ("concept",))
        value = reducer(self.losses(theta, rows), torch.ones(len(rows)), batch)
        return value.item(), torch.autograd.grad(value, theta)[0]


def test_the_weighted_gradients_are_unbiased() -> None:
    """Over 10,000 mini-batches: Equation 5's value and gradient, and what moves q, are those of all rows."""
    line, generator = Line(), torch.Generator().manual_seed(0)
    theta, q = torch.tensor([0.4, -0.7], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4])
    reducer, step_size = line.reducer(), 1 / (2.0 * 5000)
    values, gradients, ways = [], [], []
    for rows in torch.randint(500, (10_000, 16), generator=generator):
        reducer.q.copy_(q)
        reducer.t.fill_(4999)
        value, gradient = line.step(reducer, theta, rows)
        values.append(value)
        gradients.append(gradient)
        # Inside the simplex the projection takes the mean away, and nothing else.
        assert reducer.q.min() > 0
        ways.append((reducer.q - q).double() / step_size)
    means, slopes = [], []
    for k in range(3):
        mine = line.concepts == k
        residual = line.inputs[mine] @ theta - line.target[mine]
        means.append((residual**2 / 2).mean())
        slopes.append((residual[:, None] * line.inputs[mine]).mean(0))
    mean, slope = torch.stack(means), torch.stack(slopes)
    way = mean - 2.0 * (q - line.counts / 500)
    for found, expected in (
        (torch.tensor(values, dtype=torch.float64)[:, None], (q.double() * mean).sum()[None]),
        (torch.stack(gradients), q.double() @ slope),
        (torch.stack(ways), way - way.mean()),
    ):
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - expected).abs() < 3 * error).all()


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_variance_grows_by_the_concept_s_rarity(k: int) -> None:
    """Section 3.3: of one row drawn among all, weighted, N / N_k times that of one drawn among the concept's.

    At the concept's own optimum, where its mean gradient is 0; over every row there is, so that nothing is left to
    chance.
    """
    line = Line()
    mine = torch.nonzero(line.concepts == k).flatten()
    theta = torch.linalg.lstsq(line.inputs[mine], line.target[mine, None]).solution[:, 0]
    reducer = line.reducer()
    alone = ConceptWeighted(torch.zeros(500, dtype=torch.int64), torch.tensor([len(mine)]), ("one",), strength=2.0)
    drawn = []
    for row in range(500):
        reducer.q.copy_(torch.eye(3)[k])
        drawn.append(line.step(reducer, theta, torch.tensor([row]))[1])
    among = [line.step(alone, theta, row[None])[1] for row in mine]
    variances = [torch.stack(gradients).var(0, correction=0).sum().item() for gradients in (drawn, among)]
    assert torch.stack(drawn).mean(0).abs().max() < 1e-6
    assert variances[0] / variances[1] == pytest.approx(500 / len(mine), rel=1e-4)


# Theorem 3 -----------------------------------------------------------------------------------------------------------


def test_h_by_hand_and_not_negative() -> None:
    """Proposition 1, on a grid with c > 1; where c = 1 beta is 0."""
    assert slow_start_gain(math.e**2, 3.0, 4.0) == pytest.approx(3 * math.sqrt(2 / 8) - 2 * math.e)
    assert slow_start_factor(math.e**2, 3.0, 4.0) == pytest.approx(3 / 4 / math.e)
    above = 0
    for mu in (0.5, 1.0, 3.0, 10.0, 30.0, 100.0):
        for strength in (1e-3, 0.1, 1.0, 10.0):
            for s in (2, 5, 10, 100, 1000, 10_000):
                if slow_start_factor(s, mu, strength) > 1:
                    above += 1
                    assert slow_start_gain(s, mu, strength) > 0
                else:
                    assert slow_start_gain(s, mu, strength) <= 1e-9
    assert 40 < above < 140
    assert regret_bound(100, 2.0, 0.5) == pytest.approx(4 * (math.log(100) + 1) / 100)


def test_the_slow_start_that_is_chosen() -> None:
    """s where h is largest, by looking at all of them; never more than a tenth of the steps."""
    s, c = slow_start(100_000, mu=100.0, strength=1.0)
    values = [slow_start_gain(x, 100.0, 1.0) for x in range(2, 10_001)]
    assert s == 2 + int(np.argmax(values)) and c == pytest.approx(slow_start_factor(s, 100.0, 1.0)) and c > 1
    # Figure 2: the maximum is after thousands of iterations, or sooner where mu is small.
    assert 300 < s <= 10_000
    assert slow_start(100, 100.0, 1.0)[0] == 10
    assert slow_start(100_000, mu=0.1, strength=1.0)[1] == 1.0


@dataclass
class Game:
    """Two concepts, N_k = 900 and 100, and a line through 0: f_1 = (theta - 1)^2 / 2, f_2 = (theta + 1)^2 / 2."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        self.counts = torch.tensor([900, 100])
        self.concepts = torch.repeat_interleave(torch.arange(2), self.counts)
        self.target = 1.0 - 2.0 * self.concepts
        self.prior = self.counts / self.counts.sum()

    def reducer(self, **options: object) -> ConceptWeighted:
        return ConceptWeighted(self.concepts, self.counts, ("one", "two"), strength=self.strength, **options)  # type: ignore[arg-type]

    def batch(self, rows: Tensor) -> Batch:
        return Batch(torch.zeros(len(rows), 1, 1, 1), self.concepts[rows, None], rows, ("concept",))

    def play(self, reducer: ConceptWeighted, steps: int, rows: Tensor | None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """theta and q before each step; with all ``rows``, or with random mini-batches of 16."""
        generator = torch.Generator().manual_seed(seed)
        theta = torch.zeros((), requires_grad=True)
        seen = []
        for t in range(1, steps + 1):
            drawn = torch.randint(1000, (16,), generator=generator) if rows is None else rows
            seen.append((theta.item(), *reducer.q.tolist()))
            values = (theta - self.target[drawn]) ** 2 / 2
            loss = reducer(values, torch.ones_like(values), self.batch(drawn))
            (gradient,) = torch.autograd.grad(loss, theta)
            with torch.no_grad():
                theta -= gradient * (0.3 if rows is not None else 1 / (t + 3))
        found = torch.tensor(seen, dtype=torch.float64)
        return found[:, 0], found[:, 1:]


def test_the_saddle_point_of_a_toy() -> None:
    """theta* = q_1 - q_2 leaves 2 q_1 q_2 - lambda (q_1 - p)^2, largest at q_1 = (1 + lambda p) / (2 + lambda)."""
    game = Game(strength=1.0)
    theta, q = game.play(game.reducer(s=20, c=10.0), 1500, torch.arange(1000))
    expected = (1 + 0.9) / 3
    assert q[-1, 0].item() == pytest.approx(expected, abs=1e-3)
    assert theta[-1].item() == pytest.approx(2 * expected - 1, abs=1e-3)
    # Held hard, the weights stay where they are.
    held = Game(strength=1e4)
    assert held.play(held.reducer(), 100, torch.arange(1000))[1][-1, 0].item() == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("steps", [100, 1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_regret_stays_below_theorem_3(steps: int) -> None:
    """Under random mini-batches, s and c from ``auto``; mu is what the first batches showed, and no more."""
    game = Game(strength=0.5)
    regrets, bounds = [], []
    for seed in range(5 if steps == 100 else 1):
        reducer = game.reducer(total=steps)
        theta, q = game.play(reducer, steps + 10, None, seed)
        theta, q = theta[10:], q[10:]
        assert int(reducer.t) == steps and 2 <= int(reducer.s) <= steps // 10 and float(reducer.c) >= 1
        losses = torch.stack([(theta - 1) ** 2 / 2, (theta + 1) ** 2 / 2], 1)

        def value(weights: Tensor, losses: Tensor = losses) -> float:
            away = ((weights - game.prior) ** 2).sum(-1)
            return float(((weights * losses).sum(-1) - game.strength / 2 * away).mean())

        best = max(value(torch.tensor([x, 1 - x], dtype=torch.float64)) for x in np.linspace(0, 1, 1001))
        regrets.append(best - value(q))
        bounds.append(regret_bound(steps, float(reducer.mu), game.strength, int(reducer.s)))
    assert 0 < np.mean(regrets) < np.mean(bounds)


# Theorems 1 and 2 ----------------------------------------------------------------------------------------------------


def logistic(inputs: Tensor, target: Tensor, theta: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-target * (inputs @ theta))


def worst(inputs: Tensor, target: Tensor, theta: Tensor, transport: float) -> Tensor:
    """The inner maximum of Section 3.2, by a search along theta, in which the gradient lies."""
    # The slope of the loss is at most ||theta||.
    steps = torch.linspace(0, 1.01, 20_001, dtype=torch.float64) * theta.norm() / transport
    margin = target * (inputs @ theta)
    along = torch.nn.functional.softplus(-(margin[:, None] - steps * theta.norm())) - transport / 2 * steps**2
    assert (along.argmax(1) < 20_000).all()
    return along.max(1).values


@pytest.mark.parametrize("ratio", [1.05, 1.5, 2.5, 4.0, 20.0, 1000.0])
@pytest.mark.parametrize("length", [0.3, 1.0, 3.0])
def test_theorems_1_and_2(length: float, ratio: float) -> None:
    """On the logistic loss of a linear model: L_x = ||theta||^2 / 4, and ||gradient|| <= ||theta||, so L_theta = 1."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    theta *= length / theta.norm()
    inputs = torch.randn(200, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.where(torch.rand(200, generator=generator) < 0.5, -1.0, 1.0).double()
    smoothness = length**2 / 4
    transport = ratio * smoothness
    gamma = 1 / (transport - smoothness)
    left = worst(inputs.detach(), target, theta, transport)
    plain = logistic(inputs, target, theta)
    right = plain.detach() + gamma / 2 * length**2
    assert (left <= right + 1e-9).all() and (left >= plain.detach() - 1e-9).all()
    direction = adversarial_direction(logistic(inputs, target, theta).sum(), inputs)
    moved = inputs.detach() + adversarial_step(logistic(inputs, target, theta).sum(), inputs, smoothness)
    (gradient,) = torch.autograd.grad(logistic(inputs, target, theta).sum(), inputs)
    # tau = <gradient, z> / (3 L_x ||z||^2) along the unit gradient.
    tau = (gradient * direction).sum(1) / (3 * smoothness)
    torch.testing.assert_close(moved, inputs.detach() + tau[:, None] * direction)
    alpha = tightening((gradient * direction).sum(1), direction.norm(dim=1), transport, smoothness)
    assert (alpha >= 0).all()
    tighter = logistic(moved, target, theta) + gamma / 2 * length**2 - alpha
    assert (left <= tighter + 1e-9).all(), (tighter - left).min()


# The direction -------------------------------------------------------------------------------------------------------


def test_the_direction_by_hand() -> None:
    """Rows whose gradients are (3, 4), 0, and too small for squares in float32."""
    inputs = torch.zeros(3, 1, 1, 2, requires_grad=True)
    slope = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-30]]).view(3, 1, 1, 2)
    found = adversarial_direction((slope * inputs).sum(), inputs)
    assert found.shape == inputs.shape and not found.requires_grad
    assert found.flatten(1).tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0], [0.0, -1.0]]


def test_the_direction_against_differences() -> None:
    """Along it the loss grows faster than along 200 others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    inputs = torch.randn(3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 3])

    def losses(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ weight, target, reduction="none")

    found = adversarial_direction(losses(inputs).sum(), inputs)
    gain = losses(inputs + 1e-5 * found) - losses(inputs)
    others = torch.randn(200, 3, 6, generator=generator, dtype=torch.float64)
    others /= others.norm(dim=2, keepdim=True)
    for other in others:
        assert (losses(inputs + 1e-5 * other) - losses(inputs) <= gain).all()


def test_what_the_direction_refuses() -> None:
    inputs = torch.zeros(2, 3)
    with pytest.raises(UsageError, match="inputs that do not"):
        adversarial_direction(inputs.sum(), inputs)
    inputs.requires_grad_()
    with pytest.raises(UsageError, match=r"a loss of shape \(2,\)"):
        adversarial_direction(inputs.sum(1), inputs)


# The selection -------------------------------------------------------------------------------------------------------


def test_the_worst_concept_by_hand() -> None:
    """Concepts of 3 rows each, of which 2 and 1 are right; a row without a fine label counts at the coarse one."""
    levels = ("coarse", "fine")
    labels = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 2], [1, 3], [1, -1], [-1, -1]])
    answers = {"fine": torch.eye(4)[[0, 1, 0, 2, 2, 3, 0]], "coarse": torch.eye(2)[[0, 0, 0, 0, 0, 0, 0]]}
    found = worst_concept_accuracy(answers, labels, levels, labels[:, 0])
    assert found == pytest.approx(1 / 3 + 1e-6 * (2 / 3 + 1 / 3) / 2, abs=1e-7)
    # Where one concept is never right, the better epoch is the one that does better on the others.
    none = {**answers, "fine": torch.eye(4)[[0, 0, 0, 3, 2, 3, 0]]}
    some = {**answers, "fine": torch.eye(4)[[0, 1, 0, 3, 2, 3, 0]]}
    scores = [worst_concept_accuracy(a, labels, levels, labels[:, 0]) for a in (none, some)]
    assert 0 < scores[0] < scores[1] < 1e-5
    # Without fine labels the coarse ones count.
    coarse = labels.index_fill(1, torch.tensor([1]), -1)
    assert worst_concept_accuracy(answers, coarse, levels, coarse[:, 0]) == pytest.approx(0.5e-6)
    assert worst_concept_accuracy(answers, torch.full_like(labels, -1), levels, labels[:, 0]) == 0.0


@pytest.mark.parametrize(("last", "worst"), [("known coarsely", 0.0), ("a ragged leaf", 0.0), ("left out", 1.0)])
def test_no_concept_is_blind_for_the_worst(last: str, worst: float) -> None:
    """Concept b is always wrong: known at its own level alone, or a leaf there, whose fine column is its own."""
    taxonomy = Taxonomy.from_paths(["a/1", "a/2", "b" if last == "a ragged leaf" else "b/3"])
    labels = torch.from_numpy(taxonomy.columns(taxonomy.encode([["a", "1"], ["a", "2"], ["b", None], ["b", None]])))
    if last == "left out":
        labels[2:] = -1
    assert taxonomy.width("fine") == 3
    answers = {"coarse": torch.eye(2)[[0, 0, 0, 0]], "fine": torch.eye(3)[[0, 1, 0, 1]]}
    found = worst_concept_accuracy(answers, labels, taxonomy.levels, labels[:, 0])
    assert found == pytest.approx(worst, abs=1e-5)
    decisions = Decisions({level: p.argmax(1).numpy() for level, p in answers.items()}, {})
    raw = labels.masked_fill(labels >= torch.tensor([2, taxonomy.num_classes("fine")]), -1)
    data = LabelledData(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), raw.numpy(), taxonomy)
    entry = by_concept(decisions, data, {"level": "coarse"})
    assert entry["worst"] == worst and entry["of"] == "fine"
    assert entry["n"] == ({"a": 2} if last == "left out" else {"a": 2, "b": 2})
