"""What a report is made from: plain values that any caller can fill, and how untrusted names are shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from nestling.taxonomy import Taxonomy

BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Training curves of one method and seed, one value per epoch; None or NaN where nothing was measured."""

    method: str
    seed: int
    stage_of_epoch: Sequence[str]
    """The name of the stage that each epoch belongs to."""
    epochs: Sequence[float]
    """Running number of each epoch, over all stages or anew in each."""
    loss: Sequence[float | None]
    """Training loss."""
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Validation metrics by name; a name with 'loss' or 'nll' in it shares the axes of the loss, the others, in
    [0, 1], are drawn in per cent. A level's name in it gives the line that level's colour."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One test row with what the model said about it."""

    image: np.ndarray | None
    """uint8 (c, h, w); None for text, then ``item`` is shown in its place."""
    truth: Sequence[str | None]
    """True class per level; "" or None where not labelled."""
    path: Sequence[str]
    """Predicted class per level, coarse to fine; shorter where a ragged leaf ends early."""
    confidence: Sequence[float]
    """Confidence of each element of ``path``, in [0, 1]."""
    answer: Mapping[str, Any] | None
    """``{"level", "class", "confidence"}``: the deepest level that is confident enough, or None."""
    item: str = ""
    """The row's name: a file, an index, or the text itself."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a report shows. Sections whose data are empty are left out."""

    title: str
    source: str
    metrics: Mapping[str, Any]
    """As in ``metrics.json``: fractions in [0, 1]; ``methods``, ``comparisons``, ``verdict``, ``distortions``,
    ``seeds`` and each level's ``std`` where there are any."""
    curves: Sequence[Curve] = ()
    reliability: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """Method -> level -> (confidence in [0, 1], correct), one element per test row (and seed)."""
    taxonomy: Taxonomy | None = None
    node_accuracy: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Level -> (number of correct rows, number of rows) per class of the taxonomy."""
    examples: Sequence[Example] = ()
    concept_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Concept -> its weight after each epoch, of the main method's last stage that weights any."""
    theory: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of training rows, one number each: ``measured`` Pr{fine class} and Lemma 1's ``bound``, where fine labels are
    known; ``alpha``, ``within`` and ``beta``. The summary is ``metrics["theory"]``."""
    settings: Sequence[tuple[str, object, str]] = ()
    """(name, value, reason) of what was chosen automatically or given."""
    notes: Sequence[str] = ()
    method: str = ""
    """Name of the main method; default: ``metrics["method"]``."""


def main_method(content: Content) -> str:
    """The name of the method that the report is about."""
    return str(content.method or content.metrics.get("method") or "model")


def plain(value: object) -> str:
    """Text that is safe to lay out: one line, no control or direction-changing characters, valid Unicode."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    shown = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return "".join(c for c in shown if c not in BIDIRECTIONAL)


def shorten(value: object, limit: int) -> str:
    """``plain`` text of at most ``limit`` characters: the middle of a longer one becomes an ellipsis.

    Long class names often share a beginning (a genus, a folder), so the end is kept too.
    """
    text = plain(value)
    if len(text) <= limit:
        return text
    if limit < 8:
        return text[: max(limit - 1, 0)].rstrip() + "…"
    tail = limit // 3
    return text[: limit - 1 - tail].rstrip() + "…" + text[-tail:].lstrip()
