"""Fine-grained search from coarse labels: Xu, Qian, Li, Jin, Hu, *Weakly Supervised Representation Learning with Coarse
Labels*, ICCV 2021.

Coarse classification leaves fine patterns out, instance classification drowns them in others; together they find them
(Equation 3). Told from the rows of its own coarse class alone (Equation 4), an instance costs a fraction. Fine R@1 on
``digit-pairs`` after 30 epochs, one seed, two CPU cores: coins-imp 92, instances alone 77, coarse labels alone 59.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from nestling.data.dataset import LabelledData
from nestling.data.text import holds_texts
from nestling.data.transforms import Augmentation
from nestling.errors import UsageError, unknown
from nestling.methods.calibrate import temperature_stage
from nestling.methods.coins_hooks import CatchUp, Clustering, switched_on
from nestling.methods.concepts import ConceptOptions
from nestling.methods.recipe import Optimizer, Recipe, Stage, check, of_stage
from nestling.methods.self_training import Following
from nestling.models.build import SearchOptions
from nestling.models.model import Model
from nestling.models.search import SearchModel
from nestling.objectives.instance_terms import (
    UNLABELLED,
    Instance,
    InstanceProxy,
    InstanceTerm,
    InstanceWithin,
    SupervisedContrastive,
)
from nestling.objectives.momentum import MomentumContrast
from nestling.objectives.terms import CrossEntropy, Objective


@dataclass(frozen=True)
class Variant:
    """What a name stands for."""

    instance: str | None = None
    """Rows told from all others, from those within their coarse class, or by momentum contrast; None for no term."""
    coarse: bool = True
    """Whether coarse labels shape the features; else the classifier is a probe on them."""
    cosine: bool = False
    mlp: bool = False
    proxies: bool = False


VARIANTS = {
    "ins": Variant(instance="all", coarse=False),
    "cos": Variant(),
    "coins": Variant(instance="all"),
    "coins-imp": Variant(instance="within"),
    "coins-cos": Variant(instance="within", cosine=True),
    "coins-cos-mlp": Variant(instance="within", cosine=True, mlp=True),
    "coinsp": Variant(instance="within", cosine=True, mlp=True, proxies=True),
    "supcon": Variant(coarse=False, cosine=True, mlp=True),
    "moco": Variant(instance="momentum", coarse=False, cosine=True, mlp=True),
    "moco-coarse": Variant(instance="momentum", cosine=True, mlp=True),
    "opt": Variant(),
}
LAMBDAS = (0.5, 1.0, 0.1, 5.0, 0.05, 0.01)
"""What ``nestling sweep`` tries, the default first and then outwards: the six largest of the paper's ten."""
ROWED = ("all", "within")
"""Instance terms that have a row for every training row."""
ROWS_PER_PROXY = 5
"""The paper's 10,000 proxies for 50,000 rows."""
LONGEST_QUEUE = 65_536


@dataclass(frozen=True, kw_only=True)
class Moco:
    """Momentum contrast, of the variants moco and moco-coarse."""

    queue: int | None = None
    """Keys of other pictures; 65,536 by default, at most half of the rows: few are a picture's own of the last pass."""
    momentum: float = 0.999
    """Of the slow copy of the network that makes the keys."""
    coarse_weight: float = 0.5
    """Of the coarse labels beside the contrastive loss, whose weight is 1 (Section 4.3)."""


@dataclass(frozen=True, kw_only=True)
class Coins(ConceptOptions, Recipe):
    """Features for fine-grained search, learned from coarse labels."""

    method: ClassVar[str] = "coins"

    variant: str = "coins-imp"
    """ins (instances alone), cos (coarse labels alone), coins (both), coins-imp (instances within their coarse class),
    coins-cos (cosine softmax), coins-cos-mlp (and a head of two layers), coinsp (and proxies), supcon (supervised
    contrastive on coarse labels), moco (MoCo-v2), moco-coarse (and coarse labels), opt (fine labels, a bound)."""
    label_level: str | None = None
    """The level of the coarse labels; the coarsest by default. opt takes the finest."""
    instance_weight: float = 0.5
    """Lambda, of the instance term (Equations 3 and 9)."""
    proxy_weight: float = 0.5
    """Lambda_P, of the proxy term, which is switched on half-way (Equation 9)."""
    num_proxies: int | None = None
    """P; a fifth of the rows by default, the paper's share."""
    proxies_within: bool = False
    """Proxies of the row's own coarse class alone are compared."""
    temperature: float = 0.1
    """T of the cosine softmax."""
    learn_temperature: bool = False
    """T is learned, and starts there."""
    mlp: int | None = None
    """Features behind the two-layer head, where the variant has one; 128 by default."""
    unlabelled: str = "skip"
    """Rows without coarse label: skip, or instance (in the instance term they are a class of their own)."""
    moco: Moco = field(default_factory=Moco)
    """Momentum contrast."""
    balance: str = "rows"
    augmentation: str = "auto"
    """auto (by the kind of image), none, affine, crop, crop-mirror, crop-mirror-cutout or strong (MoCo-v2's)."""
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            name="sgd", lr=0.1, weight_decay=5e-4, schedule="steps", drops=(0.3, 0.6, 0.8), factor=5.0
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise unknown("variant", self.variant, VARIANTS)
        if self.unlabelled not in UNLABELLED:
            raise unknown("unlabelled", self.unlabelled, UNLABELLED)
        check("instance_weight", self.instance_weight, above=0)
        check("proxy_weight", self.proxy_weight, above=0)
        check("num_proxies", self.num_proxies, least=1)
        check("temperature", self.temperature, above=0)
        check("mlp", self.mlp, least=1)
        check("concept_strength", self.concept_strength, above=0)
        check("moco.queue", self.moco.queue, least=1)
        check("moco.momentum", self.moco.momentum, least=0, most=1)
        check("moco.coarse_weight", self.moco.coarse_weight, above=0)
        if VARIANTS[self.variant].proxies and of_stage("epochs", self.epochs or 60, 0, 1) < 2:
            raise UsageError(
                f"variant {self.variant} makes its proxies after half of the epochs, and uses them in the rest: "
                f"epochs must be at least 2, got {self.epochs}"
            )
        if VARIANTS[self.variant].instance in ROWED and self.optimizer.name != "sgd":
            raise UsageError(
                f"the rows of variant {self.variant} move by SGD with momentum at the rate of the others: "
                f"set optimizer.name = 'sgd', got {self.optimizer.name!r}"
            )

    @property
    def searched(self) -> dict[str, tuple[float, ...]]:
        variant = VARIANTS[self.variant]
        return {"instance_weight": LAMBDAS} if variant.coarse and variant.instance in ROWED else {}

    @property
    def idle(self) -> dict[str, str]:
        variant, found = VARIANTS[self.variant], super().idle
        rowed, contrast = variant.instance in ROWED, variant.instance == "momentum"
        takes = {
            ("instance_weight",): (variant.coarse and rowed, "coarse labels and instance rows"),
            ("unlabelled",): (rowed, "instance rows"),
            ("moco.queue", "moco.momentum"): (contrast, "momentum contrast"),
            ("moco.coarse_weight",): (contrast and variant.coarse, "momentum contrast and coarse labels"),
            ("proxy_weight", "num_proxies", "proxies_within"): (variant.proxies, "proxies"),
            ("temperature", "learn_temperature"): (variant.cosine, "a cosine softmax"),
            ("mlp",): (variant.mlp, "a head of two layers"),
            ("label_level",): (self.variant != "opt", "coarse labels"),
            ("concept_strength",): (self.concept_weights != "off", "concept weights"),
        }
        found |= {
            name: f"{what}, which variant {self.variant} does not have here"
            for names, (used, what) in takes.items()
            if not used
            for name in names
        }
        return found | {"patience": "a method that chooses its epoch, and coins keeps the last one"}

    def remarks(self, data: LabelledData) -> list[str]:
        """As ``Recipe.remarks``: the coarsest level is learned where none is named, and others may be labelled.

        Of texts there is a better method, whose network has a linear model of the words (benchmarks/text_search.py).
        """
        levels, known = data.taxonomy.levels, (data.labels >= 0).sum(axis=0)
        finest = max(np.flatnonzero(known), default=0)
        texts = []
        if holds_texts(data):
            named = ",".join(level for level, count in zip(levels, known, strict=True) if count)
            texts = [
                "of texts nested learning answers far better, and finds a little better, from the same labels: "
                f"--method nested --levels {named}"
            ]
        if self.variant == "opt" or self.label_level is not None or not finest:
            return texts
        return [
            *texts,
            f"coins learns from the labels of level {levels[0]!r} alone; {known[finest]:,} rows are labelled at "
            f"level {levels[finest]!r} too: --set label_level={levels[finest]} learns from those",
        ]

    def network(self) -> SearchOptions:
        variant = VARIANTS[self.variant]
        return SearchOptions(
            norm=self.norm,
            level=self.label_level,
            finest=self.variant == "opt",
            cosine=variant.cosine,
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            mlp=(self.mlp or 128) if variant.mlp else None,
            probe=not variant.coarse,
        )

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        assert isinstance(model, SearchModel)
        rows = self.rows(model, data)
        objective, proxies = self.objective(model, data, rows)
        epochs = of_stage("epochs", self.epochs or 60, 0, 1)
        batch_size = self.batch_for(len(rows))
        contrast = next((term for term in objective.terms if isinstance(term, MomentumContrast)), None)
        yield Stage(
            name="search",
            data=data,
            rows=rows,
            objective=objective,
            trainable=model.parts(model.level),
            optimizer=self.optimizer,
            lr=of_stage("optimizer.lr", self.optimizer.lr, 0, 1),
            epochs=epochs,
            batch_size=batch_size,
            steps_per_epoch=self.steps_for(len(rows), batch_size),
            balance=self.balance,
            balance_level=model.level,
            augmentation=Augmentation.parse(self.augmentation, model.config["input_shape"]),
            pairs=contrast is not None,
            after_step=None if contrast is None else Following(contrast),
            after_epoch=None if proxies is None else Clustering(proxies),
            at_end=CatchUp() if VARIANTS[self.variant].instance else None,
        )
        yield temperature_stage(model, data, self.optimizer)

    def rows(self, model: SearchModel, data: LabelledData) -> np.ndarray:
        """The rows that are learned from: those with a label of the level and, if asked for, the others."""
        level = data.taxonomy.level_index(model.level)
        known = data.taxonomy.columns(data.labels)[:, level] >= 0
        if not known.any():
            raise UsageError(f"no training row is labelled at level {model.level!r}: label some")
        others = self.unlabelled == "instance" and VARIANTS[self.variant].instance is not None
        return np.arange(len(data)) if others else np.flatnonzero(known)

    def objective(
        self, model: SearchModel, data: LabelledData, rows: np.ndarray
    ) -> tuple[Objective, InstanceProxy | None]:
        """Equations 1 to 4, 7 and 9, by variant."""
        variant, level = VARIANTS[self.variant], model.level
        known = np.asarray(data.taxonomy.columns(data.labels)[:, data.taxonomy.level_index(level)] >= 0)
        batch_size = self.batch_for(len(rows))
        reducer = self.concept_reducer(data, rows, known, batch_size=batch_size, balance=self.balance, up_to=level)
        objective = 1.0 * CrossEntropy(level, reducer=reducer)
        if self.variant == "supcon":
            return objective + SupervisedContrastive(level, level), None
        if variant.instance is None:
            return objective, None
        if variant.instance == "momentum":
            if self.moco.queue is not None and self.moco.queue > len(rows):
                raise UsageError(
                    f"moco.queue must be at most the number of rows, {len(rows):,}; got {self.moco.queue:,}"
                )
            queue = self.moco.queue or max(min(LONGEST_QUEUE, len(rows) // 2), 1)
            contrast = MomentumContrast(level, model, model.dimension, queue, self.moco.momentum)
            return (self.moco.coarse_weight if variant.coarse else 1.0) * objective + contrast, None
        classes = data.taxonomy.columns(data.labels)[rows, data.taxonomy.level_index(level)]
        instances = self.instances(model, data.index[rows], classes)
        objective = objective + (self.instance_weight if variant.coarse else 1.0) * instances
        if not variant.proxies:
            return objective, None
        begun = switched_on(of_stage("epochs", self.epochs or 60, 0, 1))
        num_proxies = self.num_proxies or max(len(instances.index) // ROWS_PER_PROXY, 1)
        proxies = InstanceProxy(instances, num_proxies, self.proxies_within)
        weighted = Objective([(lambda progress: self.proxy_weight * (progress >= begun - 1e-9), proxies)])
        return objective + weighted, proxies

    def instances(self, model: SearchModel, index: np.ndarray, classes: np.ndarray) -> InstanceTerm:
        """The term that tells rows apart, among all of them or within their classes."""
        settings = {
            "momentum": self.optimizer.momentum,
            "weight_decay": self.optimizer.weight_decay,
            "unit": model.cosine,
        }
        term: InstanceTerm
        if VARIANTS[self.variant].instance == "all":
            term = Instance(model.level, index, model.dimension, **settings)
        else:
            term = InstanceWithin(model.level, index, classes, model.dimension, unlabelled=self.unlabelled, **settings)
        if model.earlier is not None and not term.place.is_meta:
            term.adopt(model.earlier)
        return term
