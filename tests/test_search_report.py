"""Search and theory in the report and in the model card: what stands in metrics.json is what a reader sees."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest

from nestling.report import Content, render, render_card, retrieval, summary
from nestling.taxonomy import Taxonomy

TREE = Taxonomy.from_paths(["a/1", "a/2", "b/3"])
SEARCH = {
    "method": "coins",
    "levels": [{"name": "coarse", "accuracy": 0.9, "confidence": 0.8, "n": 40}],
    "retrieval": {
        "coarse": {"1": 0.912, "2": 0.95, "4": 0.97, "8": 0.99}, "fine": {"1": 0.634, "2": 0.7, "4": 0.8, "8": 0.9},
    },
    "retrieval_at_r": {"fine": {"map": 0.314, "precision": 0.402}},
    "theory": {
        "alpha": {"mean": 0.31, "least": 0.01}, "alpha within": {"mean": 0.52, "least": 0.04},
        "beta": {"mean": 0.97, "least": 0.6}, "constant": 12.5, "rows": 1234,
        "fine": {"measured": 0.71, "bound": 0.28, "lemma": 0.002, "z": 18, "violations": 0},
    },
}  # fmt: skip
ROWS = {"alpha": [0.1, 0.5], "within": [0.2, 0.7], "beta": [0.9, 1.0], "measured": [0.6, 0.8], "bound": [0.2, 0.5]}


def content(**more) -> Content:
    return Content(**{"title": "t", "source": "s", "metrics": SEARCH, "theory": ROWS, **more})


def section(page: str, name: str) -> str:
    """What a section says, and the text of its figures."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found is not None, name
    drawn = [base64.b64decode(svg).decode() for svg in re.findall(r"svg\+xml;base64,([\w+/=]+)", found[1])]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", " ".join([found[1], *drawn])))


def test_search_in_the_report() -> None:
    shown = section(render(content()), "retrieval")
    for text in ("fine: mAP@R 31.4 %, R-precision 40.2 %", "R@1 91.2", "R@1 63.4", "Recall@k (%)", "k nearest others"):
        assert text in shown, text


def test_theory_in_the_report() -> None:
    shown = section(render(content()), "theory")
    for text in ("On 1,234 training rows", "Mean probability of the fine class 0.710", "promises 0.280", "0.002 with",
                 "Mean α 0.310", "0.520 within", "mean β 0.970", "follows from the least of each is 12.5",
                 "Lemma 1's lower bound", "measured Pr{fine class}", "α within the coarse class"):  # fmt: skip
        assert text in shown, text


def test_what_is_not_known_is_left_out() -> None:
    """Without fine labels no bound, where coarse classes are sure no constant; without either nothing."""
    theory = {**SEARCH["theory"], "constant": None}
    del theory["fine"]
    rows = {name: ROWS[name] for name in ("alpha", "within", "beta")}
    shown = section(render(content(metrics={**SEARCH, "theory": theory}, theory=rows)), "theory")
    assert "Lemma 1" not in shown and "constant" not in shown and "Mean α 0.310" in shown
    plain = {name: value for name, value in SEARCH.items() if not name.startswith(("retrieval", "theory"))}
    page = render(content(metrics=plain, theory={}))
    assert 'id="theory"' not in page and 'id="retrieval"' not in page
    empty = Content(title="t", source="s", metrics={})
    assert retrieval.retrieval(empty) is None and retrieval.theory(empty) is None
    assert "## Search" not in render_card("n", TREE, plain, [], "s")


def test_the_bound_is_drawn_as_it_is() -> None:
    from nestling.report import plots

    with plots.styled():
        figure = retrieval.theory(content())
        assert figure is not None
        scatter, curves = figure.axes
    (points,) = scatter.collections
    np.testing.assert_allclose(points.get_offsets(), [[0.6, 0.2], [0.8, 0.5]])
    assert [line.get_ydata()[-1] for line in curves.lines] == [0.5, 0.7, 1.0]  # type: ignore[index]
    assert [line.get_xdata()[0] for line in curves.lines] == [50] * 3  # type: ignore[index]


@pytest.mark.parametrize("level", ["fine", "a|b`<i>"])
def test_search_in_the_card(level: str) -> None:
    metrics = {**SEARCH, "retrieval": {level: SEARCH["retrieval"]["fine"]}, "retrieval_at_r": {level: {"map": 0.5}}}
    card = render_card("n", TREE, metrics, [], "s")
    lines = card[card.index("## Search") :].splitlines()
    assert lines[2] == "| Level | Recall@1 | Recall@2 | Recall@4 | Recall@8 |"
    assert lines[4].endswith("| 63.4 | 70.0 | 80.0 | 90.0 |") and "<i>" not in card
    assert "mAP@R 50.0 %" in card and card.index("## Results") < card.index("## Search") < card.index("## Calibration")
    assert "Features to search by" in card and "at the level it learned from: coarse" in card
    assert "predictor.embed(" in card and "nestling search" in card and "predictor.predict(" not in card
    assert '"image-retrieval"' in card and "A classifier" not in card


def test_search_leads_the_report() -> None:
    found = summary.headline(content())
    assert found.outcome == "alone" and "Recall@1 63.4 % at fine" in found.text and "90.0 % accuracy" in found.text
