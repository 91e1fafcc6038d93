"""Texts as a network takes them: the hashed words and pairs of words of each, in their order.

An encoded text stands where a picture would: int32 (2, 1, length), a row of words and one of pairs. Pictures have one
channel or three, so that the two are never taken for each other.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.tables import SUFFIXES
from nestling.data.transforms import Preprocessing
from nestling.errors import DataError, UsageError

KINDS = 2
"""Words, and pairs of neighbours."""
BUCKETS = 2**17
"""Hashes of each kind; 0 stands for nothing."""
LENGTH = 768
"""Words that are read of a text: all of 99.9 % of newsgroups20's, where 512 would be all of 92 %."""
LONGEST = 4096
LARGEST = 64 << 20
"""Bytes of a text file."""
SHOWN = 80
"""Characters of a text that are shown in its place."""
CHARACTERS = 64
"""So many are read for each of the words, at most: of a text of a megabyte no more than of a page."""


@dataclass(frozen=True)
class TextEncoding:
    """``encoding.encode(texts) -> int32 (n, 2, 1, length)``; the counterpart of ``Preprocessing``.

    Words are scikit-learn's: lower case, two letters or digits at least. A text of fewer than ``length`` words is
    repeated to the end, so that means over positions are means over its own words; what is repeated is negative. A text
    without any word is all 0.
    """

    length: int = LENGTH

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST:
            raise DataError(f"a text's length must be 1 to {LONGEST} words, got {self.length}")

    channels = KINDS
    height = 1

    @property
    def width(self) -> int:
        """The same as ``length``, as a picture has it."""
        return self.length

    @property
    def most(self) -> int:
        """Characters that are read of a text."""
        return CHARACTERS * self.length

    @property
    def shape(self) -> tuple[int, int, int]:
        """(2, 1, length)."""
        return KINDS, 1, self.length

    def encode(self, texts: Sequence[str]) -> Tensor:
        """int32 (n, 2, 1, length)."""
        found = np.zeros((len(texts), KINDS, 1, self.length), dtype=np.int32)
        words = tokenizer()
        for row, text in enumerate(texts):
            tokens = words(text[: self.most])[: self.length]
            if tokens:
                ids = np.resize(np.array([hashed(token) for token in tokens], dtype=np.int64), self.length)
                found[row, 0, 0] = 1 + ids % (BUCKETS - 1)
                found[row, 1, 0] = 1 + (ids * 1_000_003 + np.roll(ids, -1)) % (BUCKETS - 1)
                found[row, :, 0, len(tokens) :] *= -1
        return torch.from_numpy(found)

    def __call__(self, encoded: Tensor) -> Tensor:
        return self.normalise(self.pixels(encoded))

    def pixels(self, encoded: Tensor) -> Tensor:
        """Encoded texts as they are. ``UsageError`` on anything else."""
        if encoded.dtype != torch.int32 or encoded.shape[1:] != self.shape:
            raise UsageError(
                f"expected encoded texts int32 (b, {KINDS}, 1, {self.length}), got {encoded.dtype} "
                f"{tuple(encoded.shape)}"
            )
        return encoded

    def normalise(self, encoded: Tensor) -> Tensor:
        """Encoded texts as they are."""
        return encoded

    def to_dict(self) -> dict[str, Any]:
        """JSON, as it stands in a bundle."""
        return {"kind": "text", "length": self.length, "buckets": BUCKETS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextEncoding:
        """From ``to_dict``; ``DataError`` on anything else."""
        if type(values.get("length")) is not int or type(values.get("buckets")) is not int:
            raise DataError(f"impossible preprocessing of texts: expected a length and {BUCKETS} buckets, got {values}")
        if values["buckets"] != BUCKETS:
            raise DataError(
                f"its texts were hashed into {values['buckets']:,} buckets by another version of nestling, and this "
                f"one has {BUCKETS:,}: train again"
            )
        return cls(values["length"])


AnyPreprocessing = Preprocessing | TextEncoding


def preprocessing_of(values: Mapping[str, Any]) -> AnyPreprocessing:
    """What a bundle's ``preprocessing`` describes."""
    return TextEncoding.from_dict(values) if values.get("kind") == "text" else Preprocessing.from_dict(values)


def loaded_for(preprocessing: AnyPreprocessing) -> dict[str, Any]:
    """What ``load_data`` is told so that a model with this preprocessing can take the rows."""
    if isinstance(preprocessing, TextEncoding):
        return {"image_size": None, "channels": None}
    return {"image_size": (preprocessing.height, preprocessing.width), "channels": preprocessing.channels}


def is_text(shape: Sequence[int]) -> bool:
    """Whether (channels, height, width) are those of encoded texts."""
    return tuple(shape[:2]) == (KINDS, 1)


def holds_texts(data: LabelledData) -> bool:
    """Whether its inputs are texts, encoded or not."""
    return isinstance(data.inputs, list) or is_text(data.image_shape)


def encoded(data: LabelledData) -> LabelledData:
    """Texts encoded; pictures as they are."""
    return replace(data, inputs=TextEncoding().encode(data.inputs)) if isinstance(data.inputs, list) else data


def input_shape(data: LabelledData) -> tuple[int, int, int]:
    """Of one input as a network takes it."""
    return TextEncoding().shape if isinstance(data.inputs, list) else data.image_shape


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """scikit-learn's: a text to its words."""
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer().build_analyzer()


@lru_cache(maxsize=1 << 20)
def hashed(token: str) -> int:
    """MurmurHash3 of a word, 0 to 2^32 - 1: the same in every process and on every machine."""
    from sklearn.utils import murmurhash3_32

    return int(murmurhash3_32(token, positive=True))


def find_texts(path: str | Path) -> list[Path]:
    """A file as it is; of a folder every *.txt below it, sorted. Raises DataError for a folder without any."""
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except OSError:
        # A name that no file can have, such as a text itself: reading it says so.
        is_folder = False
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{path}: a table, not a text: give files that hold one text each")
    if not is_folder:
        return [path]
    found = sorted(one for one in path.rglob("*.txt") if one.is_file() and not one.name.startswith("."))
    if not found:
        raise DataError(f"{path}: the folder holds no texts (expected files *.txt, and the model reads texts)")
    return found


def read_texts(paths: Iterable[Path]) -> Iterator[tuple[str, str | DataError]]:
    """Each file's name and its text, or why that cannot be read."""
    for path in paths:
        try:
            yield str(path), read_text(path)
        except DataError as error:
            yield str(path), error


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises DataError where it cannot be read, is none or is too large."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise DataError(f"{path}: a text of {size:,} bytes, more than {LARGEST:,}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except UnicodeError as error:
        raise DataError(f"{path}: cannot be read as a text in UTF-8, save it as that: {error}") from error
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise DataError(f"{beginning(str(path))}…: no name of a file; a text is given in a file") from error
        raise DataError(f"{path}: cannot be read as a text in UTF-8: {error}") from error


def beginning(text: str) -> str:
    """Of a text what is shown of it: one line without control characters."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 4 * SHOWN])
    return " ".join(plain.split())[:SHOWN]
