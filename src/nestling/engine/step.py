"""What one update is made of: which weights move, the module that gives their loss, and the checks on what came out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nestling import collective
from nestling.data.batch import Batch
from nestling.engine.runtime import Runtime
from nestling.methods.recipe import Stage
from nestling.models.model import Model
from nestling.objectives.terms import Objective


class StepModule(nn.Module):
    """Model and objective as one module, so that what is parallel wraps the loss too."""

    def __init__(self, model: Model, objective: Objective, runtime: Runtime, until: str | None, since: int = 0) -> None:
        super().__init__()
        self.model, self.objective, self.runtime = model, objective, runtime
        # In a tuple, so that the weights do not appear a second time under another name.
        self.calls = (runtime.compile(model),)
        self.options: dict[str, Any] = {"until": until, **({"since": since} if since else {})}

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        with self.runtime.autocast():
            outputs = self.calls[0](batch.inputs, **self.options)
        return self.objective(outputs, batch, progress)


def mark_trainable(stage: Stage, model: Model, objective: Objective) -> dict[str, nn.Parameter]:
    """Freeze all but what the stage declares, and return its parameters by name."""
    model.requires_grad_(False)
    objective.requires_grad_(True)
    for module in stage.trainable:
        module.requires_grad_(True)
    both = nn.ModuleDict({"model": model, "objective": objective})
    return {name: p for name, p in both.named_parameters() if p.requires_grad}


def set_modes(stage: Stage, model: Model, objective: Objective) -> None:
    """Training mode for what is trained; frozen norm layers and dropouts stay in evaluation mode."""
    model.eval()
    objective.train()
    for module in stage.trainable:
        module.train()


def check_gradients(stage: Stage, trained: dict[str, nn.Parameter]) -> None:
    """After the first backward: what is declared trainable but has no gradient is a mistake in the recipe."""
    missing = [name for name, p in trained.items() if p.grad is None]
    if missing:
        raise ValueError(
            f"stage {stage.name} declares {missing[0]} trainable, but its objective gives it no gradient "
            f"({len(missing)} such parameters): leave it out of 'trainable', or use it in the objective"
        )


class NotFinite(Exception):
    """What is not: the loss, or a weight by its name."""


def values_of(
    loss: Tensor, terms: dict[str, Tensor], trained: Mapping[str, Tensor], gradients: Sequence[Tensor], skips: bool
) -> tuple[float, dict[str, float]]:
    """Loss and terms of the global batch as numbers. Raises NotFinite.

    Norms of weights and gradients go along, the same on every process: on a GPU each read waits for it. ``skips``:
    a scaler leaves out a step whose gradient is not finite.
    """
    norms = [get_total_norm(tensors).detach() for tensors in (list(trained.values()), gradients)]
    # Each process holds its share of the terms, so that their sum over processes is that of the global batch.
    stacked = torch.stack([*norms, loss.detach(), *terms.values()])
    weight, gradient, value, *parts = (collective.all_sum(stacked) / collective.world_size()).tolist()
    # A norm may overflow where none of its numbers does.
    if not math.isfinite(weight) and (culprit := first_not_finite(trained)):
        raise NotFinite(f"weight {culprit}")
    if not math.isfinite(value):
        raise NotFinite("loss")
    if not (skips or math.isfinite(gradient)) and not all(torch.isfinite(g).all() for g in gradients):
        raise NotFinite("gradient")
    return value, dict(zip(terms, parts, strict=True))


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Raise NotFinite where a tensor is not: it must neither be saved nor become the best."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    total = get_total_norm(list(floating.values())).item()
    if not math.isfinite(total) and (culprit := first_not_finite(floating)):
        raise NotFinite(f"weight {culprit}")


def unsynchronised(module: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay this process's own inside the block, and are averaged with those of a later backward."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()


def shares(global_size: int, parts: int) -> list[float]:
    """Of a global batch, the share of rows that each micro-batch holds over all processes."""
    own_sizes = [len(range(rank, global_size, collective.world_size())) for rank in range(collective.world_size())]
    return [sum(len(range(number, size, parts)) for size in own_sizes) / global_size for number in range(parts)]


def own(rows: np.ndarray) -> np.ndarray:
    """This process's part of a global batch."""
    return rows[collective.rank() :: collective.world_size()]


def listed_rows(rows: Iterable[int], limit: int = 8) -> str:
    """``3, 17, 5``; past ``limit`` the rest is counted."""
    rows = list(map(int, rows))
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return ", ".join(map(str, rows[:limit])) + more
