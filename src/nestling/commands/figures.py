"""What ``train``, ``evaluate`` and ``show`` print below the table of levels. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestling.commands.words import aligned, concept_lines, hierarchical_lines, retrieval_lines

SCORES = {"path": "ours", "rejection": "rejection", "softmax": "softmax", "energy": "energy"}
"""Of a score: its title in a table."""


def figure_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The further entries of metrics.json in lines, those that are there."""
    return [
        *hierarchical_lines(metrics),
        *concept_lines(metrics),
        *retrieval_lines(metrics.get("retrieval", {})),
        *unknown_lines(metrics),
    ]


def unknown_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The entry ``unknown`` of metrics.json in lines; none where there is none."""
    found = metrics.get("unknown")
    if not found:
        return []
    if "needs" in found:
        return [found["needs"]]
    levels = ", ".join(f"{level['name']} {100 * level['false_alarms']:.1f} %" for level in found["levels"])
    lines = [f"unknown, at a false-alarm rate of {100 * found['rate']:g} %; false alarms down to {levels}"]
    rows = []
    for name in found["sets"]:
        for level in found["levels"]:
            if name not in level:
                continue
            entry = level[name]
            rows.append(
                [
                    name,
                    level["name"],
                    f"{entry['n']:,}",
                    f"{100 * entry['detected']:.1f}",
                    *(
                        f"{100 * entry['auroc'][kind]:.1f} / {100 * entry['fpr95'][kind]:.1f}"
                        if kind in entry["auroc"]
                        else "-"
                        for kind in SCORES
                    ),
                ]
            )
    if rows:
        titles = [f"{title}: AUROC / FPR95" for title in SCORES.values()]
        lines += aligned([["unknown", "level", "rows", "detected %", *titles], *rows], 2)
    lines += [
        f"{name}: {100 * share:.1f} % are called unknown at just their level" for name, share in found["placed"].items()
    ]
    return lines
