"""The report and the model card: complete, self-contained, and deaf to what stands in untrusted names."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from nestling.report import (
    Content,
    Curve,
    Example,
    calibration,
    comparison,
    curves,
    examples,
    icicle,
    plots,
    render,
    render_card,
    summary,
)
from nestling.report.content import plain, shorten
from nestling.report.examples import png_uri
from nestling.report.robustness import strengths
from nestling.taxonomy import Taxonomy

EVIL = "<script>alert('$x_1$')</script>\u202e\"&|`\x07"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags as a stack, so that an unbalanced one fails; and what the page shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))

    @property
    def sections(self) -> set[str]:
        return {str(attrs["id"]) for tag, attrs in self.tags if tag == "section" and attrs.get("id")}

    def images(self, kind: str) -> list[bytes]:
        prefix = f"data:image/{kind};base64,"
        sources = [str(attrs.get("src")) for tag, attrs in self.tags if tag == "img"]
        return [base64.b64decode(source.removeprefix(prefix)) for source in sources if source.startswith(prefix)]


def levels_of(taxonomy: Taxonomy, accuracy: float, seeds: int, overconfidence: float = 0.02) -> list[dict]:
    spread = {"std": {"accuracy": 0.006, "overconfidence": 0.004, "ece": 0.002}} if seeds > 1 else {}
    return [
        {"name": level, "accuracy": accuracy - 0.01 * k, "confidence": accuracy + overconfidence, "n": 450,
         "overconfidence": overconfidence, "ece": abs(overconfidence), "tree_distance": 3.5, **spread}
        for k, level in enumerate(taxonomy.levels)
    ]  # fmt: skip


def make(taxonomy: Taxonomy, seeds: int = 3, rivals: dict[str, float] | None = None) -> Content:
    rng = np.random.default_rng(0)
    accuracies = {"nested": 0.97, **(rivals or {"end-to-end": 0.95, "flat-marginal": 0.968, "flat-crm": 0.94})}
    entries = {
        method: {"levels": levels_of(taxonomy, accuracy, seeds), "agreement": 0.99,
                 "distortions": {"turbulence:1,0.5": {"levels": levels_of(taxonomy, accuracy - 0.2, seeds, 0.1)}}}
        for method, accuracy in accuracies.items()
    }  # fmt: skip
    finest = taxonomy.levels[-1]
    comparisons = [
        {"baseline": m, "level": finest, "metric": metric, "difference": gap, "interval": [gap - 0.008, gap + 0.008]}
        for m, accuracy in accuracies.items()
        for metric, gap in (("accuracy", 0.97 - accuracy), ("overconfidence", 0.0))
        if m != "nested"
    ]
    stages = ["coarse"] * 3 + ["fine"] * 4
    training = [
        Curve(method=m, seed=seed, stage_of_epoch=stages, epochs=[1, 2, 3, 1, 2, 3, 4][: 7 - seed % 2],
              loss=[3.0, 2, 1, 2, 1, 0.5, 0.4], metrics={"validation loss": [3.0] * 7,
              f"accuracy/{finest}": [None, None, None, 0.5, 0.8, 0.9, float("nan")]})
        for m in accuracies if m != "flat-crm" for seed in range(seeds)
    ]  # fmt: skip
    confidence = rng.uniform(0.3, 1, 450 * seeds)
    rows = (confidence, rng.random(len(confidence)) < confidence)
    counts = {level: np.full(len(names), 40) for level, names in taxonomy.classes.items()}
    chain = [taxonomy.column_names(level)[taxonomy.ancestor(level, of=finest)[0]] for level in taxonomy.levels]
    known = {"class": chain[0], "level": taxonomy.levels[0], "confidence": 0.95}
    sure = {"class": chain[-1], "level": finest, "confidence": 0.92}
    picture = rng.integers(0, 256, (1, 8, 8), dtype=np.uint8)
    examples = [
        Example(image=picture, truth=chain, path=chain, confidence=[0.95] * len(chain), answer=answer, item="row 7")
        for answer in (known, sure, None)
    ]
    return Content(
        title="nested on digits",
        source="digits",
        metrics={**entries.pop("nested"), "methods": entries, "comparisons": comparisons, "verdict": "As is & said.",
                 "method": "nested", "seed": 0, "seeds": [{"seed": s} for s in range(seeds)] if seeds > 1 else [],
                 "commit": None, "versions": {"torch": "2.13.0"}, "seconds": 71.3},
        curves=training,
        reliability={m: dict.fromkeys(taxonomy.levels, rows) for m in accuracies},
        taxonomy=taxonomy,
        node_accuracy={level: (count - 2 * np.arange(len(count)) % 7, count) for level, count in counts.items()},
        examples=examples,
        settings=[("precision", "fp32", "the processor has no bf16 instructions")],
        notes=["A note."],
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Taxonomy:
    return Taxonomy.from_paths([(("round", "straight")[d % 2], f"group {d % 4}", str(d)) for d in range(10)])


@pytest.fixture(scope="module")
def full(digits) -> tuple[Content, str, Page]:
    content = make(digits)
    html = render(content)
    return content, html, Page(html)


def test_every_section_of_a_full_report_is_there(full):
    _, html, page = full
    sections = {"verdict", "results", "comparisons", "distortions", "reliability", "taxonomy", "examples", "training"}
    assert page.sections == sections | {"settings"}
    assert len(page.images("svg+xml")) == 5
    assert len(page.images("png")) == 3
    assert "As is & said." in page.words
    assert "the processor has no bf16 instructions" in page.words
    assert len(html) < 3e6


def test_the_figures_are_valid_svg_with_text_axes_and_units(full):
    texts = []
    for svg in full[2].images("svg+xml"):
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        texts.append(" ".join(node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")))
    forest, distortions, reliability, taxonomy, training = texts
    assert "nested minus baseline (percentage points)" in forest
    assert "confidence − accuracy (points)" in distortions
    assert "accuracy (%)" in reliability
    assert "rows (log)" in reliability
    assert "straight" in taxonomy
    assert "accuracy on the class's test rows (%)" in taxonomy
    assert "validation accuracy (%)" in training
    assert "epoch" in training


def test_the_page_needs_nothing_from_outside(full):
    _, html, page = full
    assert "http://" not in html
    assert "https://" not in html
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert "href" not in attrs
        assert str(attrs.get("src", "data:image/")).startswith("data:image/")


def test_the_same_content_gives_the_same_bytes(full):
    assert render(full[0]) == full[1]


def test_names_from_outside_are_neither_markup_nor_formulas(digits):
    taxonomy = Taxonomy.from_paths([(EVIL, f"{EVIL}{k}") for k in range(3)], levels=["<b>", "fi$ne"])
    content = make(taxonomy, rivals={"<i>rival": 0.95, EVIL: 0.9})
    content = dataclasses.replace(content, title=EVIL, source=EVIL, notes=[EVIL], settings=[(EVIL, EVIL, EVIL)])
    html = render(content)
    page = Page(html)
    assert "<script" not in html
    assert "\u202e" not in html
    assert not {"script", "i>rival"} & {tag for tag, _ in page.tags}
    assert "alert('$x_1$')" in page.words
    for svg in page.images("svg+xml"):
        ElementTree.fromstring(svg)
    card = render_card(EVIL, taxonomy, content.metrics, content.settings, EVIL, licence='mit"\nevil: 1')
    assert "<script" not in card
    assert "\nevil:" not in card


def test_what_has_no_data_is_left_out():
    page = Page(render(Content(title="t", source="s", metrics={})))
    assert page.sections == {"verdict", "settings"}
    assert not page.images("svg+xml")
    alone = {"levels": [{"name": "fine", "accuracy": 0.9, "n": 10, "ece": None}], "method": "nested"}
    page = Page(render(Content(title="t", source="s", metrics=alone)))
    assert page.sections == {"verdict", "results", "settings"}
    assert "No baseline was run beside it." in page.words
    assert "±" not in page.words


def test_answers_that_nobody_vouches_for_are_marked():
    """The coarsest class, answered for want of a better one: also where the coarsest level is the finest."""
    tree = Taxonomy.from_paths(["a", "b"])
    sure, unsure = (
        Example(image=None, truth=["a"], path=["a"], confidence=[confidence], item="a text",
                answer={"level": tree.levels[0], "class": "a", "confidence": confidence})
        for confidence in (0.95, 0.6)
    )  # fmt: skip
    content = Content(title="t", source="s", metrics={"method": "nested"}, taxonomy=tree, examples=[sure, unsure])
    assert [(group.title.split(":")[0], len(group.cards)) for group in examples.groups(content)] == [
        ("Unsure of every class", 1),
        ("Sure down to the finest class", 1),
    ]
    assert Page(render(content)).words.count("(unsure: below 90 %)") == 1


def test_text_rows_and_rows_without_labels_are_shown():
    taxonomy = Taxonomy.from_paths(["a/x", "a/y"])
    example = Example(
        image=None, truth=["a", ""], path=["a", "x"], confidence=[0.9, float("nan")], answer=None, item="a text"
    )
    page = Page(render(Content(title="t", source="s", metrics={}, taxonomy=taxonomy, examples=[example])))
    assert "a text" in page.words
    assert "no answer" in page.words


@pytest.mark.parametrize(
    ("rivals", "outcome", "badge"),
    [
        ({"a": 0.95, "b": 0.9}, "won", "nested wins"),
        ({"a": 0.968, "b": 0.9}, "open", "No clear winner"),
        ({"a": 0.99, "b": 0.9}, "lost", "a wins"),
        ({"nested (temperature only)": 0.99}, "alone", "No comparison"),
    ],
)
def test_the_headline_follows_the_intervals(digits, rivals, outcome, badge):
    headline = summary.headline(make(digits, rivals=rivals))
    assert (headline.outcome, headline.badge) == (outcome, badge)


def test_the_headline_says_by_how_much(digits):
    won = summary.headline(make(digits, rivals={"a": 0.95, "b": 0.9}))
    assert won.text == "95.0 % accuracy at the finest level, fine: 2.0 points more than the best baseline, a (93.0 %)."
    near = summary.headline(make(digits, rivals={"a": 0.968, "b": 0.9}))
    assert "the difference to a (94.8 %) is within noise. It is clearly ahead of b." in near.text
    lost = summary.headline(make(digits, rivals={"a": 0.99, "b": 0.9}))
    assert lost.text == "97.0 % accuracy at the finest level, fine: 2.0 points more than nested (95.0 %)."


def test_the_headline_tells_of_clear_losses_elsewhere(digits):
    content = make(digits, rivals={"flat-marginal": 0.968})
    more = [
        {"baseline": "flat-marginal", "level": level, "metric": "accuracy", "condition": condition,
         "difference": difference, "interval": interval}
        for level, condition, difference, interval in (
            ("coarse", "clean", 0.02, [0.01, 0.03]),
            ("fine", "turbulence:1,0.5", -0.312, [-0.521, -0.104]),
            ("fine", "turbulence:1,0.25", -0.1, [-0.2, 0.1]),
        )
    ]  # fmt: skip
    metrics = {**content.metrics, "comparisons": [*content.metrics["comparisons"], *more]}
    found = summary.headline(dataclasses.replace(content, metrics=metrics))
    assert found.outcome == "open" and found.text.endswith(
        "Elsewhere nested is clearly worse than flat-marginal (fine under turbulence:1,0.5 −31.2 points); "
        "clearly better than flat-marginal (coarse +2.0 points)."
    )


def test_the_best_values_are_marked_ties_included(digits):
    content = make(digits, rivals={"a": 0.97, "b": 0.9})
    clean = summary.table(content)[0]
    marked = {method: [cell.best for cell in cells] for method, cells in clean.rows}
    assert marked["nested"][0]
    assert marked["a"][0]
    assert not marked["b"][0]
    assert not marked["nested"][-1], "agreement is free for a flat model, so nobody wins it"
    assert dict(clean.rows)["nested"][0].text == "97.0"
    assert dict(clean.rows)["nested"][0].spread == "± 0.6"


def test_a_signed_overconfidence_is_better_near_zero():
    def levels(value):
        return [{"name": "fine", "accuracy": 0.9, "overconfidence": value, "n": 9}]

    metrics = {"levels": levels(0.01), "methods": {"a": {"levels": levels(-0.05)}}, "method": "nested"}
    content = Content(title="t", source="s", metrics=metrics)
    difference = {"baseline": "a", "level": "fine", "metric": "overconfidence", "difference": 0.06}
    assert summary.outcome(content, {**difference, "interval": [0.05, 0.07]}) == "better"
    assert summary.outcome(content, {**difference, "interval": [-0.05, 0.07]}) == "open"


def test_binning_counts_every_row_once():
    confidence = np.array([0.0, 0.1, 0.1000001, 0.55, 1.0])
    mean, accuracy, count = calibration.binned(confidence, np.array([0, 1, 1, 0, 1]))
    assert count.tolist() == [2, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert mean[0] == pytest.approx(0.05)
    assert accuracy[0] == 0.5
    assert np.isnan(accuracy[2])


def test_stages_line_up_however_epochs_are_counted():
    stages = ["a", "a", "b", "b", "b"]
    anew = Curve(method="m", seed=0, stage_of_epoch=stages, epochs=[1, 2, 1, 2, 3], loss=[1.0] * 5)
    onward = dataclasses.replace(anew, epochs=[1, 2, 3, 4, 5])
    from_zero = dataclasses.replace(anew, epochs=[0, 1, 2, 3, 4])
    for curve in (anew, onward, from_zero):
        names, starts = curves.line_up([curve])
        assert names == ["a", "b"]
        assert starts.tolist() == [0, 2, 5]


def test_the_icicle_spans_leaves_in_order_also_in_a_ragged_tree():
    taxonomy = Taxonomy.from_paths(["a/x/1", "a/x/2", "b", "c/y"])
    content = make(taxonomy)
    found, leaves = icicle.nodes(content)
    spans = {(node.depth, node.name): (node.begin, node.end) for node in found}
    assert leaves == 4
    assert spans[0, "a"] == spans[1, "x"] == (0, 2)
    assert spans[0, "b"] == (2, 3)
    assert spans[1, "y"] == spans[0, "c"] == (3, 4)
    assert (1, "b") not in spans
    Page(render(content))


@pytest.mark.parametrize("leaves", [1, 2, 61, 200, 900])
def test_trees_of_any_size_are_drawn(leaves):
    taxonomy = Taxonomy.from_paths([(f"class {k % 7}", f"a rather long species name {k}") for k in range(leaves)])
    with plots.styled():
        figure = icicle.icicle(make(taxonomy, seeds=1))
        assert figure is not None
        uri = plots.svg_uri(figure)
    assert figure.get_size_inches()[1] < 18
    assert len(uri) < 6e5


def test_pictures_of_every_shape_become_png():
    rng = np.random.default_rng(0)
    for shape, pixelated in (((1, 8, 8), True), ((3, 32, 20), True), ((4, 300, 200), False), ((2, 9, 9), True)):
        uri, shown = png_uri(rng.integers(0, 256, shape, dtype=np.uint8))
        assert uri.startswith("data:image/png;base64,")
        assert shown == pixelated


def test_names_are_shortened_in_the_middle():
    assert shorten("species of the north", 40) == "species of the north"
    assert len(shorten("species of the north" * 9, 24)) <= 24
    assert plain("a\nb\x00\u202ec\ud800") == "a bc?"


def test_the_card_says_what_a_reader_needs(digits):
    content = make(digits, rivals={"a": 0.99, "b": 0.9})
    card = render_card("nested on digits", digits, content.metrics, content.settings, "digits", "cc-by-4.0",
                       {"coarse": 1.0, "fine": 0.1})  # fmt: skip
    front = card.split("---")[1]
    assert "library_name: nestling" in front
    assert json.loads(re.search(r"license: (.*)", front)[1]) == "cc-by-4.0"
    for text in ("nestling.from_pretrained(", "nestling predict", "fine: 10 % of the training rows", "**a is better.**",
                 "## Calibration", "## Limitations", "achddou2021nested", "overconfidence +10.0 points"):  # fmt: skip
        assert text in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    header = next(row for row in rows if row.startswith("| Method"))
    assert all(row.count("|") == header.count("|") for row in rows if row.split("|")[1].strip() in ("nested", "a", "b"))


def test_a_card_without_metrics(digits):
    card = render_card("untested", digits, {}, [], "digits")
    assert "## Results" not in card
    assert "nestling predict" in card


def test_no_figure_without_its_data():
    empty = Content(title="t", source="s", metrics={})
    makers = (comparison.forest, comparison.distortions, calibration.reliability, curves.training, icicle.icicle)
    assert [make_figure(empty) for make_figure in makers] == [None] * 5


def test_several_strengths_are_a_curve(digits):
    content = make(digits)
    before = len(Page(render(content)).images("svg+xml"))
    one = dict(content.metrics["distortions"])["turbulence:1,0.5"]
    metrics = {**content.metrics, "distortions": {"turbulence:1,0.5": one, "turbulence:1,1": one, "mirror": one}}
    drawn = render(dataclasses.replace(content, metrics=metrics))
    assert "as the distortion becomes stronger" in drawn
    assert len(Page(drawn).images("svg+xml")) == before + 1
    assert strengths(["clean", "mirror", "blur:2", "turbulence:2,0.5", "turbulence:2,1", "half:top"]) == {
        "blur:·": {"blur:2": 2.0},
        "turbulence:2,·": {"turbulence:2,0.5": 0.5, "turbulence:2,1": 1.0},
    }
