"""``LabelledData`` of what is in memory: arrays, lists of pictures or texts, and data sets of torch.

Everything is converted here, once: pictures to uint8, labels to the codes of a taxonomy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestling.data.dataset import Concepts, LabelledData
from nestling.data.decode import decode
from nestling.data.images import LazyImages, load_images
from nestling.data.inputs import Raw
from nestling.data.rows import class_name
from nestling.errors import DataError, UsageError
from nestling.taxonomy import Taxonomy
from nestling.tree import Integers, default_levels
from nestling.tree_cells import label_columns


def from_arrays(
    inputs: Any,
    labels: Any,
    *,
    taxonomy: Taxonomy | None = None,
    levels: Sequence[str] | None = None,
    qualify_names: bool = False,
    image_size: int | tuple[int, int] | None = None,
    groups: Any = None,
    concepts: Mapping[str, Sequence[str | None]] | None = None,
    name: str = "arrays",
) -> LabelledData:
    """See ``LabelledData.from_arrays``."""
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu().numpy()
    tree, codes = _labels(labels, taxonomy, levels, qualify_names)
    pictures, items, notes = _inputs(inputs, image_size, name)
    if len(pictures) != len(codes):
        raise DataError(f"{name}: there are {len(pictures):,} inputs and {len(codes):,} rows of labels: give one each")
    if concepts is not None and len(concepts) != 1:
        raise UsageError(f"{name}: concepts go by one name, such as {{'camera': [...]}}; got {len(concepts)}")
    named = None if concepts is None else next(iter(concepts.items()))
    return LabelledData(
        inputs=pictures,
        labels=codes,
        taxonomy=tree,
        items=items,
        groups=groups,
        concepts=None if named is None else Concepts.from_names(named[0], [class_name(value) for value in named[1]]),
        name=name,
        notes=notes,
    )


def from_dataset(
    dataset: Any,
    *,
    taxonomy: Taxonomy | None = None,
    levels: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    name: str = "dataset",
) -> LabelledData:
    """See ``LabelledData.from_dataset``."""
    try:
        count = len(dataset)
    except TypeError:
        raise UsageError(
            f"{name}: a data set without length cannot be labelled row by row: give one with len()"
        ) from None
    names = getattr(dataset, "classes", None)
    inputs, labels = [], []
    for number in range(count):
        pair = dataset[number]
        if not isinstance(pair, tuple | list) or len(pair) < 2:
            raise DataError(f"{name} row {number}: expected (input, label), got {type(pair).__name__}")
        inputs.append(pair[0])
        labels.append(_row(pair[1] if len(pair) == 2 else tuple(pair[1:]), names if taxonomy is None else None))
    return from_arrays(inputs, labels, taxonomy=taxonomy, levels=levels, image_size=image_size, name=name)


def _row(label: Any, names: Sequence[str] | None) -> Any:
    """One label as a row of names or codes; -1 is not labelled."""
    if isinstance(label, torch.Tensor | np.ndarray):
        label = label.tolist()
    if isinstance(label, Mapping | str) or label is None:
        return label if isinstance(label, Mapping) else (label,)
    if isinstance(label, Iterable):
        return tuple(label)
    if isinstance(names, Sequence) and isinstance(label, int | np.integer) and not isinstance(label, bool):
        if not -1 <= label < len(names):
            raise DataError(f"a label is {label}, and the data set has {len(names)} classes: 0 to {len(names) - 1}")
        return (None if label == -1 else str(names[int(label)]),)
    return (label,)


def _labels(
    labels: Any, taxonomy: Taxonomy | None, levels: Sequence[str] | None, qualify: bool
) -> tuple[Taxonomy, Integers]:
    """The taxonomy, and int64 (n, levels). Whole numbers are codes where the taxonomy is given, else names."""
    given = np.asarray(labels) if isinstance(labels, np.ndarray) or _numbers(labels) else None
    if given is not None and given.ndim not in (1, 2):
        raise DataError(f"expected labels (n,) or (n, levels), got an array {given.shape}")
    if given is not None and np.issubdtype(given.dtype, np.integer):
        given = given[:, None] if given.ndim == 1 else given
        if taxonomy is not None:
            return taxonomy, given.astype(np.int64)
        if given.size and given.min() < -1:
            raise DataError(f"a label is {given.min()}: classes are counted from 0, and -1 is not labelled")
        labels = [[None if code == -1 else str(code) for code in row] for row in given.tolist()]
    elif given is not None:
        labels = [[value] if given.ndim == 1 else value for value in given.tolist()]
    elif not isinstance(labels, Mapping):
        labels = [_cells(row) for row in labels]
    if isinstance(labels, Mapping):
        levels = levels or tuple(labels)
    elif levels is None and taxonomy is None:
        first = next(iter(labels), None)
        levels = tuple(first) if isinstance(first, Mapping) else default_levels(max(map(len, labels), default=1))
    if taxonomy is None:
        columns = label_columns(labels, tuple(levels or ()), every_level=True)
        taxonomy = Taxonomy.from_table(dict(zip(levels or (), columns)), tuple(levels or ()), qualify=qualify)
    return taxonomy, taxonomy.complete(taxonomy.encode(labels))


def _cells(row: Any) -> Any:
    """One row of labels: a path a/b, a row or mapping of names, or a single name or number."""
    if isinstance(row, str):
        return row.split("/")
    return row if isinstance(row, Sequence | Mapping | np.ndarray) else (row,)


def _numbers(labels: Any) -> bool:
    """Whether it is a list of whole numbers, or of rows of as many of them."""
    if isinstance(labels, Mapping) or not isinstance(labels, Sequence) or isinstance(labels, str):
        return False
    several = [isinstance(row, tuple | list) for row in labels]
    if any(several) and not all(several):
        return False
    rows = labels if any(several) else [(value,) for value in labels]
    return len({len(row) for row in rows}) == 1 and all(
        isinstance(value, int | np.integer) and not isinstance(value, bool) for row in rows for value in row
    )


def _inputs(
    inputs: Any, image_size: int | tuple[int, int] | None, name: str
) -> tuple[torch.Tensor | LazyImages | list[str], tuple[str, ...], tuple[str, ...]]:
    """Inputs, a name for each row, and what was decided."""
    if isinstance(inputs, torch.Tensor) and inputs.ndim == 4 and inputs.dtype == torch.uint8 and image_size is None:
        return inputs, tuple(f"{name} row {row}" for row in range(len(inputs))), ()
    rows: list[Any] = list(inputs)
    items = tuple(f"{name} row {number}" for number in range(len(rows)))
    if rows and all(isinstance(row, str) for row in rows):
        return rows, items, ()
    if (
        isinstance(inputs, np.ndarray)
        and inputs.ndim == 4
        and inputs.shape[1] in (1, 3)
        and inputs.shape[3] not in (1, 3)
    ):
        rows = [np.moveaxis(row, 0, -1) for row in rows]
    raws = [_raw(row, item) for row, item in zip(rows, items, strict=True)]
    pictures, _, notes = load_images(raws, items, image_size=image_size)
    return pictures, items, notes


def _raw(value: Any, item: str) -> Raw:
    """One picture as uint8 (h, w) or (h, w, 3), or its file. Raises ``DataError``."""
    if isinstance(value, bytes | Path):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.movedim(0, -1).numpy() if value.ndim == 3 else value.numpy()
    elif not isinstance(value, np.ndarray):
        from PIL import Image

        if not isinstance(value, Image.Image):
            raise DataError(f"{item}: expected a picture (array, tensor, PIL image, path) or a text, got {value!r:.80}")
        grey = value.mode in ("1", "L")
        pixels = decode(value, None, 1 if grey else 3, item)
        return np.ascontiguousarray(pixels[0] if grey else np.moveaxis(pixels, 0, -1))
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[..., 0]
    if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] != 3) or not value.size:
        raise DataError(f"{item}: expected (h, w), (h, w, 1 or 3), or a tensor (1 or 3, h, w); got {value.shape}")
    if np.issubdtype(value.dtype, np.floating):
        if not (np.isfinite(value).all() and value.min() >= 0 and value.max() <= 1):
            raise DataError(f"{item}: pixels that are no whole numbers must lie in [0, 1]: leave normalisation out")
        value = np.rint(value * 255)
    elif value.dtype != np.uint8 and (value.dtype.kind not in "iub" or value.min() < 0 or value.max() > 255):
        raise DataError(f"{item}: pixels must be whole numbers in 0 … 255, or fractions in [0, 1]; got {value.dtype}")
    return np.ascontiguousarray(value.astype(np.uint8))
