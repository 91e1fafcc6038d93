"""From metrics to what a reader sees first: who won, where the model is unsure, and the rows of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestling.evaluate.decide import CONFIDENT
from nestling.report.content import Content, main_method

FEW_ROWS = 5
METRICS = {
    "accuracy": "Accuracy",
    "overconfidence": "Overconfidence",
    "ece": "ECE",
    "tree_distance": "Mistake distance",
    "agreement": "Agreement of levels",
    "calibration gap": "Calibration gap",
}


@dataclass(frozen=True)
class Cell:
    """One number of the table."""

    text: str
    spread: str = ""
    best: bool = False


@dataclass(frozen=True)
class Condition:
    """The rows of the table for one condition: (method, cells)."""

    name: str
    num_rows: int
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Headline:
    """``outcome`` is won, lost, open (no clear winner) or alone (nothing to compare with)."""

    outcome: str
    badge: str
    text: str


def method_entries(content: Content) -> dict[str, Mapping[str, Any]]:
    """Method -> its metrics, the main one first."""
    main = main_method(content)
    others = content.metrics.get("methods") or {}
    return {main: content.metrics, **{str(name): entry for name, entry in others.items() if name != main}}


def conditions(content: Content) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Condition -> method -> metrics: "clean", then every distortion and attack that any method was put under."""
    entries = method_entries(content)
    found: dict[str, dict[str, Mapping[str, Any]]] = {"clean": dict(entries)}
    for group, prefix in (("distortions", ""), ("attacks", "attack ")):
        for method, entry in entries.items():
            for name, value in (entry.get(group) or {}).items():
                found.setdefault(f"{prefix}{name}", {})[method] = value
    return found


def level_names(content: Content) -> list[str]:
    """The levels that the main method was measured at, coarse to fine."""
    return [str(level["name"]) for level in content.metrics.get("levels") or []]


def at_level(entry: Mapping[str, Any], level: str) -> Mapping[str, Any]:
    """The figures of one level; empty where there are none."""
    return next((x for x in entry.get("levels") or [] if x.get("name") == level), {})


def number(entry: Mapping[str, Any], key: str) -> float:
    """A finite number, else NaN: JSON has null where nothing could be measured."""
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else float("nan")


def _cell(entry: Mapping[str, Any], key: str, percent: bool, signed: bool = False) -> tuple[Cell, float]:
    value = number(entry, key) * (100 if percent else 1)
    if not np.isfinite(value):
        return Cell("–"), float("nan")
    spread = number(entry.get("std") or {}, key) * (100 if percent else 1)
    digits = 1 if percent else 2
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    shown = f"± {spread:.{digits}f}" if np.isfinite(spread) else ""
    return Cell(text.replace("-", "−"), shown), round(value, digits)


def columns(content: Content) -> list[tuple[str, str, str]]:
    """(key, level or "", direction: up, down, zero or none) per column of the table."""
    levels = level_names(content)
    found = [("accuracy", level, "up") for level in levels]
    finest = levels[-1] if levels else ""
    everything = [entry for methods in conditions(content).values() for entry in methods.values()]
    for key, direction in (("overconfidence", "zero"), ("ece", "down"), ("tree_distance", "down")):
        if any(np.isfinite(number(at_level(entry, finest), key)) for entry in everything):
            found.append((key, finest, direction))
    if any(np.isfinite(number(entry, "agreement")) for entry in everything):
        found.append(("agreement", "", "none"))
    return found


def table(content: Content) -> list[Condition]:
    """Every method under every condition; the best mean of a column, ties included, is marked within a condition."""
    found, keys = [], columns(content)
    for name, methods in conditions(content).items():
        cells = {m: [] for m in methods}
        for key, level, direction in keys:
            column = {
                m: _cell(at_level(entry, level) if level else entry, key, key != "tree_distance", direction == "zero")
                for m, entry in methods.items()
            }
            score = {"up": lambda v: -v, "down": lambda v: v, "zero": abs, "none": lambda v: float("nan")}[direction]
            scores = {m: score(value) for m, (_, value) in column.items() if np.isfinite(score(value))}
            for m, (cell, _) in column.items():
                best = len(scores) > 1 and m in scores and scores[m] == min(scores.values())
                cells[m].append(Cell(cell.text, cell.spread, best))
        count = [int(x["n"]) for entry in methods.values() for x in entry.get("levels") or [] if x.get("n")]
        found.append(Condition(name, max(count, default=0), list(cells.items())))
    return found


def is_variant(name: str, main: str) -> bool:
    """Whether this row is the main method itself under other settings: 'nested (temperature only)'."""
    return name == main or name.startswith(f"{main} (")


def clean_comparisons(content: Content, metric: str) -> list[Mapping[str, Any]]:
    """The comparisons on undistorted rows of one metric."""
    found = content.metrics.get("comparisons") or []
    return [c for c in found if c.get("metric") == metric and condition_of(c) == "clean"]


def condition_of(comparison: Mapping[str, Any]) -> str:
    """What the rows of a comparison were put under."""
    return str(comparison.get("condition") or comparison.get("distortion") or comparison.get("attack") or "clean")


def higher_is_better(metric: str) -> bool:
    """True for accuracies and agreement; errors, gaps, distances and losses are better low."""
    return any(word in metric for word in ("accuracy", "agreement", "recall"))


def outcome(content: Content, comparison: Mapping[str, Any]) -> str:
    """ "better", "worse" or "open" (the interval holds 0) for the main method.

    A signed overconfidence is better nearer to 0, so there the two values decide, not the sign of their difference.
    """
    low, high = comparison["interval"]
    if low <= 0 <= high:
        return "open"
    better = (low > 0) == higher_is_better(str(comparison["metric"]))
    if comparison["metric"] == "overconfidence":
        under, level = conditions(content).get(condition_of(comparison)) or {}, str(comparison.get("level"))
        ours, theirs = (
            abs(number(at_level(under.get(m) or {}, level), "overconfidence"))
            for m in (main_method(content), comparison["baseline"])
        )
        better = ours < theirs if np.isfinite(ours + theirs) else better
    return "better" if better else "worse"


def headline(content: Content) -> Headline:
    """Who won at the finest level, by how much; decided by the intervals, where there are any."""
    main, levels = main_method(content), level_names(content)
    if not levels:
        return Headline("alone", "Nothing measured", "There are no metrics to report.")
    finest = levels[-1]
    entries = method_entries(content)
    ours = number(at_level(entries[main], finest), "accuracy")
    what = f"{100 * ours:.1f} % accuracy at the finest level, {finest}"
    rivals = {m: number(at_level(e, finest), "accuracy") for m, e in entries.items() if not is_variant(m, main)}
    rivals = {m: accuracy for m, accuracy in rivals.items() if np.isfinite(accuracy)}
    if not rivals:
        if recalls := content.metrics.get("retrieval"):
            level, shares = list(recalls.items())[-1]
            found = f"Recall@1 {100 * shares['1']:.1f} % at {level}, by search; {what}, by its classifier"
            return Headline("alone", "No comparison", f"{main}: {found}. No baseline was run beside it.")
        return Headline("alone", "No comparison", f"{main}: {what}. No baseline was run beside it.")
    intervals = {c["baseline"]: c for c in clean_comparisons(content, "accuracy") if c.get("level") == finest}
    verdicts, gaps = {}, {}
    for m, accuracy in rivals.items():
        gaps[m] = float(intervals[m]["difference"]) if m in intervals else ours - accuracy
        low, high = intervals[m]["interval"] if m in intervals else (min(gaps[m], 0.0), max(gaps[m], 0.0))
        verdicts[m] = "won" if low > 0 else "lost" if high < 0 else "open"
    best = max(rivals, key=lambda m: rivals[m])
    by = f"{100 * abs(gaps[best]):.1f} points"
    elsewhere = _elsewhere(content, finest)
    if "lost" in verdicts.values():
        winner = max((m for m in rivals if verdicts[m] == "lost"), key=lambda m: rivals[m])
        by = f"{100 * abs(gaps[winner]):.1f} points"
        theirs = f"{100 * rivals[winner]:.1f} % accuracy at the finest level, {finest}"
        text = f"{theirs}: {by} more than {main} ({100 * ours:.1f} %).{elsewhere}"
        return Headline("lost", f"{winner} wins", text)
    if all(v == "won" for v in verdicts.values()):
        text = f"{what}: {by} more than the best baseline, {best} ({100 * rivals[best]:.1f} %).{elsewhere}"
        return Headline("won", f"{main} wins", text)
    beaten = [m for m in rivals if verdicts[m] == "won"]
    close = [f"{m} ({100 * rivals[m]:.1f} %)" for m in rivals if verdicts[m] == "open"]
    ahead = f" It is clearly ahead of {_enumerate(beaten)}." if beaten else ""
    text = f"{main}: {what}; the difference to {_enumerate(close)} is within noise.{ahead}{elsewhere}"
    return Headline("open", "No clear winner", text)


def _elsewhere(content: Content, finest: str) -> str:
    """Where else the accuracy differs clearly: at coarser levels and under distortion."""
    found: dict[tuple[str, str], list[str]] = {}
    for c in content.metrics.get("comparisons") or []:
        way, where = outcome(content, c), condition_of(c)
        if c["metric"] == "accuracy" and (c.get("level"), where) != (finest, "clean") and way != "open":
            place = f"{c.get('level')}{'' if where == 'clean' else f' under {where}'}"
            figure = f"{100 * c['difference']:+.1f}".replace("-", "−")
            found.setdefault((way, str(c["baseline"])), []).append(f"{place} {figure}")
    said = [f"clearly {way} than {name} ({', '.join(places)} points)" for (way, name), places in sorted(found.items())]
    return f" Elsewhere {main_method(content)} is {'; '.join(reversed(said))}." if said else ""


def _enumerate(names: list[str], limit: int = 3) -> str:
    shown = names if len(names) <= limit else [*names[: limit - 1], f"{len(names) - limit + 1} more"]
    return " and ".join(x for x in (", ".join(shown[:-1]), shown[-1]) if x)


@dataclass(frozen=True)
class Sureness:
    """Shares of the test rows at one level, in [0, 1]: the two sure ones and the rest add to 1."""

    level: str
    sure_right: float
    sure_wrong: float
    unsure: float
    accuracy_sure: float
    accuracy_unsure: float


def sureness(content: Content) -> list[Sureness]:
    """How often the main method is sure at each level, and whether rightly; empty without its confidences."""
    found = []
    for level, (confidence, correct) in (content.reliability.get(main_method(content)) or {}).items():
        sure, right = np.asarray(confidence) >= CONFIDENT, np.asarray(correct, dtype=bool)
        if not len(sure):
            continue
        found.append(
            Sureness(
                level,
                float((sure & right).mean()),
                float((sure & ~right).mean()),
                float((~sure).mean()),
                float(right[sure].mean()) if sure.any() else float("nan"),
                float(right[~sure].mean()) if (~sure).any() else float("nan"),
            )
        )
    return found


def weakest(content: Content, limit: int = 5) -> list[tuple[str, float, int]]:
    """(class, accuracy, number of rows) of the finest level's classes with the lowest accuracy."""
    if content.taxonomy is None:
        return []
    levels = [level for level in content.taxonomy.levels if level in content.node_accuracy]
    if not levels:
        return []
    names = content.taxonomy.classes[levels[-1]]
    correct, count = (np.asarray(x)[: len(names)] for x in content.node_accuracy[levels[-1]])
    rows = [(names[i], float(correct[i] / count[i]), int(count[i])) for i in range(len(count)) if count[i]]
    telling = [row for row in rows if row[2] >= FEW_ROWS]  # 0 % of one row says nothing
    return sorted(telling if len(telling) >= limit else rows, key=lambda row: (row[1], -row[2]))[:limit]
