"""Decisions worked out by hand on small trees, and as loops over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.evaluate.decide import decide_leaf, decide_levels, decide_path, describe_paths
from nestling.models.model import Answers
from nestling.objectives import functional
from nestling.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q/3", "b/r/4", "b/r/5", "b/r/6"])
"""coarse a, b; middle p, q under a, r under b; fine 1, 2 under p, 3 under q, 4, 5, 6 under r."""
RAGGED = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q", "b/r/3", "c"])
"""Widths 3, 4 (p, q, r, c) and 5 (1, 2, 3, c, q)."""


def answers(levels: dict[str, list[list[float]]], rejection: dict[str, list[float]] | None = None) -> Answers:
    combined = {level: torch.tensor(p, dtype=torch.float64) for level, p in levels.items()}
    rejected = {
        level: torch.tensor(rejection[level]) if rejection else torch.zeros(len(p)) for level, p in combined.items()
    }
    separate = {level: p * (1 - rejected[level])[:, None] for level, p in combined.items()}
    return Answers(combined, separate, rejected)


def random_answers(taxonomy: Taxonomy, rows: int, seed: int, rejecting: bool = False, sharp: float = 2.0) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    given = [
        (sharp * torch.randn(rows, taxonomy.width(level), generator=generator)).softmax(1) for level in taxonomy.levels
    ]
    rejection = {
        level: torch.rand(rows, generator=generator) * (0.5 if rejecting else 0.0) for level in taxonomy.levels
    }
    combined = dict(zip(taxonomy.levels, functional.combine_levels(given, taxonomy)))
    separate = {level: p * (1 - rejection[level])[:, None] for level, p in zip(taxonomy.levels, given)}
    return Answers(combined, separate, rejection)


# By hand -------------------------------------------------------------------------------------------------------------

# b is the best coarse class; a's second child wins the middle level by a hair, 3 the fine one.
DISAGREEING = answers(
    {
        "coarse": [[0.48, 0.52]],
        "middle": [[0.02, 0.46, 0.52]],
        "fine": [[0.01, 0.01, 0.46, 0.2, 0.3, 0.02]],
    }
)


def test_each_level_by_itself_and_the_path_differ() -> None:
    alone = decide_levels(DISAGREEING)
    assert {level: c.tolist() for level, c in alone.columns.items()} == {"coarse": [1], "middle": [2], "fine": [2]}
    assert alone.confidence["fine"] == pytest.approx([0.46])
    path = decide_path(DISAGREEING, TREE)
    assert {level: c.tolist() for level, c in path.columns.items()} == {"coarse": [1], "middle": [2], "fine": [4]}
    assert [path.confidence[level][0] for level in TREE.levels] == pytest.approx([0.52, 0.52, 0.3])


def test_rejection_lowers_confidence_and_does_not_come_back() -> None:
    """The largest rejection so far: 0.1, then 0.5, then, though the fine head rejects nothing, still 0.5."""
    given = answers(
        {"coarse": [[0.9, 0.1]], "middle": [[0.8, 0.1, 0.1]], "fine": [[0.6, 0.2, 0.1, 0.05, 0.05, 0.0]]},
        {"coarse": [0.1], "middle": [0.5], "fine": [0.0]},
    )
    for decisions in (decide_levels(given), decide_path(given, TREE)):
        assert [decisions.confidence[level][0] for level in TREE.levels] == pytest.approx([0.81, 0.4, 0.3])
    # A head by itself: the probability beside its own rejection.
    alone = decide_levels(given, combined=False)
    assert [alone.confidence[level][0] for level in TREE.levels] == pytest.approx([0.81, 0.4, 0.6])


def test_least_distance_differs_from_the_most_probable_by_hand() -> None:
    """0.34 on 3, whose branch holds nothing else; 0.33 each on 4 and 5, which are two edges apart and six from 3.

    Expected distances: 3: 0.66 · 6 = 3.96; 4: 0.33 · 2 + 0.34 · 6 = 2.7; 5 the same; 6: 0.66 · 2 + 0.34 · 6 = 3.36.
    """
    p = torch.tensor([[0.0, 0.0, 0.34, 0.33, 0.33, 0.0]])
    flat = Answers(
        {level: functional.aggregate(p, TREE, level) for level in TREE.levels},
        {level: functional.aggregate(p, TREE, level) for level in TREE.levels},
        {level: torch.zeros(1) for level in TREE.levels},
    )
    likely, near = decide_leaf(flat, TREE), decide_leaf(flat, TREE, least_distance=True)
    assert [likely.columns[level][0] for level in TREE.levels] == [0, 1, 2]
    assert [near.columns[level][0] for level in TREE.levels] == [1, 2, 3]
    # The confidence is the summed probability of the ancestor.
    assert [likely.confidence[level][0] for level in TREE.levels] == pytest.approx([0.34, 0.34, 0.34])
    assert [near.confidence[level][0] for level in TREE.levels] == pytest.approx([0.66, 0.66, 0.33])


@pytest.mark.parametrize(
    ("confidence", "level", "name"),
    [
        ((0.99, 0.95, 0.90), "fine", "1"),
        ((0.99, 0.95, 0.89), "middle", "p"),
        ((0.99, 0.89, 0.89), "coarse", "a"),
        ((0.89, 0.88, 0.87), "coarse", "a"),  # none can be vouched for: still an answer
    ],
)
def test_the_answer_is_the_deepest_confident_level(confidence: tuple[float, ...], level: str, name: str) -> None:
    c, m, f = confidence
    given = answers(
        {
            "coarse": [[c, 1 - c]],
            "middle": [[m, c - m, 1 - c]],
            "fine": [[f, m - f, c - m, (1 - c) / 2, (1 - c) / 2, 0]],
        }
    )
    (found,) = describe_paths(given, TREE, flat=False)
    assert found["path"] == ["a", "p", "1"]
    assert found["confidence"] == pytest.approx(confidence, abs=1e-6)
    assert (found["answer"]["level"], found["answer"]["class"]) == (level, name)
    assert found["answer"]["confidence"] == pytest.approx(confidence[TREE.level_index(level)], abs=1e-6)


def test_a_ragged_leaf_ends_its_path() -> None:
    given = answers(
        {
            "coarse": [[0.1, 0.0, 0.9], [0.95, 0.0, 0.05], [0.9, 0.1, 0.0]],
            "middle": [[0.05, 0.05, 0.0, 0.9], [0.02, 0.93, 0.0, 0.05], [0.9, 0.0, 0.1, 0.0]],
            "fine": [[0.05, 0.0, 0.0, 0.9, 0.05], [0.01, 0.01, 0.0, 0.05, 0.93], [0.5, 0.4, 0.1, 0.0, 0.0]],
        }
    )
    leaf, inner, whole = describe_paths(given, RAGGED, flat=False)
    assert leaf["path"] == ["c"] and leaf["confidence"] == pytest.approx([0.9])
    assert leaf["answer"] == {"level": "coarse", "class": "c", "confidence": pytest.approx(0.9)}
    assert inner["path"] == ["a", "q"] and inner["answer"]["class"] == "q"
    assert whole["path"] == ["a", "p", "1"] and whole["answer"]["class"] == "p"
    assert [r["path"] for r in describe_paths(given, RAGGED, flat=True)] == [["c"], ["a", "q"], ["a", "p", "1"]]


def test_flat_models_answer_from_the_leaf_up() -> None:
    """The path of a flat model is the ancestors of its leaf, also where another coarse class is likelier."""
    p = torch.tensor([[0.0, 0.0, 0.34, 0.33, 0.33, 0.0]])
    sums = {level: functional.aggregate(p, TREE, level) for level in TREE.levels}
    flat = Answers(sums, sums, {level: torch.zeros(1) for level in TREE.levels})
    (found,) = describe_paths(flat, TREE, flat=True)
    assert found["path"] == ["a", "q", "3"]
    assert found["answer"] == {"level": "coarse", "class": "a", "confidence": pytest.approx(0.34)}
    (down,) = describe_paths(flat, TREE, flat=False)
    assert down["path"] == ["b", "r", "4"]


# As loops ------------------------------------------------------------------------------------------------------------


def naive_path(given: Answers, taxonomy: Taxonomy, row: int) -> list[tuple[int, float]]:
    """Top-down, a node at a time, in plain Python."""
    steps: list[tuple[int, float]] = []
    worst = 0.0
    for level in taxonomy.levels:
        p = given.combined[level][row].tolist()
        parent = taxonomy.column_parent(level)
        options = [c for c in range(len(p)) if not steps or parent[c] == steps[-1][0]]
        best = max(options, key=lambda c: (p[c], -c))
        worst = max(worst, float(given.rejection[level][row]))
        steps.append((best, p[best] * (1 - worst)))
    return steps


@pytest.mark.parametrize("taxonomy", [TREE, RAGGED, Taxonomy.from_paths(["x", "y"], levels=["only"])])
@pytest.mark.parametrize("rejecting", [False, True])
def test_paths_equal_a_loop(taxonomy: Taxonomy, rejecting: bool) -> None:
    given = random_answers(taxonomy, 40, seed=1, rejecting=rejecting)
    path = decide_path(given, taxonomy)
    for row in range(40):
        expected = naive_path(given, taxonomy, row)
        assert [path.columns[level][row] for level in taxonomy.levels] == [column for column, _ in expected]
        confidence = [path.confidence[level][row] for level in taxonomy.levels]
        assert confidence == pytest.approx([c for _, c in expected], abs=1e-6)


@pytest.mark.parametrize("taxonomy", [TREE, RAGGED])
@pytest.mark.parametrize("seed", range(3))
def test_confidence_never_rises_with_depth(taxonomy: Taxonomy, seed: int) -> None:
    given = random_answers(taxonomy, 200, seed, rejecting=True, sharp=5.0)
    for decisions in (decide_path(given, taxonomy), decide_leaf(given, taxonomy)):
        assert all(c.dtype == np.float64 and ((c >= 0) & (c <= 1)).all() for c in decisions.confidence.values())
    steps = np.stack([decide_path(given, taxonomy).confidence[level] for level in taxonomy.levels])
    assert (np.diff(steps, axis=0) <= 1e-6).all()
    for found in describe_paths(given, taxonomy, flat=False):
        assert (np.diff(found["confidence"]) <= 1e-6).all()
        assert len(found["path"]) == len(found["confidence"]) >= 1


def test_levels_equal_a_loop() -> None:
    given = random_answers(TREE, 30, seed=4, rejecting=True)
    for combined in (True, False):
        decisions = decide_levels(given, combined)
        for row in range(30):
            worst = 0.0
            for level in TREE.levels:
                p = (given.combined if combined else given.separate)[level][row].tolist()
                worst = max(worst, float(given.rejection[level][row]))
                best = int(np.argmax(p))
                assert decisions.columns[level][row] == best
                expected = p[best] * (1 - worst) if combined else p[best]
                assert decisions.confidence[level][row] == pytest.approx(expected, abs=1e-6)


def test_answers_up_to_a_coarser_level() -> None:
    """A model that was asked ``until`` a level has no finer answers."""
    given = answers({"coarse": [[0.2, 0.8]], "middle": [[0.1, 0.1, 0.8]]})
    (found,) = describe_paths(given, TREE, flat=False)
    assert found["path"] == ["b", "r"]
    assert list(decide_levels(given).columns) == ["coarse", "middle"]


def test_decisions_stay_in_numpy() -> None:
    decisions = decide_levels(random_answers(TREE, 3, seed=0))
    assert not any(isinstance(c, Tensor) for c in [*decisions.columns.values(), *decisions.confidence.values()])
    assert decisions.columns["fine"].dtype == np.int64
