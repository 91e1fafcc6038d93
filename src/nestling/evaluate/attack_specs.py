"""Attacks as the command line names them: ``fgsm:0.1``, ``deepfool:50``, ``saliency:0.1``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from nestling.errors import UsageError, unknown
from nestling.evaluate.attacks import (
    FRACTION,
    STEPS,
    Attacked,
    Classify,
    deepfool,
    fgsm,
    fgsm_until_flip,
    saliency_map,
)

FLIP = "flip"
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Attack:
    """``attack(classify, pixels, labels)``."""

    spec: str
    measure: str
    """What its strength is."""
    run: Callable[[Classify, Tensor, Tensor], Attacked]

    def __call__(self, classify: Classify, pixels: Tensor, labels: Tensor) -> Attacked:
        return self.run(classify, pixels, labels)


@dataclass(frozen=True)
class _Kind:
    usage: str
    meaning: str
    measure: str
    make: Callable[[str | None], Callable[[Classify, Tensor, Tensor], Attacked]]
    """From what stands behind the colon, None where there is none. Raises ``ValueError`` on what cannot be."""


def parse_attack(spec: str) -> Attack:
    """``"fgsm:0.1"`` to an ``Attack``; ``UsageError`` on an unknown name and on impossible values."""
    name, colon, text = spec.strip().partition(":")
    if name not in KINDS:
        raise unknown("attack", name, KINDS)
    kind = KINDS[name]
    try:
        return Attack(spec.strip(), kind.measure, kind.make(text.strip() if colon else None))
    except ValueError:
        raise UsageError(f"impossible attack {spec!r:.200}: expected {kind.usage}, {kind.meaning}") from None


def _fgsm(text: str | None) -> Callable[[Classify, Tensor, Tensor], Attacked]:
    if text == FLIP:
        return fgsm_until_flip
    epsilon = float(text or "")
    if not 0 <= epsilon <= 1:
        raise ValueError
    return partial(fgsm, epsilon=epsilon)


def _deepfool(text: str | None) -> Callable[[Classify, Tensor, Tensor], Attacked]:
    steps = STEPS if text is None else int(text)
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError
    return partial(deepfool, steps=steps)


def _saliency(text: str | None) -> Callable[[Classify, Tensor, Tensor], Attacked]:
    fraction = FRACTION if text is None else float(text)
    if not 0 < fraction <= 1:
        raise ValueError
    return partial(saliency_map, fraction=fraction)


KINDS = {
    "fgsm": _Kind(
        "fgsm:EPS",
        f"a step in [0, 1], pixels being in [0, 1], or fgsm:{FLIP} for one that grows until the answer is wrong",
        "epsilon",
        _fgsm,
    ),
    "deepfool": _Kind(
        "deepfool[:STEPS]", f"at most so many steps, 1 to {MOST_STEPS}, by default {STEPS}", "L2 norm", _deepfool
    ),
    "saliency": _Kind(
        "saliency[:FRACTION]",
        f"the share of an image's numbers that may be changed, above 0 and at most 1, by default {FRACTION:g}",
        "share changed",
        _saliency,
    ),
}
"""By name."""
