"""Rows as the arrow files of a dataset folder: each image read and decoded once, a few in memory at a time."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import DatasetInfo, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image as PILImage
from tqdm.auto import tqdm

from rows.files import printable
from rows.image_metadata import without_metadata
from rows.images import open_image, to_rgb


KEPT_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")  # a GIF has a palette, and becomes PNG
IMAGES_AT_ONCE = 32
ROWS_AT_ONCE = 16  # in memory, of an arrow file that is written or read
FILE_NAME = "data-00000-of-00001.arrow"


@dataclass
class Row:
    """A row to be written. Its image stays where it is until `read` is called; `pixels` is their hash from then on."""

    image_id: str
    captions: list[str]
    read: Callable[[], bytes] | None  # None: a text without an image, whose `pixels` are a hash of the text
    group_id: str | None = None
    pixels: bytes | None = None
    split_group: str | None = None  # equal for images that must be in one split; not written


def fold(caption: str) -> str:
    """The caption without blanks around it, its lines joined by a space."""
    return " ".join(filter(None, map(str.strip, caption.splitlines())))


def rgb_file(data: bytes) -> tuple[bytes, bytes]:
    """An image file as an RGB file, and a hash of its size and RGB pixels: equal for equal pictures in any format.

    The picture keeps its bytes where it is JPEG, PNG, WebP or AVIF, upright, RGB, of one frame and without
    transparency. Else it is written anew: a JPEG stays one (quality 95), all else becomes PNG. EXIF's orientation is
    applied, transparent parts become white, 16-bit grey is scaled to 8 bits. Decodes the whole image.

    What the file says beside the picture (place, time, camera, author, comments) is never kept, since datasets are
    published; see [`without_metadata`].

    Raises:
        Exception: of many types, where the file is broken or a decompression bomb.
    """
    image = open_image(io.BytesIO(data))
    upright = image.getexif().get(PILImage.ExifTags.Base.Orientation, 1) == 1
    plain = image.mode == "RGB" and upright and not image.has_transparency_data
    rgb = image if plain else to_rgb(image)
    pixels = hashlib.blake2b(f"{rgb.width} x {rgb.height}:".encode(), digest_size=16)
    pixels.update(rgb.tobytes())
    if plain and image.format in KEPT_FORMATS and getattr(image, "n_frames", 1) == 1:
        return without_metadata(data), pixels.digest()
    buffer = io.BytesIO()
    if image.format in ("JPEG", "MPO"):
        rgb.save(buffer, format="JPEG", quality=95)
    else:
        rgb.save(buffer, format="PNG")
    return without_metadata(buffer.getvalue()), pixels.digest()  # Pillow hands a JPEG's comment on


def read_images(parts: dict[str | None, list[Row]], broken: list[str]) -> Iterator[tuple[Row, bytes | None]]:
    """Rows in order with their RGB files; their `pixels` are set. What cannot be read is added to `broken` instead.

    A text without an image has no file.
    """
    for split, rows in parts.items():
        with ThreadPoolExecutor() as pool, tqdm(total=len(rows), desc=split, unit=" images", disable=None) as bar:
            for start in range(0, len(rows), IMAGES_AT_ONCE):
                some = rows[start : start + IMAGES_AT_ONCE]
                for row, (image, reason) in zip(some, pool.map(_read_image, some)):
                    if reason is None:
                        yield row, image
                    else:
                        broken.append(f"{name_of(row, split)}: {reason}")
                    bar.update()


def name_of(row: Row, split: str | None) -> str:
    """How a row is named to the user."""
    return printable(row.image_id) if split is None else f"{split} {printable(row.image_id)}"


def _read_image(row: Row) -> tuple[bytes | None, str | None]:
    if row.read is None:
        return None, None
    try:
        image, row.pixels = rgb_file(row.read())
        return image, None
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        row.pixels = None
        reason = re.sub(r" <_io.BytesIO object at \w+>", "", str(error))
        return None, fold(f"{type(error).__name__}: {reason}")


def store_images(images: Iterable[tuple[Row, bytes]], path: Path) -> None:
    """Writes images into a file for [`stored_images`]."""
    features = Features({"image": Value("large_binary")})
    with ArrowWriter(features=features, path=str(path), writer_batch_size=ROWS_AT_ONCE) as writer:
        for _, image in images:
            writer.write({"image": image})
        writer.finalize()


def stored_images(path: Path) -> Iterator[bytes]:
    """The images of a file that `store_images` wrote, in order."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as batches:
        for batch in batches:
            yield from batch.column("image").to_pylist()


def write_splits(images: Iterable[tuple[Row, bytes]], parts: dict[str, list[Row]], folder: Path, license: str) -> None:
    """Writes what `DatasetDict.save_to_disk` would, image by image; fingerprints are of the content.

    Args:
        images: rows with their RGB files, in the order in which they are written; those in none of `parts` are not.
        parts: split -> rows, of which some may be missing in `images`. Their `group_id` is a column where one has it.
        folder: exists; holds nothing of the names of the splits.
        license: kept in the dataset's info.
    """
    features = Features({"image": Image(), "captions": List(Value("string")), "image_id": Value("string")})
    if any(row.group_id is not None for rows in parts.values() for row in rows):
        features["group_id"] = Value("string")
    split_of = {row.image_id: split for split, rows in parts.items() for row in rows}
    contents = {split: hashlib.blake2b(digest_size=8) for split in parts}
    with ExitStack() as stack:
        writers = {}
        for split in parts:
            (folder / split).mkdir()
            path = str(folder / split / FILE_NAME)
            writers[split] = ArrowWriter(features=features, path=path, writer_batch_size=ROWS_AT_ONCE)
            stack.enter_context(writers[split])
        for row, image in images:
            split = split_of.get(row.image_id)
            if split is None:
                continue
            # A path beside the bytes would win over them where a file of that name lies in the working folder.
            example = {"image": None if image is None else {"bytes": image, "path": None}}
            example |= {column: getattr(row, column) for column in features if column != "image"}
            writers[split].write(example)
            contents[split].update(image or b"")
            contents[split].update(json.dumps([row.captions, row.image_id, row.group_id]).encode())
        for writer in writers.values():
            writer.finalize()
    describe_splits(folder, features, {split: content.hexdigest() for split, content in contents.items()}, license)


def describe_splits(folder: Path, features: Features, fingerprints: dict[str, str], license: str) -> None:
    """Writes what `load_from_disk` reads beside the arrow files, `{split}/data-00000-of-00001.arrow`.

    Args:
        fingerprints: of the content of each split, by its name.
        license: kept in the dataset's info.
    """
    for split, fingerprint in fingerprints.items():
        DatasetInfo(features=features, license=license).write_to_directory(str(folder / split))
        state = {
            "_data_files": [{"filename": FILE_NAME}],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        (folder / split / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(fingerprints)}), encoding="utf-8")
