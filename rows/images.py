"""Images as teacher and student see them: decoded, in RGB, augmented."""

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


# Not those for which Pillow starts other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
LONGEST_SIDES = 200  # times the other: a strip would grow without end where its short side is brought to a size
SCANS = 20  # of a JPEG of most pixels; the usual has 10, and each costs as much as the whole image
JPEG_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image, of any mode, in RGB as a person sees it: turned upright by its EXIF tag, 16 bits scaled to 8, what is
    transparent on white. Colour profiles are not applied; numbers with a point are taken for 0 to 255.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits (PGM files open as 32); PIL would clip at 255, nearly all to white
        sixteen = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((sixteen + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(file: BinaryIO) -> Image.Image:
    """An image file, decoded, in its own mode; the first frame of an animated one.

    Raises:
        Exception: of many types (OSError, SyntaxError, ValueError, others of Pillow's decoders), where it is broken,
            of a format that others than Pillow would have to read, of more pixels than `Image.MAX_IMAGE_PIXELS`, of a
            strip's shape, or made to take very long.
    """
    image = Image.open(file, formats=FORMATS)
    size, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if size > most:  # Pillow only warns, up to twice as many
        raise ValueError(f"{image.width} x {image.height} pixels, expected {most:,} at most")
    if max(image.size) > LONGEST_SIDES * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, expected sides of 1 : {LONGEST_SIDES} at most")
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        scans = sum(1 for _ in JPEG_SCAN.finditer(file.read()))
        if scans * size > SCANS * most:
            raise ValueError(f"a JPEG of {image.width} x {image.height} pixels in {scans} scans: decoding has no end")
    image.load()
    return image


def load_rgb(image: dict) -> Image.Image:
    """Decodes the undecoded value of an `Image` column (`{"bytes", "path"}`) to RGB, see [`to_rgb`].

    Raises:
        ValueError: where the image cannot be read or is a decompression bomb.
    """
    try:
        data = image["bytes"]
        if data is None:
            with fsspec.open(image["path"], "rb") as file:  # a path may lead into an archive or to the Hub
                data = file.read()
        return to_rgb(open_image(io.BytesIO(data)))
    except UnidentifiedImageError as error:  # its own message names an address in memory, another each time
        raise ValueError("unreadable image: of no format that Pillow knows") from error
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        raise ValueError(f"unreadable image: {error}") from error


def check_image_paths(images: pa.ChunkedArray | pa.Array, folder: Path | None) -> None:
    """Refuses images that a dataset does not hold but names by a path elsewhere: its author would choose which of this
    machine's pictures are read, shown on cards and published.

    Args:
        images: undecoded values of an `Image` column.
        folder: of the dataset, where it is one.

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
            place = path.rpartition("::")[2]  # of the archive, where it lies in one
            if place.startswith("hf://"):
                continue
            parent, name = os.path.split(place)
            if "://" in place or not name or not is_inside(place if os.path.islink(place) else parent):
                raise ValueError(
                    f"The dataset holds no image but the path {path!r}, which is not in its folder. Bring it into one "
                    "with its images: python -m datasets_scripts.own_data"
                )
