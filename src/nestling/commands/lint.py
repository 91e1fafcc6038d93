"""``nestling lint``: what is wrong with a source, row by row, before anything is trained on it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING

from nestling.audit import LevelAudit
from nestling.commands.outputs import refuse_others
from nestling.commands.train import answer, say
from nestling.data.inputs import BLOCK
from nestling.files import write_json
from nestling.lint.fix import check_fits, check_target, write_copy
from nestling.lint.run import Report, lint, mend

if TYPE_CHECKING:
    from nestling.options import Lint

SHOWN, LISTED = 10, 50
"""Findings of one kind that are printed; the JSON has them all."""
EVERY = 10_000
"""Inputs after which a line says how far it is."""


def lint_command(command: Lint) -> int:
    """Run the command: 3 where there are errors, 0 with warnings alone."""
    out = None if command.fix is None else check_target(command.fix, command.source)
    refuse_others(command.json, "{")

    def said(done: int) -> None:
        if done // EVERY > max(done - BLOCK, 0) // EVERY:
            say(f"{done:,} inputs looked at")

    report = lint(
        command.source,
        command.data_dir,
        command.taxonomy,
        command.level_names,
        qualify_names=command.qualify_names,
        said=said,
    )
    if out is not None:
        check_fits(report.table, out)
    if command.json == "-":
        json.dump(report.to_dict(), sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        for line in (*nestedness(report.levels), *found(report)):
            answer(line)
        if command.json is not None:
            write_json(command.json, report.to_dict())
    if out is not None:
        mended, done, changes = mend(report)
        write_copy(mended, report.table, out)
        for change in changes[:LISTED]:
            say(change)
        if len(changes) > LISTED:
            say(f"and {len(changes) - LISTED:,} more labels; what they are, a comparison of the two files says")
        say(f"{out}: {len(mended):,} of {len(report.table):,} rows; {', '.join(done) or 'nothing to mend'}")
    return 3 if report.count("error") else 0


def nestedness(levels: tuple[LevelAudit, ...]) -> list[str]:
    """The entropies of every level: labels are nested where H(Y | finer) is 0."""
    lines = [f"{'level':24}  {'rows':>9}  {'H(Y)':>8}  {'H(Y|finer)':>10}  {'H(Y|coarser)':>12}   (nats)"]
    for level in levels:
        finer, coarser = ("-" if h is None else f"{h:.4f}" for h in (level.given_finer, level.given_coarser))
        lines.append(f"{level.level[:24]:24}  {level.num_rows:>9,}  {level.entropy:>8.4f}  {finer:>10}  {coarser:>12}")
    return lines


def found(report: Report) -> list[str]:
    """Every finding with its mend, those past the first of a kind counted, and a last line that counts all."""
    lines = list(report.table.notes)
    shown: Counter[str] = Counter()
    total = Counter(finding.kind for finding in report.findings)
    for finding in report.findings:
        shown[finding.kind] += 1
        if shown[finding.kind] <= SHOWN:
            lines += [f"{finding.severity} {finding.kind}: {finding.message}", f"    mend: {finding.remedy}"]
        elif shown[finding.kind] == SHOWN + 1:
            lines.append(f"{finding.severity} {finding.kind}: {total[finding.kind] - SHOWN:,} more, in --json FILE")
    errors, warnings = report.count("error"), report.count("warning")
    lines.append(f"{len(report.table):,} rows: {errors:,} errors, {warnings:,} warnings")
    return lines
