"""Toy recipes of every shape that a method has: what the engine must carry, kill, resume and spread over processes.

``layers`` grows a layer a stage and prunes it at the stage's end; ``robust`` makes a second pass with gradients of its
inputs, under a reducer that holds state; ``clusters`` has rows with a lazy update of their own, clusters that a hook
computes into a buffer, and a term that is switched on half-way; ``levels`` has missing labels; ``robust layers``
composes two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import collective
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.methods import Nested
from nestling.methods.calibrate import select_by_likelihood
from nestling.methods.concepts import concept_table
from nestling.methods.recipe import Context, Optimizer, Recipe, Stage
from nestling.methods.robust import along_the_gradient
from nestling.models.backbones import conv_block
from nestling.models.heads import Calibration
from nestling.models.model import Answers, Model, Outputs
from nestling.models.weights import reshape
from nestling.objectives.functional import level_cross_entropy
from nestling.objectives.reducers import ConceptWeighted, Reducer
from nestling.objectives.terms import CrossEntropy, Objective, Term
from nestling.taxonomy import Taxonomy
from small import small_model

SGD = Optimizer(name="sgd", lr=0.1, schedule="constant")
WIDTH = 8


class Layers(Model):
    """Blocks that a recipe adds one after the other, each with a classifier of the finest level behind it."""

    def __init__(self, taxonomy: Taxonomy, norm: str) -> None:
        super().__init__(taxonomy, {"backbone": "layers", "input_shape": [1, 8, 8], "rejection": False})
        self.norm = norm
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleDict()
        self.calibration = Calibration({taxonomy.levels[-1]: (WIDTH, taxonomy.width(taxonomy.levels[-1]))})

    def grow(self) -> list[nn.Module]:
        """One more block and its head."""
        channels = self.blocks[-1][0].out_channels if len(self.blocks) else 1
        self.blocks.append(conv_block(channels, WIDTH, self.norm))
        name = f"layer-{len(self.blocks)}"
        self.heads[name] = nn.Linear(WIDTH, self.taxonomy.width(self.taxonomy.levels[-1]))
        return [self.blocks[-1], self.heads[name]]

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.heads)

    @property
    def flat(self) -> bool:
        return True

    def parts(self, until: str) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, images: Tensor, until: str | None = None) -> Outputs:
        current, logits, features, pooled = images, {}, {}, images
        for name, block in zip(self.heads, self.blocks):
            current = block(current)
            pooled = features[name] = current.mean((2, 3))
            logits[name] = self.heads[name](pooled)
            if name == until:
                break
        return Outputs(logits, features, pooled)

    def answers(self, outputs: Outputs, reject: bool = True) -> Answers:
        fine, last = self.taxonomy.levels[-1], list(outputs.logits)[-1]
        deepest = {fine: outputs.logits[last]}, {fine: outputs.features[last]}
        return super().answers(Outputs(*deepest, outputs.embedding), reject)


def narrow(model: Layers, kept: Tensor | None = None) -> None:
    """Leave half of the newest block's filters; with ``kept``, these and their weights."""
    number, name = len(model.blocks) - 1, model.outputs[-1]
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    mine = {key for key in old if key.startswith((f"blocks.{number}.", f"heads.{name}."))}
    axis = {key: 1 if key == f"heads.{name}.weight" else 0 for key in mine if old[key].ndim}
    axis.pop(f"heads.{name}.bias")
    half = {
        key: tuple(size // 2 if d == axis.get(key) else size for d, size in enumerate(old[key].shape)) for key in old
    }
    reshape(model, half)
    if kept is not None:
        new = model.state_dict()
        for key, d in axis.items():
            new[key].copy_(old[key].index_select(d, kept))


@torch.no_grad()
def prune(context: Context) -> None:
    """Keep the half of the filters with the largest weights."""
    filters = context.model.blocks[-1][0].weight  # type: ignore[index]
    narrow(context.model, filters.flatten(1).norm(dim=1).topk(len(filters) // 2).indices.sort().values)  # type: ignore[arg-type]


def assume(model: Model) -> str:
    """What ``prune`` does to shapes."""
    narrow(model)  # type: ignore[arg-type]
    return f"{WIDTH // 2} of {WIDTH} filters are kept"


def concepts_of(data: LabelledData, batch_size: int) -> Reducer:
    """A weight for each coarse class, over the rows whose finest label is known."""
    counted = data.labels[:, -1] >= 0
    coarse, every = data.taxonomy.levels[0], np.arange(len(data))
    table = concept_table(data, every, coarse, batch_size=batch_size, balance="rows", counted=counted)
    return ConceptWeighted(table.concept_of, table.counts, table.names, strength=5.0, s=2, c=3.0)


class LayerCrossEntropy(Term):
    """Of one layer's classifier, over the rows whose finest label is known."""

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.labels[:, -1]
        return level_cross_entropy(outputs.logits[self.name].float(), labels), (labels >= 0).float()


second_pass = along_the_gradient(0.5)


class InstanceRows(Term):
    """Each row is told from the others of its coarse class by a row of weights, which moves when its class is drawn.

    Weights decay at every step; those of classes that are not drawn catch up when they are.
    """

    def __init__(self, data: LabelledData, dimension: int, decay: float = 0.1) -> None:
        super().__init__("instance")
        self.decay = decay
        place = torch.zeros(int(data.index.max()) + 1, dtype=torch.int64)
        place[torch.from_numpy(data.index)] = torch.arange(len(data))
        self.place: Tensor
        self.classes: Tensor
        self.rows: Tensor
        self.shrunk: Tensor
        self.seen: Tensor
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("classes", torch.from_numpy(data.labels[:, 0]).clone(), persistent=False)
        self.register_buffer("rows", 0.1 * torch.randn(len(data), dimension))
        self.register_buffer("shrunk", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(len(data), dtype=torch.float64))
        self.leaf: Tensor | None = None

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        classes = batch.labels[:, 0]
        self.active = torch.isin(self.classes, collective.gather(classes))
        with torch.no_grad():
            self.rows[self.active] *= (self.shrunk - self.seen[self.active]).exp().float()[:, None]
            self.seen[self.active] = self.shrunk
        self.leaf = self.rows.detach().clone().requires_grad_()
        scores = outputs.embedding.float() @ self.leaf.T
        scores = scores.masked_fill(self.classes != classes[:, None], -torch.inf)
        values = F.cross_entropy(scores, self.place[batch.index], reduction="none")
        return values, torch.ones_like(values)

    def own_gradients(self) -> list[Tensor]:
        assert self.leaf is not None and self.leaf.grad is not None
        return [self.leaf.grad]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        assert self.leaf is not None and self.leaf.grad is not None
        gradient = collective.all_sum(self.leaf.grad) / collective.world_size()
        self.rows[self.active] -= lr * gradient[self.active]
        self.shrunk += np.log1p(-lr * self.decay)


class Proxies(Term):
    """Cross-entropy against the mean features of clusters, which a hook computes."""

    def __init__(self, data: LabelledData, dimension: int, num_proxies: int) -> None:
        super().__init__("proxy")
        place = torch.zeros(int(data.index.max()) + 1, dtype=torch.int64)
        place[torch.from_numpy(data.index)] = torch.arange(len(data))
        self.place: Tensor
        self.membership: Tensor
        self.centres: Tensor
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("membership", torch.full((len(data),), -1))
        self.register_buffer("centres", torch.zeros(num_proxies, dimension))
        # Weights of its own, without a gradient until the term is switched on.
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        assert (self.membership >= 0).all(), "switched on before there are clusters"
        scores = self.scale * outputs.embedding.float() @ self.centres.T
        values = F.cross_entropy(scores, self.membership[self.place[batch.index]], reduction="none")
        return values, torch.ones_like(values)

    @torch.no_grad()
    def cluster(self, context: Context) -> None:
        """Two rounds of k-means on the training rows' features, from rows drawn anew, in the second half."""
        if 2 * (context.epoch + 1) < context.epochs:
            return
        features = context.predict(context.train)[0].embedding
        centres = features[torch.randperm(len(features))[: len(self.centres)]]
        for _ in range(2):
            nearest = torch.cdist(features, centres).argmin(1)
            centres = torch.stack(
                [features[nearest == k].mean(0) if (nearest == k).any() else centre for k, centre in enumerate(centres)]
            )
        self.membership.copy_(torch.cdist(features, centres).argmin(1))
        self.centres.copy_(centres)


@dataclass(frozen=True, kw_only=True)
class Toy(Recipe):
    """Abstract: what the toys have in common."""

    method: ClassVar[str] = "nested"
    optimizer: Optimizer = SGD
    epochs: int = 2

    def stage(self, data: LabelledData, **fields: Any) -> Stage:
        """A stage at the recipe's sizes."""
        sizes = {"epochs": self.epochs, "batch_size": 24, "steps_per_epoch": self.steps_per_epoch}
        return Stage(data=data, optimizer=self.optimizer, lr=0.1, **sizes, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class GrowLayers(Toy):
    """Three layers, one stage each; with ``robust``, on perturbed images and weighted concepts."""

    robust: bool = False

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        for number in range(1, 4):
            parts = model.grow()  # type: ignore[operator]
            reducer = concepts_of(data, 24) if self.robust else None
            yield self.stage(
                data,
                name=f"layer-{number}",
                trainable=parts,
                objective=LayerCrossEntropy(f"layer-{number}", reducer),
                until=f"layer-{number}",
                select=select_by_likelihood(data.taxonomy.levels),
                perturb=second_pass if self.robust else None,
                at_end=prune,
                assume=assume,
            )


@dataclass(frozen=True, kw_only=True)
class SecondPass(Toy):
    """Perturbed images and weighted concepts."""

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        levels = data.taxonomy.levels
        concepts = concepts_of(data, 24)
        yield self.stage(
            data,
            name="robust",
            trainable=model.parts(levels[-1]),
            objective=CrossEntropy(levels[-1], reducer=concepts)
            + 0.5 * CrossEntropy(levels[0])
            + CrossEntropy(levels[1]),
            perturb=second_pass,
            select=select_by_likelihood(levels),
        )


@dataclass(frozen=True, kw_only=True)
class Clusters(Toy):
    """Coarse labels, rows of their own, and in the second half of the epochs clusters."""

    epochs: int = 4

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        coarse = data.taxonomy.levels[0]
        dimension = model.backbone.channels[-1]  # type: ignore[union-attr]
        proxies = Proxies(data, dimension, num_proxies=6)
        yield self.stage(
            data,
            name="clusters",
            trainable=model.parts(coarse),
            until=coarse,
            objective=CrossEntropy(coarse)
            + Objective([(lambda progress: 0.5 * (progress >= 0.25), InstanceRows(data, dimension))])
            + Objective([(lambda progress: 0.3 * (progress >= 0.5), proxies)]),
            after_epoch=proxies.cluster,
        )


RECIPES: dict[str, Recipe] = {
    "layers": GrowLayers(),
    "robust": SecondPass(),
    "clusters": Clusters(),
    "levels": Nested(epochs=(1, 1, 2), batch_size=24, steps_per_epoch=6, optimizer=SGD),
    "robust layers": GrowLayers(robust=True),
}


def toy_model(name: str, data: LabelledData, norm: str = "batch") -> Model:
    """The model that a toy recipe trains, always with the same weights."""
    if "layers" in name:
        return Layers(data.taxonomy, norm)
    return small_model(data, options={"norm": norm})
