"""``nestling train … --dry-run``: the stages to come, what they will need, and for how long. Trains nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.commands.choose import Choice
from nestling.commands.pipeline import Pipeline
from nestling.commands.rivals import rivals
from nestling.commands.train import answer, say
from nestling.commands.words import aligned, duration, size
from nestling.engine.estimate import STEPS, Estimate, estimate
from nestling.engine.fit import cut_rows
from nestling.engine.plan import StagePlan
from nestling.engine.runfolder import RunFolder
from nestling.engine.runtime import Runtime, seeded
from nestling.seeds import derive

if TYPE_CHECKING:
    from nestling.options import Train


def dry_run(
    command: Train,
    options: Mapping[str, Any],
    fields: Mapping[str, Any],
    out: Path,
    deadline: float | None = None,
    chosen: Sequence[Choice] = (),
) -> None:
    """Print plan and estimates, of a training that ends before ``deadline`` where there is one; nothing is written.

    Raises what the training would raise before its first step.
    """
    with RunFolder(out, dry=True) as folder:
        pipeline = Pipeline(folder, options, fields, command.data_dir, command.device, command.workers)
    # The lock is given back, and with it goes the folder that it made.
    if folder.begun:
        then = "is finished" if folder.finished else "a training goes on with"
        say(f"{out} holds a run of these settings, which {then}; this is the whole of it")
    train, validation, test = pipeline.rows.load_all()
    pipeline.within_memory(train, validation)
    pipeline.deadline = deadline
    stages = pipeline.within_minutes(train, validation, pipeline.check(train, validation))
    for line in (*(choice.line for choice in chosen), *pipeline.notes(train, validation, test)):
        say(line)
    runtime = Runtime.choose(command.device, pipeline.precision, folder.kept("precision"), command.workers)
    rows, held = cut_rows(train, validation, pipeline.seed)
    trainings = (
        rivals(pipeline.recipe, pipeline.rate_given, stages)
        if options.get("baselines")
        else {pipeline.recipe.method: [pipeline.recipe]}
    )
    total, most = 0.0, 0
    for method, recipes in trainings.items():
        with seeded(derive(pipeline.seed, "weights")):
            model = pipeline.build(train, recipes[0])
        backbone = model.config["backbone"]
        planned = pipeline.check(train, validation, recipes[0])
        found = estimate(recipes[0], model, rows, held, runtime, folder=out)
        total += len(recipes) * sum(e.seconds for e in found)
        most = max(most, *(e.memory for e in found))
        times = f", trained at {len(recipes)} learning rates" if len(recipes) > 1 else ""
        answer(f"{method} on {backbone}, {runtime.precision} on {runtime.device}{times}")
        for line in [*plan_lines(planned), "", *estimate_lines(found), ""]:
            answer(line)
    answer(f"memory, estimated: {size(most)}, beside Python, torch and the pictures themselves")
    answer(
        f"time, estimated: {duration(total)} undisturbed and without an early stop, beside the evaluation at the end"
    )
    answer(
        f"measured: {STEPS} steps of each stage on this machine, on weights that were thrown away; nothing is written"
    )


def plan_lines(stages: Sequence[StagePlan]) -> list[str]:
    """The stages as an aligned table, and under it what was assumed of them."""
    titles = ["stage", "rows", "trainable parameters", "epochs", "steps", "batch"]
    rows = [
        [s.name, *(f"{n:,}" for n in (s.num_rows, s.num_trainable, s.epochs, s.steps, s.batch_size))]
        if s.epochs
        else [s.name, f"{s.num_rows:,}", f"{s.num_trainable:,}", "-", "-", "-"]
        for s in stages
    ]
    return [*aligned([titles, *rows], 1), *(f"assumed of {s.name}: {s.assumes}" for s in stages if s.assumes)]


def estimate_lines(found: Sequence[Estimate]) -> list[str]:
    """Memory and time of the stages as an aligned table."""
    titles = ["stage", "parameters", "gradients", "optimizer", "activations", "maps", "memory", "time"]
    rows = [
        [
            e.name,
            *map(size, (e.parameters, e.gradients, e.optimizer, e.activations)),
            f"{size(e.maps.size)} ({e.maps.place or 'not kept'})" if e.maps.size else "-",
            size(e.memory),
            duration(e.seconds),
        ]
        for e in found
    ]
    return aligned([titles, *rows], 1)
