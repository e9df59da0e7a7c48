"""Image files that the tests of the data programs make."""

import io

import numpy as np
from PIL import Image


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A smooth coloured picture, so that JPEG keeps it nearly."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return image.convert(mode)


def encoded(image: Image.Image, file_format: str = "JPEG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **settings)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
