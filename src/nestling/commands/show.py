"""``nestling show``: what a run was given, what was chosen and why, and what it scored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.commands.figures import figure_lines
from nestling.commands.words import score_lines
from nestling.config import load_toml
from nestling.engine.runfolder import FINISHED, flat
from nestling.errors import StorageError, UsageError

if TYPE_CHECKING:
    from nestling.options import Show


def show(command: Show) -> int:
    """Run the command. A bundle shows its model card. Imports no torch."""
    run = Path(command.run)
    try:
        if (run / "recipe.toml").is_file():
            text = "\n".join(describe_run(run))
        elif (run / "config.json").is_file() and (run / "README.md").is_file():
            text = (run / "README.md").read_text(encoding="utf-8")
        else:
            raise UsageError(f"there is no run {run}: give the folder that nestling train or demo printed")
    except (UsageError, StorageError):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StorageError(f"a file of {run} is damaged ({reason:.200}): run the training command again") from error
    print(text)
    return 0


def describe_run(run: Path) -> Iterator[str]:
    """A run folder in lines."""
    settings = load_toml(run / "recipe.toml")
    yield f"{run}\n\ngiven"
    yield from (
        f"  {name} = {json.dumps(value, ensure_ascii=False)}" for name, value in flat(settings["given"]).items()
    )
    yield "\nchosen automatically"
    for name, entry in settings.get("derived", {}).items():
        yield f"  {name}: {entry['value']} ({entry['reason']})"
    if (run / "sweep.json").is_file():
        from nestling.commands.sweep import best_lines

        yield ""
        yield from best_lines(json.loads((run / "sweep.json").read_bytes()))
        return
    if not (run / FINISHED).is_file():
        yield f"\n{unfinished(run, settings['given'])}"
        return
    metrics = json.loads((run / "metrics.json").read_bytes())
    yield "\nscores on test rows"
    methods = {metrics["method"]: metrics, **metrics.get("methods", {})}
    yield from (f"  {line}" for line in score_lines({name: entry["levels"] for name, entry in methods.items()}))
    yield from (f"  {line}" for line in figure_lines(metrics))
    if "verdict" in metrics:
        yield f"\n{metrics['verdict']}"
    where = metrics.get("hardware", "unknown hardware")
    yield f"\ncommit {metrics['commit']}, {metrics['seconds']} s on {where}; report: {run / FINISHED}"


def unfinished(run: Path, given: Mapping[str, Any]) -> str:
    """What there is of a run without a report, and how to go on."""
    if "source" in given:
        return "not finished: the same training command goes on where it stopped"
    stages = ", ".join(path.name.partition("-")[2] for path in sorted((run / "stages").glob("*-*"))) or "none"
    trained = f"trained by nestling.fit, which writes no report; stages finished: {stages}"
    if (run / "model").is_dir():
        return f"{trained}; model: {run / 'model'}"
    return (
        f"{trained}; no model is saved: the same call of fit goes on, or gives back the finished run, "
        f"and run.save_pretrained({str(run / 'model')!r}) saves its model"
    )


def require_model(run: Path) -> None:
    """Raise UsageError where ``run`` was trained by ``nestling.fit`` and its model not saved, saying how to save it."""
    if (run / "recipe.toml").is_file() and not (run / "model").is_dir():
        given = load_toml(run / "recipe.toml").get("given")
        if isinstance(given, dict) and "source" not in given:
            raise UsageError(f"{run} was {unfinished(run, given)}")
