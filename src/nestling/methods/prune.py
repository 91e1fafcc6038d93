"""Compression while training (*Shallow Learning for Deep Networks*, Section 4.3), at the end of a layer's stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nestling.errors import UsageError
from nestling.methods.recipe import Context, check
from nestling.models.convnet import Block
from nestling.models.layerwise import LayerwiseModel
from nestling.models.model import Model
from nestling.models.prune import filter_scores, narrow
from nestling.objectives.functional import marginal_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The settings of compression while training."""

    share: float | None = None
    """Of a layer's filters that are kept once it is trained; then its classifier is fine-tuned. None keeps them all."""
    epochs: int = 20
    """Of that fine-tuning."""

    def __post_init__(self) -> None:
        check("compression.share", self.share, above=0, most=1)
        check("compression.epochs", self.epochs, least=1)


@dataclass(frozen=True)
class Pruning:
    """``Pruning(block, share)(context)`` keeps that share of a block's filters, those of the largest Taylor score."""

    block: int
    share: float

    def __call__(self, context: Context) -> None:
        model = layers_of(context.model)
        before = accuracy(context, self.block)
        scores = self.scores(context)
        kept = scores.topk(self.left(model)).indices.sort().values
        filters = len(scores)
        narrow(model, self.block, kept)
        after = accuracy(context, self.block)
        context.note(
            f"filters of layer-{self.block + 1}",
            f"{len(kept)} of {filters}",
            f"first-order Taylor criterion; validation accuracy {percent(before)} before, {percent(after)} after",
        )

    def scores(self, context: Context) -> torch.Tensor:
        """Of every filter: how much the training loss would change without it, to first order (Molchanov et al.)."""
        model = layers_of(context.model)
        name, level = f"layer-{self.block + 1}", model.levels_at[self.block]
        scores = torch.zeros(model.out_channels(self.block), device=model.calibration.temperature.device)
        for batch in context.batches(context.train):
            maps = batch.inputs
            with torch.no_grad():
                for block in model.blocks[: self.block + 1]:
                    maps = block(maps)
            maps = maps.detach().requires_grad_()
            with torch.enable_grad():
                logits, _ = model.auxiliary[name](maps)
                loss = marginal_cross_entropy(logits, batch.labels, model.taxonomy, level).sum()
            (gradient,) = torch.autograd.grad(loss, maps)
            scores += filter_scores(maps.detach(), gradient)
        return scores

    def left(self, model: LayerwiseModel) -> int:
        """How many filters stay."""
        return int(self.share * model.out_channels(self.block) + 1e-9)

    def check(self, model: LayerwiseModel) -> None:
        """Raise UsageError where the block cannot be pruned, or none of its filters would be left."""
        if not all(isinstance(block, Block) for block in model.blocks):
            raise UsageError("compression needs layers of one convolution each: use backbone auto, vgg11 or vgg13")
        if self.left(model) < 1:
            raise UsageError(
                f"compression.share = {self.share} leaves none of the {model.out_channels(self.block)} filters of "
                f"layer {self.block + 1}: keep a larger share"
            )

    def assume(self, model: Model) -> str:
        """What this does to shapes."""
        layers = layers_of(model)
        filters, left = layers.out_channels(self.block), self.left(layers)
        narrow(layers, self.block, torch.arange(left))
        return f"{left} of the {filters} filters of layer {self.block + 1} are kept"


def note_accuracy(context: Context) -> None:
    """Record how often the newest classifier is right on validation rows."""
    model = layers_of(context.model)
    name = model.outputs[-1]
    share = accuracy(context, model.number(name))
    if share is not None:
        context.note(f"validation accuracy of {name}", percent(share), f"at level {model.level_of(name)}")


@torch.no_grad()
def accuracy(context: Context, block: int) -> float | None:
    """Of the classifier behind a block, on validation rows that have its level; None without such rows."""
    model = layers_of(context.model)
    if context.validation is None or len(context.validation) == 0:
        return None
    outputs, labels = context.predict(context.validation)
    target = labels[:, model.taxonomy.level_index(model.levels_at[block])]
    right = outputs.logits[f"layer-{block + 1}"].argmax(1) == target
    return float(right[target >= 0].float().mean()) if (target >= 0).any() else None


def percent(share: float | None) -> str:
    """``87.6 %``."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


def layers_of(model: Model) -> LayerwiseModel:
    """The model of a layerwise recipe."""
    assert isinstance(model, LayerwiseModel)
    return model
