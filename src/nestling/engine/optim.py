"""From a recipe's ``Optimizer`` to torch's, and learning rates as functions of progress."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nestling.methods.recipe import Optimizer
from nestling.models.words import AlongGradient

EPSILON = 100.0
"""Of Adam, for tables of words: far above their gradients."""
SGD_SHARE = 0.03
"""Of the rate of SGD, which is as much higher than Adam's, for tables of words; momentum aside."""


def build_optimizer(settings: Optimizer, lr: float, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh optimiser; a fused kernel where there is one, since small networks are bound by the calls.

    ``models.words.AlongGradient``, tables of words, are a group of their own, whose ``rate`` is a factor on the
    learning rate. Adam would divide a rare word's gradient by its own size, so that the rarest words, which tell least,
    would move furthest; with an epsilon far above all gradients its step is their mean's multiple, as SGD's is.
    """
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for parameter in parameters:
        groups[isinstance(parameter, AlongGradient)].append(parameter)
    along: dict[str, float] = {"rate": EPSILON, "eps": EPSILON}
    if settings.name == "sgd":
        along = {"rate": SGD_SHARE * (1 - settings.momentum)}
    elif settings.name == "adamw":
        along["weight_decay"] = settings.weight_decay / EPSILON
    both: list[dict[str, Any]] = [{"params": groups[0]}, {"params": groups[1], **along}]
    given = [group for group in both if group["params"]]
    fused = given[0]["params"][0].device.type in ("cpu", "cuda")
    if settings.name == "sgd":
        return torch.optim.SGD(
            given, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=fused
        )
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(given, lr=lr, weight_decay=settings.weight_decay, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)


def rate(settings: Optimizer, progress: float, history: list[float]) -> float:
    """The factor on the stage's learning rate at ``progress`` in [0, 1).

    ``history`` are the validation losses so far, lower is better, which 'plateau' alone reads.
    """
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if settings.schedule == "one-cycle":
        warm = 0.3
        if progress < warm:
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * progress / warm)) / 2
        return max((1 + math.cos(math.pi * (progress - warm) / (1 - warm))) / 2, 1e-5)
    if settings.schedule == "steps":
        return settings.factor ** -num_drops(settings, progress)
    if settings.schedule == "plateau":
        return settings.factor ** -num_plateaus(history, settings.patience)
    return 1.0


def num_drops(settings: Optimizer, progress: float) -> int:
    """How often ``steps`` has divided the rate at ``progress``."""
    return sum(progress >= drop - 1e-9 for drop in settings.drops)


def begins_anew(settings: Optimizer, step: int, steps: int) -> bool:
    """Whether the optimiser is made anew before step number ``step``, from 0, of ``steps``."""
    before, now = (num_drops(settings, number / steps) for number in (step - 1, step))
    return settings.schedule == "steps" and settings.restarts and now > before


def num_plateaus(history: list[float], patience: int) -> int:
    """How often ``patience`` epochs have passed without a lower loss; each time the count starts anew."""
    best, stale, plateaus = math.inf, 0, 0
    for loss in history:
        best, stale = (loss, 0) if loss < best else (best, stale + 1)
        if stale == patience:
            plateaus, stale = plateaus + 1, 0
    return plateaus
