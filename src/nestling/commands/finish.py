"""What every training command ends with: scores on test rows, comparisons, the bundle, metrics.json and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestling.bundle import held_scores, save_bundle
from nestling.commands.unknown import HELD_OUT, measure_unknown
from nestling.data.dataset import LabelledData
from nestling.data.sides import Sides
from nestling.engine.run import Run
from nestling.engine.runfolder import FINISHED, RunFolder
from nestling.engine.runtime import Runtime
from nestling.evaluate.compare import compare, verdict
from nestling.evaluate.coverage import backoff_metrics
from nestling.evaluate.measure import Measurement, mean_over_seeds, measure, outputs_of
from nestling.evaluate.scores import scores_of
from nestling.evaluate.theory import theory_of
from nestling.files import write_bytes, write_json, write_text
from nestling.provenance import provenance
from nestling.report import render, render_card
from nestling.report.gather import gather


@dataclass(frozen=True, kw_only=True)
class Finish:
    """All that the end of a run needs."""

    folder: RunFolder
    method: str
    runs: Mapping[str, Sequence[Run]]
    """Per method one run for each seed; the first of ``method`` becomes the bundle."""
    seeds: Sequence[int]
    test: LabelledData
    held_out: LabelledData | None = None
    """Test rows of classes that training never saw."""
    source: str
    device: str
    workers: int | None = None
    """Processes that decode pictures ahead; None for the automatic choice."""
    about: Mapping[str, Any]
    """What the bundle remembers of the options."""
    sides: Sides | None = None
    """Which rows of the source these were."""
    notes: Sequence[str]
    caveat: str = ""
    """What stands below the verdict."""
    train: LabelledData | None = None
    """The rows that the runs were given, on which a method's theory is checked."""
    began: float
    """``time.monotonic()`` at the beginning of this process's work."""


def finish(end: Finish, distortions: Sequence[str]) -> dict[str, Any]:
    """Evaluate and write; the report goes last, since it marks the run as finished. Returns the metrics."""
    runtime = Runtime.choose(end.device, "fp32", workers=end.workers)
    measurements: dict[str, list[Measurement]] = {}
    for method, runs in end.runs.items():
        for run in runs:
            for name, measurement in score(
                method, run, end.test, runtime, distortions, end.about.get("concepts")
            ).items():
                measurements.setdefault(name, []).append(measurement)
    main = end.runs[end.method][0]
    metrics = summarise(end, measurements)
    theory = None if end.train is None else theory_of(main, end.train, runtime)
    if theory is not None:
        metrics["theory"] = theory.figures()
    held = held_scores(main)
    if (scores := scores_of(main.model, main.preprocessing, end.test, runtime)) is not None:
        metrics["backoff"] = backoff_metrics(held, scores)
    if end.held_out is not None and len(end.held_out):
        unknown = {HELD_OUT: end.held_out}
        metrics["unknown"] = measure_unknown(main.model, main.preprocessing, held, end.test, unknown, runtime)
    content = gather(
        title=f"{end.method} on {end.source}",
        source=end.source,
        metrics=metrics,
        method=end.method,
        runs=end.runs,
        seeds=end.seeds,
        measurements=measurements,
        test=end.test,
        model=main.model,
        notes=end.notes,
        theory=None if theory is None else theory.rows(),
        preprocessing=main.preprocessing,
    )
    card = render_card(
        name=f"{end.source}-{end.method}",
        taxonomy=end.test.taxonomy,
        metrics=metrics,
        settings=main.decisions,
        source=end.source,
        label_budget=end.about.get("known"),
    )
    save_bundle(
        end.folder.path / "model",
        main.model,
        main.preprocessing,
        card,
        held,
        end.sides,
        source=end.source,
        seed=end.seeds[0],
        **end.about,
    )
    if main.path is not None and main.path != end.folder.path:
        # Where several were trained, the steps of the one that is the bundle.
        write_bytes(end.folder.path / "metrics.jsonl", (main.path / "metrics.jsonl").read_bytes())
    write_json(end.folder.path / "metrics.json", metrics)
    write_text(end.folder.path / FINISHED, render(content))
    return metrics


def score(
    method: str,
    run: Run,
    test: LabelledData,
    runtime: Runtime,
    distortions: Sequence[str],
    concepts: Mapping[str, Any] | None = None,
) -> dict[str, Measurement]:
    """The measurements of one run: flat + marginal also decided by CRM, a rejection layer also left out."""
    outputs = outputs_of(run.model, run.preprocessing, test, runtime, distortions)
    scores = {method: measure(run.model, outputs, test, concepts=concepts)}
    if run.model.config["rejection"]:
        scores[f"{method} (temperature only)"] = measure(run.model, outputs, test, reject=False, concepts=concepts)
    if method == "flat-marginal":
        scores["flat-crm"] = measure(run.model, outputs, test, least_distance=True, concepts=concepts)
    return scores


def summarise(end: Finish, measurements: Mapping[str, Sequence[Measurement]]) -> dict[str, Any]:
    """The content of metrics.json."""
    metrics = mean_over_seeds([m.metrics for m in measurements[end.method]])
    rivals = {name: list(found) for name, found in measurements.items() if name != end.method}
    if rivals:
        metrics["methods"] = {name: mean_over_seeds([m.metrics for m in found]) for name, found in rivals.items()}
        baselines = {name: found for name, found in rivals.items() if not name.startswith(end.method)}
        if baselines:
            metrics["comparisons"] = compare(measurements[end.method], baselines, end.test)
            told = verdict(end.method, metrics["comparisons"], metrics["levels"][-1]["name"], len(end.seeds))
            metrics["verdict"] = f"{told}\n{end.caveat}".rstrip()
    if len(end.seeds) > 1:
        metrics["seeds"] = [
            {"seed": seed, **{name: found[number].metrics for name, found in measurements.items()}}
            for number, seed in enumerate(end.seeds)
        ]
    validation = [run.metrics for run in end.runs[end.method]]
    return metrics | {"validation": validation[0]} | provenance(end.method, end.seeds[0], time.monotonic() - end.began)


def default_distortions(side: int) -> list[str]:
    """What a run is scored under beside clean rows: two strengths of turbulence, for images of ``side`` pixels."""
    if side <= 16:
        return ["turbulence:1,0.25", "turbulence:1,0.5"]
    scale = max(round(side / 32), 1)
    return [f"turbulence:{2 * scale},{strength * scale:g}" for strength in (0.5, 1)]
