"""Checkpoints: a folder of safetensors and JSON, with a manifest of hashes, renamed into place when it is complete.

``latest`` is computed, never stored: it walks back to the newest folder whose hashes agree. Nothing reads a pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nestling.errors import StorageError
from nestling.files import write_folder

FORMAT = 1


class NewerFormat(StorageError):
    """What a newer nestling wrote: sound, but not to be read by this one."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by name and a JSON state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write(folder: Path, saved: Saved) -> None:
    """Write ``folder`` whole or not at all."""
    contents = {
        "tensors.safetensors": save({name: t.detach().cpu().contiguous() for name, t in saved.tensors.items()}),
        "state.json": json.dumps(saved.state, allow_nan=False).encode(),
    }
    manifest = {"format": FORMAT, "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}}
    write_folder(folder, {**contents, "manifest.json": json.dumps(manifest).encode()})


def read(folder: Path) -> Saved:
    """Read and check a checkpoint. Raises StorageError where a file is missing, damaged or of a newer format."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["format"] > FORMAT:
            raise NewerFormat(
                f"{folder} has format {manifest['format']}, newer than this nestling reads ({FORMAT}): update nestling"
            )
        contents = {name: (folder / name).read_bytes() for name in ("tensors.safetensors", "state.json")}
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
                raise StorageError(f"{folder / name} is damaged: its hash is not the one in the manifest")
        return Saved(load(contents["tensors.safetensors"]), json.loads(contents["state.json"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot read the checkpoint {folder}: {error}") from error


class Checkpoints:
    """The checkpoints and finished stages of a run folder."""

    def __init__(self, run: Path) -> None:
        self.partial = run / "checkpoints"
        self.finished = run / "stages"

    def save(self, stage: int, epoch: int, step: int, saved: Saved, keep: int = 2) -> None:
        """Write a checkpoint of the interrupted stage, and delete all but the newest ``keep`` up to it.

        Later ones are those that could not be read: the run has gone back behind them.
        """
        new = self.partial / f"{stage:02d}-{epoch:05d}-{step:07d}"
        write(new, saved)
        there = self._partial()
        end = there.index(new) + 1
        for other in [*there[end:], *there[: max(end - keep, 0)]]:
            shutil.rmtree(other, ignore_errors=True)

    def any(self) -> bool:
        """Whether a checkpoint or a finished stage is there to go on from."""
        return bool(self._partial()) or any(self.finished.glob("[0-9]*-*"))

    def latest(self, stage: int) -> tuple[Saved | None, list[str]]:
        """The newest complete checkpoint of a stage, and a line for each newer one that had to be passed over.

        Raises StorageError where none can be read and one is of a newer format: beginning anew would discard it.
        """
        complaints: list[str] = []
        newer: NewerFormat | None = None
        for folder in reversed(self._partial()):
            if int(folder.name.split("-")[0]) != stage:
                continue
            try:
                return read(folder), complaints
            except StorageError as error:
                newer = error if isinstance(error, NewerFormat) else newer
                complaints.append(f"{error}; falling back to the checkpoint before")
        if newer is not None:
            raise newer
        return None, complaints

    def _partial(self) -> list[Path]:
        return sorted(p for p in self.partial.glob("[0-9]*-*-*")) if self.partial.is_dir() else []

    def finish(self, stage: int, name: str, saved: Saved) -> None:
        """Write the file of a finished stage; its checkpoints are then of no more use."""
        write(self.finished / f"{stage:02d}-{name}", saved)
        for old in self._partial():
            shutil.rmtree(old, ignore_errors=True)

    def stage(self, stage: int, name: str) -> Saved | None:
        """A finished stage's file, or None where it is yet to be trained. Raises StorageError where it is damaged."""
        folder = self.finished / f"{stage:02d}-{name}"
        try:
            return read(folder) if folder.is_dir() else None
        except StorageError as error:
            raise StorageError(f"{error}; it is kept only once: delete the run folder and train again") from error


def collect(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with ``prefix`` before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def pick(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix``, without it."""
    return {
        name.removeprefix(prefix + "."): tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, by the number of the parameter."""
    return {
        f"{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave, in the layout of each parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        like = parameter.shape == tensor.shape and tensor.ndim > 0
        # A fused step keeps its step counts on the parameter's device; others want them on the CPU.
        value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor) if like else tensor.to(parameter.device)
        optimizer.state[parameter][name] = value
