"""Sets that are made, not read: scikit-learn's digits, pairs of them, and patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from nestling.data.catalogue import CATALOGUE, DIGIT_PATHS
from nestling.data.inputs import Listed
from nestling.data.rows import Rows

NUM_TEST_DIGITS = 450
NUM_PAIRS = 2000
"""In each split of digit-pairs."""
RIGHT_DIGITS = 5
"""The right digit of a pair is one of 0 to 4."""


def _all_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (n, 8, 8) uint8 and digits (n,) of scikit-learn's set, and which rows train and test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, target = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = np.asarray(target)
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=NUM_TEST_DIGITS, stratify=classes, random_state=seed
    )
    return pixels, classes, np.sort(train), np.sort(test)


def digits(seed: int = 0) -> dict[str, Rows]:
    """Both splits of scikit-learn's digits: 1,347 rows to train, 450 to test, stratified by digit, the same always.

    Pixels of 0 to 16 become 0 to 255. Rows stand in scikit-learn's order and are called after it.
    """
    pixels, classes, train, test = _all_digits(0)
    paths = [DIGIT_PATHS[digit] for digit in classes.tolist()]
    every = Rows(
        columns={level: [path[place] for path in paths] for place, level in enumerate(CATALOGUE["digits"].levels)},
        items=[f"digits row {row}" for row in range(len(pixels))],
        kind="image",
        inputs=Listed(list(pixels)),
    )
    return {"train": every.select(train), "test": every.select(test)}


def digit_pairs(seed: int = 0) -> dict[str, Rows]:
    """Two real digits side by side, 8x16: the left one is the coarse class, both are the fine one.

    2,000 pairs to train and 2,000 to test, drawn with repetition from disjoint digits, left and right each uniform
    over their classes' digits. ``seed`` decides which digits are tested, and the pairs.
    """
    pixels, classes, train, test = _all_digits(seed)
    splits = {}
    for number, (split, rows) in enumerate((("train", train), ("test", test))):
        generator = np.random.default_rng([seed, number])
        left = generator.choice(rows, NUM_PAIRS)
        right = generator.choice(rows[classes[rows] < RIGHT_DIGITS], NUM_PAIRS)
        images = np.concatenate([pixels[left], pixels[right]], axis=2)
        splits[split] = Rows(
            columns={
                "coarse": [f"{digit}" for digit in classes[left].tolist()],
                "fine": [f"{a}-{b}" for a, b in zip(classes[left].tolist(), classes[right].tolist(), strict=True)],
            },
            items=[f"digit-pairs/{split} row {row}" for row in range(NUM_PAIRS)],
            kind="image",
            inputs=Listed(list(images)),
        )
    return splits


PATCH_SIDE, BIG, SMALL = 64, 24, 12
"""Pixels of an image of patches, and of its big and its small patch."""
NUM_BIG, SMALL_OF_EACH, IMAGES_OF_EACH = 32, 4, 4


def patches(seed: int = 0) -> dict[str, Rows]:
    """Figure 1's synthetic set, our construction: 512 images of 64x64, all in one split.

    The coarse class is a big patch (32), the fine one a small patch (128, four under each big one); four images of
    each differ by where the small patch lies and by a 2x2 mark. Patches are coloured noise in cells of 4 pixels.
    """
    generator = np.random.default_rng(seed)

    def texture(side: int) -> np.ndarray:
        cells = generator.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
        return cells.repeat(4, axis=0).repeat(4, axis=1)

    images, coarse, fine = [], [], []
    for big in range(NUM_BIG):
        large = texture(BIG)
        for small in range(SMALL_OF_EACH):
            little = texture(SMALL)
            # Below the big patch, in four columns of which no two overlap; the mark is somewhere along the right edge.
            for number in range(IMAGES_OF_EACH):
                image = np.full((PATCH_SIDE, PATCH_SIDE, 3), 127, dtype=np.uint8)
                image[4 : 4 + BIG, 4 : 4 + BIG] = large
                top, left = 32 + int(generator.integers(0, PATCH_SIDE - 32 - SMALL)), 2 + 14 * number
                image[top : top + SMALL, left : left + SMALL] = little
                mark = int(generator.integers(0, 30))
                image[mark : mark + 2, 60:62] = generator.integers(0, 256, 3)
                images.append(image)
                coarse.append(f"big {big:02d}")
                fine.append(f"big {big:02d} small {small}")
    rows = Rows(
        columns={"coarse": coarse, "fine": fine},
        items=[f"patches row {row}" for row in range(len(images))],
        kind="image",
        inputs=Listed(images),
    )
    return {"": rows}


MADE: Mapping[str, Callable[[int], dict[str, Rows]]] = MappingProxyType(
    {"digits": digits, "digit-pairs": digit_pairs, "patches": patches}
)
"""Every set that is made, by name: from a seed to its splits."""
