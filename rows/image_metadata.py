"""Image files without what they say of who took them, where, when and with what; their pixels are not touched."""

from __future__ import annotations

import io
import re
import struct
import zlib
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from .images import FORMATS, open_image, to_rgb


# What is needed to show the picture as it is; all other chunks and segments are left out, known or not.
PNG_KEPT = frozenset(
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD pHYs acTL fcTL fdAT".split()
)
WEBP_KEPT = frozenset([b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"])
WEBP_EXIF, WEBP_XMP = 0x08, 0x04  # flags of VP8X
# In the scans of a JPEG 0xFF is followed by 0 where it is a value, or by a restart marker.
AFTER_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
ORIENTATION = Image.ExifTags.Base.Orientation


def without_metadata(data: bytes) -> bytes:
    """An image file without EXIF, XMP, IPTC, comments, times and what is hung on behind it, but for the orientation.

    The bytes of the picture and its colour profile stay as they are in JPEG, PNG and WebP; a file without any metadata
    is given back as it is. AVIF with metadata, other formats, and files that do not keep to their format become PNG
    with the pixels that `to_rgb` gives, which are upright.

    Args:
        data: a file that [`open_image`] reads.

    Raises:
        Exception: of many types, where it does not.
    """
    kind, turned = None, 1
    with suppress(UnidentifiedImageError), Image.open(io.BytesIO(data), formats=FORMATS) as image:  # HEIC is none
        kind, turned = image.format, image.getexif().get(ORIENTATION, 1)
        if kind == "AVIF" and not {"exif", "xmp"} & image.info.keys():
            return data
    exif = Image.Exif()
    if turned in range(2, 9):
        exif[ORIENTATION] = turned
    strip = {"JPEG": _strip_jpeg, "MPO": _strip_jpeg, "PNG": _strip_png, "WEBP": _strip_webp}.get(kind)
    try:
        if strip is not None:
            return strip(data, exif.tobytes() if len(exif) else b"")
    except (IndexError, ValueError, struct.error):  # cut short or odd, which Pillow may read all the same
        pass
    pixels, buffer = to_rgb(open_image(io.BytesIO(data))), io.BytesIO()
    pixels.info.clear()
    pixels.save(buffer, "PNG")
    return buffer.getvalue()


def without_metadata_of(images: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """The values of an `Image(decode=False)` column, each file as [`without_metadata`] leaves it; null stays null.

    Raises:
        ValueError: a file is no image, naming its place in the column.
    """
    chunks = images.chunks if isinstance(images, pa.ChunkedArray) else [images]
    cleaned, place, changed = [], 0, False
    for chunk in chunks:
        files = pc.struct_field(chunk, "bytes").to_pylist()
        for i, file in enumerate(files):
            try:
                files[i] = None if file is None else without_metadata(file)
            except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
                raise ValueError(f"the image of row {place + i} cannot be read: {type(error).__name__}") from error
            changed |= files[i] != file
        place += len(files)
        files = pa.array(files, chunk.field("bytes").type)
        cleaned.append(
            pa.StructArray.from_arrays([files, chunk.field("path")], ["bytes", "path"], mask=chunk.is_null())
        )
    if not changed:
        return images
    return pa.chunked_array(cleaned) if isinstance(images, pa.ChunkedArray) else cleaned[0]


def _strip_jpeg(data: bytes, exif: bytes) -> bytes:
    kept = [data[:2]]
    if exif:
        kept.append(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
    place = 2
    while True:
        if data[place] != 0xFF:
            raise ValueError("no marker where one has to be")
        while data[place + 1] == 0xFF:  # filled up
            place += 1
        marker = data[place + 1]
        if marker == 0xD9:  # the end of the picture; phones hang videos on behind it
            return b"".join([*kept, data[place : place + 2]])
        end = place + 2
        if marker != 0x01 and marker not in range(0xD0, 0xD8):
            end += struct.unpack(">H", data[end : end + 2])[0]
        if marker == 0xDA:
            found = AFTER_SCAN.search(data, end)
            if found is None:  # it is cut short, which Pillow reads in part
                return b"".join([*kept, data[place:]])
            end = found.start()
        segment = data[place:end]
        if _is_needed(marker, segment[4:]):
            kept.append(segment)
        place = end


def _is_needed(marker: int, content: bytes) -> bool:
    if marker == 0xE0:
        return content.startswith(b"JFIF")
    if marker == 0xE2:
        return content.startswith(b"ICC_PROFILE")
    if marker == 0xEE:
        return content.startswith(b"Adobe")  # which colours the channels are
    return marker != 0xFE and marker not in range(0xE0, 0xF0)


def _strip_png(data: bytes, exif: bytes) -> bytes:
    kept, place = [data[:8]], 8
    while True:
        length, name = struct.unpack(">I4s", data[place : place + 8])
        if len(data) < place + 12 + length:
            raise ValueError("cut short")
        if name == b"IDAT" and exif:
            content = b"eXIf" + exif.removeprefix(b"Exif\0\0")
            kept.append(struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content)))
            exif = b""
        if name in PNG_KEPT:
            kept.append(data[place : place + 12 + length])
        place += 12 + length
        if name == b"IEND":
            return b"".join(kept)


def _strip_webp(data: bytes, exif: bytes) -> bytes:
    end = 8 + struct.unpack("<I", data[4:8])[0]
    if len(data) < end:
        raise ValueError("cut short")
    kept, place = [], 12
    while place < end:
        name, length = struct.unpack("<4sI", data[place : place + 8])
        chunk = data[place : place + 8 + length + length % 2]
        if name == b"VP8X":
            flags = chunk[8] & ~WEBP_XMP & ~WEBP_EXIF | WEBP_EXIF * bool(exif)
            chunk = chunk[:8] + bytes([flags]) + chunk[9:]
        if name in WEBP_KEPT:
            kept.append(chunk)
        place += len(chunk)
    if exif:  # a file that has one has VP8X too
        kept.append(b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2))
    content = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content
