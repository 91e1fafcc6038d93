"""Back-off with a guarantee: the deepest level at which the answers' error rate stays below a risk that is asked for.

The thresholds come from calibration rows, which serve nothing else. Learn then Test: with probability 1 - delta over
the calibration rows, at most ``risk`` of the answers are wrong. Conformal risk control: on average over calibration
rows, at most ``risk`` of all rows are answered wrongly. Validation rows only say where the search begins.
"""

from __future__ import annotations

import numpy as np

from nestling.errors import UsageError, unknown
from nestling.evaluate.answered import (
    Backoff,
    Outcome,
    counted_at,
    depth_under,
    known_to,
    one_threshold,
    outcome,
    single_level,
    turns,
)
from nestling.evaluate.guarantee import (
    binomial_p_value,
    check_share,
    fixed_sequence,
    risk_control_threshold,
    rows_needed,
    rows_needed_on_average,
)
from nestling.evaluate.scores import Scores

GUARANTEES, SCOPES = ("ltt", "crc"), ("all", "level", "class")
DELTA = 0.1
MOST = 0.9
"""The largest share of rows that the first threshold aims at, where these are rows enough without an error."""
STEPS = 20
"""Thresholds that are tested one after the other; each may fail by chance, so that more of them find less."""
SPARE = 1.15
"""Times as many rows as needed are aimed at, since their number is known of the validation rows alone."""
WITHOUT_VALIDATION = (0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.0)
"""Thresholds that are tried where no validation row says where to begin: each then takes its share of delta."""


def back_off(
    calibration: Scores | None,
    validation: Scores | None,
    risk: float,
    *,
    guarantee: str = "ltt",
    delta: float = DELTA,
    per: str = "all",
) -> Backoff:
    """Thresholds that keep ``risk``.

    Parameters
    ----------
    calibration: rows like those to come, which neither training nor any choice has seen.
    validation: other rows, from whose scores the thresholds to try, and the first of them, are taken.
    risk: the share of wrong answers that is allowed, in (0, 1).
    guarantee: ltt or crc.
    delta: of ltt, the probability that the guarantee fails.
    per: all: over all answers; level: over the answers that say something of a level, for all levels at once; class:
        over the answers that say a class, for each class by itself.

    Raises UsageError where the calibration rows are too few for the risk, and says how many are needed.
    """
    check_share("risk", risk)
    check_share("delta", delta)
    if guarantee not in GUARANTEES:
        raise unknown("guarantee", guarantee, GUARANTEES)
    if per not in SCOPES:
        raise unknown("scope of the guarantee", per, SCOPES)
    if calibration is None or len(calibration) == 0:
        raise UsageError(
            "this model has no calibration rows, without which no risk can be guaranteed: train it again (not with "
            "whole=True), or leave --risk out"
        )
    if per != "all":
        return _by_group(calibration, validation, risk, guarantee, delta, per)
    return _crc(calibration, risk) if guarantee == "crc" else _ltt(calibration, validation, risk, delta)


def _ltt(calibration: Scores, validation: Scores | None, risk: float, delta: float) -> Backoff:
    """One threshold, and the finest level that is answered: of all pairs that pass, the one of the deepest answers.

    Rows that count are those known down to that level, whatever level they are answered at: counted where the answer's
    own label is known, the many rows that are known only coarsely would stand for more answers than they are.
    """
    tests = 1 if validation is not None and len(validation) else len(WITHOUT_VALIDATION)
    caps = depths_to_try(calibration, risk, delta, tests)
    share, best = delta / len(caps), None
    for cap in caps:
        rows, others = known_to(calibration, cap), None if validation is None else known_to(validation, cap)
        for threshold, found in _passing(rows, others, cap, risk, share):
            depth = float(depth_under(calibration, threshold, cap).mean())
            if best is None or depth > best[0]:
                best = depth, threshold, cap, found
    names = calibration.levels
    if best is None:
        needed, more = (rows_needed(risk, share / tests, errors=errors) for errors in (0, 1))
        each = f", at each of {len(caps)} depths" if len(caps) > 1 else ""
        text = (
            f"no threshold keeps the error rate below {_percent(risk)} with confidence {1 - delta:g} on "
            f"{counted_at(calibration, caps[-1] - 1).sum()} calibration rows ({needed} without an error would prove "
            f"it{each}, or {more} with one): there are no answers; ask for a higher risk, or train on more labelled "
            "rows"
        )
        return Backoff(one_threshold(calibration, np.inf, 0), text)
    _, threshold, cap, found = best
    p_value = float(binomial_p_value(found.wrong, found.counted, risk))
    text = (
        f"answers down to level {names[cap - 1]}, where confidence is at least {threshold:.4g}; of the calibration "
        f"rows {found.counted} are answered, {found.wrong} of them wrong (p = {p_value:.2g}). With confidence "
        f"{1 - delta:g} at most {_percent(risk)} of the answers are wrong, {_conditions(names[cap - 1])}"
    )
    return Backoff(one_threshold(calibration, threshold, cap), text)


def _crc(calibration: Scores, risk: float) -> Backoff:
    """The least threshold at which wrong answers stay below ``risk`` of all rows, down to the finest level that enough
    rows are labelled at."""
    needed, names = rows_needed_on_average(risk), calibration.levels
    enough = [i + 1 for i in range(len(names)) if counted_at(calibration, i).sum() >= needed]
    if not enough:
        raise UsageError(_too_few(calibration, needed, f"a mean risk of {_percent(risk)}"))
    cap = enough[-1]
    rows = known_to(calibration, cap)
    threshold = risk_control_threshold(turns(rows, cap), risk)
    found = outcome(rows, depth_under(rows, threshold, cap))
    text = (
        f"answers down to level {names[cap - 1]}, where confidence is at least {threshold:.4g}; of {len(rows)} "
        f"calibration rows {found.wrong} are answered wrongly. On average at most {_percent(risk)} of all rows are "
        f"answered wrongly, unanswered ones included, {_conditions(names[cap - 1])}"
    )
    return Backoff(one_threshold(calibration, threshold, cap), text)


def _by_group(
    calibration: Scores, validation: Scores | None, risk: float, guarantee: str, delta: float, per: str
) -> Backoff:
    """A threshold for each level, or for each class: of the rows whose path is vouched for there, whether or not the
    answer is deeper, at most ``risk`` are wrong there. A finer threshold is never below its parent's."""
    taxonomy, names = calibration.taxonomy, calibration.levels
    share = delta / len(names) if per == "level" else delta
    tests = 1 if validation is not None and len(validation) else len(WITHOUT_VALIDATION)
    needed = rows_needed(risk, share / tests) if guarantee == "ltt" else rows_needed_on_average(risk)
    thresholds, kept, groups, enough = [], 0, 0, False
    for i, level in enumerate(names):
        width, classes = taxonomy.width(level), taxonomy.num_classes(level)
        parent = taxonomy.ancestor(names[i - 1], of=level) if i else None
        above = np.zeros(width) if parent is None else thresholds[i - 1][parent]
        least = np.full(width, np.inf)
        for members in [np.arange(classes)] if per == "level" else np.arange(classes)[:, None]:
            groups += 1
            rows = single_level(calibration, i, members)
            if len(rows) < needed:
                continue
            enough = True
            others = None if validation is None else single_level(validation, i, members)
            if guarantee == "crc":
                passed = [risk_control_threshold(turns(rows, 1), risk)]
                least[members] = np.maximum(passed[0], above[members])
            else:
                passed = sorted(threshold for threshold, _ in _passing(rows, others, 1, risk, share))
                for member in members:
                    least[member] = next((t for t in passed if t >= above[member]), np.inf)
            kept += bool(np.isfinite(least[members]).any())
        # A leaf that ended above is answered there.
        least[classes:] = above[classes:]
        thresholds.append(least)
    if not enough:
        raise UsageError(_too_few(calibration, needed, f"a risk of {_percent(risk)} per {per}", f" of a {per}"))
    each = "for all levels at once" if per == "level" else "for each class by itself"
    promise = (
        f"with confidence {1 - delta:g} at most {_percent(risk)} of what is said of it is wrong, {each}"
        if guarantee == "ltt"
        else f"on average at most {_percent(risk)} of the rows whose path goes there are vouched for wrongly"
    )
    text = (
        f"{kept} of {groups} {'levels' if per == 'level' else 'classes'} can be vouched for ({needed} calibration rows "
        f"are needed of each): {promise}, {_conditions('that is judged')}"
    )
    return Backoff(tuple(thresholds), text)


def depths_to_try(calibration: Scores, risk: float, delta: float, tests: int = 1) -> list[int]:
    """The numbers of levels down to which answers are tried, each with its share of delta: those that more rows are
    known to than to the next finer one, as long as they are enough rows for each of ``tests`` thresholds to have its
    share. Raises UsageError where they never are."""
    known = counts_of(calibration)
    caps = [i + 1 for i in range(len(known)) if i + 1 == len(known) or known[i] > known[i + 1]]
    while caps:
        needed = rows_needed(risk, delta / len(caps) / tests)
        enough = [cap for cap in caps if known[cap - 1] >= needed]
        if len(enough) == len(caps):
            return caps
        # Fewer share delta, and each then needs fewer rows.
        caps = enough or ([max(caps, key=lambda cap: known[cap - 1])] if len(caps) > 1 else [])
    what = f"a risk of {_percent(risk)} at delta {delta:g}"
    raise UsageError(_too_few(calibration, rows_needed(risk, delta / tests), what))


def _passing(
    calibration: Scores, validation: Scores | None, cap: int, risk: float, delta: float
) -> list[tuple[float, Outcome]]:
    """The thresholds that pass, falling, each with what it makes of the calibration rows."""
    if validation is None or len(validation) == 0:
        thresholds, share = list(WITHOUT_VALIDATION), delta / len(WITHOUT_VALIDATION)
    else:
        thresholds, share = _sequence(validation, cap, len(calibration), risk, delta), delta
    tried = [(threshold, outcome(calibration, depth_under(calibration, threshold, cap))) for threshold in thresholds]
    p_values = [float(binomial_p_value(found.wrong, found.counted, risk)) for _, found in tried]
    if share < delta:
        return [pair for pair, p_value in zip(tried, p_values, strict=True) if p_value <= share]
    return tried[: fixed_sequence(p_values, delta)]


def _sequence(validation: Scores, cap: int, rows: int, risk: float, delta: float) -> list[float]:
    """Thresholds to test one after the other on so many calibration ``rows``, falling, from confidences alone.

    The first answers as many rows as pass with one error, and a few more, since counts differ; each of the following
    deepens the answers by as much; the last is 0, where all is answered. Begun with fewer rows a single error would
    end it, begun with more the errors of less confident rows would.
    """
    most = MOST if MOST * rows >= SPARE * rows_needed(risk, delta) else 1.0
    enough = min(SPARE * rows_needed(risk, delta, errors=1) / rows, most)
    answered = np.sort(validation.confidence[:, 0])[::-1]
    first = answered[min(int(enough * len(answered)), len(answered) - 1)]
    values = validation.confidence[:, :cap][validation.named[:, :cap]]
    values = np.append(values[values <= first], first)
    steps = np.quantile(values, np.linspace(1, 0, STEPS), method="nearest")
    return sorted({0.0, *steps.tolist()}, reverse=True)


def counts_of(calibration: Scores) -> list[int]:
    """How many rows count at each level."""
    return [int(counted_at(calibration, i).sum()) for i in range(len(calibration.levels))]


def _too_few(calibration: Scores, needed: int, what: str, of: str = "") -> str:
    counts = ", ".join(f"{level} {n}" for level, n in zip(calibration.levels, counts_of(calibration)))
    return (
        f"{what} needs {needed} calibration rows{of} whose label is known, even if none is answered wrongly, and this "
        f"model has fewer{' of each' if of else ''} at every level ({counts}): ask for a higher risk, or train on more "
        "labelled rows, a tenth of which are kept for calibration"
    )


def _conditions(level: str) -> str:
    where = f"known at level {level}" if level != "that is judged" else "known at the level that is judged"
    return (
        "as long as inputs are like the calibration rows and labels are missing at random, which neither the class nor "
        f"the input itself may influence: only rows {where} count"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
