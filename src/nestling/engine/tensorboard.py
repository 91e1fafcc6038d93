"""Scalars for TensorBoard, where that is installed: ``tensorboard --logdir RUN/tensorboard``.

Each stage has a folder of its own there, so that a resume that takes back the steps behind its checkpoint leaves the
stages before alone. ``metrics.jsonl`` holds the same figures, always.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoard:
    """What a stage logs. Writes nothing where TensorBoard is not installed, or ``folder`` is None.

    Parameters
    ----------
    folder: the run folder.
    stage: the stage's folder, as in ``stages/``.
    done: steps of the stage that stand in the checkpoint; what was written of later ones is purged.
    """

    def __init__(self, folder: Path | None, stage: str, done: int) -> None:
        self.writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(str(folder / FOLDER / stage), purge_step=done + 1)

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        """Every number among ``figures``, as of so many steps; a mapping's own are named after it: terms/fine."""
        if self.writer is None:
            return
        for name, value in figures.items():
            if isinstance(value, Mapping):
                self.add(step, {f"{name}/{key}": inner for key, inner in value.items()})
            elif isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Give what was added to the operating system: a checkpoint is about to say that it is there."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Flush, and end the thread that writes."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
