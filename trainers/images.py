"""Images as teacher and student see them: decoded, in RGB, augmented."""

from __future__ import annotations

import io
import random

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


# Not those for which Pillow starts other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


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


def open_image(data: bytes) -> Image.Image:
    """An image file, decoded, in its own mode.

    Raises:
        Exception: of many types (OSError, SyntaxError, ValueError, others of Pillow's decoders), where it is broken,
            of a format that others than Pillow would have to read, or of more pixels than `Image.MAX_IMAGE_PIXELS`.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns, up to twice as many
        raise ValueError(f"{image.width} x {image.height} pixels, expected {Image.MAX_IMAGE_PIXELS:,} at most")
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
        return to_rgb(open_image(data))
    except UnidentifiedImageError as error:  # its own message names an address in memory, another each time
        raise ValueError("unreadable image: of no format that Pillow knows") from error
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        raise ValueError(f"unreadable image: {error}") from error


def random_view(image: Image.Image, rng: random.Random, shift: float, zoom: float) -> Image.Image:
    """A shifted and zoomed view of the same size; what lies outside the image repeats its edge.

    Args:
        image: RGB.
        rng: where the randomness comes from.
        shift: largest shift in each direction, as a fraction of the side, in [0, 1).
        zoom: the side of the view is the image's times a factor in [1 - zoom, 1 + zoom], zoom in [0, 1).
    """
    if not shift and not zoom:
        return image
    width, height = image.size
    factor = 1 + rng.uniform(-zoom, zoom)
    center_x = width * (0.5 + rng.uniform(-shift, shift))
    center_y = height * (0.5 + rng.uniform(-shift, shift))
    box = [
        center_x - width * factor / 2,
        center_y - height * factor / 2,
        center_x + width * factor / 2,
        center_y + height * factor / 2,
    ]
    pad = max(0, int(np.ceil(max(-box[0], -box[1], box[2] - width, box[3] - height))))
    padded = Image.fromarray(np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
    return padded.resize((width, height), Image.Resampling.BILINEAR, box=[side + pad for side in box])
