"""Images as teacher and student see them: decoded, in RGB, augmented."""

from __future__ import annotations

import random

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def to_rgb(image: Image.Image) -> Image.Image:
    """The image, of any mode, in RGB as a person sees it: turned upright by its EXIF tag, 16 bits scaled to 8, what is
    transparent on white. Colour profiles are not applied.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits (PGM files open as 32); PIL would clip at 255, nearly all to white
        sixteen = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((sixteen + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_rgb(image: dict) -> Image.Image:
    """Decodes the undecoded value of an `Image` column (`{"bytes", "path"}`) to RGB, see [`to_rgb`].

    Raises:
        ValueError: where the image cannot be read or is a decompression bomb.
    """
    try:
        return to_rgb(datasets.Image().decode_example(image))
    except UnidentifiedImageError as error:  # its own message names an address in memory, another each time
        raise ValueError("unreadable image: of no format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
