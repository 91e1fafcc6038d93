"""The tables of search from coarse labels: recipes at every scale, what is measured, and the paper's order.

*Weakly Supervised Representation Learning with Coarse Labels*, Xu, Qian, Li, Jin, Hu, 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nestling.evaluate.retrieval import precision_at_r, recalls
from nestling.methods.coins import Coins
from nestling.methods.recipe import Optimizer
from nestling.models.search import SearchModel
from nestling.reproduce.measures import Trained, share, trained
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Claim, Place, Trial, better

VARIANTS = ("ins", "cos", "coins", "coins-imp", "coins-cos", "coins-cos-mlp", "coinsp", "supcon", "opt")
STRONG = "coins-imp with strong augmentation"
KS = (1, 2, 4, 8)
PAPER_OPTIMIZER = Optimizer(
    name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="steps", drops=(0.3, 0.6, 0.8), factor=5.0
)
"""Section 4.1: the rate divided by 5 after 60, 120 and 160 of 200 epochs."""


def recipe(scale: str, variant: str, epochs: int, batch_size: int, augmentation: str) -> Coins:
    """A variant with the paper's optimiser; P is a fifth of the rows, as 10,000 are of 50,000."""
    made = Coins(
        variant=variant,
        epochs=epochs,
        batch_size=batch_size,
        augmentation=augmentation,
        optimizer=PAPER_OPTIMIZER,
    )
    return replace(made, epochs=2, steps_per_epoch=1, batch_size=16) if scale == "smoke" else made


def search(trial: Trial, place: Place) -> list[Cell]:
    """Recall@k of every level and mAP@R of the finest, every test row a query; top-1 and top-5 of the coarse classes.

    Features are those of the backbone, compared by cosine similarity.
    """
    return searched(trial, trained(trial, place))


def searched(trial: Trial, found: Trained) -> list[Cell]:
    """``search`` of a network that is trained."""
    assert isinstance(found.run.model, SearchModel)
    outputs, labels = found.outputs(found.test)
    features, labels = outputs.embedding.cpu(), labels.cpu()
    levels = found.test.taxonomy.levels
    cells = [
        Cell(trial.row, f"{level} R@{k}", value, count=len(labels))
        for level, shares in zip(levels, recalls(features, labels, KS), strict=True)
        for k, value in shares.items()
    ]
    average, precise = precision_at_r(features, labels[:, -1])
    cells += [Cell(trial.row, f"{levels[-1]} mAP@R", average), Cell(trial.row, f"{levels[-1]} R-precision", precise)]
    level = found.run.model.level
    if level == levels[0] and not found.run.model.probe:
        scores, truth = outputs.logits[level].cpu(), labels[:, 0]
        cells += [share(trial.row, f"{level} top-{top}", scores, truth, top) for top in (1, 5) if top < scores.shape[1]]
    return cells


def trials(
    scale: str,
    rows: Rows,
    network: str,
    epochs: int,
    batch_size: int,
    augmentation: str,
    prefix: str = "",
    *,
    strong: bool = False,
) -> list[Trial]:
    """Every variant on one set; with ``strong``, the default one under strong augmentation too."""
    if scale == "smoke":
        rows, network = replace(rows, train=120, test=80), "conv:4/4"
    each = {variant: (variant, augmentation) for variant in VARIANTS}
    if strong:
        each[STRONG] = ("coins-imp", "strong")
    return [
        Trial(
            row=f"{prefix}{row}",
            recipe=recipe(scale, variant, epochs, batch_size, kind),
            rows=rows,
            measure=search,
            backbone=network,
        )
        for row, (variant, kind) in each.items()
    ]


Steps = tuple[tuple[str, str], ...]


def order(
    prefix: str = "", printed: Mapping[str, float] | None = None, steps: Steps = (), at_least: Steps = ()
) -> list[Claim]:
    """The paper's order in fine R@1, each step a claim: ``steps`` of <, and ``at_least`` of <=, within two points."""
    known = printed or {}
    column, slug = "fine R@1", f"{prefix.split(':')[0].replace('_', '-')}-" if prefix else ""

    def effect(more: str, less: str) -> float | None:
        return round(known[more] - known[less], 4) if more in known and less in known else None

    found = [
        better(
            f"{slug}{more}-over-{less}",
            f"{prefix}{more} is above {less}",
            f"{prefix}{more}",
            f"{prefix}{less}",
            effect(more, less),
            column,
        )
        for more, less in steps or STEPS
    ]
    found += [
        Claim(
            id=f"{slug}{more}-near-{less}",
            text=f"{prefix}{more} loses less than 2 points to {less}",
            more=(f"{prefix}{more}", column),
            less=(f"{prefix}{less}", column),
            paper=effect(more, less),
            least=-0.02,
        )
        for more, less in at_least or AT_LEAST
    ]
    return found


def ablation(prefix: str = "") -> Claim:
    """Strong augmentation hurts, which Section 4.1 says without a number."""
    slug = f"{prefix.split(':')[0].replace('_', '-')}-" if prefix else ""
    text = f"{prefix}coins-imp is above itself with strong augmentation"
    return better(f"{slug}strong-hurts", text, f"{prefix}coins-imp", f"{prefix}{STRONG}", column="fine R@1")


STEPS = (
    ("cos", "ins"),
    ("coins", "cos"),
    ("coins-imp", "cos"),
    ("coins-imp", "ins"),
    ("opt", "coinsp"),
    ("coins-imp", "supcon"),
)
AT_LEAST = (
    ("coins-imp", "coins"),
    ("coins-cos", "coins-imp"),
    ("coins-cos-mlp", "coins-cos"),
    ("coinsp", "coins-cos-mlp"),
)
"""ins < cos < coins <= coins* <= coins** <= coinsp** < opt, and the rival. coins* is coins-imp with cosine softmax, so
that it is compared with coins-imp: beside coins it would differ in two things."""
SETTINGS = (
    "lambda = 0.5, lambda_P = 0.5 and T = 0.1 are the recipe's for all variants, and were not searched as the paper "
    "did. supcon has one view of each picture, and the head."
)
