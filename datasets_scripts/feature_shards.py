"""The files that a teacher's pass writes: which rows are in each, what of them is encoded, what is left out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.table import embed_table_storage

from datasets_scripts.left_out import LEAVE_OUT
from rows.checks import check_rows, row_faults, without_empty_captions
from rows.columns import caption_counts
from rows.files import printable, write_whole
from rows.image_metadata import without_metadata_of
from rows.teacher_columns import feature_columns


ROW = "row of the dataset"  # column of files that hold no images: a row's place among all of its split
NO_IMAGE = -1  # the place of a row's image among the distinct ones, where it has none
ROWS_IN_GROUP = 256  # of a parquet file: what a reader in random order has to decompress for one row


@dataclass
class Encoding:
    """How features are made and stored; with other values they are other features.

    Args:
        weights: of the teachers, summing to 1; a dot product of two features is this mean of the teachers' cosines.
        int8: store int8 with one scale a row instead of float16.
        batch_size: images in a batch; of captions as many as make about the same work.
        shard_rows: rows in a file.
        image_size: store images with no side above this many pixels, as a student of this size would squash them
            again in every epoch; the teacher sees them whole. None: as they are.
    """

    weights: list[float] = field(default_factory=lambda: [1.0])
    int8: bool = False
    batch_size: int = 64
    shard_rows: int = 1024
    image_size: int | None = None


@dataclass
class Shard:
    """Rows of one file: what of them must be encoded, and what has been so far.

    Attributes:
        left_out: what could not be planned or decoded, by kind ('images', 'rows'), a line each.
        dropped: number of empty captions that were dropped.
        unreadable: reason why an image cannot be read, by its place among the distinct ones.
        done: number of batches that are encoded.
    """

    split: str
    number: int
    table: pa.Table  # images as bytes
    distinct_images: list[int]  # row of each distinct image
    image_of_row: list[int]  # [N] which of the distinct images, NO_IMAGE for a text without one
    distinct_captions: list[str]  # longest first
    text_of_caption: list[int]  # [C] which of the distinct captions
    batches: list[tuple[str, range]]  # ("image" or "text", places among the distinct ones), in order
    left_out: dict[str, list[str]] = field(default_factory=dict)
    dropped: int = 0
    features: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"image": [], "text": []})
    stored_images: list[bytes] = field(default_factory=list)  # of the distinct, readable images, with `image_size`
    unreadable: dict[int, str] = field(default_factory=dict)
    done: int = 0

    @property
    def is_encoded(self) -> bool:
        return self.done == len(self.batches)

    def contents(self, kind: str, places: range) -> tuple[str, list[bytes | None] | list[str]]:
        if kind == "text":
            return kind, [self.distinct_captions[i] for i in places]
        cells = (self.table["image"][self.distinct_images[i]].as_py() for i in places)
        return kind, [cell["bytes"] if cell else None for cell in cells]

    def note_unreadable(self, reasons: dict[int, str], skip_broken: bool) -> None:
        """Notes images of the batch that is next: reason by place in the batch.

        Raises:
            ValueError: such rows are not to be skipped.
        """
        _, places = self.batches[self.done]
        for i, reason in reasons.items():
            if not skip_broken:
                image_id = self.table["image_id"][self.distinct_images[places[i]]].as_py()
                raise ValueError(f"{self.split} split, image_id {image_id!r}: {reason}. {LEAVE_OUT}")
            self.unreadable[places[i]] = reason


def plan(
    split: str,
    number: int,
    rows: datasets.Dataset,
    encoding: Encoding,
    skip_broken: bool = False,
    columns_only: bool = False,
) -> Shard:
    """Batches of the distinct images, and of the distinct captions by length: padding costs as much as words.

    Args:
        columns_only: the file will not hold the images, but the place of each row.

    Raises:
        ValueError: a row breaks the contract or its image file cannot be read, and such rows are not to be skipped.
    """
    table, start, dropped = rows.with_format("arrow")[:], number * encoding.shard_rows, 0
    left_out: dict[str, list[str]] = {"images": [], "rows": []}
    if columns_only:
        table = table.append_column(ROW, pa.array(range(start, start + len(table)), pa.int64()))
    if skip_broken:
        table, dropped = without_empty_captions(table)
        table = _without(table, row_faults(table, _has_image(table)), split, start, left_out["rows"])
    else:
        try:
            check_rows(table.drop_columns("image"), split, None, start, _has_image(table))
        except ValueError as error:
            raise ValueError(f"{error} Or leave such rows out with --skip_broken.") from None
    try:
        table = embed_table_storage(table)  # its chunks stay: one of them holds 2 GB of images at most
    except OSError:
        faults = _missing_files(table)
        if not skip_broken:
            row, reason = next(iter(faults.items()))
            name = f"{split} split, image_id {table['image_id'][row].as_py()!r}"
            raise ValueError(f"{name}: its image file cannot be read: {reason}. {LEAVE_OUT}") from None
        table = embed_table_storage(_without(table, faults, split, start, left_out["images"]))
    places: dict[bytes, int] = {}
    distinct_images, image_of_row = [], []
    contents = (content for chunk in table["image"].chunks for content in chunk.field("bytes"))
    for row, (content, has_image) in enumerate(zip(contents, _has_image(table))):
        if not has_image:
            image_of_row.append(NO_IMAGE)
            continue
        digest = hashlib.blake2b(content.as_buffer() or b"", digest_size=16).digest()
        if digest not in places:
            places[digest] = len(places)
            distinct_images.append(row)
        image_of_row.append(places[digest])
    captions = table["captions"].to_pylist()
    distinct = sorted({text for texts in captions for text in texts}, key=lambda text: (-len(text), text))
    place = {text: i for i, text in enumerate(distinct)}
    size = encoding.batch_size
    batches = [("image", range(i, min(i + size, len(distinct_images)))) for i in range(0, len(distinct_images), size)]
    first = 0
    while first < len(distinct):  # about `size` times 256 characters, with their padding
        stop = min(len(distinct), first + max(1, size * 256 // max(len(distinct[first]), 16)))
        batches.append(("text", range(first, stop)))
        first = stop
    text_of_caption = [place[text] for texts in captions for text in texts]
    of_rows = (table, distinct_images, image_of_row, distinct, text_of_caption, batches)
    return Shard(split, number, *of_rows, left_out, dropped)


def _has_image(table: pa.Table) -> np.ndarray:
    return table["image"].is_valid().to_numpy()


def _without(table: pa.Table, faults: dict[int, str], split: str, start: int | None, lines: list[str]) -> pa.Table:
    """The table without rows that have a fault, of each of which `lines` gets one."""
    if not faults:
        return table
    ids = table["image_id"].to_pylist()
    lines += [_line(split, ids[row], reason, row, start) for row, reason in faults.items()]
    return table.filter(pa.array([row not in faults for row in range(len(table))]))


def _line(split: str, image_id: object, reason: str, row: int | None = None, start: int | None = None) -> str:
    name = printable(image_id) if isinstance(image_id, str) and image_id else f"row {(start or 0) + (row or 0)}"
    return f"{split} {name}: {reason}"


def _missing_files(table: pa.Table) -> dict[int, str]:
    """Rows whose image file cannot be read, and why."""
    faults = {}
    for row in range(len(table)):
        try:
            embed_table_storage(table.select(["image"]).slice(row, 1))
        except OSError as error:
            faults[row] = str(error)
    return faults


def write_shard(shard: Shard, description: str, int8: bool, folder: Path) -> None:
    """The shard's rows with the teacher's columns as one parquet file, written beside and renamed.

    What was left out is noted in a file of its own before. Of a shard with no row left the parquet file has none.
    Images are stored without EXIF and the like, see rows/image_metadata.py.
    With int8, splits other than train also leave their exact float16 features as `.npz`, to tell what int8 costs.

    Raises:
        ValueError: features that are NaN, infinite or zero as they are stored, naming their rows.
    """
    path = shard_file(folder, shard.split, shard.number)
    table, ids = shard.table, shard.table["image_id"].to_pylist()
    bad = {row: shard.unreadable[place] for row, place in enumerate(shard.image_of_row) if place in shard.unreadable}
    shard.left_out["images"] += [_line(shard.split, ids[row], reason) for row, reason in bad.items()]
    if any(shard.left_out.values()) or shard.dropped:
        with write_whole(left_out_file(path)) as beside:
            beside.write_text(json.dumps({**shard.left_out, "empty captions": shard.dropped}), encoding="utf-8")
    readable = np.array([row not in bad for row in range(len(table))], bool)
    if not readable.any():
        with write_whole(path) as beside:
            pq.write_table(table.slice(0, 0), beside)
        return
    counts = caption_counts(table["captions"])
    text_of_caption = np.array(shard.text_of_caption)[np.repeat(readable, counts)]
    # Features, and images that are stored smaller, are there of what was readable.
    distinct = [place for place in range(len(shard.distinct_images)) if place not in shard.unreadable]
    feature_of = {place: i for i, place in enumerate(distinct)}
    image_of_row = [feature_of[place] for place in shard.image_of_row if place in feature_of]
    if bad:
        table, counts = table.filter(pa.array(readable)), counts[readable]
        ids = table["image_id"].to_pylist()
    has_image = _has_image(table)
    first = next(part for parts in shard.features.values() for part in parts)
    nothing = first[:0].cpu()  # where the file has no image, or no caption
    image, text = (torch.cat([nothing, *(of.cpu() for of in parts)]) for parts in shard.features.values())
    image, text = image[image_of_row], text[text_of_caption]  # [images, D], [C, D]
    try:
        columns = feature_columns(image, text, counts, ids, int8, has_image)
    except ValueError as error:
        raise ValueError(f"{shard.split} split: {error} Try another --dtype, or another teacher.") from None
    columns["teacher"] = pa.array([description] * len(ids)), datasets.Value("string")
    schema = datasets.Features.from_arrow_schema(table.schema)
    if shard.stored_images:
        paths = pa.chunked_array([chunk.field("path") for chunk in table["image"].chunks]).combine_chunks()
        stored = iter([shard.stored_images[place] for place in image_of_row])
        images = pa.array([next(stored) if has else None for has in has_image], pa.binary())
        images = pa.StructArray.from_arrays([images, paths], ["bytes", "path"], mask=pa.array(~has_image))
        table = table.set_column(table.column_names.index("image"), "image", images)
    schema["image"] = datasets.Image()  # decoded again for a reader
    if ROW in table.column_names:
        table = table.drop_columns("image")
        del schema["image"]
    else:
        place = table.column_names.index("image")
        table = table.set_column(place, "image", without_metadata_of(table["image"]))
    for name, (array, feature) in columns.items():
        table = table.append_column(name, array)
        schema[name] = feature
    if int8 and shard.split != "train":
        exact = path.with_suffix(".npz")
        with write_whole(exact) as beside, beside.open("wb") as file:  # a name would get another ending
            np.savez(file, image=image.half().numpy(), text=text.half().numpy())
    table = table.cast(schema.arrow_schema).replace_schema_metadata(schema.arrow_schema.metadata)
    with write_whole(path) as beside:
        pq.write_table(table, beside, row_group_size=ROWS_IN_GROUP)


def shard_file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.parquet"


def left_out_file(shard: Path) -> Path:
    """Where it is noted what was left out of a file; there only where something was."""
    return shard.with_suffix(".json")


def rows_in(folder: Path, split: str, number: int) -> int:
    """Number of rows in a file."""
    return pq.read_metadata(shard_file(folder, split, number)).num_rows


def all_left_out(folder: Path, files: dict[str, int]) -> tuple[list[str], list[str], int]:
    """What was left out of all files: a line for each row, a line for each image, and the number of empty captions.

    Args:
        folder, files: see [`encode_dataset`].
    """
    rows, images, dropped = [], [], 0
    for split, count in files.items():
        for number in range(count):
            if (path := left_out_file(shard_file(folder, split, number))).is_file():
                noted = json.loads(path.read_text(encoding="utf-8"))
                rows += noted["rows"]
                images += noted["images"]
                dropped += noted["empty captions"]
    return rows, images, dropped
