"""The report: one HTML file without scripts or requests, every picture inlined."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nestling.evaluate.decide import CONFIDENT
from nestling.report import summary
from nestling.report.content import Content, main_method, plain
from nestling.report.examples import SHOWN, groups

DIRECTIONS = {"up": "↑ higher better", "down": "↓ lower better", "zero": "near 0 better", "none": ""}


def _shown(value: object) -> object:
    """Every text that the template prints goes through ``plain``, then through autoescape."""
    return value if isinstance(value, Markup) else plain(value) if isinstance(value, str) else value


def _figures(content: Content) -> dict[str, str]:
    """Name -> data URI of every figure that the content has data for."""
    # Matplotlib costs half a second of import, which the model card, in this package too, need not pay.
    from nestling.report import (
        backoff,
        calibration,
        comparison,
        concepts,
        curves,
        icicle,
        plots,
        retrieval,
        robustness,
    )

    makers: dict[str, Callable] = {
        "forest": comparison.forest,
        "distortions": comparison.distortions,
        "robustness": robustness.robustness,
        "reliability": calibration.reliability,
        "retrieval": retrieval.retrieval,
        "theory": retrieval.theory,
        "training": curves.training,
        "concepts": concepts.concepts,
        "backoff": backoff.backoff,
        "taxonomy": icicle.icicle,
    }
    with plots.styled():
        drawn = {name: make(content) for name, make in makers.items()}
        return {name: Markup(plots.svg_uri(figure)) for name, figure in drawn.items() if figure is not None}


def _facts(content: Content) -> list[tuple[str, str]]:
    """How the figures came about: seeds, versions, commit, time."""
    metrics = content.metrics
    seeds = [str(s.get("seed", i)) if isinstance(s, dict) else str(s) for i, s in enumerate(metrics.get("seeds") or [])]
    facts = [("Data", content.source), ("Method", main_method(content))]
    if seeds or metrics.get("seed") is not None:
        facts.append(("Seeds" if len(seeds) > 1 else "Seed", ", ".join(seeds) or str(metrics["seed"])))
    facts += [("Commit", str(metrics["commit"]))] if metrics.get("commit") else []
    facts += [("Time", f"{metrics['seconds']:.0f} s")] if metrics.get("seconds") else []
    return facts + [(f"Version of {name}", str(v)) for name, v in (metrics.get("versions") or {}).items()]


def _ranked(backoff: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of the table of risks, named; mean risks, of another kind, last."""
    words = {"ltt": "risk of {} % guaranteed", "crc": "risk of {} % on average"}
    return [(text.format(f"{100 * row['risk']:g}"), row) for name, text in words.items() for row in backoff[name]]


def _unknown_kinds(unknown: dict[str, Any]) -> list[str]:
    """The scores by which rows of no known class were told."""
    entries = [level[name] for level in unknown["levels"] for name in unknown["sets"] if name in level]
    return list(entries[0]["auroc"]) if entries else []


def _race(content: Content) -> dict | None:
    """Finest accuracy of every method on one scale, as positions in per cent of its width."""
    levels = summary.level_names(content)
    if not levels:
        return None
    rows = []
    for method, entry in summary.method_entries(content).items():
        level = summary.at_level(entry, levels[-1])
        accuracy, spread = summary.number(level, "accuracy"), summary.number(level.get("std") or {}, "accuracy")
        if accuracy == accuracy:
            rows.append((method, 100 * accuracy, 100 * spread if spread == spread else 0.0))
    if not rows:
        return None
    ends = [value + sign * spread for _, value, spread in rows for sign in (-1, 1)]
    step = next(s for s in (1, 2, 5, 10, 20) if s == 20 or (max(ends) - min(ends)) / s <= 8)
    low, high = max(0, step * int((min(ends) - step / 2) // step)), min(100, step * (int(max(ends) // step) + 1))

    def at(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / max(high - low, 1e-9), 2)

    best = max(round(value, 1) for _, value, _ in rows)
    shown = [
        {"name": name, "text": f"{value:.1f} %", "spread": f"± {spread:.1f}" if spread else "", "at": at(value),
         "from": at(value - spread), "to": at(value + spread), "best": len(rows) > 1 and round(value, 1) == best}
        for name, value, spread in sorted(rows, key=lambda row: -row[1])
    ]  # fmt: skip
    return {"rows": shown, "low": low, "high": high, "level": levels[-1]}


def render(content: Content) -> str:
    """The report as one HTML text, complete in itself; what has no data is left out.

    Class names, items and notes are untrusted: they are escaped in the page and never read as markup by the figures.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("nestling.report").joinpath("template.html").read_text("utf-8"))
    main, levels = main_method(content), summary.level_names(content)
    columns = [(summary.METRICS[key], level, DIRECTIONS[way], key) for key, level, way in summary.columns(content)]
    num_seeds = len(content.metrics.get("seeds") or [])
    page = template.render(
        content=content,
        main=main,
        finest=levels[-1] if levels else "",
        headline=summary.headline(content),
        verdict=re.split(r"(?<=\.)\s+", str(content.metrics.get("verdict") or "").strip()),
        race=_race(content),
        sureness=summary.sureness(content),
        sure=f"{100 * CONFIDENT:.0f} %",
        weakest=summary.weakest(content),
        conditions=summary.table(content) if levels else [],
        columns=columns,
        measured={key for _, _, _, key in columns},
        compared=len(summary.method_entries(content)) > 1,
        compared_by={str(c.get("metric")) for c in content.metrics.get("comparisons") or []},
        turbulence=any(name.startswith("turbulence") for name in summary.conditions(content)),
        num_seeds=num_seeds,
        figures=_figures(content),
        theory=content.metrics.get("theory") or {},
        groups=groups(content),
        num_hidden=max(len(content.examples) - SHOWN, 0),
        facts=_facts(content),
        ranked=_ranked,
        unknown_kinds=_unknown_kinds,
    )
    return page.encode("utf-8", "replace").decode("utf-8")
