"""What a run says while it trains: a live line on a terminal, plain lines elsewhere. Records go to metrics.jsonl."""

from __future__ import annotations

import sys
import time
from typing import Any

QUIET_SECONDS = 5.0


class Reporter:
    """Prints to stderr, so that stdout stays free for results. ``verbose=False`` prints nothing."""

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self.live = None
        self.task = None
        self.printed = 0.0
        self.began = time.monotonic()
        self.done_before = 0.0

    def say(self, text: str) -> None:
        """One line."""
        if self.verbose:
            if self.live is not None:
                self.live.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)

    def stage(self, name: str, total: int, done: int, description: str) -> None:
        """A stage of ``total`` steps begins, ``done`` of which were taken before."""
        self.say(f"stage {name}: {description}")
        self.began, self.done_before, self.printed = time.monotonic(), done, time.monotonic()
        if self.verbose and sys.stderr.isatty() and total:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(20),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=Console(stderr=True),
            )
            self.live.start()
            self.task = self.live.add_task(name, total=total, completed=done, detail="")

    def step(self, done: int) -> None:
        """``done`` steps of the stage are taken."""
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=done)

    def epoch(self, name: str, epoch: int, epochs: int, done: int, total: int, record: dict[str, Any]) -> None:
        """An epoch ended; off a terminal only every few seconds' last one is printed."""
        detail = "  ".join(f"{key} {value:.3g}" for key, value in record.items() if isinstance(value, float))
        accuracies = record.get("accuracy", {})
        detail += "".join(f"  {level} {100 * value:.1f} %" for level, value in accuracies.items() if value is not None)
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=done, description=f"{name} epoch {epoch}/{epochs}", detail=detail)
        elif time.monotonic() - self.printed > QUIET_SECONDS or epoch == epochs:
            self.printed = time.monotonic()
            left = (self.printed - self.began) / max(done - self.done_before, 1) * (total - done)
            self.say(f"  {name} epoch {epoch}/{epochs}  {detail}  at most {left:.0f} s left in this stage")

    def stage_ended(self) -> None:
        """The stage is over, or broken off."""
        if self.live is not None:
            self.live.stop()
            self.live = self.task = None
