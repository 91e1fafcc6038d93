"""LabelledData, and pictures: what is decoded, refused, left out."""

from __future__ import annotations

import pickle
import struct
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from nestling.data import LabelledData, LazyImages, find_images, images, read_images
from nestling.data.decode import decode
from nestling.data.images import load_images
from nestling.errors import DataError, UsageError
from nestling.taxonomy import Taxonomy


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(height: int = 4, width: int = 6, channels: int | None = None) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    return (np.arange(np.prod(shape)) * 7 % 256).astype(np.uint8).reshape(shape)


# LabelledData ------------------------------------------------------------------------------------------------------


def test_coarser_labels_are_filled_in(toy_taxonomy: Taxonomy) -> None:
    pixels = torch.zeros((2, 1, 2, 2), dtype=torch.uint8)
    data = LabelledData(pixels, np.array([[-1, -1, 5], [-1, 1, -1]]), toy_taxonomy)
    assert data.labels.tolist() == [[1, 2, 5], [0, 1, -1]]
    assert data.labels.dtype == data.index.dtype == np.int64
    assert data.index.tolist() == [0, 1]
    assert data.items == ("data row 0", "data row 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros((3, 3), dtype=int)}, "must be integers of shape \\(2, 3\\), one row per input"),
        ({"labels": np.zeros((2, 2), dtype=int)}, "one column per level; got int64 of shape \\(2, 2\\)"),
        ({"labels": np.zeros((2, 3))}, "got float64"),
        ({"labels": np.array([[0, 0, 0], [0, 0, 6]])}, "b.png: label 6 at level 'fine' must be -1 .* 0 to 5"),
        ({"labels": np.array([[0, 0, 0], [0, -2, 0]])}, "b.png: label -2 at level 'middle'"),
        ({"labels": np.array([[0, 0, 0], [1, 0, -1]])}, "row 1: middle 'bird' is a 'animal', but coarse says 'plant'"),
        ({"inputs": torch.zeros((2, 1, 2, 2))}, "must be uint8 of shape \\(n, c, h, w\\); got torch.float32"),
        ({"inputs": torch.zeros((2, 2, 2), dtype=torch.uint8)}, "must be uint8 of shape"),
        ({"index": np.zeros(3, dtype=int)}, "the index of 'data' must be integers of shape \\(2,\\)"),
        ({"groups": np.zeros(2)}, "the groups of 'data' must be integers of shape \\(2,\\); got float64"),
        ({"items": ["a.png"]}, "the items of 'data' must be 2 names; got 1"),
    ],
)
def test_what_does_not_fit_is_refused(toy_taxonomy: Taxonomy, changes: dict, message: str) -> None:
    fields = {
        "inputs": torch.zeros((2, 1, 2, 2), dtype=torch.uint8),
        "labels": np.zeros((2, 3), dtype=np.int64),
        "taxonomy": toy_taxonomy,
        "items": ["a.png", "b.png"],
    }
    with pytest.raises(DataError, match=message):
        LabelledData(**fields | changes)


def test_subset_keeps_what_belongs_to_a_row(toy_data: LabelledData) -> None:
    rows = np.array([7, 3, 200])
    part = toy_data.subset(rows)
    assert len(part) == 3
    assert part.index.tolist() == rows.tolist()
    assert part.subset([2]).index.tolist() == [200]
    assert part.items == ("toy row 7", "toy row 3", "toy row 200")
    assert torch.equal(part.inputs, toy_data.inputs[torch.from_numpy(rows)])
    mask = toy_data.labels[:, 2] == 4
    assert len(toy_data.subset(mask)) == 40
    assert len(toy_data.subset([])) == 0
    texts = LabelledData(["a", "b"], np.zeros((2, 3), dtype=int), toy_data.taxonomy)
    assert texts.subset([1]).inputs == ["b"]


def test_what_is_printed_of_data_is_a_line(toy_data: LabelledData) -> None:
    said = repr(toy_data.keep({"fine": 0.5}))
    count = len(toy_data)
    assert (
        "\n" not in said and len(said) < 200 and f"{count} rows of {'x'.join(map(str, toy_data.image_shape))}" in said
    )
    for level, known in zip(toy_data.taxonomy.levels, (count, count, count // 2), strict=True):
        assert f"{level} ({len(toy_data.taxonomy.classes[level])} classes, {known} known)" in said
    texts = LabelledData(["a text"], np.zeros((1, 1), int), Taxonomy.from_paths(["a", "b"]))
    assert repr(texts) == "LabelledData('data', 1 rows of texts: level-1 (2 classes, 1 known))"


def test_finest_known_counts_a_ragged_leaf_as_finest() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b"])
    labels = taxonomy.encode([("a", "x"), ("a", None), ("b", None), (None, None)])
    data = LabelledData(["t"] * 4, labels, taxonomy)
    assert data.finest_known().tolist() == [1, 0, 1, -1]
    assert data.keep({"coarse": 0}).finest_known().tolist() == [-1] * 4


# keep --------------------------------------------------------------------------------------------------------------


def known(data: LabelledData) -> list[int]:
    return (data.labels >= 0).sum(axis=0).tolist()


def test_keep_on_the_digits() -> None:
    from nestling.data import load_data

    digits = load_data("digits")
    kept = digits.keep({"coarse": 1.0, "middle": 0.4, "fine": 0.1}, seed=0)
    assert known(kept) == [1347, 539, 135]
    assert len(kept) == 1347
    assert (np.bincount(kept.labels[kept.labels[:, 2] >= 0, 2]) - np.bincount(digits.labels[:, 2]) * 0.1).max() < 1
    assert "labels kept, of 1,347 rows: coarse 1,347, middle 539, fine 135 (fractions 1, 0.4, 0.1)" in kept.notes
    assert torch.equal(kept.inputs, digits.inputs)


def test_keep_is_nested_stratified_and_seeded(toy_data: LabelledData) -> None:
    kept = toy_data.keep({"coarse": 0.9, "middle": 0.5, "fine": 0.25}, seed=1)
    has = kept.labels >= 0
    assert (has[:, 0] >= has[:, 1]).all()
    assert (has[:, 1] >= has[:, 2]).all()
    for level, count in enumerate((36, 20, 10)):
        assert np.bincount(toy_data.labels[has[:, level], 2]).tolist() == [count] * 6
    assert (kept.labels[has] == toy_data.labels[has]).all()
    again = toy_data.keep({"coarse": 0.9, "middle": 0.5, "fine": 0.25}, seed=1)
    other = toy_data.keep({"coarse": 0.9, "middle": 0.5, "fine": 0.25}, seed=2)
    assert (again.labels == kept.labels).all()
    assert (other.labels != kept.labels).any()


def test_a_level_not_named_keeps_the_coarser_fraction(toy_data: LabelledData) -> None:
    assert known(toy_data.keep({})) == [240, 240, 240]
    assert known(toy_data.keep({"middle": 0.5})) == [240, 120, 120]
    assert known(toy_data.keep({"coarse": 0.5, "fine": 0.25})) == [120, 120, 60]


def test_at_least_one_row_of_each_class_but_zero_means_none(toy_data: LabelledData) -> None:
    kept = toy_data.keep({"middle": 0.001, "fine": 0.0})
    assert known(kept) == [240, 3, 0]
    assert sorted(kept.labels[kept.labels[:, 1] >= 0, 1].tolist()) == [0, 1, 2]
    assert known(toy_data.keep({"coarse": 0.001})) == [6, 6, 6]
    assert known(toy_data.keep({"coarse": 0})) == [0, 0, 0]
    assert len(toy_data.keep({"coarse": 0})) == 240


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"mid": 0.5}, "unknown level mid: expected one of 'coarse', 'middle', 'fine'. Did you mean 'middle'"),
        ({"fine": 1.5}, "the fraction known at level 'fine' must lie in \\[0, 1\\]; got 1.5"),
        ({"fine": -0.1}, "must lie in"),
        ({"fine": float("nan")}, "must lie in"),
        ({"fine": "0.5"}, "must lie in"),
        ({"middle": 0.2, "fine": 0.5}, "may not rise towards fine: fine=0.5 is above middle=0.2"),
        ({"coarse": 0.2, "middle": 0.5}, "may not rise towards fine"),
    ],
)
def test_impossible_fractions(toy_data: LabelledData, fractions: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        toy_data.keep(fractions)


def test_keep_of_labels_already_missing() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b/z"])
    labels = taxonomy.encode([("a", "x")] * 10 + [("a", None)] * 10 + [("b", "z")] + [(None, None)] * 3)
    kept = LabelledData(["t"] * 24, labels, taxonomy).keep({"fine": 0.5})
    assert known(kept) == [21, 6]
    assert kept.labels[20].tolist() == [1, 2]


# One picture -------------------------------------------------------------------------------------------------------


def test_lossless_pixels_come_through() -> None:
    grey, colour = ramp(), ramp(channels=3)
    assert (decode(encoded(grey), None, 1) == grey[None]).all()
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert (decode(encoded(colour, kind), None, 3) == colour.transpose(2, 0, 1)).all()
    assert (decode(encoded(colour, "WEBP", lossless=True), None, 3) == colour.transpose(2, 0, 1)).all()
    assert (decode(encoded(grey, "GIF"), None, 1)[0] == grey).all()
    assert (decode(grey, None, 3) == np.stack([grey] * 3)).all()
    assert decode(encoded(colour), None, 1).shape == (1, 4, 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str) -> None:
    """Orientation 6: the camera lay on its side, so the top of the scene is at the left of the pixels."""
    upright = np.zeros((16, 8), dtype=np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(np.rot90(upright).copy(), kind, exif=exif)
    inputs, _, _ = load_images([stored] * 9, [f"{row}" for row in range(9)])
    assert inputs.shape[2:] == (16, 8)
    assert np.abs(np.asarray(inputs[0, 0]).astype(int) - upright).max() < 40


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter() -> None:
    data = encoded(ramp(8, 8), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    assert decode(data, None, 1).shape == (1, 8, 8)


def test_modes() -> None:
    deep = (np.arange(4) * 21845).astype(np.uint16).reshape(2, 2)
    assert decode(encoded(deep), None, 1).ravel().tolist() == [0, 85, 170, 255]
    clear = np.zeros((2, 2, 4), dtype=np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    assert decode(encoded(clear), None, 3)[:, 0].tolist() == [[10, 255], [20, 255], [30, 255]], "transparent is white"
    assert decode(encoded(clear), None, 1)[0, 1].tolist() == [255, 255]
    palette = Image.fromarray(ramp(channels=3)).quantize(8)
    palette.info["transparency"] = 0
    assert decode(encoded(palette, transparency=0), None, 3).shape == (3, 4, 6)
    assert decode(encoded(Image.new("1", (2, 2), 1)), None, 1).tolist() == [[[255, 255], [255, 255]]]
    assert decode(encoded(Image.new("CMYK", (2, 2)), "JPEG"), None, 3).min() > 250
    frames = [Image.new("L", (2, 2), shade) for shade in (10, 200)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(animated, None, 1).max() == 10, "the first frame"


def test_centre_crop_and_resize() -> None:
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 200
    assert decode(encoded(wide), (5, 5), 1)[0, :, 1:-1].tolist() == [[200] * 3] * 5
    photograph = np.zeros((600, 1200, 3), dtype=np.uint8)
    photograph[:, 300:900] = 90
    small = decode(encoded(photograph, "JPEG"), (32, 32), 3)
    assert np.abs(small.astype(int)[:, :, 2:-2] - 90).max() < 8


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "x.png: the picture is empty"),
        (b"not a picture at all", "x.png: is no picture that can be read \\(expected one of PNG, JPEG"),
        (encoded(ramp(40, 40))[:-60], "x.png: cannot be read as a picture: .*truncated"),
        (encoded(ramp(64, 64), "JPEG")[:-200], "x.png: cannot be read as a picture: .*truncated"),
        (png_of_size(9000, 9000), "x.png: 9000 x 9000 pixels, above the limit of 64 million"),
        (png_of_size(60000, 60000), "x.png: "),
        (png_of_size(50, 50), "x.png: cannot be read as a picture"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "x.png: floating-point pixels have no fixed range"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "x.png: is no picture that can be read"),
        (None, "x.png: there is no picture"),
        (Path("/nowhere/x.png"), "x.png: there is no such file"),
        (Path("/"), "x.png: is no regular file"),
    ],
)
def test_bad_pictures_are_named(raw: bytes | Path | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(raw, None, 1, "x.png")
    with pytest.raises(DataError, match=message + ".*--on-bad-image skip"):
        load_images([raw], ["x.png"])


def test_random_damage_never_escapes() -> None:
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        good = np.frombuffer(encoded(ramp(12, 12, 3), kind), dtype=np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[generator.integers(0, len(bad), 4)] = generator.integers(0, 256, 4)
            with suppress(DataError):
                assert decode(bad.tobytes(), (8, 8), 3, "x").shape == (3, 8, 8)


def test_truncated_pictures_are_not_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match=r"fills missing pixels with grey"):
        decode(encoded(ramp()), None, 1)


# Many pictures -----------------------------------------------------------------------------------------------------


def named(count: int) -> list[str]:
    return [f"picture {row}" for row in range(count)]


def test_common_size_is_kept_and_grey_found() -> None:
    grey = [encoded(ramp(5, 7) + shade) for shade in range(20)]
    inputs, rows, notes = load_images(grey, named(20))
    assert isinstance(inputs, torch.Tensor)
    assert inputs.shape == (20, 1, 5, 7)
    assert rows.tolist() == list(range(20))
    assert notes == ("pictures of 5 x 7 pixels: the size of every picture", "grey pictures: one channel")
    assert (inputs[3, 0].numpy() == ramp(5, 7) + 3).all()
    inputs, _, _ = load_images([*grey, encoded(ramp(5, 7, 3))], named(21))
    assert inputs.shape == (21, 3, 5, 7)
    assert load_images(grey, named(20), channels=3)[0].shape == (20, 3, 5, 7)


def test_other_sizes_become_the_median_shorter_side() -> None:
    raws = [encoded(ramp(10, 12)), encoded(ramp(30, 14)), encoded(ramp(20, 20))]
    inputs, _, notes = load_images(raws, named(3))
    assert inputs.shape == (3, 1, 14, 14)
    assert "14 x 14 pixels: the median shorter side, at most 224, cropped at the centre and resized" in notes[0]
    assert load_images(raws, named(3), image_size=8)[0].shape == (3, 1, 8, 8)
    assert load_images(raws, named(3), image_size=(8, 4))[0].shape == (3, 1, 8, 4)
    assert load_images([encoded(ramp(300, 400))], named(1))[0].shape == (1, 1, 224, 224)
    with pytest.raises(UsageError, match=r"at least 1 pixel"):
        load_images(raws, named(3), image_size=0)


def test_skipping_counts_and_lists() -> None:
    raws = [encoded(ramp()) for _ in range(12)]
    raws[2], raws[9] = b"", encoded(ramp(40, 40))[:-60]
    with pytest.raises(DataError, match=r"picture 2: the picture is empty.*skip"):
        load_images(raws, named(12))
    inputs, rows, notes = load_images(raws, named(12), image_size=4, skip_bad=True)
    assert rows.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 10, 11]
    assert len(inputs) == 10
    assert notes[-1].startswith("left out, because unreadable: 2 of 12 pictures: picture 2: the picture is empty")
    assert "picture 9: cannot be read" in notes[-1]
    with pytest.raises(DataError, match=r"no picture can be read: picture 0"):
        load_images([b"", b""], named(2), skip_bad=True)


def test_large_data_are_decoded_on_access(monkeypatch: pytest.MonkeyPatch, toy_taxonomy: Taxonomy) -> None:
    raws = [encoded(ramp(6, 6) + shade) for shade in range(12)]
    whole, _, _ = load_images(raws, named(12))
    monkeypatch.setattr(images, "MAX_TENSOR_BYTES", 100)
    raws[5] = raws[5][:-35]
    lazy, _, notes = load_images(raws, named(12))
    assert isinstance(lazy, LazyImages)
    assert any(note.startswith("decoded on access") for note in notes)
    assert lazy.shape == (12, 1, 6, 6)
    assert len(lazy) == 12
    lazy = pickle.loads(pickle.dumps(lazy))
    assert torch.equal(lazy[3], whole[3])
    assert torch.equal(lazy.take([7, 1, 1]), whole[[7, 1, 1]])
    assert lazy.take([]).shape == (0, 1, 6, 6)
    with pytest.raises(DataError, match=r"picture 5: "):
        lazy.take([4, 5])
    data = LabelledData(lazy, np.zeros((12, 3), dtype=int), toy_taxonomy)
    assert torch.equal(data.subset([8, 2]).inputs.take([1]), whole[[2]])
    skipped, rows, _ = load_images(raws, named(12), skip_bad=True)
    assert isinstance(skipped, LazyImages)
    assert rows.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_reading_files_one_bad_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    Image.fromarray(ramp(8, 8)).save(tmp_path / "b" / "good.PNG")
    Image.fromarray(ramp(8, 8)).save(tmp_path / "z.jpg")
    (tmp_path / "a.png").write_bytes(b"no")
    (tmp_path / ".hidden.png").write_bytes(b"no")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    # Another name for a folder is no loop.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "again").symlink_to(tmp_path / "a")
    paths = find_images(tmp_path)
    assert [path.name for path in paths] == ["a.png", "good.PNG", "z.jpg"]
    results = list(read_images([*paths, tmp_path / "missing.png"], (4, 4), 3))
    assert [name for name, _ in results] == [str(path) for path in [*paths, tmp_path / "missing.png"]]
    assert isinstance(results[0][1], DataError)
    assert isinstance(results[1][1], np.ndarray)
    assert results[1][1].shape == (3, 4, 4)
    assert "there is no such file" in str(results[3][1])
    assert find_images(tmp_path / "missing.png") == [tmp_path / "missing.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder holds no pictures"):
        find_images(tmp_path / "empty")
