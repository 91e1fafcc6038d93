"""Votes of the levels, against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nestling import functional
from nestling.errors import UsageError
from nestling.evaluate.decide import decide_votes
from nestling.models.model import Answers
from nestling.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["x/p/1", "x/p/2", "x/q/3", "y/r/4", "y/r/5"])


def probabilities(rows: int = 200, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, TREE.width(level), generator=generator).softmax(1) for level in TREE.levels]


def naive(parts: list[torch.Tensor], weights: list[float]) -> list[int]:
    """Row by row: the votes of every finest class, ties by its own probability."""
    chosen = []
    for row in range(len(parts[0])):
        votes = [0.0] * TREE.width("fine")
        for level, p, weight in zip(TREE.levels, parts, weights):
            for fine, above in enumerate(TREE.ancestor(level, of="fine").tolist()):
                votes[fine] += weight * (above == int(p[row].argmax()))
        best = [fine for fine, count in enumerate(votes) if count > max(votes) - 1e-12]
        chosen.append(max(best, key=lambda fine: float(parts[-1][row, fine])))
    return chosen


@pytest.mark.parametrize("weights", [None, [0.9, 0.8, 0.6], [0.3, 0.3, 0.7], [0.0, 0.0, 1.0]])
def test_votes_equal_a_loop(weights: list[float] | None) -> None:
    parts = probabilities()
    assert functional.vote(parts, TREE, weights).tolist() == naive(parts, weights or [1.0, 1.0, 1.0])


def test_a_vote_by_hand() -> None:
    """Coarse x and middle p against fine 4 of y: p's children have two votes, and 2 is the likelier. Weighing 3, fine
    wins."""
    parts = [torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([[0.1, 0.2, 0.1, 0.5, 0.1]])]
    assert functional.vote(parts, TREE).item() == 1
    assert functional.vote(parts, TREE, [1, 1, 3]).item() == 3
    # Of two levels that disagree the finest has its way.
    assert functional.vote(parts[::2], TREE, levels=("coarse", "fine")).item() == 3


def test_what_cannot_vote_is_refused() -> None:
    parts = probabilities(3)
    for wrong in (parts[:2], [parts[0], parts[1], parts[2][:2]], [parts[0], parts[1], parts[2][:, :2]]):
        with pytest.raises(UsageError, match="expected probabilities"):
            functional.vote(wrong, TREE)
    for weights in ([1.0, 1.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(UsageError, match="expected a weight of at least 0"):
            functional.vote(parts, TREE, weights)


def test_decisions_by_votes_lie_on_one_path() -> None:
    parts = dict(zip(TREE.levels, probabilities(50)))
    none = {level: torch.zeros(50) for level in parts}
    found = decide_votes(Answers(parts, parts, none), TREE)
    for level in TREE.levels:
        assert np.array_equal(found.columns[level], TREE.ancestor(level, of="fine")[found.columns["fine"]])
        rows = torch.arange(50)
        expected = parts[level][rows, torch.from_numpy(found.columns[level])]
        assert found.confidence[level] == pytest.approx(expected.numpy(), abs=1e-6)
