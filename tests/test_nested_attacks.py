"""The table of attacks: how strengths are compared, and what its columns are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nestling.data.sources import load_data
from nestling.engine.runtime import Runtime
from nestling.methods.nested import Nested
from nestling.methods.recipe import Optimizer
from nestling.reproduce import nested_attacks
from nestling.reproduce.nested import MARGINAL, NESTED, TWIN
from nestling.reproduce.nested_attacks import (
    ATTACKS_TABLE,
    LEVELS,
    accuracy,
    attacks,
    epsilon_at,
    flipped,
    ratio_at,
    ratios,
    turned,
)
from nestling.reproduce.result import unit_of
from nestling.reproduce.table import Cell
from small import quick


def test_strengths_are_compared_with_end_to_ends() -> None:
    cells = [
        Cell(f"mnist: {NESTED}", epsilon_at(0.6), 0.3),
        Cell(f"mnist: {TWIN}", epsilon_at(0.6), 0.1),
        Cell(f"mnist: {MARGINAL}", epsilon_at(0.6), 0.05),
        # Nothing to compare with: the other reaches no such error.
        Cell(f"mnist: {NESTED}", epsilon_at(0.75), 0.4),
        Cell(f"mnist: {NESTED}", epsilon_at(0.6, combined=True), 0.2),
        Cell(f"mnist: {TWIN}", epsilon_at(0.6, combined=True), 0.1),
    ]
    found = {(cell.row, cell.column): cell.value for cell in ratios(cells)}
    assert found == {
        (f"mnist: {NESTED}", ratio_at(0.6)): pytest.approx(3),
        (f"mnist: {TWIN}", ratio_at(0.6)): 1,
        (f"mnist: {MARGINAL}", ratio_at(0.6)): pytest.approx(0.5),
        (f"mnist: {NESTED}", ratio_at(0.6, combined=True)): pytest.approx(2),
        (f"mnist: {TWIN}", ratio_at(0.6, combined=True)): 1,
    }


def test_the_papers_table_stands_beside_both_sets() -> None:
    printed = ATTACKS_TABLE.printed
    assert len(printed) == 2 * 2 * 3 * 3
    assert printed[f"cifar10: {NESTED}", accuracy("middle", "saliency")] == 0.715
    for source in ("mnist", "cifar10"):
        claims = {claim.id: claim for claim in ATTACKS_TABLE.claims}
        assert claims[f"{source}-fgsm-coarse-over-end-to-end"].paper == pytest.approx(0.616)
        for which in ("60", "75", "60-combined", "75-combined"):
            harder = claims[f"{source}-twice-the-noise-at-{which}"]
            assert (harder.least, harder.paper) == (1, 1)
    assert unit_of(ATTACKS_TABLE, ratio_at(0.6))[1] == unit_of(ATTACKS_TABLE, epsilon_at(0.6))[1] == ".4g"
    assert {unit_of(ATTACKS_TABLE, accuracy(level, "FGSM"))[2] for level in LEVELS} == {"%"}


def test_trainings_are_those_of_the_other_tables() -> None:
    """As many label rates, networks and steps: what is trained by the same is trained once."""
    from nestling.reproduce.nested_distortion import BUDGET, DISTORTION

    for scale in ("small", "paper"):
        others = [made.trained_by() for table in (DISTORTION, BUDGET) for made in table.trials(scale)]
        assert all(made.trained_by() in others for made in ATTACKS_TABLE.trials(scale))


def test_only_rows_that_were_fooled_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 3: the fine answer of every row is wrong; beside it those that the attack made wrong."""
    digits = load_data("digits", "test").subset(range(40))
    recipe = Nested(epochs=(1, 1, 6), batch_size=32, steps_per_epoch=20, optimizer=Optimizer(lr=0.01))
    run = quick(recipe, load_data("digits").subset(range(320)))
    made = SimpleNamespace(run=run, test=digits, runtime=Runtime.choose("cpu", "fp32"))
    monkeypatch.setattr(nested_attacks, "trained", lambda trial, place: made)
    trial = SimpleNamespace(row="a", options={"attacks": {"FGSM": "fgsm:0.1", "strong": "fgsm:flip"}, "attacked": 30})
    cells = {cell.column: cell for cell in attacks(trial, None)}  # type: ignore[arg-type]
    clean = cells[accuracy("fine", "clean")]
    assert clean.count == 30 and 0 < clean.value < 1
    assert 1 - clean.value <= cells[flipped("FGSM")].value < 1, "too weak to turn every answer"
    for name in ("FGSM", "strong"):
        wrong = cells[flipped(name)]
        assert cells[accuracy("fine", name)].value == 0
        assert cells[accuracy("coarse", name)].count == sum(wrong.samples) == round(30 * wrong.value)
        assert cells[turned("coarse", name)].count == round(30 * (wrong.value - (1 - clean.value))) > 0
    assert np.isfinite(cells["strength of strong"].value)
    for combined in ("", ", combined"):
        clean = cells[accuracy("fine", "clean", combined=bool(combined))].value
        assert cells[f"fine error{combined} epsilon 0"].value == pytest.approx(1 - clean)
