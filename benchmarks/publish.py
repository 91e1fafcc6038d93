"""The pages of results and the README's tables, written from results/*.json: ``python benchmarks/publish.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nestling.files import write_text
from nestling.reproduce import TABLES
from nestling.reproduce.result import text_of

START, END = "<!-- {} -->", "<!-- end of {} -->"
TITLES = {
    "demo": "Handwritten digits: the demo",
    "mnist": "MNIST with 5 % fine labels",
    "demo-choice": "How the demo's settings were chosen",
    "defaults-choice": "How nested learning's defaults were chosen",
    "self-training-screen": "A nested network that flat + marginal does not beat: what was tried first",
    "self-training-choice": "Guesses inside the known class, and averaged weights",
    "self-training-default": "The last epoch, or the one of the best validation loss",
    "automatic": "The method that is chosen without being named, and the others",
}
TEXTS = {
    "demo": """1,347 training digits of 8 x 8 pixels: all show their coarse class, 40 % their middle one, 10 % the
digit; 450 test digits. Every method has the same network, augmentation, temperature step and 600 steps of 64 rows.
`turbulence:S,T` warps the picture by a random field, smooth over S pixels and T pixels strong.""",
    "mnist": """All 60,000 rows show their coarse class, 50 % their middle one, 5 % the digit. One seed: a figure, no
claim.""",
    "demo-choice": """Five folds of the 1,347 training digits; no test row was read. The demo uses each method's setting
of least log loss (x 100, of the fine class, over clean and distorted rows).""",
    "defaults-choice": """6,000 training rows of mnist and fashion_mnist, at 14 x 14 pixels, with 2 % and 10 % fine
labels; scored on 4,000 other training rows; no test row was read. Equal steps for all.""",
    "self-training-screen": """6,000 training rows at 14 x 14 or 16 x 16 pixels with 2 % fine labels, scored on 4,000
other training rows; no test row was read. What is added to the cascade and to one flat softmax at two rates, with its
gain over the same network with nothing added, and the cascade's over the better flat softmax. One seed: no claim.""",
    "self-training-choice": """What the screen left, with 2 % and 10 % of fine labels, on other seeds and rows than the
screen's. Gains as there, with paired 95 % intervals over seeds (Student's t).""",
    "self-training-default": """The same, of these two alone with five seeds: by this `selection = "last"` became the
default of nested learning and of the flat baselines.""",
    "text-search": """Texts found by what a network learned from coarse labels, by their words, and by both:
newsgroups20, 2,000 training rows held out in whole threads, three splits.""",
    "automatic": """`nestling train SET --method M --minutes 1`, one core of two each, photographs with 16 x 16 pixels.
Mean accuracy over the levels; where only coarse labels exist, fine R@1 by the features. The method with an interval is
the one that is chosen; the interval is of its difference to the best, paired over rows and seeds. - = does not take
texts.""",
}


def value(row: dict[str, Any]) -> str:
    """A share in per cent, or a mean depth in levels, with its deviation over seeds or its interval."""
    if row["mean"] is None:
        return "-"
    scale, digits = (1, 2) if row["column"].endswith("depth") else (100, 1)
    deviation = f" ± {scale * row['std']:.{digits}f}" if row.get("std") is not None else ""
    low, high = row.get("interval") or (None, None)
    interval = "" if low is None else f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
    return f"{scale * row['mean']:.{digits}f}{deviation}{interval}"


def grid(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table: ``titles`` over the columns; rows of a name and its cells."""
    titles = [title.replace(" | ", ", ") for title in titles]
    head = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def cells_of(result: dict[str, Any]) -> dict[tuple[str, str], str]:
    """The entries by row and column, as they are printed."""
    return {(r["row"], r["column"]): value(r) for r in result["table"]}


def table(result: dict[str, Any], columns: dict[str, str], rows: Iterable[str] | None = None) -> list[str]:
    """A line for each row of ``result``, or for those named, the chosen columns under new names."""
    cells = cells_of(result)
    named = dict.fromkeys(r["row"] for r in result["table"]) if rows is None else rows
    lines = ([row.replace(" | ", ", "), *(cells.get((row, c), "-") for c in columns)] for row in named)
    return grid(columns.values(), lines)


def columns_of(result: dict[str, Any]) -> dict[str, str]:
    """The columns that are shown: for runs accuracy and overconfidence, for choices all."""
    found = list(dict.fromkeys(r["column"] for r in result["table"]))
    if not any(" | " in c and "accuracy" in c for c in found):
        return {c: c for c in found}
    levels = list(dict.fromkeys(c.split(" | ")[1] for c in found))
    conditions = list(dict.fromkeys(c.split(" | ")[0] for c in found))
    shown = {f"clean | {level} | accuracy": f"{level} accuracy" for level in levels}
    for condition in conditions:
        if condition != "clean":
            shown[f"{condition} | {levels[-1]} | accuracy"] = f"{levels[-1]}, {condition}"
        where = "" if condition == "clean" else f", {condition}"
        shown[f"{condition} | {levels[-1]} | overconfidence"] = f"overconfidence{where}"
    return shown


def readme_columns(result: dict[str, Any]) -> dict[str, str]:
    """Fewer columns, for the README: accuracies per level, and how the finest one stands under distortion."""
    return {c: title for c, title in columns_of(result).items() if "accuracy" in c or c.startswith("clean")}


def claims(result: dict[str, Any]) -> list[str]:
    """Each claim with its interval and verdict."""
    if not result["claims"]:
        return []
    lines = ["", "| claim | points | 95 % interval | verdict |", "|---|---:|---:|---|"]
    for c in result["claims"]:
        lo, hi = c["interval"]
        lines.append(f"| {c['text']} | {100 * c['ours']:+.1f} | [{100 * lo:+.1f}, {100 * hi:+.1f}] | {c['verdict']} |")
    return lines


def section(name: str, result: dict[str, Any]) -> str:
    """One result as a section of the page."""
    commit = str(result["commit"])[:10]
    made = f"`{result['command']}`, {len(result['seeds'])} seed(s), {result['hardware']}, commit {commit}, "
    lines = [
        f"## {TITLES.get(name, name)}",
        "",
        TEXTS.get(name, ""),
        "",
        f"{made}{result['seconds']:.0f} s. In per cent, mean ± std.",
        "",
    ]
    return "\n".join([*lines, *table(result, columns_of(result)), *claims(result), ""])


def reproduced(name: str, result: dict[str, Any]) -> str:
    """A table of a paper as a section: as the command prints it, and its figure."""
    commits = ", ".join(commit[:10] for commit in str(result["commit"]).split(", "))
    made = f"`{result['command']}`, {result['hardware']}, commit {commits}, {result['seconds'] / 60:.0f} minutes of "
    lines = [f"## {name}", "", f"{made}training and measuring, one thread each.", "", "```text"]
    lines += [*text_of(TABLES[name], result), "```", ""]
    if (Path("results") / f"{name}.png").exists():
        lines += [f"![{name}](../results/{name}.png)", ""]
    return "\n".join(lines)


def at_depth(result: dict[str, Any]) -> list[str]:
    """The README's lines of layerwise training: k = 1, 2, 3 beside their twins."""
    cells, shown = cells_of(result), {"single": "last classifier", "ensemble": "ensemble"}
    twins = {"end-to-end": "end-to-end", "end-to-end, a J-th": "end-to-end, a quarter of the images"}
    rows = [
        [k, *(cells.get((k, c), "-") for c in shown), *(cells.get((f"{k} {twin}", "single"), "-") for twin in twins)]
        for k in ("k=1", "k=2", "k=3")
    ]
    return grid([*shown.values(), *twins.values()], rows)


def of_concepts(result: dict[str, Any]) -> list[str]:
    """The README's lines of robust training."""
    columns = {"worst concept": "worst concept", "five smallest": "five rarest concepts", "mean of concepts": "mean"}
    columns |= {"single": "all rows"} | {f"moved step {step}": f"moved by {step}" for step in (1, 2)}
    return table(result, columns, ("ERM", "EL", "CL", "HRRL", "group DRO"))


def on_disjoint_subsets(result: dict[str, Any]) -> list[str]:
    """The README's lines of Table 1: each set's accuracies, and the paper's fine ones."""
    columns = {f"{level} accuracy": level for level in ("coarse", "middle", "fine")}
    rows = [row for row in dict.fromkeys(r["row"] for r in result["table"]) if not row.endswith(("rejection", "CRM"))]
    paper = {(r["row"], r["column"]): r["paper"] for r in result["table"] if r["paper"] is not None}
    cells = cells_of(result)
    lines = [
        [
            row,
            *(cells.get((row, c), "-") for c in columns),
            f"{100 * paper[row, 'fine accuracy']:.1f}" if (row, "fine accuracy") in paper else "-",
        ]
        for row in rows
    ]
    return grid([*columns.values(), "fine, the paper"], lines)


def distorted(result: dict[str, Any]) -> list[str]:
    """The README's lines of nested learning at the authors' label rates."""
    columns = {"fine accuracy strength 0": "fine accuracy", "fine overconfidence strength 0": "overconfidence"}
    columns |= {"fine accuracy, distorted": "fine, distorted", "fine overconfidence, distorted": "overconfidence"}
    rows = ("nested", "nested, marginal + balanced", "end-to-end", "end-to-end, 1.5 f", "flat + marginal", "flat + CRM")
    return table(result, columns, rows)


def searched(result: dict[str, Any]) -> list[str]:
    """The README's lines of search from coarse labels: fine R@1 of every variant on each set."""
    cells, sets = cells_of(result), ("digit-pairs", "mnist", "fashion_mnist")
    variants = ("cos", "ins", "supcon", "coins-imp", "coins-cos", "coins-cos-mlp", "coinsp", "opt")
    return grid(sets, [[name, *(cells.get((f"{s}: {name}", "fine R@1"), "-") for s in sets)] for name in variants])


README: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "layerwise": ("layerwise-cifar10", at_depth),
    "robust": ("robust-concepts", of_concepts),
    "table 1": ("nested-table1", on_disjoint_subsets),
    "nested": ("nested-distortion", distorted),
    "coins": ("coins-small", searched),
}
"""By the mark in the README: the table that its lines are of."""


def between(text: str, name: str, lines: list[str]) -> str:
    """``text`` with the lines between the marks of that name."""
    start, end = START.format(name), END.format(name)
    before, rest = text.split(start)
    return before + "\n".join([start, *lines, "", end]) + rest.split(end)[1]


def main() -> None:
    """Write all of them."""
    order = list(TITLES)
    found = {path.stem: json.loads(path.read_text()) for path in Path("results").glob("*.json")}
    tables = {name: found[name] for name in TABLES if name in found}
    found = {name: r for name, r in found.items() if "table" in r and name not in TABLES}
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    intro = "# Results\n\nWritten from `results/*.json` by `python benchmarks/publish.py`.\n"
    notes = "Overconfidence is mean confidence minus accuracy, in points.\n"
    write_text("docs/results.md", "\n".join([intro, notes, *(section(name, found[name]) for name in names)]))
    for paper in sorted({name.partition("-")[0] for name in tables}):
        sections = [reproduced(name, r) for name, r in tables.items() if name.startswith(paper)]
        title = f"# Results: the tables of {paper}"
        source = f"Written from `results/{paper}-*.json` by `python benchmarks/publish.py`."
        write_text(f"docs/results-{paper}.md", "\n".join([title, "", source, "", *sections]))
    readme = Path("README.md").read_text()
    if "demo" in found:
        lines = [TEXTS["demo"], "", *table(found["demo"], readme_columns(found["demo"]))]
        readme = between(readme, "results", lines)
    for mark, (name, lines_of) in README.items():
        if name in tables:
            readme = between(readme, mark, lines_of(tables[name]))
    write_text("README.md", readme)


if __name__ == "__main__":
    main()
