"""The table of attacks: how strengths are compared, and what its columns are."""

from __future__ import annotations

import pytest

from nestling.reproduce.nested import MARGINAL, NESTED, TWIN
from nestling.reproduce.nested_attacks import ATTACKS_TABLE, LEVELS, accuracy, epsilon_at, ratio_at, ratios
from nestling.reproduce.result import unit_of
from nestling.reproduce.table import Cell


def test_strengths_are_compared_with_end_to_ends() -> None:
    cells = [
        Cell(f"mnist: {NESTED}", epsilon_at(0.5), 0.3),
        Cell(f"mnist: {TWIN}", epsilon_at(0.5), 0.1),
        Cell(f"mnist: {MARGINAL}", epsilon_at(0.5), 0.05),
        # Nothing to compare with: the other reaches no such error.
        Cell(f"mnist: {NESTED}", epsilon_at(0.75), 0.4),
    ]
    found = {(cell.row, cell.column): cell.value for cell in ratios(cells)}
    assert found == {
        (f"mnist: {NESTED}", ratio_at(0.5)): pytest.approx(3),
        (f"mnist: {TWIN}", ratio_at(0.5)): 1,
        (f"mnist: {MARGINAL}", ratio_at(0.5)): pytest.approx(0.5),
    }


def test_the_papers_table_stands_beside_both_sets() -> None:
    printed = ATTACKS_TABLE.printed
    assert len(printed) == 2 * 2 * 3 * 3
    assert printed[f"cifar10: {NESTED}", accuracy("middle", "saliency")] == 0.715
    for source in ("mnist", "cifar10"):
        claims = {claim.id: claim for claim in ATTACKS_TABLE.claims}
        assert claims[f"{source}-fgsm-coarse-over-end-to-end"].paper == pytest.approx(0.616)
        assert (claims[f"{source}-twice-the-noise-at-50"].least, claims[f"{source}-twice-the-noise-at-50"].paper) == (
            1,
            1,
        )
    assert unit_of(ATTACKS_TABLE, ratio_at(0.5))[1] == unit_of(ATTACKS_TABLE, epsilon_at(0.5))[1] == ".4g"
    assert {unit_of(ATTACKS_TABLE, accuracy(level, "FGSM"))[2] for level in LEVELS} == {"%"}


def test_trainings_are_those_of_the_other_tables() -> None:
    """As many label rates, networks and steps: what is trained by the same is trained once."""
    from nestling.reproduce.nested_distortion import BUDGET, DISTORTION

    for scale in ("small", "paper"):
        others = [made.trained_by() for table in (DISTORTION, BUDGET) for made in table.trials(scale)]
        assert all(made.trained_by() in others for made in ATTACKS_TABLE.trials(scale))
