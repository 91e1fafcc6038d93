"""One row for every kind of source, and for every set that is known by name. A name or suffix without a row fails."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestling.data import CATALOGUE, LabelledData, available_splits, load_data
from nestling.data.made import MADE
from nestling.data.tables import SUFFIXES
from nestling.errors import DataError, NestlingError, StorageError, UsageError
from nestling.taxonomy import Taxonomy

PATHS = [("animal", "owl"), ("animal", "wren"), ("plant", "oak"), ("plant", "ash")] * 5
"""Class and shade of 20 pictures of 4x6 pixels, each shade its own."""


@pytest.fixture(autouse=True)
def no_real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTLING_DATA", raising=False)


def png(number: int) -> bytes:
    buffer = BytesIO()
    Image.new("L", (6, 4), 10 * number).save(buffer, "PNG")
    return buffer.getvalue()


def folder(place: Path) -> Path:
    for number, (coarse, fine) in enumerate(PATHS):
        path = place / "set" / coarse / fine
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{number:02d}.png").write_bytes(png(number))
    return place / "set"


def table(suffix: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        path = place / f"set{suffix}"
        if suffix == ".parquet":
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            images = [{"bytes": png(number), "path": None} for number in range(20)]
            coarse, fine = (list(column) for column in zip(*PATHS))
            parquet.write_table(pyarrow.table({"image": images, "coarse": coarse, "fine": fine}), path)
            return path
        folder(place)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerow(["path", "coarse", "fine"])
            for number, (coarse, fine) in enumerate(PATHS):
                writer.writerow([f"set/{coarse}/{fine}/{number:02d}.png", coarse, fine])
        return path

    return make


def empty(place: Path) -> Path:
    (place / "empty").mkdir()
    return place / "empty"


def without_pictures(suffix: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        path = place / f"bad{suffix}"
        path.write_bytes(b"PAR1 and nothing" if suffix == ".parquet" else b"coarse\tfine\na\tb\n")
        return path

    return make


@dataclass(frozen=True)
class Row:
    kind: str
    make: Callable[[Path], Path | str]
    wrong: Callable[[Path], Path | str]
    error: type[NestlingError]


TABLE = [
    Row("folder", folder, empty, DataError),
    *(Row(suffix, table(suffix), without_pictures(suffix), DataError) for suffix in (".csv", ".tsv", ".parquet")),
]


def test_every_kind_of_table_has_a_row() -> None:
    assert {row.kind for row in TABLE} - {"folder"} == set(SUFFIXES)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.kind)
def test_every_kind_gives_the_same_rows(row: Row, tmp_path: Path) -> None:
    """Pictures as uint8 (n, c, h, w), labels as codes, a name for every row: the same whatever they come from."""
    source = row.make(tmp_path)
    data = load_data(source, "all")
    assert isinstance(data, LabelledData) and len(data) == 20
    assert data.image_shape == (1, 4, 6)
    assert data.taxonomy.levels == ("coarse", "fine")
    assert data.taxonomy.classes["fine"] == ("owl", "wren", "ash", "oak")
    shades = data.images(np.arange(20))[:, 0, 0, 0].tolist()
    assert sorted(shades) == [10 * number for number in range(20)]
    for row_number, shade in enumerate(shades):
        coarse, fine = PATHS[shade // 10]
        assert data.labels[row_number].tolist() == data.taxonomy.encode([(coarse, fine)])[0].tolist()
    assert len(set(data.items)) == 20 and data.index.tolist() == list(range(20))
    assert data.name and set(available_splits(source)) == {"train", "test"}
    train, test = load_data(source, "train"), load_data(source, "test")
    assert (len(train), len(test)) == (16, 4)
    assert not set(train.items) & set(test.items)
    again = load_data(source, "train")
    assert again.items == train.items and (again.labels == train.labels).all()
    with pytest.raises(UsageError, match="unknown split"):
        load_data(source, "dev")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.kind)
def test_what_is_wrong_inside_is_said(row: Row, tmp_path: Path) -> None:
    source = row.wrong(tmp_path)
    with pytest.raises(row.error) as error:
        load_data(source)
    assert "\n" not in str(error.value) and Path(source).name in str(error.value)


# By name -------------------------------------------------------------------------------------------------------------

NAMES = {
    # name: (levels, where the hub has it, classes per level where the tree is kept here)
    "digits": (3, None, None),
    "digit-pairs": (2, None, None),
    "patches": (2, None, None),
    "mnist": (3, "ylecun/mnist", [2, 4, 10]),
    "fashion_mnist": (3, "zalando-datasets/fashion_mnist", [2, 4, 10]),
    "cifar10": (3, "uoft-cs/cifar10", [2, 5, 10]),
    "cifar100": (2, "uoft-cs/cifar100", None),
    "plantvillage": (3, None, None),
    "grocery": (3, None, None),
    "newsgroups20": (2, "SetFit/20_newsgroups", [6, 20]),
    "tiny_imagenet32": (3, None, None),
    "dbpedia": (3, "DeveloperOats/DBPedia_Classes", None),
    "caltech101": (1, None, None),
    "svhn": (1, "ufldl-stanford/svhn", None),
    "sop": (2, None, None),
    "sop_random": (2, None, None),
    "imagenet": (1, "ILSVRC/imagenet-1k", None),
}


def test_every_known_set_has_a_row() -> None:
    assert set(NAMES) == set(CATALOGUE)


@pytest.mark.parametrize("name", NAMES)
def test_known_sets(name: str, tmp_path: Path) -> None:
    entry, (depth, hub, classes) = CATALOGUE[name], NAMES[name]
    assert len(entry.levels) == depth and entry.hub == hub
    assert entry.about and entry.licence
    assert hub is not None or not entry.hub_columns
    if hub is not None:
        assert set(entry.hub_columns.values()) - {"image", "text"} <= set(entry.levels)
    assert (classes is not None) is bool(entry.paths)
    if classes is not None:
        tree = Taxonomy.from_paths(entry.paths, entry.levels)
        assert [len(tree.classes[level]) for level in tree.levels] == classes
    if hub is None and name not in MADE:
        with pytest.raises(StorageError, match=f"{entry.of or name}.*--data-dir"):
            load_data(name, data_dir=tmp_path)


def test_digits_are_always_there() -> None:
    train, test = load_data("digits", "train"), load_data("digits", "test")
    assert (len(train), len(test), train.image_shape) == (1_347, 450, (1, 8, 8))
    assert [len(train.taxonomy.classes[level]) for level in train.taxonomy.levels] == [2, 4, 10]


def test_digit_pairs_are_made_of_disjoint_digits() -> None:
    """Left is coarse; left and right are fine; the digits of a test pair are in no training pair."""
    train, test = (load_data("digit-pairs", split) for split in ("train", "test"))
    assert (len(train), len(test), train.image_shape) == (2_000, 2_000, (1, 8, 16))
    assert [len(train.taxonomy.classes[level]) for level in ("coarse", "fine")] == [10, 50]
    assert train.taxonomy.classes["fine"][:6] == ("0-0", "0-1", "0-2", "0-3", "0-4", "1-0")
    assert (train.labels[:, 1] // 5 == train.labels[:, 0]).all()
    digits, splits = load_data("digits", "all"), []
    known = {image.tobytes(): fine for image, fine in zip(digits.inputs.numpy(), digits.labels[:, 2])}
    names = [int(name) for name in digits.taxonomy.classes["fine"]]
    for data in (train, test):
        halves = [data.inputs[:, :, :, :8].numpy(), data.inputs[:, :, :, 8:].numpy()]
        seen = [[names[known[image.tobytes()]] for image in half] for half in halves]
        pairs = [f"{left}-{right}" for left, right in zip(*seen)]
        assert pairs == [data.taxonomy.classes["fine"][code] for code in data.labels[:, 1]]
        splits.append({image.tobytes() for half in halves for image in half})
    assert not splits[0] & splits[1]
    again, other = load_data("digit-pairs"), load_data("digit-pairs", seed=1)
    assert again.inputs.equal(train.inputs) and not other.inputs.equal(train.inputs)


def test_patches_are_nested_by_construction() -> None:
    data = load_data("patches", "all")
    assert (len(data), data.image_shape) == (512, (3, 64, 64))
    assert [len(data.taxonomy.classes[level]) for level in ("coarse", "fine")] == [32, 128]
    assert (np.bincount(data.labels[:, 1]) == 4).all()
    big = data.inputs[:, :, 4:28, 4:28].flatten(1)
    same = (big[:, None] == big[None]).all(2).numpy()
    assert (same == (data.labels[:, 0] == data.labels[:, :1])).all(), "the big patch is the coarse class"
    assert len(data.inputs.flatten(1).unique(dim=0)) == 512, "no two images are the same"
    assert load_data("patches", "all").inputs.equal(data.inputs)
