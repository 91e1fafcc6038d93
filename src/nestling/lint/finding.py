"""What a check finds: its kind, the rows that show it, and how these could be mended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ERRORS = (
    "two-parents",
    "cycle",
    "contradicting-labels",
    "unknown-class",
    "missing-file",
    "unreadable-file",
    "duplicate-across-splits",
    "duplicate-contradicting",
    "same-row-twice",
)
WARNINGS = (
    "similar-names",
    "single-child",
    "tiny-class",
    "empty-class",
    "ragged-row",
    "class-mix-drift",
    "near-duplicate",
)
SEVERITY = {**dict.fromkeys(ERRORS, "error"), **dict.fromkeys(WARNINGS, "warning")}
"""Every kind of finding, and how bad it is: training cannot be trusted with an error, and can live with a warning."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault. Places count the rows of the table that was checked, which a mended one may have fewer of."""

    kind: str
    """One of ``SEVERITY``."""
    rows: tuple[int, ...]
    """The rows of the source that show it, counted from 0."""
    items: tuple[str, ...]
    """Their names; classes, folders or lines of a taxonomy where no row shows it."""
    message: str
    remedy: str
    drop: tuple[int, ...] = ()
    """Places of the rows that a mended copy leaves out."""
    cells: tuple[tuple[int, int, str | None], ...] = ()
    """(place, level, name): labels that a mended copy has instead, None for one that is forgotten."""

    @property
    def severity(self) -> str:
        return SEVERITY[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """As in ``lint --json``."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "rows": list(self.rows),
            "items": list(self.items),
            "message": self.message,
            "remedy": self.remedy,
        }
