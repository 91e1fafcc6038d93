"""What ``train`` and ``evaluate`` print below the table of levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.commands.unknown import unknown_lines
from nestling.commands.words import concept_lines, hierarchical_lines, retrieval_lines


def figure_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The further entries of metrics.json in lines, those that are there."""
    return [
        *hierarchical_lines(metrics),
        *concept_lines(metrics),
        *retrieval_lines(metrics.get("retrieval", {})),
        *unknown_lines(metrics),
    ]
