"""``nestling reproduce``: a table of a paper, measured here, beside the paper's own numbers."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.commands.train import answer, say
from nestling.errors import UsageError, unknown

if TYPE_CHECKING:
    from nestling.options import Reproduce


def reproduce(command: Reproduce) -> int:
    """Train what is not trained yet, compare, print and write."""
    from nestling.files import write_bytes, write_json
    from nestling.reproduce import TABLES
    from nestling.reproduce.campaign import Campaign
    from nestling.reproduce.figure import draw
    from nestling.reproduce.result import command_line, result_of, text_of
    from nestling.reproduce.table import check_scale

    if command.name not in TABLES:
        raise unknown("table", command.name, TABLES)
    check_scale(command.scale)
    table = TABLES[command.name]
    seeds = table.seeds[command.scale] if command.seeds is None else command.seeds
    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {seeds}")
    if not command.budget_minutes > 0:
        raise UsageError(f"--budget-minutes must be above 0, got {command.budget_minutes:g}")
    if command.jobs is not None and command.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {command.jobs}")
    place = Path(command.out or "runs/reproduce")
    folder = place / f"{table.name}-{command.scale}"
    campaign = Campaign(
        table=table,
        scale=command.scale,
        seeds=range(seeds),
        folder=folder,
        trainings=place / f"trainings-{command.scale}",
        data_dir=command.data_dir,
        device=command.device,
        compile=command.compile,
        rows=None if command.rows is None else tuple(name.strip() for name in command.rows.split(",")),
        jobs=command.jobs,
        deadline=time.time() + 60 * command.budget_minutes,
    )
    result = result_of(campaign, campaign.run(), command_line(table.name, command.scale, seeds))
    target = None if command.json == "-" else Path(command.json or folder / "result.json")
    picture = (target or folder / "result.json").with_suffix(".png")
    drawn = draw(table, result) if table.picture is None else table.picture(table, result, folder)
    write_bytes(picture, drawn)
    if target is None:
        with suppress(BrokenPipeError):
            json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
            print()
        say(f"figure: {picture}")
        return 0
    write_json(target, result)
    answer("\n".join([*text_of(table, result), f"figures: {target}", f"figure:  {picture}"]))
    return 0
