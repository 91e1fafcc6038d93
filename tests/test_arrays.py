"""Data in memory, and pictures as people have them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestling import LabelledData, Taxonomy
from nestling.data.decode import decode
from nestling.data.sources import load_data
from nestling.errors import DataError, UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
ROWS = [("dog", "husky"), ("dog", "setter"), ("cat", "tabby"), ("dog", None), (None, "tabby"), (None, None)]
CODES = [[1, 1], [1, 2], [0, 0], [1, -1], [0, 0], [-1, -1]]


@pytest.mark.parametrize(
    "inputs",
    [
        PIXELS,
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
        PIXELS.transpose(0, 3, 1, 2),
        PIXELS / 255,
        list(PIXELS.astype(np.int64)),
        [Image.fromarray(pixels) for pixels in PIXELS],
        [torch.from_numpy(pixels).permute(2, 0, 1) / 255 for pixels in PIXELS],
    ],
    ids=["array", "tensor", "channels first", "fractions", "integers", "PIL", "float tensors"],
)
def test_pictures_in_memory_are_taken_as_they_are(inputs: object) -> None:
    data = LabelledData.from_arrays(inputs, ROWS)
    assert (data.images(np.arange(6)).permute(0, 2, 3, 1).numpy() == PIXELS).all()
    assert data.taxonomy.levels == ("coarse", "fine") and data.labels.tolist() == CODES


@pytest.mark.parametrize(
    "labels",
    [
        ["dog/husky", "dog/setter", "cat/tabby", "dog", ("", "tabby"), ("",)],
        {"coarse": [row[0] for row in ROWS], "fine": [row[1] for row in ROWS]},
        [dict(zip(("coarse", "fine"), row, strict=True)) for row in ROWS],
        np.array(ROWS, dtype=object),
    ],
    ids=["paths", "columns", "mappings", "array"],
)
def test_labels_in_memory_are_names_in_any_shape(labels: object) -> None:
    data = LabelledData.from_arrays(PIXELS, labels)
    assert data.labels.tolist() == CODES
    assert data.taxonomy.classes["fine"] == ("tabby", "husky", "setter")


def test_numbers_are_codes_of_a_taxonomy_and_names_without_one() -> None:
    tree = Taxonomy.from_paths(["cat/tabby", "dog/husky", "dog/setter"])
    assert LabelledData.from_arrays(PIXELS, np.array(CODES), taxonomy=tree).labels.tolist() == CODES
    flat = LabelledData.from_arrays(PIXELS, [3, 10, 3, -1, 10, 3], levels=["digit"])
    assert flat.taxonomy.classes["digit"] == ("3", "10") and flat.labels[:, 0].tolist() == [0, 1, 0, -1, 1, 0]


def test_texts_in_memory() -> None:
    assert LabelledData.from_arrays(["a", "b"], ["x", "y"]).inputs == ["a", "b"]


class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(PIXELS[row]), row % 2


def test_a_data_set_of_torch_is_read_once_with_the_names_of_its_classes() -> None:
    data = LabelledData.from_dataset(Pairs(), levels=["animal"])
    assert data.taxonomy.classes["animal"] == ("cat", "dog") and data.labels[:, 0].tolist() == [0, 1] * 3
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(PIXELS[..., 0])[:, None], torch.tensor(CODES))
    tree = Taxonomy.from_paths(["cat/tabby", "dog/husky", "dog/setter"])
    grey = LabelledData.from_dataset(pairs, taxonomy=tree)
    assert grey.labels.tolist() == CODES and grey.image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("inputs", "labels", "said"),
    [
        (PIXELS[:5], ROWS, "5 inputs and 6 rows of labels"),
        (PIXELS - 0.5, ROWS, "arrays row 0: pixels that are no whole numbers must lie in"),
        (PIXELS.astype(np.int64) + 1, ROWS, "whole numbers in 0 … 255"),
        (PIXELS[..., :2], ROWS, r"got \(8, 8, 2\)"),
        ([None] * 6, ROWS, "expected a picture"),
        (PIXELS, [*ROWS[:5], ("cat", "husky")], "has two parents"),
    ],
)
def test_what_is_no_picture_or_no_label_is_named(inputs: object, labels: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        LabelledData.from_arrays(inputs, labels)


def test_what_is_no_data_set_is_refused() -> None:
    with pytest.raises(UsageError, match="without length"):
        LabelledData.from_dataset(iter([]))
    with pytest.raises(DataError, match="row 0: expected"):
        LabelledData.from_dataset([3])


# Pictures as people have them ----------------------------------------------------------------------------------------


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bit_colour() -> bytes:
    """A PNG of 4 x 2 pixels of 16 bits a colour, which Pillow does not write: (65535, 0, 32768) everywhere."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", 65535, 0, 32768) * 4
    header = struct.pack(">IIBBBBB", 4, 2, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 2)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def twelve_bit_grey() -> bytes:
    """A TIFF of 4 x 2 pixels of 12 bits, as microscopes and scanners write them: 2056 of 4095 everywhere."""
    data = bytes([0x80, 0x88, 0x08]) * 4
    tags = {256: 4, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(data)}
    folder = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + folder + bytes(4)


HALF = Image.fromarray(np.full((2, 4), 32896, np.uint16))
CLEAR = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
RED = Image.new("RGB", (4, 2), (255, 0, 0))
FRAMES = [Image.new("P", (4, 2), 0), Image.new("P", (4, 2), 1)]
AS_PEOPLE_HAVE_THEM = {
    "RGBA png": (stored(CLEAR, "PNG"), (255, 255, 255)),
    "LA png": (stored(CLEAR.convert("LA"), "PNG"), (255, 255, 255)),
    "webp with alpha": (stored(CLEAR, "WEBP", lossless=True), (255, 255, 255)),
    "16-bit grey png": (stored(HALF, "PNG"), (128, 128, 128)),
    "16-bit grey tiff": (stored(HALF, "TIFF"), (128, 128, 128)),
    "12-bit grey tiff": (twelve_bit_grey(), (128, 128, 128)),
    "16-bit colour png": (sixteen_bit_colour(), (255, 0, 128)),
    "CMYK jpeg": (stored(RED.convert("CMYK"), "JPEG", quality=100), (254, 0, 0)),
    "CMYK tiff": (stored(RED.convert("CMYK"), "TIFF"), (255, 0, 0)),
    "1-bit png": (stored(Image.new("1", (4, 2), 1), "PNG"), (255, 255, 255)),
    "YCbCr tiff": (stored(RED.convert("YCbCr"), "TIFF"), (254, 0, 0)),
    "animated gif": (stored(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), None),
    "photographs in one file (MPO)": (stored(RED, "MPO", save_all=True, append_images=[RED], quality=100), (254, 0, 0)),
    "one pixel": (stored(Image.new("RGB", (1, 1), (255, 0, 0)), "PNG"), (255, 0, 0)),
    "a thread": (stored(Image.new("L", (3000, 1), 9), "PNG"), (9, 9, 9)),
}


@pytest.mark.parametrize("kind", AS_PEOPLE_HAVE_THEM)
def test_any_picture_becomes_eight_bits(kind: str) -> None:
    content, colour = AS_PEOPLE_HAVE_THEM[kind]
    pixels = decode(content, (2, 4), 3, kind)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 2, 4)
    if colour is not None:
        assert np.abs(pixels.astype(int) - np.array(colour)[:, None, None]).max() <= 2
    assert decode(content, (2, 4), 1, kind).shape == (1, 2, 4)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_of_a_camera_is_undone(turn: int) -> None:
    """Of a picture dark above and light below, stored as the camera held it."""
    upright = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 8, axis=0).repeat(8, axis=1))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = turn
    held = upright.transpose(undo[turn]) if turn > 1 else upright
    pixels = decode(stored(held, "PNG", exif=exif), None, 1)
    assert pixels[0, :8].max() == 0 and pixels[0, 8:].min() == 255


def test_a_folder_of_all_of_them_is_read(tmp_path: Path) -> None:
    suffix = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}
    for number, (content, _) in enumerate(AS_PEOPLE_HAVE_THEM.values()):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        end = next((end for start, end in suffix.items() if content.startswith(start)), ".tif")
        (folder / f"{number}{end}").write_bytes(content)
    data = load_data(tmp_path, "all", image_size=4)
    assert data.image_shape == (3, 4, 4) and len(data) == len(AS_PEOPLE_HAVE_THEM)


def test_concepts_by_a_name_of_their_own() -> None:
    pixels = np.zeros((4, 8, 8), dtype=np.uint8)
    labels = ["a/x", "a/y", "b/z", "b/z"]
    data = LabelledData.from_arrays(pixels, labels, concepts={"camera": ["old", float("nan"), "new", "old"]})
    codes, names = data.concepts_at("camera")
    assert names == ("new", "old") and codes.tolist() == [1, -1, 0, 1]
    assert data.concepts_at("coarse")[1] == ("a", "b")
    with pytest.raises(DataError, match=r"-1 or one of 2 for each of the 4 rows; got int64 of shape \(3,\)"):
        LabelledData.from_arrays(pixels, labels, concepts={"camera": ["old", "new", "old"]})
    with pytest.raises(DataError, match="'coarse' is a level"):
        LabelledData.from_arrays(pixels, labels, concepts={"coarse": ["old"] * 4})
    with pytest.raises(UsageError, match="one name, such as"):
        LabelledData.from_arrays(pixels, labels, concepts={})


@pytest.mark.parametrize(
    ("labels", "codes"),
    [
        ([0, 1, None, 1], [0, 1, -1, 1]),
        ([0.0, 1.0, float("nan"), 1.0], [0, 1, -1, 1]),
        ([True, False, True, None], [1, 0, 1, -1]),
        (np.array([0.0, 1.0, np.nan, 1.0]), [0, 1, -1, 1]),
    ],
    ids=["None", "NaN", "bools", "array of NaN"],
)
def test_single_labels_may_be_missing(labels: object, codes: list[int]) -> None:
    assert LabelledData.from_arrays(PIXELS[:4], labels).labels[:, 0].tolist() == codes


def test_codes_of_a_data_set_stay_within_its_classes() -> None:
    class Two(list):
        classes = ("cat", "dog")

    data = LabelledData.from_dataset(Two([(PIXELS[0], code) for code in (0, np.int64(1), -1)]))
    assert data.taxonomy.classes["level-1"] == ("cat", "dog") and data.labels[:, 0].tolist() == [0, 1, -1]
    for code in (2, -2):
        with pytest.raises(DataError, match=f"a label is {code}, and the data set has 2 classes"):
            LabelledData.from_dataset(Two([(PIXELS[0], code)]))
    assert LabelledData.from_arrays(PIXELS[:2], [0, [1]]).labels.tolist() == [[0], [1]]
    for labels, said in ((np.array([0, -5]), "a label is -5"), (np.zeros((2, 1, 1), int), r"an array \(2, 1, 1\)")):
        with pytest.raises(DataError, match=said):
            LabelledData.from_arrays(PIXELS[:2], labels)


def test_pictures_of_other_formats_are_not_passed_over(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(PIXELS[0]).save(tmp_path / name)
    (tmp_path / "b" / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=r"IMG_0001\.HEIC: is no picture that can be read .*convert others"):
        load_data(tmp_path, "all")
    assert len(load_data(tmp_path, "all", on_bad_image="skip")) == 2
