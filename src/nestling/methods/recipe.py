"""What a method is written in: a ``Recipe`` yields ``Stage`` after ``Stage``, and the engine trains them.

``Recipe.stages`` is a generator: its body is the paper's algorithm. Between two yields it only builds, cheaply and
deterministically; whatever is computed from weights or data happens in a stage's hook and is written into a buffer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
from torch import Tensor, nn

from nestling.data.transforms import Augmentation
from nestling.errors import UsageError, unknown
from nestling.models.build import AnyOptions, NetworkOptions
from nestling.objectives.terms import Objective, Term

if TYPE_CHECKING:
    from nestling.data.batch import Batch
    from nestling.data.dataset import LabelledData
    from nestling.models.model import Model, Outputs

OPTIMIZERS = ("adamw", "adam", "sgd")
LARGEST_BATCH, LEAST_BATCH = 256, 32
"""Of the automatic choice."""
LEAST_STEPS = 10
"""Of an epoch: with fewer, a hundred rows would be learned from in a handful of updates."""
SCHEDULES = ("one-cycle", "cosine", "constant", "steps", "plateau")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights move."""

    name: str = "adamw"
    """adamw, adam or sgd."""
    lr: float | tuple[float, ...] = 3e-3
    """Learning rate at its highest: one value, or one per stage."""
    weight_decay: float = 1e-4
    """Decoupled for adamw, an L2 penalty for adam and sgd."""
    momentum: float = 0.9
    """Of sgd."""
    schedule: str = "one-cycle"
    """one-cycle, cosine, constant, steps (divides the rate at each of `drops`), or plateau (divides it after `patience`
    epochs without improvement)."""
    factor: float = 5.0
    """What steps and plateau divide the rate by."""
    drops: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Shares of a stage's steps after which steps divides."""
    restarts: bool = False
    """With steps the optimiser is made anew at each of `drops`: its momentum is cleared."""
    patience: int = 5
    """Epochs without improvement after which plateau divides."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown("optimizer.name", self.name, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown("optimizer.schedule", self.schedule, SCHEDULES)
        check("optimizer.lr", self.lr, above=0)
        check("optimizer.weight_decay", self.weight_decay, least=0)
        check("optimizer.momentum", self.momentum, least=0, most=1)
        check("optimizer.drops", self.drops, above=0, most=1)
        check("optimizer.factor", self.factor, above=1)
        check("optimizer.patience", self.patience, least=1)

    @property
    def idle(self) -> dict[str, str]:
        """Fields without effect as the others are, and what it would take for one."""
        takes = {
            "momentum": (self.name == "sgd", "name = 'sgd'"),
            "drops": (self.schedule == "steps", "schedule = 'steps'"),
            "restarts": (self.schedule == "steps", "schedule = 'steps'"),
            "factor": (self.schedule in ("steps", "plateau"), "schedule = 'steps' or 'plateau'"),
            "patience": (self.schedule == "plateau", "schedule = 'plateau'"),
        }
        return {f"optimizer.{name}": f"optimizer.{what}" for name, (used, what) in takes.items() if not used}


@dataclass(frozen=True)
class Select:
    """How a stage's epochs are compared: a pure function of calibrated probabilities and labels, on validation rows."""

    metric: Callable[..., float]
    """(probabilities per level, labels (n, levels), names of levels) to a number; with ``concepts``, these (n,) too."""
    name: str
    mode: str = "min"
    levels: tuple[str, ...] = ()
    """The levels that count; all of them where none is named."""
    split: str = "validation"
    """validation, or train: the stage's own rows, without augmentation."""
    start: bool = False
    """The weights that the stage begins with are compared too."""
    keeps: bool = True
    """The best epoch's weights are kept; false records the metric of every epoch, and the last one's are."""
    concepts: str | None = None
    """The level, or the column, of the concepts that the metric is told of each row."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a hook may see. Test rows are not among it."""

    model: Model
    objective: Objective
    train: LabelledData
    validation: LabelledData | None
    predict: Callable[[LabelledData], tuple[Outputs, Tensor]]
    """Rows to outputs of the model in evaluation mode, without augmentation, and their targets (n, levels)."""
    batches: Callable[[LabelledData], Iterator[Batch]]
    """Rows as batches on the device, in their order, without augmentation."""
    note: Callable[[str, object, str], None]
    """Records what was decided automatically: name, value, reason. Printed, and kept in the run's recipe.toml."""
    epochs: int = 0
    """Of the stage, at most."""
    epoch: int = 0
    """The one under way, or just over, from 0; ``epochs`` at the stage's end."""


Hook = Callable[[Context], None]
Perturb = Callable[[Callable[["Batch"], Tensor], "Batch"], "Batch"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One optimisation problem: which rows, which weights, which objective, for how long."""

    name: str
    data: LabelledData
    rows: np.ndarray | None = None
    """Numbers of the rows of ``data`` that are trained on; all of them by default."""
    objective: Objective | Term
    trainable: Sequence[nn.Module]
    """Everything else is frozen, its norm layers in evaluation mode."""
    optimizer: Optimizer
    lr: float
    """The highest learning rate of this stage."""
    epochs: int
    batch_size: int
    steps_per_epoch: int | None = None
    """One pass over the rows by default."""
    balance: str = "rows"
    """levels: fixed shares of every batch by finest known level; rows: as they come."""
    balance_level: str | None = None
    """Batches are balanced by what is known up to this level; None for the finest."""
    augmentation: Augmentation | None = None
    until: str | None = None
    """The last output that the objective needs; None for all of them."""
    prefix: Sequence[nn.Module] = ()
    """Frozen modules that come first, with ``views``: what they make of a row is computed once and kept, where there is
    room, and the model is called with ``since=len(prefix)``."""
    views: int | None = None
    """So many augmentations of each row, fixed for the whole run; None for a new one at every draw."""
    pairs: bool = False
    """Every row comes under two augmentations, the second in ``Batch.other``; on rows themselves, not on ``views``."""
    micro_batch: int | None = None
    """Rows, over all processes, that go through the network at once; their gradients add up to the batch's. Parts are
    weighed by their rows: exact where every row has the labels that the objective reads."""
    select: Select | None = None
    """None keeps the last epoch."""
    patience: int | None = None
    """Stop after so many epochs without a better one."""
    perturb: Perturb | None = None
    """``perturb(loss, batch)`` replaces the batch before the step: the second pass of example robustness.
    ``loss(batch)`` is the step's own; what terms, reducers and batch norms keep of a batch stays as it is meanwhile."""
    after_step: Hook | None = None
    """Runs on every process, which must all do the same: a momentum encoder."""
    after_epoch: Hook | None = None
    """Runs on the first process; what it writes into buffers (clusters) reaches the others, and the checkpoint."""
    at_end: Hook | None = None
    """Runs once on the first process, on the restored best weights. It may make the model narrower: weights and shapes
    reach the other processes, and the stage's file."""
    assume: Callable[[Model], str] | None = None
    """What a dry run does in place of ``at_end``: changes shapes as that is expected to, and says what it assumes."""
    own_epochs: bool = False
    """``epochs`` are not the recipe's field of that name, which ``--minutes`` shortens."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Abstract. The hyper-parameters of a method and, in ``stages``, its algorithm."""

    method: ClassVar[str]
    """Its name on the command line."""

    epochs: int | tuple[int, ...] | None = None
    """At most so many: one value, or one per stage. None: 60, and of nested learning's coarser levels 3 each."""
    steps_per_epoch: int | None = None
    """None: one pass over the stage's rows, and at least 10 steps."""
    batch_size: int | None = None
    """Rows per step, over all processes. None: 256, of few rows a tenth, but at least 32."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """How weights move."""
    norm: str = "batch"
    """Normalisation in the network: batch or none."""
    balance: str = "levels"
    """levels: fixed shares of a batch by finest known level; rows: as they come."""
    augmentation: str = "auto"
    """auto (by the kind of image), none, affine, crop, crop-mirror, crop-mirror-cutout or strong."""
    patience: int | None = None
    """Stop a stage after so many epochs without a better validation loss, where the best epoch is kept."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "steps_per_epoch"):
            check(name, getattr(self, name), least=1, most=10**9)
        check("patience", self.patience, least=1)
        for name, options in (("norm", ("batch", "none")), ("balance", ("levels", "rows"))):
            if getattr(self, name) not in options:
                raise unknown(name, getattr(self, name), options)
        Augmentation.parse(self.augmentation, (1, 8, 8))

    @property
    def searched(self) -> dict[str, tuple[float, ...]]:
        """The fields that ``nestling sweep`` searches: log-uniformly between two numbers, or each of several values."""
        return {"optimizer.lr": (1e-4, 1e-1)}

    @property
    def idle(self) -> dict[str, str]:
        """Fields without effect as the others are, dotted, and what it would take for one: who sets them is warned."""
        return self.optimizer.idle

    def remarks(self, data: LabelledData) -> list[str]:
        """What to warn of before a training on these rows: labels that it makes no use of, fields without effect."""
        return []

    def network(self) -> AnyOptions:
        """What this method asks of its network."""
        return NetworkOptions(norm=self.norm)

    def concepts_at(self, data: LabelledData) -> str | None:
        """The level, or column, of the concepts that this recipe weights or is judged by; None where it knows none."""
        return None

    def batch_for(self, num_rows: int) -> int:
        """Rows per step of a stage of ``num_rows``."""
        return self.batch_size or max(min(LARGEST_BATCH, num_rows // LEAST_STEPS), LEAST_BATCH)

    def steps_for(self, num_rows: int, batch_size: int) -> int | None:
        """Steps per epoch of a stage whose pass is over ``num_rows``; None is an exact pass, every row once."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        return LEAST_STEPS if num_rows < LEAST_STEPS * batch_size else None

    @abstractmethod
    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        """The algorithm. ``data`` are the training rows; validation rows reach hooks and ``select`` alone."""


N = TypeVar("N", int, float)


def of_stage(name: str, values: N | tuple[N, ...], stage: int, num_stages: int) -> N:
    """The value for stage number ``stage``: a single value serves all of them. Raises UsageError on another count."""
    if not isinstance(values, tuple):
        return values
    if len(values) != num_stages:
        raise UsageError(f"{name} has {len(values)} values for {num_stages} stages: give one value, or one per stage")
    return values[stage]


def check(
    name: str, value: object, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> None:
    """Raise UsageError unless every number in ``value`` lies in the range; None passes."""
    for number in value if isinstance(value, tuple) else (value,):
        if number is None:
            continue
        wanted = " and ".join(
            [f"above {above}"] * (above is not None)
            + [f"at least {least}"] * (least is not None)
            + [f"at most {most}"] * (most is not None)
        )
        good = isinstance(number, int | float) and (
            (above is None or number > above)
            and (least is None or number >= least)
            and (most is None or number <= most)
            and abs(number) < float("inf")
        )
        if not good:
            raise UsageError(f"{name} must be {wanted}, got {number!r}")
