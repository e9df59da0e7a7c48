"""A teacher's output features for every row of a dataset, file by file."""

from __future__ import annotations

import hashlib
import io
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets.table import embed_table_storage
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from rows.checks import check_rows
from rows.files import write_whole
from rows.images import check_image_paths, load_rgb
from rows.teacher_columns import feature_columns, teacher_columns
from teachers import Teacher
from trainers.run.loader_workers import shielded


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
    """Rows of one file: what of them must be encoded, and what has been so far."""

    split: str
    number: int
    table: pa.Table  # images as bytes
    distinct_images: list[int]  # row of each distinct image
    image_of_row: list[int]  # [N] which of the distinct images
    distinct_captions: list[str]  # longest first
    text_of_caption: list[int]  # [C] which of the distinct captions
    batches: list[tuple[str, range]]  # ("image" or "text", places among the distinct ones), in order
    features: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"image": [], "text": []})
    stored_images: list[bytes] = field(default_factory=list)  # of the distinct images so far, with `image_size`

    @property
    def is_encoded(self) -> bool:
        return len(self.features["image"]) + len(self.features["text"]) == len(self.batches)

    def contents(self, kind: str, places: range) -> tuple[str, list[bytes] | list[str]]:
        if kind == "text":
            return kind, [self.distinct_captions[i] for i in places]
        return kind, [self.table["image"][self.distinct_images[i]].as_py()["bytes"] for i in places]


def encode_dataset(
    rows: datasets.DatasetDict | datasets.IterableDatasetDict,
    teachers: list[Teacher],
    description: str,
    encoding: Encoding,
    folder: Path,
    num_workers: int,
) -> dict[str, int]:
    """Writes `folder/{split}-{number}.parquet` for every `shard_rows` rows that have no such file yet.

    Every process takes its share of the files. What is in a file does not depend on the number of processes or on what
    stood there before: a file is made of its own rows alone, and is whole or absent. An image or
    caption that occurs several times in a file is encoded once.

    Args:
        rows: the splits; columns `image`, `captions`, `image_id` and any others, which are kept.
        teachers: their features are joined, see [`join`].
        description: JSON, the constant column `teacher`.
        folder: exists.
        num_workers: processes that decode images and tokenise captions.

    Returns:
        The number of files of each split.

    Raises:
        ValueError: a column is missing, a split is empty, a row breaks the contract, an image cannot be read, a
            feature is NaN or zero.
    """
    files = dict.fromkeys(rows, 0)
    pending: deque[Shard] = deque()
    parts = {split: _undecoded(part, split) for split, part in rows.items()}
    bar = _progress_bar(parts, folder, encoding.shard_rows)

    def work() -> Iterator[tuple[str, list]]:
        """Read ahead of the model by what the loader's workers hold, and no more."""
        turn = 0
        for split, part in parts.items():
            for number, chunk in _chunks(part, encoding.shard_rows):
                files[split] = number + 1
                if _is_own(turn) and not shard_file(folder, split, number).is_file():
                    pending.append(plan(split, number, chunk(), encoding))
                    yield from (pending[-1].contents(*batch) for batch in pending[-1].batches)
                turn += 1

    loader = DataLoader(
        Preparation(teachers, encoding.image_size),
        batch_sampler=work(),
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    with ThreadPoolExecutor(1) as writer:
        written: Future | None = None  # the file before is written while the next is encoded
        for kind, prepared, stored_images in shielded(loader):
            shard = pending[0]
            if kind == "error":
                raise ValueError(_unreadable_row(shard, *prepared))
            make = "image_features" if kind == "image" else "text_features"
            parts_of_row = [getattr(teacher, make)(inputs) for teacher, inputs in zip(teachers, prepared)]
            shard.features[kind].append(join(parts_of_row, encoding.weights))
            if kind == "image":
                shard.stored_images += stored_images
                bar.update(len(shard.features[kind][-1]))
            if shard.is_encoded:
                if written is not None:
                    written.result()
                written = writer.submit(write_shard, pending.popleft(), description, encoding.int8, folder)
                bar.update(len(shard.table) - len(shard.distinct_images))
        if written is not None:
            written.result()
    bar.close()
    empty = [split for split, count in files.items() if count == 0]
    if empty:
        raise ValueError(f"The {', '.join(empty)} split is empty: leave it out.")
    return files


def join(features: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Features `[N, D_i]` of several teachers as one `[N, sum of D_i]`, of length 1.

    A dot product of two is the mean of the teachers' cosines, by their weights: each is normalised and scaled by the
    root of its weight (1/sqrt(k) where the k weights are equal). A single teacher's features stay as they are.
    """
    if len(features) == 1:
        return features[0]
    parts = [torch.nn.functional.normalize(part, dim=-1) * weight**0.5 for part, weight in zip(features, weights)]
    return torch.cat(parts, dim=-1)


def plan(split: str, number: int, rows: datasets.Dataset, encoding: Encoding) -> Shard:
    """Batches of the distinct images, and of the distinct captions by length: padding costs as much as words."""
    table = rows.with_format("arrow")[:]
    check_rows(table.drop_columns("image"), split, None, number * encoding.shard_rows)
    try:
        table = embed_table_storage(table)  # its chunks stay: one of them holds 2 GB of images at most
    except OSError as error:
        raise ValueError(f"An image file of the {split} split cannot be read: {error}") from error
    places: dict[bytes, int] = {}
    distinct_images, image_of_row = [], []
    contents = (content for chunk in table["image"].chunks for content in chunk.field("bytes"))
    for row, content in enumerate(contents):
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
    start = 0
    while start < len(distinct):  # about `size` times 256 characters, with their padding
        stop = min(len(distinct), start + max(1, size * 256 // max(len(distinct[start]), 16)))
        batches.append(("text", range(start, stop)))
        start = stop
    text_of_caption = [place[text] for texts in captions for text in texts]
    return Shard(split, number, table, distinct_images, image_of_row, distinct, text_of_caption, batches)


def write_shard(shard: Shard, description: str, int8: bool, folder: Path) -> None:
    """The shard's rows with the teacher's columns as one parquet file, written beside and renamed.

    With int8, splits other than train also leave their exact float16 features as `.npz`, to tell what int8 costs.

    Raises:
        ValueError: features that are NaN, infinite or zero as they are stored, naming their rows.
    """
    image = torch.cat(shard.features["image"]).cpu()[shard.image_of_row]  # [N, D]
    text = torch.cat(shard.features["text"]).cpu()[shard.text_of_caption]  # [C, D]
    counts = pa.compute.list_value_length(shard.table["captions"]).to_numpy()
    ids = shard.table["image_id"].to_pylist()
    try:
        columns = feature_columns(image, text, counts, ids, int8)
    except ValueError as error:
        raise ValueError(f"{shard.split} split: {error} Try another --dtype, or another teacher.") from None
    columns["teacher"] = pa.array([description] * len(ids)), datasets.Value("string")
    table = shard.table
    if shard.stored_images:
        paths = pa.chunked_array([chunk.field("path") for chunk in table["image"].chunks]).combine_chunks()
        images = pa.array([shard.stored_images[place] for place in shard.image_of_row], pa.binary())
        images = pa.StructArray.from_arrays([images, paths], ["bytes", "path"])
        table = table.set_column(table.column_names.index("image"), "image", images)
    schema = datasets.Features.from_arrow_schema(shard.table.schema)
    schema["image"] = datasets.Image()  # decoded again for a reader
    for name, (array, feature) in columns.items():
        table = table.append_column(name, array)
        schema[name] = feature
    path = shard_file(folder, shard.split, shard.number)
    if int8 and shard.split != "train":
        exact = path.with_suffix(".npz")
        with write_whole(exact) as beside, beside.open("wb") as file:  # a path would get another ending from numpy
            np.savez(file, image=image.half().numpy(), text=text.half().numpy())
    table = table.cast(schema.arrow_schema).replace_schema_metadata(schema.arrow_schema.metadata)
    with write_whole(path) as beside:
        pq.write_table(table, beside, row_group_size=ROWS_IN_GROUP)


def shard_file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.parquet"


class Preparation(torch.utils.data.Dataset):
    """What a loader's worker does with a batch of images or captions before the model."""

    def __init__(self, teachers: list[Teacher], image_size: int | None):
        self.teachers = teachers
        self.image_size = image_size

    def __getitems__(self, batch: tuple[str, list]) -> tuple[str, object, list[bytes]]:
        """Kind, the teachers' inputs, and images as they are to be stored where they are not stored as they came."""
        kind, contents = batch
        if kind == "text":
            return kind, [teacher.prepare_texts(contents) for teacher in self.teachers], []
        images = []
        for i, content in enumerate(contents):
            try:
                images.append(load_rgb({"bytes": content or b"", "path": None}))
            except ValueError as error:
                return "error", (i, str(error)), []
        stored = []
        if self.image_size is not None:
            stored = [shrunk(content, image, self.image_size) for content, image in zip(contents, images)]
        return kind, [teacher.prepare_images(images) for teacher in self.teachers], stored


def shrunk(content: bytes, image: Image.Image, size: int) -> bytes:
    """An image's file with no side longer than `size`: squashed, as processors do, and never enlarged.

    Args:
        content: the file; given back where nothing is to be done.
        image: what is in it, in RGB.
    """
    if max(image.size) <= size:
        return content
    buffer = io.BytesIO()
    small = image.resize((min(image.width, size), min(image.height, size)), Image.Resampling.BICUBIC)
    if content[:2] == b"\xff\xd8":
        small.save(buffer, "JPEG", quality=95)
    else:
        small.save(buffer, "PNG")
    return buffer.getvalue()


def _as_it_is(batch):
    return batch


def _unreadable_row(shard: Shard, place_in_batch: int, message: str) -> str:
    place = shard.batches[len(shard.features["image"])][1][place_in_batch]
    image_id = shard.table["image_id"][shard.distinct_images[place]].as_py()
    return f"{shard.split} split, image_id {image_id!r}: {message}. Drop the row."


def _undecoded(part: datasets.Dataset | datasets.IterableDataset, split: str):
    """The split with its images as bytes or paths, and without features of another teacher."""
    names = part.column_names
    missing = [name for name in ("image", "captions", "image_id") if name not in names]
    if missing:
        raise ValueError(
            f"The {split} split has no column {', '.join(missing)} (it has {', '.join(names)}): "
            "`python -m datasets_scripts.own_data` brings data into these columns."
        )
    for name in {"image_id", "group_id"} & set(names):
        if getattr(part.features[name], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"{name} of the {split} split is {part.features[name]}: cast the column to string.")
    dropped = {*teacher_columns(names), "teacher"}
    # Not `remove_columns`: of a stream, it decodes the images and encodes them again.
    part = part.select_columns([name for name in names if name not in dropped])
    return part.cast_column("image", datasets.Image(decode=False))


def _chunks(
    part: datasets.Dataset | datasets.IterableDataset, size: int
) -> Iterator[tuple[int, Callable[[], datasets.Dataset]]]:
    """Number of each chunk of `size` rows, and what gives its rows. Every process reads the whole of a stream."""
    if isinstance(part, datasets.Dataset):
        for number in range(math.ceil(len(part) / size)):
            span = range(number * size, min(len(part), (number + 1) * size))
            yield number, lambda span=span: part.select(span)
        return
    info = datasets.DatasetInfo(features=part.features)
    for number, table in enumerate(part.with_format("arrow").iter(size)):
        check_image_paths(table["image"], None)
        yield number, lambda table=table: datasets.Dataset(table, info=info)


def _is_own(turn: int) -> bool:
    state = PartialState()
    return turn % state.num_processes == state.process_index


def _progress_bar(parts: dict, folder: Path, size: int) -> tqdm:
    """Rows of this process that are left to do, with rows/s and the time left where the number of rows is known."""
    left: int | None = 0
    turn = 0
    for split, part in parts.items():
        if not isinstance(part, datasets.Dataset):
            left = None
            break
        for number, start in enumerate(range(0, len(part), size)):
            if _is_own(turn) and not shard_file(folder, split, number).is_file():
                left += min(size, len(part) - start)
            turn += 1
    state = PartialState()
    label = f"features, process 1 of {state.num_processes}" if state.num_processes > 1 else "features"
    return tqdm(total=left, desc=label, unit=" rows", disable=None if state.is_main_process else True)
