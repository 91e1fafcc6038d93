"""Sets that are made, not read: scikit-learn's digits."""

from __future__ import annotations

import numpy as np

from nestling.data.catalogue import CATALOGUE, DIGIT_PATHS
from nestling.data.inputs import Listed
from nestling.data.rows import Rows

NUM_TEST_DIGITS = 450


def digits() -> dict[str, Rows]:
    """Both splits of scikit-learn's digits: 1,347 rows to train, 450 to test, stratified by digit, the same always.

    Pixels of 0 to 16 become 0 to 255. Rows stand in scikit-learn's order and are called after it.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, target = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = np.asarray(target)
    train, test = train_test_split(np.arange(len(pixels)), test_size=NUM_TEST_DIGITS, stratify=classes, random_state=0)
    paths = [DIGIT_PATHS[digit] for digit in classes.tolist()]
    every = Rows(
        columns={level: [path[place] for path in paths] for place, level in enumerate(CATALOGUE["digits"].levels)},
        items=[f"digits row {row}" for row in range(len(pixels))],
        kind="image",
        inputs=Listed(list(pixels)),
    )
    return {"train": every.select(np.sort(train)), "test": every.select(np.sort(test))}
