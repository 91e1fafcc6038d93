"""The result of a table: as JSON, as text, and as a figure."""

from __future__ import annotations

from typing import Any

from nestling.provenance import hardware, versions
from nestling.reproduce.campaign import Campaign, unpack
from nestling.reproduce.table import Table, on_axis
from nestling.reproduce.verdict import decide, gather, reaches, summary

UNITS = {
    "number": (1, ".4g", ""),
    "bytes": (2**20, ".1f", "MiB"),
    "seconds": (1, ".2f", "s"),
    "millions": (1e6, ".1f", "M"),
}
"""Divisor, format and name of what is no share."""
SHARE = (0.01, ".1f", "%")


def result_of(campaign: Campaign, records: dict[int, list[dict[str, Any]]], command: str) -> dict[str, Any]:
    """What ``results/*.json`` holds. ``seconds`` is the sum over trainings, each of which may have run at any time."""
    table = campaign.table.at(campaign.scale)
    cells = {seed: [unpack(cell) for record in found for cell in record["cells"]] for seed, found in records.items()}
    cells = {seed: [*found, *table.derived(found)] for seed, found in cells.items()}
    if cells and campaign.seeds:
        cells[campaign.seeds[0]] = [*cells[campaign.seeds[0]], *table.fixed()]
    measured = gather(cells)
    every = [record for found in records.values() for record in found]
    commits = sorted({record["commit"] for record in every if record["commit"]})
    return {
        "name": table.name,
        "scale": campaign.scale,
        "seeds": list(campaign.seeds),
        "table": summary(measured, table.printed),
        "claims": decide(measured, table.claims, table.floor),
        "floor": {**vars(table.floor), "reached": reaches(measured, table.floor)},
        "missing": campaign.missing(),
        "command": command,
        "commit": ", ".join(commits) or None,
        "hardware": hardware(),
        "versions": versions(),
        "seconds": round(sum(record["seconds"] for record in every), 1),
    }


def command_line(name: str, scale: str, seeds: int) -> str:
    """What makes the same figures again; where the files lie, and how long it may take, is everybody's own."""
    return f"nestling reproduce {name} --scale {scale} --seeds {seeds}"


def unit_of(table: Table, column: str) -> tuple[float, str, str]:
    """Divisor, format and name of a column's numbers."""
    for start, unit in table.units.items():
        if column.startswith(start):
            return UNITS[unit]
    return SHARE


def text_of(table: Table, result: dict[str, Any]) -> list[str]:
    """The paper's table beside ours, and its claims, as lines."""
    from nestling.commands.words import aligned

    table = table.at(result["scale"])
    lines = [f"{result['name']}, {result['scale']}: {table.paper}", table.about, ""]
    columns = sorted(dict.fromkeys(e["column"] for e in result["table"]), key=place)
    rows = list(dict.fromkeys(e["row"] for e in result["table"]))
    entries = {(e["row"], e["column"]): e for e in result["table"]}
    for group in grouped(columns):
        body = [
            [row, *(cell_text(table, entries.get((row, column))) for column in group)]
            for row in rows
            if any((row, column) in entries for column in group)
        ]
        titles = ["", *(f"{column} {unit_of(table, column)[2]}" for column in group)]
        lines += [*aligned([titles, *body], 1), ""]
    lines += [f"Mean and standard deviation over seeds ({len(result['seeds'])}); the paper's number in brackets.", ""]
    columns_of = {claim.id: claim.more[1] for claim in table.claims}
    # A result may be older than the table, and have claims that it has no more.
    claims = [claim for claim in result["claims"] if claim["id"] in columns_of]
    lines += [claim_text(claim, unit_of(table, columns_of[claim["id"]])) for claim in claims]
    floor = result["floor"]
    lines += [
        "",
        f"Floor: {floor['row']}, {floor['column']}, must reach {floor['least']:.2f}, and has"
        + ("." if floor["reached"] else " not: no claim is decided."),
    ]
    if result["missing"]:
        lines += [f"Not done within the budget: {', '.join(result['missing'])}; the same command goes on from here."]
    return lines


def place(column: str) -> float:
    """On its axis; 0 where it has none."""
    found = on_axis(column)
    return found[2] if found else 0


def grouped(columns: list[str], most: int = 6) -> list[list[str]]:
    """Columns as blocks that fit beside each other: those on one axis together."""
    kinds: dict[Any, list[str]] = {}
    for column in columns:
        found = on_axis(column)
        kinds.setdefault(found and found[:2], []).append(column)
    return [kind[i : i + most] for kind in kinds.values() for i in range(0, len(kind), most)]


def cell_text(table: Table, entry: dict[str, Any] | None) -> str:
    """``56.3 ± 0.8 (90.4)``."""
    if entry is None:
        return ""
    divisor, form, _ = unit_of(table, entry["column"])
    text = "-" if entry["mean"] is None else format(entry["mean"] / divisor, form)
    text += "" if entry["std"] is None else f" ± {format(entry['std'] / divisor, form)}"
    return text + ("" if entry["paper"] is None else f" ({format(entry['paper'] / divisor, form)})")


def claim_text(claim: dict[str, Any], unit: tuple[float, str, str]) -> str:
    """One line; differences of shares in points."""
    divisor, form, name = unit
    name = "points" if unit == SHARE else name

    def signed(value: float) -> str:
        return format(value / divisor, f"+{form}")

    lo, hi = claim["interval"]
    interval = "" if lo is None else f" [{signed(lo)}, {signed(hi)}]"
    ours = "not measured" if claim["ours"] is None else f"{signed(claim['ours'])}{interval} {name}"
    paper = "" if claim["paper"] is None else f", the paper {signed(claim['paper'])}"
    return f"{claim['verdict']:>14}  {claim['text']}: {ours}{paper}"
