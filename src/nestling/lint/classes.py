"""Checks of the classes: names that look alike, how many rows each has, and how splits differ in their mix."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict

import numpy as np

from nestling.errors import listed
from nestling.lint.finding import Finding
from nestling.lint.table import Table
from nestling.taxonomy import Taxonomy
from nestling.tree import Integers

FEWEST = 3
"""Rows of a class, one each for training, validation and test."""
FEW = 10
"""A class of fewer rows is tiny where the median class of its level has ten times as many."""
LEAST_TOKEN = 6
"""Letters of a word, from which on one letter more or less is taken for a slip of the pen: house and mouse are not."""
DRIFT = 0.1
"""Of the rows of a split, so many would have to be of another class for the mix to be that of training."""
DRAWS = 200


def similar_names(table: Table) -> list[Finding]:
    """Names of one level that differ by case, spaces, hyphens and the like, or by one letter of a long word."""
    found = []
    for level, (names, codes) in enumerate(table.named):
        counts = np.bincount(codes[codes >= 0], minlength=len(names))
        plain = [name.rsplit("/", 1)[-1] if table.qualified else name for name in names]
        for one, other in pairs_alike(plain):
            if plain[one] == plain[other]:
                continue
            rare, usual = sorted((one, other), key=lambda number: (counts[number], -number))
            places = np.flatnonzero(codes == rare)
            message = (
                f"{table.levels[level]} {plain[rare]!r} ({counts[rare]:,} rows) and {plain[usual]!r} "
                f"({counts[usual]:,} rows) look like one class written in two ways"
            )
            same = plain_form(plain[rare]) == plain_form(plain[usual]) and _parent(names[rare]) == _parent(names[usual])
            # A slip of the pen may be another word after all: that is for a person to say.
            cells = [(int(place), level, names[usual]) for place in places] if same else []
            remedy = f"write {plain[usual]!r} in these rows, if it is one"
            found.append(table.finding("similar-names", places, message, remedy, cells=cells))
    return found


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def plain_form(name: str) -> str:
    """A name without what people write differently: case, accents, spaces, hyphens, underscores, points."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    return re.sub(r"[\W_]+", "", "".join(c for c in letters if not unicodedata.combining(c)))


def pairs_alike(names: list[str]) -> list[tuple[int, int]]:
    """Numbers of names that look alike, each pair once."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        # Names of signs alone have no plain form, and are told apart as they stand.
        groups[plain_form(name) or name].append(number)
    found = {(members[0], other) for members in groups.values() for other in members[1:]}
    first = {form: members[0] for form, members in groups.items()}
    without: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number in first.values():
        words = [plain_form(word) for word in re.split(r"[\W_]+", names[number]) if word]
        for place, word in enumerate(words):
            if len(word) < LEAST_TOKEN or any(c.isdigit() for c in word):
                continue
            around = (*words[:place], "", *words[place + 1 :])
            # Two words that differ by one letter share what is left where it is taken out.
            for cut in range(-1, len(word)):
                without[(*around, word if cut < 0 else word[:cut] + word[cut + 1 :])].add(number)
    for members in without.values():
        ordered = sorted(members)
        found |= {(ordered[0], other) for other in ordered[1:]}
    return sorted(found)


def tiny_classes(table: Table) -> list[Finding]:
    """Classes of fewer rows than parts, or of few beside many; of a source with splits, training rows count."""
    found = []
    counted = _training(table)
    for level, (names, codes) in enumerate(table.named):
        counts = np.bincount(codes[counted & (codes >= 0)], minlength=len(names))
        median = float(np.median(counts[counts > 0])) if (counts > 0).any() else 0.0
        for code in np.flatnonzero((counts > 0) & ((counts < FEWEST) | ((counts < FEW) & (10 * counts < median)))):
            rows = "1 labelled row" if counts[code] == 1 else f"{counts[code]} labelled rows"
            message = (
                f"{table.levels[level]} {names[code]!r} has {rows} to learn from; the median class of its level has "
                f"{median:g}"
            )
            remedy = "label more rows of it, or merge it into a neighbour; nothing can be said of how well it is told"
            found.append(table.finding("tiny-class", np.flatnonzero(codes == code), message, remedy))
    return found


def empty_classes(table: Table, taxonomy: Taxonomy | None) -> list[Finding]:
    """Classes without a row, class folders without a picture, and classes that only test rows have."""
    found = [
        table.finding(
            "empty-class",
            (),
            f"the folder {folder} holds no picture",
            "put pictures into it, or delete it",
            items=[folder],
        )
        for folder in table.hollow
    ]
    counted = _training(table)
    for level, (names, codes) in enumerate(table.named):
        where = table.levels[level]
        trained = np.bincount(codes[counted & (codes >= 0)], minlength=len(names))
        for code in np.flatnonzero(trained == 0):
            places = np.flatnonzero(codes == code)
            splits = sorted({table.splits[place] for place in places.tolist()})
            message = f"{where} {names[code]!r} has no training row: all of its {len(places):,} are in {listed(splits)}"
            remedy = "move some of them to train: a class that training never sees cannot be learned"
            found.append(table.finding("empty-class", places, message, remedy))
        if taxonomy is not None:
            known = set(names) | {name.rsplit("/", 1)[-1] for name in names}
            absent = [name for name in taxonomy.classes[where] if not {name, name.rsplit("/", 1)[-1]} & known]
            below = _covered(table, taxonomy, level)
            for name in absent:
                if name in below:
                    continue
                message = f"{where} {name!r} stands in the taxonomy and has no row"
                remedy = "label rows of it, or take it out of the taxonomy"
                found.append(table.finding("empty-class", (), message, remedy, items=[name]))
    return found


def _covered(table: Table, taxonomy: Taxonomy, level: int) -> set[str]:
    """The classes of a level that some row is labelled below, without being labelled at the level itself."""
    covered: set[str] = set()
    for finer in range(level + 1, len(table.levels)):
        names = set(table.named[finer][0])
        above = taxonomy.ancestor(level, of=finer)
        classes = taxonomy.classes[taxonomy.levels[finer]]
        covered |= {
            taxonomy.column_names(level)[above[code]]
            for code, name in enumerate(classes)
            if name in names or name.rsplit("/", 1)[-1] in names
        }
    return covered


def mix_drift(table: Table) -> list[Finding]:
    """Splits whose classes come in another mix than in training, beyond what chance gives, at the coarsest such level.

    The mix is compared by the total variation distance; what chance gives is measured by drawing splits of that size
    from both together.
    """
    if "train" not in table.splits:
        return []
    of = np.array(table.splits)
    found = []
    for split in sorted(set(table.splits) - {"train"}):
        for level, (names, codes) in enumerate(table.named):
            trained, other = (codes[(of == name) & (codes >= 0)] for name in ("train", split))
            if not len(trained) or not len(other):
                continue
            counts = [np.bincount(part, minlength=len(names)) for part in (trained, other)]
            shares = [count / count.sum() for count in counts]
            distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
            rng = np.random.default_rng(0)
            drawn = rng.multivariate_hypergeometric(counts[0] + counts[1], len(other), size=DRAWS, method="marginals")
            rest = (counts[0] + counts[1]) - drawn
            chance = np.abs(drawn / len(other) - rest / len(trained)).sum(axis=1) / 2
            if distance - chance.mean() < DRIFT or distance < chance.mean() + 4 * chance.std():
                continue
            most = int(np.argmax(shares[1] - shares[0]))
            message = (
                f"the classes of level {table.levels[level]!r} come in another mix in {split} than in train: "
                f"{100 * distance:.0f} % of the rows would have to be of another class (by chance "
                f"{100 * chance.mean():.0f} %); most so {names[most]!r}, {100 * shares[1][most]:.0f} % against "
                f"{100 * shares[0][most]:.0f} %"
            )
            remedy = "draw the splits anew, stratified, or report accuracy by class: the mean over rows will mislead"
            places: Integers = np.flatnonzero((of == split) & (codes == most))
            found.append(table.finding("class-mix-drift", places, message, remedy))
            break
    return found


def _training(table: Table) -> np.ndarray:
    """bool (n,): the rows to learn from; all of them where the source has no split of its own to train on."""
    of = np.array(table.splits)
    return of == "train" if "train" in table.splits else np.ones(len(table), bool)
