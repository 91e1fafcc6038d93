"""Untrusted pictures to uint8, with Pillow alone.

Size, then header, then pixels; whatever goes wrong leaves as a ``DataError`` that names the picture. A picture
that cannot be read is never replaced: Pillow's truncated-image mode, which fills in grey, is refused.

How a picture becomes pixels: the EXIF orientation is applied, the first frame taken, transparency laid on white (as a
page shows it), 16-bit grey divided by 257, colour profiles ignored, all else converted by Pillow to RGB or grey.
"""

from __future__ import annotations

import stat
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from nestling.data.inputs import Raw
from nestling.errors import DataError, NestlingError, UsageError, read_as_data

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(".png .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm".split())
UNREADABLE = frozenset(".heic .heif .avif .jxl .jp2 .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split())
"""Of pictures as telephones and cameras make them, which are not read: that they are there is said."""
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 << 20

_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})


@dataclass(frozen=True)
class Header:
    """What a picture says of itself before its pixels are read, orientation applied."""

    height: int
    width: int
    grey: bool


def _open(raw: Raw | Image.Image | BinaryIO, item: str) -> Image.Image:
    """The picture with its header read, within the limits on bytes, formats and pixels."""
    from PIL import Image, ImageFile, UnidentifiedImageError

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which fills missing pixels with grey: set it to False"
        )
    if raw is None:
        raise DataError(f"{item}: there is no picture (neither bytes nor a path)")
    if isinstance(raw, Image.Image):
        image = raw
    elif isinstance(raw, np.ndarray):
        image = Image.fromarray(raw)
    else:
        if isinstance(raw, str | Path):
            with _open_file(Path(raw), item) as file:
                raw = file.read()
        if isinstance(raw, bytes):
            _check_size(len(raw), item)
            raw = BytesIO(raw)
        try:
            image = Image.open(raw, formats=FORMATS)
        except UnidentifiedImageError:
            raise DataError(
                f"{item}: is no picture that can be read (expected one of {', '.join(FORMATS)}; convert others)"
            ) from None
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{item}: {image.width} x {image.height} pixels, above the limit of {MAX_PIXELS // 10**6} million"
        )
    return image


def _open_file(path: Path, item: str) -> BinaryIO:
    """The file, within the limits on bytes, nothing of it read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{item}: is no regular file")
        _check_size(status.st_size, item)
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{item}: there is no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, NestlingError):
            raise
        raise DataError(f"{item}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _check_size(num_bytes: int, item: str) -> None:
    if not num_bytes:
        raise DataError(f"{item}: the picture is empty (0 bytes)")
    if num_bytes > MAX_BYTES:
        raise DataError(f"{item}: {num_bytes:,} bytes, above the limit of {MAX_BYTES:,}")


def _orientation(image: Image.Image) -> int:
    # A damaged EXIF block says nothing about the pixels, which are fine.
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1


def read_header(raw: Raw | Image.Image, item: str) -> Header:
    """Size and colour of one picture, its pixels not decoded; of a file no more is read than that takes."""
    with read_as_data(f"{item}: cannot be read as a picture"), ExitStack() as stack:
        image = _open(stack.enter_context(_open_file(raw, item)) if isinstance(raw, Path) else raw, item)
        height, width = image.height, image.width
        # PNG may keep EXIF behind the pixels, so asking could decode them; TIFF's size is turned by Pillow.
        known = image.format in ("JPEG", "MPO", "WEBP") or (image.format == "PNG" and "exif" in image.info)
        if known and _orientation(image) >= 5:
            height, width = width, height
        return Header(height, width, image.mode in _GREY)


def decode(raw: Raw | Image.Image, size: tuple[int, int] | None, channels: int, item: str = "picture") -> np.ndarray:
    """One picture as uint8 (channels, h, w).

    raw: encoded bytes, a path, a PIL image, or uint8 (h, w) or (h, w, 3). size: (h, w) in pixels, reached by cropping
    the centre to that shape and resizing (bilinear, antialiased); None keeps the picture's own.
    Raises ``DataError`` naming ``item``.
    """
    from PIL import Image, ImageOps

    with read_as_data(f"{item}: cannot be read as a picture"):
        image = _open(raw, item)
        if size is not None and image.format in ("JPEG", "MPO") and image is not raw:
            # Decoded at 1/2 to 1/8 where twice the wanted size remains: a photograph takes a third of the time.
            factor = 2 * max(size) / min(image.size)
            image.draft(image.mode, (int(image.width * factor), int(image.height * factor)))
        bits = _bits(image)
        image.load()
        turn = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        image = _eight_bits(image, channels, item, bits)
        if size is not None and (image.height, image.width) != tuple(size):
            image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _bits(image: Image.Image) -> int:
    """Of a grey value: 16, or what a TIFF says that it has fewer of."""
    given = getattr(image, "tag_v2", {}).get(0x0102, ())
    return given[0] if len(given) == 1 and 8 < given[0] < 16 else 16


def _eight_bits(image: Image.Image, channels: int, item: str, bits: int) -> Image.Image:
    """Any mode to L (channels=1) or RGB (channels=3); ``bits`` of grey values past 8."""
    from PIL import Image

    wanted = "L" if channels == 1 else "RGB"
    if image.mode == "F":
        raise DataError(f"{item}: floating-point pixels have no fixed range: convert the picture to 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(f"{item}: its grey values exceed 16 bits: convert the picture to 8 bits")
        top = max(2**bits - 1, int(values.max(initial=0)))
        return Image.fromarray(((255 * values + top // 2) // top).astype(np.uint8)).convert(wanted)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    return image if image.mode == wanted else image.convert(wanted)
