"""The figures of tables: which rows are one set's, and which panels there are."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from nestling.report.plots import looks
from nestling.reproduce.figure import named, panels_of, points, sets_of


def entry(row: str, column: str, mean: float = 0.5, paper: float | None = None) -> dict[str, Any]:
    return {"row": row, "column": column, "mean": mean, "std": 0.1, "paper": paper}


def test_rows_of_several_sets() -> None:
    assert sets_of(["mnist: ins", "mnist: cos", "digits: cos"]) == ("mnist", "digits")
    # One set, or a row of none: names stay as they are.
    for rows in (["mnist: ins", "mnist: cos"], ["mnist: ins", "digits: cos", "average"]):
        assert sets_of(rows) == () and named(rows[0], sets_of(rows)) == rows[0]
    assert named("mnist: flat: more", ("mnist", "digits")) == "flat: more"


def test_lines_of_each_set_have_a_panel() -> None:
    rows = ["mnist: a", "mnist: b", "digits: a", "digits: b"]
    result = {"table": [entry(row, column) for row in rows for column in ("R@1", "error epsilon 1", "error epsilon 2")]}
    assert list(panels_of(result)) == [("R@1", None), ("mnist: error", "epsilon"), ("digits: error", "epsilon")]
    assert list(panels_of(result, "^R@")) == [("R@1", None)]


def test_points_stand_by_set() -> None:
    """Two sets of two, given in turns: each set together, with its name below its middle."""
    rows = ["mnist: a", "digits: a", "mnist: b", "digits: b"]
    axes = Figure().add_subplot()
    styles = dict(zip(rows, looks(rows).values()))
    points(axes, [entry(row, "R@1", number) for number, row in enumerate(rows)], styles, 1.0, ("mnist", "digits"))
    drawn = [
        line.get_xydata()[0].tolist()
        for line in axes.lines
        if line.get_linestyle() != "None" or len(line.get_xydata()) == 1
    ]
    places = {y: x for x, y in drawn}
    assert [places[y] for y in (0.0, 2.0, 1.0, 3.0)] == [0.0, 1.0, 3.5, 4.5]
    assert list(axes.get_xticks()) == [0.5, 4.0] and [t.get_text() for t in axes.get_xticklabels()] == [
        "mnist",
        "digits",
    ]
