"""Rows as the arrow files of a dataset folder: each image read and decoded once, a few in memory at a time."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetInfo, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image as PILImage
from tqdm.auto import tqdm

from rows.files import printable
from rows.images import open_image, to_rgb


IMAGES_AT_ONCE = 32


@dataclass
class Row:
    """A row to be written. Its image stays where it is until `read` is called."""

    image_id: str
    captions: list[str]
    read: Callable[[], bytes]
    group_id: str | None = None


def fold(caption: str) -> str:
    """The caption without blanks around it, its lines joined by a space."""
    return " ".join(filter(None, map(str.strip, caption.splitlines())))


def rgb_bytes(data: bytes) -> bytes:
    """An image file as an RGB file: the same bytes where it is an upright RGB JPEG or PNG, else written anew.

    A JPEG stays one (quality 95), all else becomes PNG. Orientation from EXIF is applied, transparent parts become
    white, 16-bit grey is scaled to 8 bits. Decodes the whole image.

    Raises:
        Exception: of many types, where the file is broken or a decompression bomb.
    """
    image = open_image(io.BytesIO(data))
    file_format = image.format
    upright = image.getexif().get(PILImage.ExifTags.Base.Orientation, 1) == 1
    if file_format in ("JPEG", "PNG") and image.mode == "RGB" and upright and not image.has_transparency_data:
        return data
    buffer = io.BytesIO()
    rgb = to_rgb(image)
    if file_format in ("JPEG", "MPO"):
        rgb.save(buffer, format="JPEG", quality=95)
    else:
        rgb.save(buffer, format="PNG")
    return buffer.getvalue()


def write_rows(parts: dict[str, list[Row]], folder: Path, license: str) -> list[str]:
    """Writes what `DatasetDict.save_to_disk` would, image by image. Returns what could not be read, with reasons."""
    features = Features({"image": Image(), "captions": List(Value("string")), "image_id": Value("string")})
    if any(row.group_id is not None for rows in parts.values() for row in rows):
        features["group_id"] = Value("string")
    broken = []
    for split, rows in parts.items():
        (folder / split).mkdir()
        name = "data-00000-of-00001.arrow"
        content = hashlib.blake2b(digest_size=8)
        with ArrowWriter(features=features, path=str(folder / split / name), writer_batch_size=16) as writer:
            for row, image, reason in _read_images(rows, split):
                if reason is not None:
                    broken.append(f"{split} {printable(row.image_id)}: {reason}")
                    continue
                # A path beside the bytes would win over them where a file of that name lies in the working folder.
                example = {"image": {"bytes": image, "path": None}}
                example |= {column: getattr(row, column) for column in features if column != "image"}
                writer.write(example)
                content.update(image)
                content.update(json.dumps([row.captions, row.image_id, row.group_id]).encode())
            writer.finalize()
        DatasetInfo(features=features, license=license).write_to_directory(str(folder / split))
        state = {
            "_data_files": [{"filename": name}],
            "_fingerprint": content.hexdigest(),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        (folder / split / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}), encoding="utf-8")
    return broken


def _read_images(rows: list[Row], split: str) -> Iterator[tuple[Row, bytes | None, str | None]]:
    """Rows in order, each with its RGB file or the reason why there is none."""
    with ThreadPoolExecutor() as pool, tqdm(total=len(rows), desc=split, unit=" images", disable=None) as bar:
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            some = rows[start : start + IMAGES_AT_ONCE]
            for row, (image, reason) in zip(some, pool.map(_read_image, some)):
                yield row, image, reason
                bar.update()


def _read_image(row: Row) -> tuple[bytes | None, str | None]:
    try:
        return rgb_bytes(row.read()), None
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        reason = re.sub(r" <_io.BytesIO object at \w+>", "", str(error))
        return None, fold(f"{type(error).__name__}: {reason}")
