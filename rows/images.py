"""Images as teacher and student see them, decoded and in RGB; files and paths that could do harm are refused."""

from __future__ import annotations

import functools
import io
import os
import re
from pathlib import Path
from typing import BinaryIO

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from huggingface_hub import constants
from PIL import Image, ImageOps, UnidentifiedImageError


# The formats that are read; without those for which Pillow starts other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# The most that an image's longer side may be times its shorter one: a processor that resizes the shorter side of a
# strip to a fixed size would make the longer one too large for the memory.
LONGEST_SIDES = 200
# The most scans of a progressive JPEG with the most pixels allowed; a smaller one may have more. Ten are usual, and
# each takes as long to decode as a whole image.
SCANS = 20
# [`to_rgb`] for 8 bits, as code for those who have not this project; `file` is an expression.
UPRIGHT_ON_WHITE = """image = ImageOps.exif_transpose(Image.open({file}))  # upright; and on white:
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")"""
HEIC_BRANDS = b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()
JPEG_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image, of any mode, in RGB as a person sees it: turned upright by its EXIF tag, 16 bits scaled to 8, what is
    transparent on white. Colour profiles are not applied; floating-point pixels are taken to be in [0, 255].
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits (32 for PGM files); PIL would turn all above 255 to white
        sixteen = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((sixteen + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(file: BinaryIO, at_least: int | None = None) -> Image.Image:
    """Decodes an image file in its own mode; of an animated one, the first frame.

    Args:
        at_least: a JPEG may be decoded at half, a quarter or an eighth of its sides, in a fraction of the time, as
            long as both stay so many pixels long. None: at its own size.

    Raises:
        Exception: the file is broken, is in none of `FORMATS` (HEIC is read where `pi_heif` is
            installed), has more than `Image.MAX_IMAGE_PIXELS` pixels, is a
            narrow strip, or would take very long to decode. The types are many: OSError, SyntaxError, ValueError and
            others of Pillow's decoders.
    """
    image = _heic_image(file) if _is_heic(file) else Image.open(file, formats=FORMATS)
    _check_size(image)
    size, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        scans = sum(1 for _ in JPEG_SCAN.finditer(file.read()))
        if scans * size > SCANS * most:
            raise ValueError(f"{image.width} x {image.height} pixels in {scans} JPEG scans take too long to decode")
        if at_least is not None:
            image.draft(None, (at_least, at_least))
    image.load()
    _check_size(image)  # of a HEIC file, decoding may change it
    return image


def _check_size(image: Image.Image) -> None:
    most = Image.MAX_IMAGE_PIXELS
    if image.width * image.height > most:  # Pillow only warns, up to twice as many
        raise ValueError(f"{image.width} x {image.height} pixels, expected {most:,} at most")
    if max(image.size) > LONGEST_SIDES * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, expected sides of 1 : {LONGEST_SIDES} at most")


def _is_heic(file: BinaryIO) -> bool:
    """Whether a file says that it is HEIC; the position stays at its start."""
    file.seek(0)
    start = file.read(4096)
    file.seek(0)
    if start[4:8] != b"ftyp":
        return False
    length = int.from_bytes(start[:4], "big")
    brands = {start[i : i + 4] for i in (8, *range(16, min(length, len(start)), 4))}
    # The last two say only that it is a picture or several; of HEIC or, where another brand says so, of AVIF.
    return start[8:12] in HEIC_BRANDS and not brands & {b"avif", b"avis"}


def _heic_image(file: BinaryIO) -> Image.Image:
    try:
        import pi_heif  # not registered with Pillow: nothing else is to open such files
    except ImportError:
        raise ValueError('a HEIC file, which needs a decoder of its own: pip install -e ".[heic]"') from None
    return pi_heif.HeifImageFile(file)


def load_rgb(image: dict, at_least: int | None = None) -> Image.Image:
    """Decodes a value of an `Image(decode=False)` column (`{"bytes", "path"}`) to RGB, see [`to_rgb`].

    Args:
        at_least: see [`open_image`]; for views of training alone.

    Raises:
        ValueError: the image cannot be read, or is a decompression bomb.
    """
    try:
        data = image["bytes"]
        if data is None:
            with fsspec.open(image["path"], "rb") as file:  # a path may lead into an archive or to the Hub
                data = file.read()
        return to_rgb(open_image(io.BytesIO(data), at_least))
    except UnidentifiedImageError as error:  # its own message holds a memory address, never the same
        raise ValueError("unreadable image: of no format that Pillow knows") from error
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        raise ValueError(f"unreadable image: {error}") from error


def check_image_paths(images: pa.ChunkedArray | pa.Array, folder: Path | None) -> None:
    """Refuses images whose bytes the dataset does not hold, unless their path lies in its folder or the Hub's caches.

    Through any other path the author of a dataset could choose which of this machine's pictures are read, shown on
    cards and published.

    Args:
        images: values of an `Image(decode=False)` column.
        folder: the dataset's; None if it is not a local folder.

    Raises:
        ValueError: a path leads out of the folder and of the Hub's caches, or to another host than the Hub.
    """
    roots = [constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, *([folder] if folder else [])]
    roots = [os.path.realpath(root) for root in roots]

    @functools.lru_cache(1024)
    def is_inside(place: str) -> bool:
        return any(Path(os.path.realpath(place)).is_relative_to(root) for root in roots)

    for chunk in images.chunks if isinstance(images, pa.ChunkedArray) else [images]:
        for path in chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist():
            if path is None:
                continue
            place = path.rpartition("::")[2]  # for a path inside an archive: the archive
            if place.startswith("hf://"):
                continue
            parent, name = os.path.split(place)
            if "://" in place or not name or not is_inside(place if os.path.islink(place) else parent):
                raise ValueError(
                    f"The dataset holds no image but the path {path!r}, which is not in its folder. Make a dataset "
                    "that holds its images: python -m datasets_scripts.own_data"
                )
