"""``nestling show``: what a run was given, what was chosen and why, and what it scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.config import load_toml, to_toml
from nestling.engine.runfolder import FINISHED
from nestling.errors import StorageError, UsageError

if TYPE_CHECKING:
    from nestling.cli import Show


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
    yield from (f"  {line}".rstrip() for line in to_toml(settings["given"]).splitlines())
    yield "\nchosen automatically"
    for name, entry in settings.get("derived", {}).items():
        yield f"  {name}: {entry['value']} ({entry['reason']})"
    if not (run / FINISHED).is_file():
        yield "\nnot finished: the same training command goes on where it stopped"
        return
    metrics = json.loads((run / "metrics.json").read_bytes())
    yield "\nscores on test rows"
    for name, entry in {metrics["method"]: metrics, **metrics.get("methods", {})}.items():
        for level in entry["levels"]:
            known = [key for key in ("accuracy", "confidence", "ece") if level[key] is not None]
            numbers = "  ".join(f"{key} {level[key]:.4f}" for key in known)
            yield f"  {name:26} {level['name']:12} {numbers}  n {level['n']}"
    if "verdict" in metrics:
        yield f"\n{metrics['verdict']}"
    where = metrics.get("hardware", "unknown hardware")
    yield f"\ncommit {metrics['commit']}, {metrics['seconds']} s on {where}; report: {run / FINISHED}"
