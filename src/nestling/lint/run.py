"""``lint``: every check on a source, in one order; and the mended table, which has no errors left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nestling.audit import LevelAudit, audit_levels
from nestling.errors import DataError
from nestling.lint.classes import empty_classes, mix_drift, similar_names, tiny_classes
from nestling.lint.duplicates import across_splits, contradicting, near_duplicates, same_rows
from nestling.lint.finding import Finding
from nestling.lint.inputs import Prints, look, missing_files, unreadable_files
from nestling.lint.parents import across_gaps, slips, two_parents
from nestling.lint.table import Table, read_source
from nestling.lint.tree import against, cycles, of_file, ragged, single_child
from nestling.taxonomy import Taxonomy

ROUNDS = 8
"""Of mending: a mend may bring another fault to light."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is wrong with a source."""

    table: Table
    prints: Prints
    taxonomy: Taxonomy | None
    findings: tuple[Finding, ...]
    levels: tuple[LevelAudit, ...]
    """H(Y), H(Y | finer) and H(Y | coarser) of every level: Definitions 2.1 and 2.2 of nested learning."""

    def count(self, severity: str) -> int:
        """The findings of a severity, 'error' or 'warning'."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As ``lint --json``; entropies that are not defined are None."""
        return {
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [finding.to_dict() for finding in self.findings],
            "nestedness": [
                {
                    "level": level.level,
                    "rows": level.num_rows,
                    **{
                        name: None if value is None or value != value else value
                        for name, value in (
                            ("entropy", level.entropy),
                            ("given_finer", level.given_finer),
                            ("given_coarser", level.given_coarser),
                        )
                    },
                }
                for level in self.levels
            ],
        }


def lint(
    source: str | Path,
    data_dir: str | Path | None = None,
    taxonomy: str | Path | None = None,
    levels: Sequence[str] | None = None,
    *,
    qualify_names: bool = False,
    said: Callable[[int], None] | None = None,
) -> Report:
    """Check a source as ``load_data`` would read it, and go on where that would stop.

    ``said`` hears how many inputs have been looked at. Raises ``UsageError``, ``DataError`` and ``StorageError`` where
    the source cannot be read as a whole.
    """
    tree, faulty = None, None
    if taxonomy is not None:
        try:
            tree = Taxonomy.load(taxonomy)
        except DataError as error:
            faulty = error
    table = read_source(source, data_dir, tree, levels, qualify_names)
    broken: list[Finding] = []
    if faulty is not None:
        broken = of_file(table, Path(str(taxonomy))) if Path(str(taxonomy)).suffix.lower() == ".csv" else []
        if not broken:
            raise faulty
    prints = look(table, said)
    return Report(
        table=table,
        prints=prints,
        taxonomy=tree,
        findings=(*broken, *check(table, prints, tree)),
        levels=audit_levels(table.levels, table.codes),
    )


def check(table: Table, prints: Prints, taxonomy: Taxonomy | None) -> list[Finding]:
    """Every check of rows, errors first."""
    found = [*cycles(table)]
    swapped = {place for finding in found for place, _, _ in finding.cells}
    found += (
        against(table, taxonomy)
        if taxonomy is not None
        else [*_beside(swapped, two_parents(table)), *_beside(swapped, slips(table)), *across_gaps(table)]
    )
    found += missing_files(table, prints)
    found += unreadable_files(table, prints)
    found += across_splits(table, prints)
    found += contradicting(table, prints)
    found += same_rows(table, prints)
    found += similar_names(table)
    found += single_child(table)
    found += tiny_classes(table)
    found += empty_classes(table, taxonomy)
    found += ragged(table)
    found += mix_drift(table)
    return found + near_duplicates(table, prints)


def _beside(swapped: set[int], findings: list[Finding]) -> list[Finding]:
    """Without those that swapped columns alone explain."""
    return [finding for finding in findings if not {place for place, _, _ in finding.cells} <= swapped or not swapped]


def mend(report: Report) -> tuple[Table, list[str], list[str]]:
    """The table with the mends of all findings made, what was done, and every label that was changed. Raises DataError
    where errors stay."""
    table, prints = report.table, report.prints
    done: list[str] = []
    changes: list[str] = []
    findings = list(report.findings)
    for _ in range(ROUNDS):
        # Spellings first: a class that is written in two ways would seem to have two parents, or none.
        findings = [found for found in findings if found.kind == "similar-names" and found.cells] or findings
        drop = {place for finding in findings for place in finding.drop}
        columns = [list(column) for column in table.columns]
        changed = 0
        for finding in findings:
            for place, level, name in finding.cells:
                if place not in drop and (old := columns[level][place]) != name:
                    columns[level][place], changed = name, changed + 1
                    now = f"is now {name!r}" if name is not None else "is forgotten"
                    changes.append(f"{table.items[place]}: {table.levels[level]} {old!r} {now}")
        if not drop and not changed:
            break
        done += [f"{len(drop):,} rows left out"] * bool(drop)
        done += [f"{changed:,} labels changed or forgotten"] * bool(changed)
        kept = np.array([place for place in range(len(table)) if place not in drop], np.int64)
        if not len(kept):
            raise DataError(f"{table.name}: no row would be left in a mended copy")
        table, prints = replace(table, columns=columns).select(kept), prints.select(kept)
        findings = check(table, prints, report.taxonomy)
    left = [finding for finding in findings if finding.severity == "error"]
    if left:
        raise DataError(f"{table.name}: cannot be mended by itself: {left[0].message}; {left[0].remedy}")
    return table, done, changes
