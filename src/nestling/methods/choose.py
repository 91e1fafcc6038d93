"""Which method a training takes when none is named: by what labels there are, and what else was asked for.

Rules are asked from the top, and the first that holds decides:

| holds where | method | because |
|---|---|---|
| a limit on memory is given | layerwise | it alone trains few layers at a time (Belilovsky et al., Section 4.3) |
| a target's mix of classes is given | robust | it alone weights concepts towards it (Qian et al., Section 3.1) |
| no row is labelled at the finest level | coins | instances tell fine classes apart (Xu et al., Equation 3) |
| else: every level is known for some rows | nested | any granularity trains it (Achddou et al., Section 2.2) |

Epochs follow the rows: 60 passes of a small set, of a large one so many as make three million pictures, at least 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.errors import UsageError

EPOCHS, LEAST_EPOCHS = 60, 10
PICTURES = 3_000_000
"""That all epochs together show, of sets too large for ``EPOCHS`` passes."""
COARSER_EPOCHS = 3
"""Of nested learning's stages before the last."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the rule looks at."""

    levels: Sequence[str]
    """Coarse to fine."""
    known: Sequence[int]
    """Training rows labelled at each level."""
    memory: bool = False
    """Whether a limit on memory is given."""
    mix: bool = False
    """Whether the mix of classes that a target has is given."""

    @property
    def finest_known(self) -> int:
        """The number of the finest level that any row is labelled at, -1 without any."""
        return max((number for number, count in enumerate(self.known) if count), default=-1)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A row of the table."""

    method: str
    holds: Callable[[Seen], bool]
    because: Callable[[Seen], str]
    fields: Callable[[Seen], dict[str, Any]] = lambda seen: {}
    """What else it sets in the method's recipe."""


def _counted(seen: Seen) -> str:
    return ", ".join(f"{level} {count:,}" for level, count in zip(seen.levels, seen.known, strict=True))


def _only_coarse(seen: Seen) -> bool:
    return 0 <= seen.finest_known < len(seen.levels) - 1


RULES = (
    Rule(
        method="layerwise",
        holds=lambda seen: seen.memory,
        because=lambda seen: "--memory limits what training may hold, and it alone trains a few layers at a time",
    ),
    Rule(
        method="robust",
        holds=lambda seen: seen.mix,
        because=lambda seen: "--target-mix gives another mix of classes, and it alone weights concepts towards one",
    ),
    Rule(
        method="coins",
        holds=_only_coarse,
        because=lambda seen: (
            f"no training row is labelled at level {seen.levels[-1]!r} (rows labelled: {_counted(seen)}), and it "
            f"learns to tell apart within {seen.levels[seen.finest_known]!r} without such labels"
        ),
        fields=lambda seen: {"label_level": seen.levels[seen.finest_known]} if seen.finest_known else {},
    ),
    Rule(
        method="nested",
        holds=lambda seen: True,
        because=lambda seen: (
            f"rows are labelled at every level ({_counted(seen)}), and it learns from all of them at once"
            if len(seen.levels) > 1
            else f"there is a single level ({_counted(seen)})"
        ),
    ),
)


def choose_method(seen: Seen) -> tuple[str, dict[str, Any], str]:
    """The method, the fields of its recipe that are set for it, and the reason.

    Raises UsageError where a limit on memory and a mix of classes are given, which no method takes together.
    """
    if seen.memory and seen.mix:
        raise UsageError("--memory asks for layerwise training and --target-mix for robust training: leave one out")
    rule = next(rule for rule in RULES if rule.holds(seen))
    return rule.method, rule.fields(seen), rule.because(seen)


def choose_epochs(method: str, num_rows: int, num_levels: int) -> tuple[int | tuple[int, ...] | None, str]:
    """The recipe's ``epochs`` for so many training rows, None for its own, and the reason."""
    wanted = max(min(EPOCHS, PICTURES // max(num_rows, 1)), LEAST_EPOCHS)
    if method == "layerwise" or wanted == EPOCHS:
        return None, f"the usual number for {num_rows:,} rows"
    reason = f"{num_rows:,} rows: {wanted} passes show about {wanted * num_rows / 1e6:.1f} million pictures"
    return (COARSER_EPOCHS,) * (num_levels - 1) + (wanted,) if method == "nested" else wanted, reason


def within(
    stages: Sequence[tuple[int, int, float]], budget: float, least: int = 3
) -> tuple[tuple[int, ...], int | None]:
    """Epochs of every stage, and steps per epoch (None for as many as they have), that take ``budget`` seconds at most.

    ``stages``: (epochs, steps per epoch, seconds in all) each, as they are wanted. Where the longest would be left with
    fewer epochs than ``least``, which a schedule and the choice of the best epoch need, its epochs become shorter.
    """
    total = sum(seconds for _, _, seconds in stages)
    if total <= budget:
        return tuple(epochs for epochs, _, _ in stages), None
    share = max(budget, 0.0) / total
    shorter = tuple(max(int(epochs * share), 1) for epochs, _, _ in stages)
    longest = max(range(len(stages)), key=lambda number: stages[number][2])
    if shorter[longest] >= min(least, stages[longest][0]):
        return shorter, None
    epochs, steps, _ = stages[longest]
    fewer = max(int(epochs * steps * share / least), 1)
    return tuple(max(int(e * s * share / fewer), 1) for e, s, _ in stages), fewer


def fields_with(fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` and what was chosen beside them; what was given stays."""
    return {**chosen, **fields}
