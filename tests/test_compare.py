"""What a model scores, differences between methods against a naive bootstrap, and the verdict in words."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from nestling.data.dataset import LabelledData
from nestling.data.transforms import Preprocessing
from nestling.engine.runtime import Runtime
from nestling.evaluate.compare import compare, excess, gap, gap_interval, verdict
from nestling.evaluate.decide import Decisions
from nestling.evaluate.measure import Measurement, mean_over_seeds, measure, outputs_of
from small import small_model

LEVELS = ("coarse", "middle", "fine")


def naive_gap_interval(ours: np.ndarray, theirs: np.ndarray, draws: int, seed: int) -> tuple[float, float, float]:
    """Rows drawn with replacement, the same for both methods and all seeds; seeds drawn too from three on."""
    generator = np.random.default_rng(seed)
    conditions, seeds, rows = ours.shape

    def of(values: np.ndarray, which_seeds: np.ndarray, which_rows: np.ndarray) -> float:
        total = 0.0
        for s in which_seeds:
            for c in range(conditions):
                total += abs(sum(values[c, s, r] for r in which_rows) / rows)
        return total / (len(which_seeds) * conditions)

    every = np.arange(seeds), np.arange(rows)
    found = []
    for _ in range(draws):
        which_rows = generator.integers(rows, size=rows)
        which_seeds = generator.integers(seeds, size=seeds) if seeds >= 3 else np.arange(seeds)
        found.append(of(ours, which_seeds, which_rows) - of(theirs, which_seeds, which_rows))
    lo, hi = np.quantile(found, [0.025, 0.975])
    return of(ours, *every) - of(theirs, *every), lo, hi


def random_excess(shape: tuple[int, int, int], shift: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.beta(5, 2, shape) + shift - (generator.random(shape) < 0.7)


def test_gap_by_hand() -> None:
    """Two conditions, two seeds: mean excesses 0.3, -0.1 and 0.2, 0: (0.3 + 0.1 + 0.2 + 0) / 4."""
    values = np.array([[[0.5, 0.1], [0.3, -0.5]], [[0.2, 0.2], [-1.0, 1.0]]])
    assert gap(values) == pytest.approx(0.15)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_gap_interval_equals_a_naive_bootstrap(seeds: int) -> None:
    """Ends of 2,000 draws each, on differently drawn rows: apart by sampling error alone, a tenth of the width."""
    ours, theirs = random_excess((2, seeds, 40), 0.1, 1), random_excess((2, seeds, 40), 0.0, 2)
    difference, lo, hi = gap_interval(ours, theirs, draws=2000)
    expected, naive_lo, naive_hi = naive_gap_interval(ours, theirs, draws=600, seed=1)
    assert difference == pytest.approx(expected, abs=1e-6)
    width = naive_hi - naive_lo
    assert lo == pytest.approx(naive_lo, abs=0.15 * width) and hi == pytest.approx(naive_hi, abs=0.15 * width)
    assert lo < difference < hi


def test_gap_intervals_are_paired() -> None:
    """A method against itself differs by nothing in every draw; against a shifted self by nearly the same."""
    ours = random_excess((2, 3, 60), 0.2, 3)
    assert gap_interval(ours, ours) == (0.0, 0.0, 0.0)
    difference, lo, hi = gap_interval(ours + 0.05, ours)
    # Both gaps are far from 0, so that the absolute values change nothing.
    assert (difference, lo, hi) == pytest.approx((0.05, 0.05, 0.05), abs=1e-5)


def test_gap_interval_is_the_same_again() -> None:
    ours, theirs = random_excess((1, 3, 30), 0.1, 1), random_excess((1, 3, 30), 0.0, 2)
    assert gap_interval(ours, theirs) == gap_interval(ours, theirs)
    assert gap_interval(ours, theirs, seed=1) != gap_interval(ours, theirs)


def test_gap_interval_needs_no_room_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 draws of 200,000 rows are 160 MB as one matrix; whatever the chunks, the interval is the same."""
    ours, theirs = random_excess((1, 1, 200_000), 0.1, 1), random_excess((1, 1, 200_000), 0.0, 2)
    tracemalloc.start()
    gap_interval(ours, theirs, draws=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
    ours, theirs = random_excess((2, 3, 40), 0.1, 1), random_excess((2, 3, 40), 0.0, 2)
    whole = gap_interval(ours, theirs)
    monkeypatch.setattr("nestling.evaluate.compare.AT_ONCE", 7 * 4 * 40)
    assert gap_interval(ours, theirs) == pytest.approx(whole, abs=1e-6)


def test_wider_levels_give_wider_intervals() -> None:
    ours, theirs = random_excess((1, 1, 50), 0.1, 1), random_excess((1, 1, 50), 0.0, 2)
    _, lo, hi = gap_interval(ours, theirs, level=0.99)
    _, inner_lo, inner_hi = gap_interval(ours, theirs, level=0.5)
    assert lo < inner_lo < inner_hi < hi


# From measurements to comparisons ------------------------------------------------------------------------------------


def measured(data: LabelledData, accuracy: float, confidence: float, seed: int) -> Measurement:
    """Decisions right with this probability, all of the same confidence; under distortion 20 points less often."""
    generator = np.random.default_rng(seed)
    decisions = {}
    for condition, loss in (("clean", 0.0), ("blur:1", 0.2)):
        columns, sure = {}, {}
        for number, level in enumerate(LEVELS):
            truth, width = data.labels[:, number], data.taxonomy.width(level)
            right = generator.random(len(truth)) < accuracy - loss
            columns[level] = np.where(right | (truth < 0), truth, (truth + 1) % width)
            sure[level] = np.full(len(truth), confidence)
        decisions[condition] = Decisions(columns, sure)
    return Measurement({}, decisions)


@pytest.fixture(scope="module")
def partly(toy_data: LabelledData) -> LabelledData:
    return toy_data.keep({"middle": 0.8, "fine": 0.5}, seed=0)


def test_comparisons_by_hand(partly: LabelledData) -> None:
    """On rows labelled at the level alone, which the decisions at the others do not touch."""
    ours = [measured(partly, 0.9, 0.8, seed) for seed in range(3)]
    theirs = [measured(partly, 0.7, 0.8, 10 + seed) for seed in range(3)]
    found = compare(ours, {"flat": theirs}, partly)
    assert [(c["metric"], c["level"], c["condition"]) for c in found] == [
        ("accuracy", "coarse", "clean"),
        ("accuracy", "middle", "clean"),
        ("accuracy", "fine", "clean"),
        ("accuracy", "fine", "blur:1"),
        ("calibration gap", "fine", "clean"),
        ("calibration gap", "fine", "distorted"),
    ]
    assert all(c["baseline"] == "flat" and len(c["interval"]) == 2 for c in found)

    def share(measurements: list[Measurement], number: int, condition: str) -> list[float]:
        known = partly.labels[:, number] >= 0
        return [
            float((m.decisions[condition].columns[LEVELS[number]] == partly.labels[:, number])[known].mean())
            for m in measurements
        ]

    for c, (number, condition) in zip(found, [(0, "clean"), (1, "clean"), (2, "clean"), (2, "blur:1")]):
        expected = np.mean(share(ours, number, condition)) - np.mean(share(theirs, number, condition))
        assert c["difference"] == pytest.approx(expected)
        lo, hi = c["interval"]
        assert lo < c["difference"] < hi
    for c, condition in zip(found[4:], ["clean", "blur:1"]):
        gaps = [np.mean([abs(0.8 - a) for a in share(m, 2, condition)]) for m in (ours, theirs)]
        assert c["difference"] == pytest.approx(gaps[0] - gaps[1])
    assert (partly.labels[:, 2] >= 0).sum() == 120, "no test: every row is labelled finely"


def test_excess_is_confidence_minus_correctness(partly: LabelledData) -> None:
    m = measured(partly, 0.9, 0.8, 0)
    values = excess([m], partly, "fine", ["clean"])
    assert values.shape == (1, 1, 120)
    assert set(np.round(values.ravel(), 6)) == {0.8, -0.2}


def test_levels_without_labels_are_left_out(toy_data: LabelledData) -> None:
    coarse = toy_data.keep({"middle": 0.0})
    ours, theirs = ([measured(coarse, accuracy, 0.8, 0)] for accuracy in (0.9, 0.7))
    found = compare(ours, {"flat": theirs}, coarse)
    assert [(c["metric"], c["level"]) for c in found] == [("accuracy", "coarse")]


# In words ------------------------------------------------------------------------------------------------------------


def comparison(metric: str, difference: float, lo: float, hi: float, name: str = "flat", **changes: str) -> dict:
    condition = "distorted" if metric == "calibration gap" else "clean"
    return {
        "baseline": name,
        "level": "fine",
        "metric": metric,
        "condition": condition,
        "difference": difference,
        "interval": [lo, hi],
        **changes,
    }


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.012, 0.001, 0.023), "nested beats flat in fine accuracy (+1.2 points [+0.1, +2.3])"),
        ((-0.012, -0.023, -0.001), "nested loses to flat in fine accuracy (-1.2 points [-2.3, -0.1])"),
        ((0.012, -0.001, 0.025), "nested is not told apart from flat in fine accuracy (+1.2 points [-0.1, +2.5])"),
        ((0.012, 0.0, 0.025), "nested is not told apart from flat in fine accuracy (+1.2 points [+0.0, +2.5])"),
        ((0.0, 0.0, 0.0), "nested is not told apart from flat in fine accuracy (+0.0 points [+0.0, +0.0])"),
    ],
)
def test_the_verdict_says_who_wins(interval: tuple[float, float, float], words: str) -> None:
    said = verdict("nested", [comparison("accuracy", *interval)], "fine", 3)
    assert said.startswith(words + ".")


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.02, 0.01, 0.03), "its calibration gap under distortion is larger (+2.0 points [+1.0, +3.0])"),
        ((-0.02, -0.03, -0.01), "its calibration gap under distortion is smaller (-2.0 points [-3.0, -1.0])"),
        ((-0.02, -0.05, 0.01), "its calibration gap under distortion is not told apart (-2.0 points [-5.0, +1.0])"),
    ],
)
def test_the_verdict_on_calibration(interval: tuple[float, float, float], words: str) -> None:
    clean = comparison("accuracy", 0.0, -0.1, 0.1)
    said = verdict("nested", [clean, comparison("calibration gap", *interval)], "fine", 3)
    assert "; " + words + "." in said


def test_the_verdict_names_every_baseline_and_what_the_intervals_are() -> None:
    """Clean calibration does not enter; below three seeds the intervals are over rows alone, which is said."""
    given = [
        comparison("accuracy", 0.01, 0.001, 0.02),
        comparison("accuracy", -0.01, -0.02, -0.001, name="end-to-end"),
        comparison("calibration gap", 0.9, 0.8, 1.0, condition="clean"),
    ]
    said = verdict("nested", given, "fine", 3)
    assert "nested beats flat in fine accuracy (+1.0 points [+0.1, +2.0])." in said
    assert "nested loses to end-to-end in fine accuracy (-1.0 points [-2.0, -0.1])." in said
    assert "90.0" not in said and "calibration" not in said and "Points are percentage points" in said
    number = " Comparisons made: 3; where methods do not differ at all, about one in twenty would look clear by chance."
    assert said.endswith("paired 95 % intervals over seeds and test rows, 3 seeds." + number)
    assert verdict("nested", given, "fine", 2).endswith("intervals over test rows, 2 seeds." + number)
    one = verdict("nested", given, "fine", 1)
    assert one.endswith("intervals over test rows, 1 seed, which says nothing of how seeds differ." + number)


def test_the_verdict_tells_of_clear_differences_elsewhere() -> None:
    """At coarser levels and under distortion, losses first; what may be nothing is left out."""
    given = [
        comparison("accuracy", 0.01, -0.01, 0.03),
        comparison("accuracy", -0.02, -0.03, -0.01, level="coarse"),
        comparison("accuracy", 0.04, 0.01, 0.07, level="middle"),
        comparison("accuracy", -0.312, -0.521, -0.104, condition="blur:1"),
        comparison("accuracy", -0.9, -1.0, 0.0, condition="blur:2"),
    ]
    assert verdict("nested", given, "fine", 3).splitlines()[0] == (
        "nested is not told apart from flat in fine accuracy (+1.0 points [-1.0, +3.0]); it is clearly worse in coarse "
        "accuracy (-2.0 points [-3.0, -1.0]), fine accuracy under blur:1 (-31.2 points [-52.1, -10.4]); it is "
        "clearly better in middle accuracy (+4.0 points [+1.0, +7.0])."
    )
    without = verdict("nested", given[1:2], "fine", 3)
    assert "not compared with flat in fine accuracy: no test row" in without and "worse in coarse" in without


# Over seeds ----------------------------------------------------------------------------------------------------------


def entry(accuracy: float, tree_distance: float | None) -> dict:
    return {"name": "fine", "accuracy": accuracy, "tree_distance": tree_distance, "n": 40}


def test_means_over_seeds_by_hand() -> None:
    """Sample deviation, beside every number but the count; a figure that one seed lacks is averaged over the others."""
    seeds = [
        {"levels": [entry(0.8, 2.0)], "agreement": 0.5, "distortions": {"blur:1": {"levels": [entry(0.2, 4.0)]}}},
        {"levels": [entry(0.9, None)], "agreement": 0.7, "distortions": {"blur:1": {"levels": [entry(0.4, None)]}}},
        {"levels": [entry(1.0, 3.0)], "agreement": None, "distortions": {"blur:1": {"levels": [entry(0.6, None)]}}},
    ]
    found = mean_over_seeds(seeds)
    (level,) = found["levels"]
    assert level == {
        "name": "fine",
        "accuracy": pytest.approx(0.9),
        "tree_distance": pytest.approx(2.5),
        "n": 40,
        "std": {"accuracy": pytest.approx(0.1), "tree_distance": pytest.approx(math.sqrt(0.5))},
    }
    assert found["agreement"] == pytest.approx(0.6)
    (distorted,) = found["distortions"]["blur:1"]["levels"]
    assert distorted["accuracy"] == pytest.approx(0.4)
    assert distorted["tree_distance"] == 4.0 and distorted["std"]["tree_distance"] is None
    assert mean_over_seeds(seeds[:1]) == seeds[0]


def test_measuring_a_model(partly: LabelledData) -> None:
    """The figures of metrics.json are those of the decisions, on the rows that are labelled at the level."""
    model = small_model(partly)
    preprocessing = Preprocessing.from_data(partly.images(np.arange(240)))
    outputs = outputs_of(model, preprocessing, partly, Runtime.choose("cpu", "fp32"), ["negative"])
    assert list(outputs) == ["clean", "negative"]
    found = measure(model, outputs, partly)
    assert [level["n"] for level in found.metrics["levels"]] == [240, 192, 120]
    assert list(found.metrics["distortions"]) == ["negative"]
    pixels = preprocessing.pixels(partly.images(np.arange(240)))
    for condition, seen in (("clean", pixels), ("negative", 1 - pixels)):
        with torch.no_grad():
            answers = model.eval().answers(model(preprocessing.normalise(seen)))
        levels = found.metrics["levels"] if condition == "clean" else found.metrics["distortions"]["negative"]["levels"]
        for number, level in enumerate(LEVELS):
            truth, p = partly.labels[:, number], answers.combined[level].numpy()
            known = truth >= 0
            right = (p.argmax(1) == truth)[known]
            assert levels[number]["accuracy"] == pytest.approx(right.mean())
            assert levels[number]["confidence"] == pytest.approx(p.max(1)[known].mean(), abs=1e-5)
            assert (found.correct(partly, level, condition) == right).all()
            assert found.confidence(partly, level, condition) == pytest.approx(p.max(1)[known], abs=1e-5)
    with torch.no_grad():
        separate = model.answers(model(preprocessing(partly.images(np.arange(240))))).separate["fine"].numpy()
    known = partly.labels[:, 2] >= 0
    uncombined = (separate.argmax(1) == partly.labels[:, 2])[known].mean()
    assert found.metrics["levels_uncombined"][2]["accuracy"] == pytest.approx(uncombined)


def test_measuring_a_flat_model(partly: LabelledData) -> None:
    """Coarser answers are the ancestors of the finest one, or of the one of least distance; both always agree."""
    model = small_model(partly, method="flat-marginal")
    preprocessing = Preprocessing.from_data(partly.images(np.arange(240)))
    outputs = outputs_of(model, preprocessing, partly, Runtime.choose("cpu", "fp32"))
    for least_distance in (False, True):
        found = measure(model, outputs, partly, least_distance=least_distance)
        columns = found.decisions["clean"].columns
        for level in LEVELS[:2]:
            assert (columns[level] == partly.taxonomy.ancestor(level, of="fine")[columns["fine"]]).all()
        assert found.metrics["agreement"] == found.metrics["agreement_uncombined"] == 1.0
        assert found.metrics["levels"] == found.metrics["levels_uncombined"]
