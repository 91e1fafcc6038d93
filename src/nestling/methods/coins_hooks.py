"""What search from coarse labels does between steps and epochs: proxies made anew, rows brought up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nestling.methods.recipe import Context
from nestling.objectives.instance_terms import InstanceProxy, InstanceTerm


def switched_on(epochs: int) -> float:
    """The progress at which proxies begin to count: with the first whole epoch of the second half."""
    return math.ceil(epochs / 2) / epochs


@dataclass(frozen=True)
class CatchUp:
    """The stage's file holds every row as it is at the end: a later run goes on from there."""

    def __call__(self, context: Context) -> None:
        for term in context.objective.terms:
            if isinstance(term, InstanceTerm):
                term.rows.current()


@dataclass(frozen=True)
class Clustering:
    """After each epoch from half-way on but the last, the proxies are made anew from the rows of then (Algorithm 1)."""

    proxies: InstanceProxy

    def __call__(self, context: Context) -> None:
        # After the last epoch nobody would read them.
        if math.ceil(context.epochs / 2) <= context.epoch + 1 < context.epochs:
            # The engine seeds every hook, by the run's seed and the epoch.
            self.proxies.cluster(int(torch.randint(2**31, ())))
