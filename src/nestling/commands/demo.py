"""``nestling demo``: a calibrated classifier of real handwritten digits, and what it has to beat, in about a minute."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.commands.train import answer, say
from nestling.commands.words import program
from nestling.engine.runfolder import FINISHED, RunFolder
from nestling.errors import UsageError

if TYPE_CHECKING:
    from nestling.data.dataset import LabelledData
    from nestling.methods.recipe import Recipe
    from nestling.options import Demo

KNOWN = {"coarse": 1.0, "middle": 0.4, "fine": 0.1}
SOURCE = "digits"
DISTORTIONS = ("turbulence:1,0.25", "turbulence:1,0.5")
PRECISION = "fp32"
"""Networks this small gain nothing from bf16, and the figures are then the same wherever the demo runs."""


def recipes() -> dict[str, Recipe]:
    """The demo's recipes, all of 600 steps of 64 rows.

    Each method's learning rate, and nested learning's epochs, have the least log loss over clean and distorted rows, in
    five folds of the 1,347 training rows (benchmarks/choose.py, results/demo-choice.json); test rows chose nothing.
    """
    from nestling.methods import EndToEnd, FlatMarginal, Nested, Optimizer

    return {
        "nested": Nested(
            epochs=(5, 5, 50), steps_per_epoch=10, batch_size=64, optimizer=Optimizer(lr=3e-3), selection="likelihood"
        ),
        "end-to-end": EndToEnd(
            epochs=60, steps_per_epoch=10, batch_size=64, optimizer=Optimizer(lr=1e-3), selection="likelihood"
        ),
        "flat-marginal": FlatMarginal(
            epochs=60, steps_per_epoch=10, batch_size=64, optimizer=Optimizer(lr=3e-3), selection="likelihood"
        ),
    }


def demo(command: Demo) -> int:
    """Run the command: every method on every seed, the report, and pictures to predict."""
    if command.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {command.seeds}")
    out = Path(command.out)
    began = time.monotonic()
    with RunFolder(out) as folder:
        from nestling.config import to_dict

        chosen = recipes()
        given = {"source": SOURCE, "method": "nested", "seed": 0, "seeds": command.seeds, "known": KNOWN}
        begun = folder.open(given | {"precision": PRECISION} | to_dict(chosen["nested"]))
        if begun and (out / FINISHED).exists():
            say(f"{out} is finished: {program()} show {out} prints it")
        else:
            if not begun:
                folder.begin()
            work(folder, chosen, list(range(command.seeds)), began)
    model = out / "model"
    answer(f"report: {out / FINISHED}\nmodel:  {model}\ntry:    {program()} predict {model} {out / 'examples'}")
    return 0


def work(folder: RunFolder, chosen: dict[str, Recipe], seeds: list[int], began: float) -> None:
    """Train all jobs, read them back, and finish."""
    from nestling.commands.finish import Finish, finish
    from nestling.commands.jobs import Job, run_jobs

    say(
        f"training {len(chosen)} methods x {len(seeds)} seeds on 1,347 digits, "
        "of which 40 % show their middle class and 10 % their digit"
    )
    jobs = [
        Job(f"{method}, seed {seed}", fit_one, (recipe, seed, folder.path / "seeds" / str(seed) / method))
        for seed in seeds
        for method, recipe in chosen.items()
    ]
    run_jobs(jobs)
    runs = {
        method: [fit_one(recipe, seed, folder.path / "seeds" / str(seed) / method) for seed in seeds]
        for method, recipe in chosen.items()
    }
    for decision in runs["nested"][0].decisions:
        folder.derive(*decision)
    test = load("test")
    save_examples(test, folder.path / "examples")
    end = Finish(
        folder=folder,
        method="nested",
        runs=runs,
        seeds=seeds,
        test=test,
        source=SOURCE,
        device="cpu",
        about={"known": KNOWN},
        notes=test.notes,
        began=began,
    )
    metrics = finish(end, DISTORTIONS)
    for name, entry in {"nested": metrics, **metrics["methods"]}.items():
        finest = [entry["levels"][-1], *(e["levels"][-1] for e in entry["distortions"].values())]
        clean, *distorted = (f"{100 * f['accuracy']:.1f} % at confidence {100 * f['confidence']:.1f} %" for f in finest)
        say(f"{name:14} {finest[0]['name']} accuracy {clean}; distorted: {', '.join(distorted)}")
    say(metrics["verdict"])
    say(f"{time.monotonic() - began:.0f} s")


def load(split: str) -> LabelledData:
    """The digits."""
    from nestling.data.sources import load_data

    return load_data(SOURCE, split)


def fit_one(recipe: Recipe, seed: int, out: Path):
    """Train one method on one seed, or read it back."""
    from nestling.engine.fit import fit

    return fit(
        recipe, load("train").keep(KNOWN, seed), out=out, seed=seed, device="cpu", precision=PRECISION, verbose=False
    )


def save_examples(test: LabelledData, folder: Path) -> None:
    """One test picture of each digit, as PNG files to predict."""
    import numpy as np
    from PIL import Image

    from nestling.files import write_bytes

    finest = test.labels[:, -1]
    for code, name in enumerate(test.taxonomy.classes[test.taxonomy.levels[-1]]):
        row = int(np.flatnonzero(finest == code)[0])
        buffer = io.BytesIO()
        Image.fromarray(test.inputs[row, 0].numpy()).save(buffer, format="PNG")  # type: ignore[index,union-attr]
        write_bytes(folder / f"digit-{name}.png", buffer.getvalue())
