"""Table 1 of nested learning: the same network end-to-end and nested, on disjoint subsets of coarse and fine labels."""

from __future__ import annotations

from dataclasses import replace

from nestling.reproduce.nested import MARGINAL, NESTED, TWIN, Network, Setting, compare
from nestling.reproduce.nested_measures import accuracy, robustness
from nestling.reproduce.table import Claim, Floor, Table, Trial

PRINTED = {
    "dbpedia": {"coarse": (0.918, 0.981), "middle": (0.818, 0.934), "fine": (0.764, 0.847)},
    "plantvillage": {"coarse": (0.952, 0.979), "middle": (0.945, 0.975), "fine": (0.923, 0.946)},
    "cifar100": {"coarse": (0.700, 0.793), "fine": (0.596, 0.649)},
}
"""Accuracy end-to-end, and nested, by set and level."""
WORDS = Network(backbone="text:48/64/96", dropout=0.3)
CONV, RESNET = Network(backbone="conv:24/48/96"), Network(backbone="resnet18")
SMOKE = Network(backbone="conv:4/4/4")

SETTINGS: dict[str, tuple[Setting, ...]] = {
    "smoke": (
        Setting(source="cifar100", num_rows=300, known=(60, 60), network=SMOKE, epochs=(1, 1), test=60),
        Setting(
            source="plantvillage", num_rows=300, known=(30, 30, 60), network=SMOKE, epochs=(1, 1, 1), test=60,
            image_size=32,
        ),
        Setting(
            source="dbpedia", num_rows=300, known=(40, 40, 40), network=Network(backbone="text:6/6/6"),
            epochs=(1, 1, 1), test=60,
        ),
        Setting(
            source="newsgroups20", num_rows=150, known=(50, 50), network=Network(backbone="text:6/6"), epochs=(1, 1),
            test=60,
        ),
    ),
    "small": (
        Setting(
            source="cifar100", num_rows=10_000, known=(5_000, 5_000), network=CONV, epochs=(8, 16), test=4_000,
            augmentation="crop-mirror",
        ),
        Setting(
            source="plantvillage", num_rows=None, known=(1_730, 1_730, 3_460), network=CONV, epochs=(12, 12, 16),
            test=None, image_size=32, augmentation="crop-mirror",
        ),
        Setting(
            source="dbpedia", num_rows=None, known=(1_331, 1_331, 1_331), network=WORDS, epochs=(8, 8, 16), test=None
        ),
        Setting(
            source="newsgroups20", num_rows=None, known=(5_657, 5_657), network=WORDS, epochs=(4, 8), test=None
        ),
    ),
    "paper": (
        Setting(
            source="cifar100", num_rows=None, known=(25_000, 25_000), network=RESNET, epochs=(100, 200), test=None,
            augmentation="crop-mirror",
        ),
        Setting(
            source="plantvillage", num_rows=None, known=(4_500, 4_500, 9_000), network=RESNET, epochs=(100, 100, 200),
            test=None, augmentation="crop-mirror",
        ),
        Setting(
            source="dbpedia", num_rows=None, known=(50_000, 50_000, 50_000), network=WORDS, epochs=(100, 100, 200),
            test=None,
        ),
        Setting(
            source="newsgroups20", num_rows=None, known=(5_657, 5_657), network=WORDS, epochs=(100, 200), test=None
        ),
    ),
}  # fmt: skip
"""Where there are fewer rows than a label mix asks for, it is kept in its proportions."""


def trials(scale: str) -> list[Trial]:
    """On every set the cascade, its twin that sees the fine labels alone, and flat + marginal on all labels."""
    return [
        replace(made, options={**made.options, "clean": True})
        for at in SETTINGS[scale]
        for made in compare(scale, at, robustness, (NESTED, TWIN, MARGINAL), f"{at.source}: ")
    ]


def claims() -> list[Claim]:
    """Nested learning above end-to-end at every level of every set; above flat + marginal, which the paper lacks."""
    found = []
    for source, levels in PRINTED.items():
        for level, (theirs, ours) in levels.items():
            found.append(above(source, level, TWIN, round(ours - theirs, 3)))
    found += [above("newsgroups20", level, TWIN, None) for level in ("coarse", "fine")]
    found += [above(source, "fine", MARGINAL, None) for source in (*PRINTED, "newsgroups20")]
    return found


def above(source: str, level: str, rival: str, effect: float | None) -> Claim:
    return Claim(
        id=f"{source}-{level}-over-{'-'.join(rival.replace('+ ', '').split())}",
        text=f"{source}: nested has a higher {level} accuracy than {rival}",
        more=(f"{source}: {NESTED}", accuracy(level)),
        less=(f"{source}: {rival}", accuracy(level)),
        paper=effect,
    )


TABLE1 = Table(
    name="nested-table1",
    paper="Nested Learning for Multi-Level Classification, Table 1",
    about="Disjoint subsets by finest label, in the paper's numbers or, where there are fewer rows, its proportions "
    "(cifar100 1:1, plantvillage 1:1:2, dbpedia and newsgroups20 one to one): the cascade sees each in its stage, "
    "end-to-end the fine one alone, flat + marginal all. One network for all methods of a set; at small as many "
    "steps and one rate, 3e-3, not searched, 5,000 + 5,000 rows of cifar100 and plantvillage at 32x32. At the "
    "paper's scale each has the paper's epochs on the rows that it sees.",
    trials=trials,
    seeds={"smoke": 1, "small": 3, "paper": 3},
    floor=Floor(row=f"cifar100: {TWIN}", column=accuracy("fine"), least=0.15),
    printed={
        (f"{source}: {row}", accuracy(level)): values[number]
        for source, levels in PRINTED.items()
        for level, values in levels.items()
        for number, row in enumerate((TWIN, NESTED))
    },
    claims=claims(),
)
