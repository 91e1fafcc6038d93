"""Many pictures as uint8 of one size: in one tensor, decoded on access, or file by file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nestling.data.decode import MAX_PIXELS, SUFFIXES, UNREADABLE, Header, decode, read_header
from nestling.data.inputs import Inputs, Raw, inputs_of
from nestling.errors import DataError, UsageError

MAX_SIDE = 224
"""Pictures of one common size up to this are kept as they are; others are resized to at most this."""
MAX_TENSOR_BYTES = 2 << 30
"""Decoded pictures up to this size are held as one tensor; more are decoded on access."""
MAX_HELD_BYTES = 2 << 30
"""Encoded pictures of tables up to this size are read once and held; more are read on demand."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class LazyImages(Sequence[torch.Tensor]):
    """Pictures decoded on access, of one size.

    A picture that cannot be read raises ``DataError`` with its name when it is asked for.
    """

    def __init__(self, inputs: Inputs, items: Sequence[str], size: tuple[int, int], channels: int) -> None:
        self.inputs, self.items, self.size, self.channels = inputs, list(items), size, channels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, c, h, w), as of the tensor that this stands for."""
        return (len(self.inputs), self.channels, *self.size)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> torch.Tensor:  # type: ignore[override]
        """uint8 (c, h, w)."""
        return self.take([range(len(self))[row]])[0]

    def take(self, rows: np.ndarray | Sequence[int]) -> torch.Tensor:
        """uint8 (b, c, h, w), decoded by as many threads as there are processors."""
        rows = np.asarray(rows, dtype=np.int64)
        pixels, errors = _decode_all(self.subset(rows))
        if errors:
            raise errors[min(errors)]
        return torch.from_numpy(pixels)

    def sizes(self) -> list[int]:
        """The encoded bytes of each picture, -1 where its file cannot be asked; of one read on demand from a table,
        the mean of its row group."""
        return self.inputs.sizes(np.arange(len(self))).tolist()

    def subset(self, rows: np.ndarray | Sequence[int]) -> LazyImages:
        """The given rows, nothing decoded."""
        rows = np.asarray(rows, dtype=np.int64)
        items = [self.items[row] for row in rows.tolist()]
        return LazyImages(self.inputs.select(rows), items, self.size, self.channels)


def load_images(
    raws: Inputs | Sequence[Raw],
    items: Sequence[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    skip_bad: bool = False,
) -> tuple[torch.Tensor | LazyImages, np.ndarray, tuple[str, ...]]:
    """Pictures of one size: (uint8 (n, c, h, w) or ``LazyImages``, the rows kept as int64 (n,), notes).

    ``image_size``: pixels, one number for a square; None takes it from the data: a common size up to 224 is kept,
    else the centre is cropped to a square of the median shorter side, at most 224. ``channels``: 1 or 3; None is 1
    where every picture is grey. Raises ``DataError`` naming the first picture that cannot be read, unless
    ``skip_bad``: then such pictures are left out and listed in the notes.
    """
    inputs = (raws if isinstance(raws, Inputs) else inputs_of(raws)).hold(MAX_HELD_BYTES)
    found: list[Header | DataError] = []
    for rows, block in inputs.blocks():
        named = [*zip(block, [items[row] for row in rows.tolist()], strict=True)]
        found += _map(lambda pair: _caught(read_header, *pair), named)
    bad = {row: header for row, header in enumerate(found) if isinstance(header, DataError)}
    _refuse(bad, skip_bad)
    headers = [header for header in found if isinstance(header, Header)]
    if not headers:
        raise DataError(f"no picture can be read: {bad[0]}" if bad else "there are no pictures")
    size, notes = _choose_size(headers, image_size)
    if channels is None:
        channels = 1 if all(header.grey for header in headers) else 3
        notes.append("grey pictures: one channel" if channels == 1 else "colour pictures: three channels")
    rows = np.array([row for row in range(len(inputs)) if row not in bad], dtype=np.int64)
    images = LazyImages(inputs, items, size, channels)
    images = images.subset(rows) if bad else images
    lazy = len(rows) * channels * size[0] * size[1] > MAX_TENSOR_BYTES
    if lazy:
        notes.append(f"decoded on access: {len(rows):,} pictures would take over {MAX_TENSOR_BYTES >> 30} GiB")
        if not inputs.in_memory:
            notes.append(f"read on demand: the pictures in the files take over {MAX_HELD_BYTES >> 30} GiB")
    if not lazy or skip_bad:
        pixels, errors = _decode_all(images, keep=not lazy)
        _refuse(errors, skip_bad)
        good = np.array([place for place in range(len(rows)) if place not in errors], dtype=np.int64)
        bad |= {int(rows[place]): error for place, error in errors.items()}
        rows = rows[good]
        if not len(rows):
            raise DataError(f"no picture can be read: {bad[min(bad)]}")
        loaded = images.subset(good) if lazy else torch.from_numpy(pixels[good] if errors else pixels)
    else:
        loaded = images
    if bad:
        shown = "; ".join(str(bad[row]) for row in sorted(bad)[:5]) + (" …" if len(bad) > 5 else "")
        notes.append(f"left out, because unreadable: {len(bad):,} of {len(inputs):,} pictures: {shown}")
    return loaded, rows, tuple(notes)


def _choose_size(headers: list[Header], image_size: int | tuple[int, int] | None) -> tuple[tuple[int, int], list[str]]:
    sizes = {(header.height, header.width) for header in headers}
    common = next(iter(sizes)) if len(sizes) == 1 else None
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
            raise UsageError(f"the image size must be at least 1 pixel and at most 64 million in all; got {image_size}")
        reason = "the size asked for, or that of the model"
    elif common is not None and max(common) <= MAX_SIDE:
        size, reason = common, "the size of every picture"
    else:
        side = min(MAX_SIDE, max(1, int(np.median([min(header.height, header.width) for header in headers]))))
        size, reason = (side, side), f"the median shorter side, at most {MAX_SIDE}"
    changed = "" if common == size else ", cropped at the centre and resized"
    return size, [f"pictures of {size[0]} x {size[1]} pixels: {reason}{changed}"]


def _refuse(errors: dict[int, DataError], skip_bad: bool) -> None:
    if errors and not skip_bad:
        more = f" (and {len(errors) - 1:,} more)" if len(errors) > 1 else ""
        raise DataError(f"{errors[min(errors)]}{more}; --on-bad-image skip leaves such pictures out")


def _caught(function: Callable[..., _R], *arguments: Any) -> _R | DataError:
    try:
        return function(*arguments)
    except DataError as error:
        return error


def _map(function: Callable[[_T], _R], values: Sequence[_T], block: int = 256) -> list[_R]:
    """``function`` of every value, by as many threads as processors: Pillow's decoders let go of the interpreter."""
    if len(values) <= 8:
        return [function(value) for value in values]
    block = min(block, -(-len(values) // (os.cpu_count() or 1)))
    blocks = [values[start : start + block] for start in range(0, len(values), block)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda part: [function(value) for value in part], blocks))
    return [result for part in found for result in part]


def _decode_all(images: LazyImages, keep: bool = True) -> tuple[np.ndarray, dict[int, DataError]]:
    """uint8 (n, c, h, w) and the errors by row, whose pixels are undefined; without ``keep`` only the errors."""
    count, channels, height, width = images.shape
    pixels = np.empty((count if keep else 0, channels, height, width), dtype=np.uint8)

    def one(pair: tuple[int, Raw]) -> DataError | None:
        row, raw = pair
        decoded = _caught(decode, raw, images.size, images.channels, images.items[row])
        if isinstance(decoded, DataError):
            return decoded
        if keep:
            pixels[row] = decoded
        return None

    errors: dict[int, DataError] = {}
    for rows, raws in images.inputs.blocks():
        found = _map(one, [*zip(rows.tolist(), raws, strict=True)])
        errors |= {row: error for row, error in zip(rows.tolist(), found, strict=True) if error is not None}
    return pixels, errors


def read_images(
    paths: Sequence[str | Path], size: tuple[int, int], channels: int
) -> Iterator[tuple[str, np.ndarray | DataError]]:
    """For every file its name and uint8 (channels, *size), or the error: one bad file does not stop the others."""
    names = [str(path) for path in paths]
    for start in range(0, len(names), 256):
        part = names[start : start + 256]
        yield from zip(
            part, _map(lambda name: _caught(decode, Path(name), size, channels, name), part, block=16), strict=True
        )


def find_images(path: str | Path) -> list[Path]:
    """A file as it is, whatever its name or whether it exists (reading it says so); of a folder, every picture below
    it, sorted. Raises ``DataError`` for a folder without pictures."""
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        # A name that no file can have: reading it says so.
        is_folder = False
    if not is_folder:
        return [path]
    found = sorted(walk_images(path))
    if not found:
        raise DataError(f"{path}: the folder holds no pictures (expected files such as *.png, *.jpg)")
    return found


def walk_images(folder: Path) -> Iterator[Path]:
    """Every picture file below ``folder``, by its suffix; hidden files and folders are passed over."""
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link that leads back up would otherwise be walked for ever.
        real = Path(os.path.realpath(root))
        if any(real == Path(os.path.realpath(above)) for above in _between(Path(folder), Path(root))):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES | UNREADABLE:
                yield Path(root, name)


def _between(top: Path, folder: Path) -> list[Path]:
    """The folders that ``folder`` lies in, up to ``top``."""
    return [above for above in folder.parents if above == top or top in above.parents]
