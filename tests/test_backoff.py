"""Back-off: the counts that prove a risk, the thresholds that keep it, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nestling.bundle import from_pretrained, held_scores
from nestling.data.dataset import LabelledData
from nestling.data.split import cut_parts
from nestling.errors import DataError, StorageError, UsageError
from nestling.evaluate.answered import counted_at, fixed, outcome
from nestling.evaluate.backoff import back_off, depths_to_try
from nestling.evaluate.coverage import figures
from nestling.evaluate.guarantee import (
    binomial_p_value,
    fixed_sequence,
    risk_control_threshold,
    rows_needed,
    rows_needed_on_average,
    set_threshold,
)
from nestling.evaluate.scores import Scores
from nestling.evaluate.sets import set_thresholds
from nestling.taxonomy import Taxonomy
from small import RECIPES, quick


def tail(errors: int, rows: int, risk: float) -> float:
    return sum(math.comb(rows, k) * risk**k * (1 - risk) ** (rows - k) for k in range(errors + 1))


@pytest.mark.parametrize(
    ("errors", "rows", "risk"), [(0, 45, 0.05), (3, 60, 0.1), (7, 7, 0.3), (0, 0, 0.5), (2, 9, 0.9)]
)
def test_the_p_value_is_the_binomial_tail(errors: int, rows: int, risk: float) -> None:
    assert binomial_p_value(errors, rows, risk) == pytest.approx(tail(errors, rows, risk), abs=1e-12)


def test_the_p_value_by_hand_and_below_hoeffding_bentkus() -> None:
    # One error in two rows at 1/2: one quarter without, one half with one.
    assert binomial_p_value([0, 1, 2], 2, 0.5).tolist() == pytest.approx([0.25, 0.75, 1.0])
    rows, risk = 200, 0.1
    errors = np.arange(20)
    mean = errors / rows
    bentkus = math.e * binomial_p_value(errors, rows, risk)
    kl = np.where(mean > 0, mean * np.log(np.maximum(mean, 1e-300) / risk), 0) + (1 - mean) * np.log(
        (1 - mean) / (1 - risk)
    )
    assert (binomial_p_value(errors, rows, risk) <= np.minimum(bentkus, np.exp(-rows * kl)) * (1 + 1e-9)).all()
    with pytest.raises(UsageError, match="between 0 and the number"):
        binomial_p_value(3, 2, 0.1)


def test_the_rows_that_a_risk_needs() -> None:
    assert rows_needed(0.05, 0.1) == 45 and rows_needed(0.1, 0.1) == 22 and rows_needed_on_average(0.05) == 19
    for risk, delta, errors in ((0.05, 0.1, 0), (0.2, 0.05, 0), (0.05, 0.1, 1), (0.01, 0.1, 2)):
        count = rows_needed(risk, delta, errors)
        assert tail(errors, count, risk) <= delta < tail(errors, count - 1, risk)
    for wrong in (0, 1, True, -0.1, "5"):
        with pytest.raises(UsageError, match="risk must lie between 0 and 1"):
            rows_needed(wrong, 0.1)  # type: ignore[arg-type]


def test_a_fixed_sequence_stops_at_the_first_failure() -> None:
    assert fixed_sequence([0.01, 0.1, 0.2, 0.01], 0.1) == 2
    assert (
        fixed_sequence([0.2, 0.0], 0.1) == 0 and fixed_sequence([0.0, 0.1], 0.1) == 2 and fixed_sequence([], 0.1) == 0
    )


def test_risk_control_by_hand() -> None:
    # 19 rows at 10 %: (losses + 1) / 20 <= 0.1 allows one loss; the second largest turn, 0.6, must be above.
    turns = np.array([0.8, 0.6, 0.4] + [-np.inf] * 16)
    threshold = risk_control_threshold(turns, 0.1)
    assert threshold > 0.6 and threshold == pytest.approx(0.6)
    assert risk_control_threshold(turns, 0.3) == 0.0
    with pytest.raises(UsageError, match="19 are needed"):
        risk_control_threshold(np.zeros(18), 0.05)


def test_set_threshold_by_hand() -> None:
    assert set_threshold(np.arange(1, 20) / 20, 0.1) == 0.1
    generator = np.random.default_rng(0)
    missed = [(generator.random(200) < set_threshold(generator.random(39), 0.1)).mean() for _ in range(300)]
    assert np.mean(missed) == pytest.approx(0.1, abs=0.01)


def rows(
    taxonomy: Taxonomy, count: int, seed: int, hard: float = 1.0, known: tuple[float, ...] = (1, 1, 1)
) -> tuple[Scores, Scores]:
    """Paths that are right as often as their confidence says, or, with ``hard`` above 1, less; all labels known, and
    only those shares of them."""
    generator = np.random.default_rng(seed)
    labels = taxonomy.columns(np.stack([np.full(count, -1)] * 2 + [generator.integers(0, 6, count)], axis=1))
    confidence = np.minimum.accumulate(1 - generator.random((count, 3)) ** 3 * np.array([0.2, 0.4, 0.6]), axis=1)
    chance = generator.random(count)
    right = chance[:, None] < confidence**hard
    columns = labels.copy()
    for i, level in enumerate(taxonomy.levels):
        # The class after the right one stands for a wrong one; a path that is wrong once is wrong below.
        columns[~right[:, i], i] = (columns[~right[:, i], i] + 1) % taxonomy.num_classes(level)
    given = np.where(generator.random(count)[:, None] < np.array(known), labels, -1)
    full = Scores(taxonomy, taxonomy.levels, confidence, columns, labels, confidence)
    return full, replace(full, labels=given)


def expected_losses(scores: Scores, depth: np.ndarray, hard: float) -> np.ndarray:
    """(n,): how probably each row of ``rows`` is answered wrongly."""
    at = np.take_along_axis(scores.confidence, np.maximum(depth - 1, 0)[:, None], 1)[:, 0]
    return np.where(depth > 0, 1 - at**hard, 0)


@pytest.mark.parametrize(
    ("risk", "hard", "known"), [(0.05, 1.0, (1, 1, 1)), (0.1, 1.5, (1, 1, 1)), (0.1, 2.0, (1.0, 0.6, 0.3))]
)
def test_the_risk_is_kept_in_nine_of_ten_draws(
    toy_taxonomy: Taxonomy, risk: float, hard: float, known: tuple[float, ...]
) -> None:
    test, _ = rows(toy_taxonomy, 4000, 0, hard)
    kept, depths, lost = [], [], []
    for seed in range(1, 61):
        (_, calibration), (_, validation) = (rows(toy_taxonomy, 300, 1000 * seed + k, hard, known) for k in (0, 1))
        depth = back_off(calibration, validation, risk).depth_of(test)
        kept.append(expected_losses(test, depth, hard).sum() <= risk * (depth > 0).sum())
        depths.append(depth.mean())
        depth = back_off(calibration, validation, risk, guarantee="crc").depth_of(test)
        lost.append(expected_losses(test, depth, hard).mean())
    assert np.mean(kept) >= 0.9 and np.mean(depths) > 0.3
    assert np.mean(lost) <= risk + 2 * np.std(lost) / len(lost) ** 0.5


@pytest.mark.parametrize("guarantee", ["ltt", "crc"])
@pytest.mark.parametrize("per", ["level", "class"])
def test_by_level_and_by_class(toy_taxonomy: Taxonomy, guarantee: str, per: str) -> None:
    test, _ = rows(toy_taxonomy, 8000, 0)
    kept, said = [], []
    for seed in range(1, 11):
        calibration, validation = (rows(toy_taxonomy, 600, 1000 * seed + k)[0] for k in (0, 1))
        chosen = back_off(calibration, validation, 0.1, guarantee=guarantee, per=per)
        for i, level in enumerate(toy_taxonomy.levels):
            # Never below the parent's threshold.
            if i:
                above = chosen.thresholds[i - 1][toy_taxonomy.column_parent(level)]
                assert (chosen.thresholds[i] >= above).all()
            goes = test.confidence[:, i] >= chosen.thresholds[i][test.columns[:, i]]
            wrong = goes & (test.columns[:, i] != test.labels[:, i])
            for code in range(toy_taxonomy.num_classes(level)) if per == "class" else [None]:
                here = np.ones(len(test), bool) if code is None else test.columns[:, i] == code
                of = here if guarantee == "crc" else here & goes
                kept.append(wrong[here].sum() / max(of.sum(), 1) <= (0.1 if guarantee == "ltt" else 0.15))
                said.append(goes[here].mean())
    assert np.mean(kept) >= 0.9 and np.mean(said) > 0.3


def test_depths_share_delta_only_where_labels_end_there(toy_taxonomy: Taxonomy) -> None:
    full, _ = rows(toy_taxonomy, 60, 0)
    assert depths_to_try(full, 0.05, 0.1) == [3]
    labels = full.labels.copy()
    labels[50:, 2] = -1
    # 50 and 60 rows would share delta, and then need 59 each.
    assert depths_to_try(replace(full, labels=labels), 0.05, 0.1) == [2]
    labels[20:, 1:] = -1
    assert depths_to_try(replace(full, labels=labels), 0.1, 0.1) == [1]


def test_rows_known_only_coarsely_do_not_stand_for_fine_answers(toy_taxonomy: Taxonomy) -> None:
    """Fine answers are often wrong, coarse ones never; of ten rows nine are known coarsely only. Counted where the
    answer's own label is known, the answers of these would hide the wrong ones."""
    count = 2000
    labels = toy_taxonomy.columns(np.stack([np.full(count, -1)] * 2 + [np.arange(count) % 6], axis=1))
    columns = labels.copy()
    unsure = np.arange(count) % 2 == 0
    columns[unsure & (np.arange(count) % 5 == 0), 2] ^= 1
    confidence = np.stack([np.ones(count), np.ones(count), np.where(unsure, 0.5, 0.4)], axis=1)
    known = labels.copy()
    known[np.random.default_rng(0).random(count) < 0.9, 2] = -1
    full = Scores(toy_taxonomy, toy_taxonomy.levels, confidence, columns, labels, confidence)
    validation, calibration = full, replace(full, labels=known)
    chosen = back_off(calibration, validation, 0.08)
    found = outcome(full, chosen.depth_of(full))
    assert found.risk is not None and found.risk <= 0.08


def test_too_few_rows_say_how_many_are_needed(toy_taxonomy: Taxonomy) -> None:
    few, many = (rows(toy_taxonomy, count, 0)[0] for count in (44, 60))
    with pytest.raises(UsageError, match=r"needs 45 calibration rows .* \(coarse 44, middle 44, fine 44\)"):
        back_off(few, many, 0.05)
    back_off(rows(toy_taxonomy, 45, 0)[0], many, 0.05)
    with pytest.raises(UsageError, match="needs 19 calibration rows"):
        back_off(rows(toy_taxonomy, 18, 0)[0], None, 0.05, guarantee="crc")
    with pytest.raises(UsageError, match="needs 22 calibration rows of a class"):
        back_off(rows(toy_taxonomy, 20, 0)[0], many, 0.1, per="class")
    # Ten thresholds share delta where none is known to come first.
    with pytest.raises(UsageError, match="needs 90 calibration rows"):
        back_off(many, None, 0.05)
    with pytest.raises(UsageError, match="has no calibration rows"):
        back_off(None, many, 0.05)
    with pytest.raises(UsageError, match=r"unknown guarantee lt: .* Did you mean 'ltt'"):
        back_off(many, many, 0.05, guarantee="lt")
    with pytest.raises(UsageError, match="need 19 calibration rows"):
        set_thresholds(rows(toy_taxonomy, 18, 0)[0], 0.05)


def test_few_rows_are_all_looked_at_before_none_is_answered(toy_taxonomy: Taxonomy) -> None:
    """46 rows prove 5 %, if none of the 45 surest is wrong: nine tenths of them would not do."""
    few, many = (rows(toy_taxonomy, count, 0)[0] for count in (46, 400))
    right = replace(few, columns=few.labels)
    assert "answers down to level fine" in back_off(right, many, 0.05).text
    wrong = replace(few, columns=np.roll(few.labels, 1, axis=0))
    text = back_off(wrong, many, 0.05).text
    assert "(45 without an error would prove it, or 77 with one)" in text and "ask for a higher risk" in text


def test_without_validation_rows_every_threshold_takes_its_share(toy_taxonomy: Taxonomy) -> None:
    test, _ = rows(toy_taxonomy, 8000, 0)
    found = [
        outcome(test, back_off(rows(toy_taxonomy, 400, seed)[0], None, 0.1).depth_of(test)) for seed in range(1, 21)
    ]
    assert np.mean([(one.risk or 0) <= 0.1 for one in found]) >= 0.9 and np.mean([one.depth for one in found]) > 0.3


def test_a_ragged_leaf_is_answered_where_it_ends() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b"])
    # Columns of fine: x, y, and b passing through.
    confidence = np.array([[0.9, 0.9], [0.9, 0.8], [0.9, 0.2]])
    columns, labels = np.array([[1, 2], [0, 1], [0, 1]]), np.array([[1, 2], [0, 1], [0, 0]])
    scores = Scores(taxonomy, taxonomy.levels, confidence, columns, labels, confidence)
    depth = fixed(taxonomy, scores.levels, 0.5).depth_of(scores)
    assert depth.tolist() == [1, 2, 1]
    assert outcome(scores, depth).risk == 0 and outcome(scores, np.array([1, 2, 2])).wrong == 1


def ragged(count: int, seed: int, known: float) -> tuple[Scores, Scores]:
    """Half of the rows at a leaf that ends early and is always right; of the others a fifth is wrong at the fine level,
    and a share of the fine labels is known."""
    taxonomy, generator = Taxonomy.from_paths(["a/x", "a/y", "b"]), np.random.default_rng(seed)
    labels = np.array([[1, 2], [0, 0], [0, 1]])[generator.integers(0, 2, count) * generator.integers(1, 3, count)]
    columns = labels.copy()
    wrong = (labels[:, 0] == 0) & (generator.random(count) < 0.2)
    columns[wrong, 1] = 1 - columns[wrong, 1]
    confidence = np.stack([np.ones(count), 0.5 + 0.4 * generator.random(count)], axis=1)
    given = labels.copy()
    given[(labels[:, 0] == 0) & (generator.random(count) > known), 1] = -1
    full = Scores(taxonomy, taxonomy.levels, confidence, columns, labels, confidence)
    return full, replace(full, labels=given)


@pytest.mark.parametrize("guarantee", ["ltt", "crc"])
def test_leaves_that_end_early_do_not_stand_for_rows_without_labels(guarantee: str) -> None:
    test, _ = ragged(20_000, 0, 1.0)
    kept, lost = [], []
    for seed in range(1, 41):
        (_, calibration), (_, validation) = (ragged(600, 100 * seed + k, 0.2) for k in (0, 1))
        found = outcome(test, back_off(calibration, validation, 0.05, guarantee=guarantee).depth_of(test))
        kept.append((found.risk or 0) <= 0.05)
        lost.append(found.wrong / len(test))
    if guarantee == "ltt":
        assert np.mean(kept) >= 0.9
    else:
        assert np.mean(lost) <= 0.05 + 2 * np.std(lost) / len(lost) ** 0.5


def test_of_leaves_that_end_early_as_large_a_share_counts() -> None:
    full, partly = ragged(600, 0, 0.2)
    ended = full.labels[:, 0] == 1
    assert counted_at(full, 1).all() and counted_at(partly, 0).all()
    counted, share = counted_at(partly, 1), (partly.labels[~ended, 1] >= 0).mean()
    assert (counted[~ended] == (partly.labels[~ended, 1] >= 0)).all() and counted[ended].sum() == round(
        share * ended.sum()
    )
    # Of test rows too: an error is that of rows that can be checked as deep as any answer goes.
    found, whole = (figures(fixed(full.taxonomy, full.levels, 0.0), rows) for rows in (partly, full))
    assert found["n"] == counted.sum() and found["error"] == pytest.approx(whole["error"], abs=0.04)
    assert found["depth"] == whole["depth"]


def test_scores_travel_and_are_checked(toy_taxonomy: Taxonomy) -> None:
    _, scores = rows(toy_taxonomy, 30, 0, known=(1, 0.5, 0.5))
    tensors = scores.tensors("calibration")
    again = Scores.from_tensors(tensors, "calibration", toy_taxonomy)
    assert all(
        np.array_equal(getattr(again, name), getattr(scores, name)) for name in ("confidence", "columns", "labels")
    )
    assert again.levels == scores.levels
    for name, change in (("confidence", 2.0), ("columns", 9), ("labels", -2), ("truth", float("nan"))):
        broken = dict(tensors)
        broken[f"calibration.{name}"] = tensors[f"calibration.{name}"].clone().fill_(change)
        with pytest.raises(DataError, match=name):
            Scores.from_tensors(broken, "calibration", toy_taxonomy)
    del tensors["calibration.truth"]
    with pytest.raises(DataError, match=r"calibration\.truth must be"):
        Scores.from_tensors(tensors, "calibration", toy_taxonomy)


def test_calibration_rows_shape_nothing(toy_data: LabelledData, tmp_path: Path) -> None:
    """Other pictures in their place leave weights, temperatures and the validation rows' scores as they are."""
    _, _, calibration = cut_parts(toy_data, None, 0)
    assert isinstance(toy_data.inputs, torch.Tensor)
    inputs = toy_data.inputs.clone()
    inputs[calibration.index] = 255 - inputs[calibration.index]
    runs = [quick(RECIPES["nested"], data) for data in (toy_data, replace(toy_data, inputs=inputs))]
    assert all(run.calibration is not None and len(run.calibration) == 24 for run in runs)
    one, other = (run.model.state_dict() for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert runs[0].preprocessing == runs[1].preprocessing
    scores = [held_scores(run) for run in runs]
    assert np.array_equal(scores[0]["validation"].confidence, scores[1]["validation"].confidence)
    assert not np.array_equal(scores[0]["calibration"].confidence, scores[1]["calibration"].confidence)

    # They travel in the bundle, and are those of the paths that are predicted.
    runs[0].save_pretrained(tmp_path / "model")
    predictor = from_pretrained(tmp_path / "model")
    kept = predictor.scores["calibration"]
    assert np.array_equal(kept.labels, toy_data.taxonomy.columns(calibration.labels))
    said = predictor.predict(calibration.inputs)  # type: ignore[arg-type]
    assert np.allclose(kept.confidence, [answer["confidence"] for answer in said], atol=1e-6)
    with pytest.raises(UsageError, match="needs 45 calibration rows"):
        predictor.predict(calibration.inputs, risk=0.05)  # type: ignore[arg-type]

    file = tmp_path / "model" / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StorageError, match="damaged"):
        from_pretrained(tmp_path / "model")
