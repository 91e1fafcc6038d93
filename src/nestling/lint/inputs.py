"""What every input looks like: whether it is there, whether it can be read, and hashes to compare it by."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from nestling.data.decode import decode, read_header
from nestling.data.inputs import Raw
from nestling.errors import DataError
from nestling.lint.finding import Finding
from nestling.lint.table import Table
from nestling.tree import Integers, some_rows

LARGE = 1_000_000
"""Pixels from which on a picture is compared by its middle at a smaller scale: decoding all of it takes too long."""
SMALLER = (512, 512)
SIDE = 16
"""Of the thumbnails that near-duplicates are judged by."""
STEP = 4
"""Grey levels that neighbours must differ by to count as darker and lighter: flat regions are noise."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prints:
    """Of ``n`` inputs, row by row."""

    fault: list[str | None]
    """Why it cannot be read; None where it can."""
    missing: np.ndarray
    """bool (n,): there is nothing at all."""
    digest: list[bytes]
    """Of the bytes, or of the text; b"" where it cannot be read."""
    pixels: list[bytes]
    """Of what it shows, however it is encoded: pixels, or a text without case and spaces."""
    hashes: np.ndarray
    """uint64 (n,): where a picture grows darker from left to right, in 8 rows of 8."""
    thumbs: np.ndarray
    """float32 (n, 256): grey thumbnails, centred and of norm 1; 0 where there is no contrast, or no picture."""
    colours: np.ndarray
    """float32 (n, 3): the mean of each colour."""

    @cached_property
    def copies(self) -> list[list[int]]:
        """The places of inputs that are exactly alike, two and more each, in order."""
        groups: dict[bytes, list[int]] = defaultdict(list)
        home: dict[bytes, bytes] = {}
        for place, (digest, pixels) in enumerate(zip(self.digest, self.pixels, strict=True)):
            if digest:
                # Of a text, what it reads like is a near-duplicate only.
                groups[home.setdefault(digest, pixels if self.thumbs.shape[1] else digest)].append(place)
        return [places for places in groups.values() if len(places) > 1]

    def select(self, places: Integers) -> Prints:
        """Those of the given rows."""
        chosen = places.tolist()
        return Prints(
            fault=[self.fault[place] for place in chosen],
            missing=self.missing[places],
            digest=[self.digest[place] for place in chosen],
            pixels=[self.pixels[place] for place in chosen],
            hashes=self.hashes[places],
            thumbs=self.thumbs[places],
            colours=self.colours[places],
        )


def look(table: Table, said: Callable[[int], None] | None = None) -> Prints:
    """Read every input once; of a file that stands in several rows that is enough. ``said`` hears how many are done."""
    n, side = len(table), SIDE * SIDE if table.kind == "image" else 0
    prints = Prints(
        fault=[None] * n,
        missing=np.zeros(n, bool),
        digest=[b""] * n,
        pixels=[b""] * n,
        hashes=np.zeros(n, np.uint64),
        thumbs=np.zeros((n, side), np.float32),
        colours=np.zeros((n, 3), np.float32),
    )
    first: dict[Path, int] = {}

    def one(pair: tuple[int, Raw]) -> None:
        place, raw = pair
        if isinstance(raw, Path) and first.setdefault(raw, place) != place:
            return
        (_picture if table.kind == "image" else _text)(prints, place, raw, table.items[place])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for places, raws in table.inputs.blocks():
            block = list(zip(places.tolist(), raws, strict=True))
            if table.kind == "image":
                # Which row of a file is its first is settled before the threads ask.
                for place, raw in block:
                    if isinstance(raw, Path):
                        first.setdefault(raw, place)
                list(pool.map(one, block, chunksize=8))
                for place, raw in block:
                    if isinstance(raw, Path) and first[raw] != place:
                        _copy(prints, first[raw], place)
            else:
                for pair in block:
                    one(pair)
            if said is not None:
                said(int(places[-1]) + 1)
    return prints


def _copy(prints: Prints, source: int, place: int) -> None:
    for values in (prints.fault, prints.digest, prints.pixels):
        values[place] = values[source]  # type: ignore[assignment]
    for array in (prints.missing, prints.hashes, prints.thumbs, prints.colours):
        array[place] = array[source]


def _text(prints: Prints, place: int, raw: Raw, item: str) -> None:
    text = raw if isinstance(raw, str) else ""
    if not text.strip():
        prints.missing[place], prints.fault[place] = True, f"{item}: there is no text"
        return
    prints.digest[place] = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    plain = " ".join(text.casefold().split())
    prints.pixels[place] = blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _picture(prints: Prints, place: int, raw: Raw, item: str) -> None:
    try:
        if raw is None or (isinstance(raw, Path) and not raw.exists()):
            prints.missing[place] = True
            prints.fault[place] = f"{item}: there is no picture" if raw is None else f"{item}: there is no such file"
            return
        if isinstance(raw, Path):
            read_header(raw, item)  # limits on bytes and pixels, before anything is read whole
            raw = raw.read_bytes()
        content = np.ascontiguousarray(raw).tobytes() if isinstance(raw, np.ndarray) else raw
        assert isinstance(content, bytes)
        header = read_header(raw, item)
        shrunk = SMALLER if header.height * header.width > LARGE else None
        pixels = decode(raw, shrunk, 3, item)
    except DataError as error:
        prints.fault[place] = str(error)
        return
    except (OSError, ValueError) as error:
        prints.fault[place] = f"{item}: cannot be read: {error}"
        return
    prints.digest[place] = blake2b(content, digest_size=16).digest()
    shape = repr((header.height, header.width)).encode()
    prints.pixels[place] = blake2b(shape + np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()
    prints.hashes[place], prints.thumbs[place], prints.colours[place] = perceived(pixels)


def perceived(pixels: np.ndarray) -> tuple[np.uint64, np.ndarray, np.ndarray]:
    """Of uint8 (3, h, w) the hash of gradients, the thumbnail (256,), and the mean colour (3,)."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")

    def scaled(width: int, height: int) -> np.ndarray:
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)

    grey = scaled(9, 8)
    bits = (grey[:, 1:] > grey[:, :-1] + STEP).reshape(-1)
    code = np.packbits(bits).view(np.uint64)[0]
    thumb = scaled(SIDE, SIDE).reshape(-1)
    thumb = thumb - thumb.mean()
    norm = float(np.linalg.norm(thumb))
    return code, thumb / norm if norm > SIDE else np.zeros_like(thumb), pixels.mean(axis=(1, 2), dtype=np.float32)


def missing_files(table: Table, prints: Prints) -> list[Finding]:
    """Rows whose file is not there, or that have none."""
    places = np.flatnonzero(prints.missing)
    if not len(places):
        return []
    message = f"{prints.fault[int(places[0])]}" + (f", and so in {len(places) - 1:,} more rows" * (len(places) > 1))
    message += f": {some_rows(table.numbers[places])}"
    remedy = "put the files there, correct the paths, or leave the rows out"
    return [table.finding("missing-file", places, message, remedy, drop=places)]


def unreadable_files(table: Table, prints: Prints) -> list[Finding]:
    """Rows whose picture is damaged, empty, or none at all; one finding each, since each has its own reason."""
    return [
        table.finding(
            "unreadable-file",
            [place],
            f"{some_rows(table.numbers[[place]])}: {fault}",
            "replace the file, or leave the row out (--on-bad-image skip does)",
            drop=[place],
        )
        for place, fault in enumerate(prints.fault)
        if fault is not None and not prints.missing[place]
    ]
