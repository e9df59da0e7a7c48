"""Image files, and tars of them, that the tests of the data programs make."""

import io
import tarfile
from pathlib import Path

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


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    """A tar of files, each a name and what it holds, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def file_of(mode: str) -> bytes:
    """A picture that is wider than high and whose EXIF tag turns it; what is transparent has colours of its own."""
    image, settings = picture(3), {}
    fade = Image.linear_gradient("L").resize(image.size)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(fade)
    elif mode == "P, transparent":
        image, settings = image.quantize(8), {"transparency": bytes(range(0, 256, 32))}
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(fade).astype(np.uint16) * 200 + 37)
    else:
        image = image.convert(mode)
    assert image.mode == mode.split(",")[0]
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    return encoded(image, "JPEG" if mode == "CMYK" else "PNG", exif=exif, **settings)
