"""``nestling show``: what a run was given, what was chosen and why, and what it scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.config import load_toml, to_toml
from nestling.errors import StorageError, UsageError

if TYPE_CHECKING:
    from nestling.cli import Show


def show(command: Show) -> int:
    """Run the command. A bundle shows its model card. Imports no torch."""
    run = Path(command.run)
    if not (run / "recipe.toml").is_file():
        if (run / "config.json").is_file() and (run / "README.md").is_file():
            print((run / "README.md").read_text(encoding="utf-8"))
            return 0
        raise UsageError(f"there is no run {run}: give the folder that nestling train or demo printed")
    settings = load_toml(run / "recipe.toml")
    print(f"{run}\n\ngiven\n" + _indented(to_toml(settings.get("given", {}))))
    print("chosen automatically")
    for name, entry in settings.get("derived", {}).items():
        print(f"  {name}: {entry['value']} ({entry['reason']})")
    try:
        metrics = json.loads((run / "metrics.json").read_bytes())
    except FileNotFoundError:
        print("\nnot finished: the same training command goes on where it stopped")
        return 0
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {run / 'metrics.json'}: {error}; run the training command again") from error
    print("\nscores on test rows")
    for name, entry in {metrics["method"]: metrics, **metrics.get("methods", {})}.items():
        for level in entry["levels"]:
            numbers = "  ".join(
                f"{key} {level[key]:.4f}" for key in ("accuracy", "confidence", "ece") if level[key] is not None
            )
            print(f"  {name:26} {level['name']:12} {numbers}  n {level['n']}")
    if "verdict" in metrics:
        print(f"\n{metrics['verdict']}")
    print(
        f"\ncommit {metrics['commit']}, {metrics['seconds']} s on {metrics.get('hardware', 'unknown hardware')}; report: {run / 'report.html'}"
    )
    return 0


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" if line else "\n" for line in text.splitlines())
