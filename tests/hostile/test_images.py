"""Images made to exhaust the machine, to lie, or to lead out of their folder."""

import random
import re
import struct
import zlib
from pathlib import Path

import pytest
from hostile.fuzzing import at_most
from image_files import encoded, picture
from PIL import Image
from transformers import CLIPImageProcessorPil

from inference import search
from rows.images import LONGEST_SIDES, load_rgb
from trainers.batches import random_view


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, pixels: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """Compressed; a thousandth of their number."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(count >> 20)) + packer.flush()


def tiff(width: int, height: int, strip: bytes) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 273: 134, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4 + 12) + strip


def webp(width: int, height: int) -> bytes:
    still = encoded(picture(0, size=(8, 8)), "WEBP", lossless=True)
    lossless = bytearray(still)
    at = lossless.index(b"VP8L") + 9
    lossless[at : at + 4] = ((height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(lossless)


def avif(width: int, height: int, still: bytes | None = None) -> bytes:
    """A small picture, or the given one, that says it has this size."""
    data = bytearray(still or encoded(picture(0), "AVIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", width, height)
    return bytes(data)


def many_scans() -> bytes:
    """A JPEG whose last scan, of a hundred bytes, stands there ten thousand times: hours of decoding."""
    data = encoded(Image.new("L", (9000, 9000), 128), "JPEG", progressive=True, quality=10)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 10_000 + data[-2:]


def memory(field: str) -> int:
    """KiB: VmRSS that are held, VmHWM that were held at most."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def forget_the_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


EXIF = b"Exif\0\0MM\0*\0\0\0\x08"
BOMBS = {
    "png": png(60_000, 60_000, zeros(1 << 24)),
    "just above the limit": png(9460, 9460, zeros(1 << 24)),
    "tiff": tiff(60_000, 60_000, zeros(1 << 24)),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + encoded(picture(0), "GIF")[13:],
    "webp": webp(16_384, 16_384),
    "avif": avif(16_000, 16_000),
    "avif just above the limit": avif(9460, 9460),
    "avif strip": avif(30_000, 100),
    "avif that is larger than it says": avif(64, 64, encoded(Image.new("L", (7000, 7000), 128), "AVIF", speed=10)),
    "ppm": b"P6 60000 60000 255\n",
    "bmp": encoded(picture(0), "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded(picture(0), "BMP")[26:],
    "strip": encoded(Image.new("RGB", (100_000, 1)), "PNG"),
    "tall strip": encoded(Image.new("RGB", (1, 100_000)), "PNG"),
    "scans": many_scans(),
    "zipped text": png(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"zTXt", b"a\0\0" + zeros(200 << 20))),
    "zipped colours": png(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"iCCP", b"a\0\0" + zeros(200 << 20))),
    "exif of itself": encoded(picture(0), "JPEG", exif=EXIF + b"\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x08" + b"\0" * 4),
    "exif of many": encoded(picture(0), "JPEG", exif=EXIF + b"\xff\xff" + b"\1\0\0\2\xff\xff\xff\xff" * 5000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_neither_memory_nor_time(name):
    assert len(BOMBS[name]) < 2_000_000
    before = forget_the_peak()
    with at_most(20):
        try:
            image = load_rgb({"bytes": BOMBS[name], "path": None})
        except ValueError as error:
            assert re.search("pixels|bomb|Decompressed data too large", str(error)), error
        else:
            assert name.startswith(("exif", "zipped", "avif that")) and max(image.size) < 100
    assert memory("VmHWM") - before < 300_000  # KiB


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        encoded(picture(0))[:-20],
        encoded(picture(0))[:300],
        png(64, 64, zlib.compress(bytes(100))),  # fewer pixels than it says
        encoded(picture(0), "PNG")[:60],
        encoded(picture(0), "TIFF")[:100],
        encoded(picture(0), "AVIF")[:-20],
        encoded(picture(0), "AVIF")[:200],
        encoded(picture(0), "AVIF")[:-500] + bytes(500),
        encoded(picture(0), "AVIF", save_all=True, append_images=[picture(1)])[:600],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
    ],
)
def test_broken_images_are_refused(data):
    with pytest.raises(ValueError, match="unreadable image"):
        load_rgb({"bytes": data, "path": None})


@pytest.mark.parametrize("size", [(9000, 45), (45, 9000), (1, 1)])
def test_the_longest_strips_fit_every_resize_and_view(size):
    """A processor that brings the short side to 224 makes 224 by 44,800 of them; one longer is refused."""
    assert max(size) <= LONGEST_SIDES * min(size)
    image = load_rgb({"bytes": encoded(Image.new("RGB", size), "PNG"), "path": None})
    before = forget_the_peak()
    with at_most(20):
        view = random_view(image, random.Random(0), 0.9, 0.9)
        CLIPImageProcessorPil()(images=[image], return_tensors="np")
    assert view.size == size
    assert memory("VmHWM") - before < 500_000


def test_the_search_refuses_them_too(tmp_path):
    for name in ("png", "strip", "scans"):
        (tmp_path / "x.png").write_bytes(BOMBS[name])
        with at_most(20), pytest.raises(Exception, match="pixels"):
            search.read_image(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(OSError, match="cannot identify"):
        search.read_image(tmp_path / "x.png")
