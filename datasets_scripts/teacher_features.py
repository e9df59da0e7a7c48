"""A teacher's output features for every row of a dataset, shard by shard."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets.table import embed_table_storage
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from teachers import Teacher
from trainers.images import load_rgb
from trainers.retrieval_data import TEACHER_COLUMNS, TEACHER_SCALES


ROWS_IN_GROUP = 256  # of a parquet file: what a reader in random order has to decompress for one row


@dataclass
class Encoding:
    """How features are made and stored; with other values they are other features.

    Args:
        weights: of the teachers, summing to 1; a dot product of two features is this mean of the teachers' cosines.
        int8: store int8 with one scale a row instead of float16.
        batch_size: images in a batch; of captions as many as make about the same work.
        shard_rows: rows in a file.
    """

    weights: list[float] = field(default_factory=lambda: [1.0])
    int8: bool = False
    batch_size: int = 64
    shard_rows: int = 4096


@dataclass
class Shard:
    """Rows of one file: what of them must be encoded, and what has been so far."""

    split: str
    number: int
    table: pa.Table  # images as bytes
    image_rows: list[int]  # [N] each row's place among the distinct images
    caption_rows: list[int]  # [C] each caption's place among the distinct captions, longest first
    batches: list[tuple[str, list]]  # ("image", bytes) or ("text", captions), in order
    features: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"image": [], "text": []})

    @property
    def is_encoded(self) -> bool:
        return len(self.features["image"]) + len(self.features["text"]) == len(self.batches)


def encode_dataset(
    rows: datasets.DatasetDict | datasets.IterableDatasetDict,
    teachers: list[Teacher],
    description: str,
    encoding: Encoding,
    folder: Path,
    num_workers: int,
) -> dict[str, int]:
    """Writes `folder/data/{split}-{number}.parquet` for every `shard_rows` rows that have no such file yet.

    Every process takes its share of the files. What is in a file does not depend on the number of processes or on what
    stood there before: a file is made of its own rows alone, and is whole or absent.

    Args:
        rows: the splits; columns `image`, `captions`, `image_id` and any others, which are kept.
        teachers: their features are joined, see [`join`].
        description: JSON, the constant column `teacher`.
        folder: exists.
        num_workers: processes that decode images and tokenise captions.

    Returns:
        The number of files of each split.

    Raises:
        ValueError: a column is missing, a row has no captions, an image cannot be read, a feature is NaN or zero.
    """
    (folder / "data").mkdir(exist_ok=True)
    files = dict.fromkeys(rows, 0)
    pending: deque[Shard] = deque()
    bar = _progress_bar(rows, folder, encoding.shard_rows)

    def work() -> Iterator[tuple[str, list]]:
        """Read ahead of the model by what the loader's workers hold, and no more."""
        for split, part in rows.items():
            for number, chunk in _chunks(_undecoded(part, split), encoding.shard_rows):
                files[split] = number + 1
                if _is_own(number) and not shard_file(folder, split, number).is_file():
                    pending.append(plan(split, number, chunk(), encoding.batch_size))
                    yield from pending[-1].batches

    loader = DataLoader(
        Preparation(teachers),
        batch_sampler=work(),
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for kind, prepared in loader:
        shard = pending[0]
        if kind == "error":
            raise ValueError(f"{shard.split} split: {_row_of_image(shard, len(shard.features['image']), prepared)}")
        make = "image_features" if kind == "image" else "text_features"
        parts = [getattr(teacher, make)(inputs) for teacher, inputs in zip(teachers, prepared)]
        shard.features[kind].append(join(parts, encoding.weights))
        if shard.is_encoded:
            write_shard(shard, description, encoding.int8, folder)
            bar.update(len(shard.table))
            pending.popleft()
    bar.close()
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


def plan(split: str, number: int, rows: datasets.Dataset, batch_size: int) -> Shard:
    """Batches of the distinct images, and of the distinct captions by length: padding costs as much as words."""
    table = embed_table_storage(rows.with_format("arrow")[:])
    images: dict[bytes, bytes] = {}
    image_rows = []
    places: dict[bytes, int] = {}
    for image in table["image"].to_pylist():
        content = (image or {}).get("bytes") or b""
        key = hashlib.blake2b(content, digest_size=16).digest()
        image_rows.append(places.setdefault(key, len(places)))
        images[key] = content
    captions = table["captions"].to_pylist()
    for image_id, texts in zip(table["image_id"].to_pylist(), captions):
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{split} split, image_id {image_id!r} has captions {texts!r}: expected strings, one or more."
            )
    distinct = sorted({text for texts in captions for text in texts}, key=lambda text: (-len(text), text))
    place = {text: i for i, text in enumerate(distinct)}
    contents = list(images.values())
    batches = [("image", contents[i : i + batch_size]) for i in range(0, len(contents), batch_size)]
    batches += [("text", batch) for batch in _batches_by_length(distinct, batch_size)]
    return Shard(split, number, table, image_rows, [place[text] for texts in captions for text in texts], batches)


def write_shard(shard: Shard, description: str, int8: bool, folder: Path) -> None:
    """The shard's rows with the teacher's columns as one parquet file, written beside and renamed.

    With int8, splits other than train also leave their exact float16 features in `folder/exact`, to tell what int8
    costs.

    Raises:
        ValueError: features that are NaN, infinite or zero as they would be stored, naming their rows.
    """
    image = torch.cat(shard.features["image"]).cpu()[shard.image_rows]  # [N, D]
    text = torch.cat(shard.features["text"]).cpu()[shard.caption_rows]  # [C, D]
    counts = pa.compute.list_value_length(shard.table["captions"]).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    for kind, features, row_of in (("image", image, np.arange(len(image))), ("text", text, None)):
        row_of = np.repeat(np.arange(len(image)), counts) if row_of is None else row_of
        stored = features.half().float()
        bad = np.flatnonzero(~(torch.isfinite(stored).all(1) & (stored != 0).any(1)).numpy())
        if len(bad):
            ids = shard.table["image_id"].to_pylist()
            names = list(dict.fromkeys(repr(ids[row_of[i]]) for i in bad))
            raise ValueError(
                f"{len(bad)} {kind} features of the {shard.split} split are NaN, infinite or zero in float16, of "
                f"image_id {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}: try another --dtype, "
                "or the teacher cannot be used on these rows."
            )
    columns: dict[str, tuple[pa.Array, object]] = {}
    for name, scale_name, features, is_text in zip(TEACHER_COLUMNS, TEACHER_SCALES, (image, text), (False, True)):
        kind = "int8" if int8 else "float16"
        values, scale = quantize(features) if int8 else (features.half(), None)
        vector = datasets.List(datasets.Value(kind), length=features.shape[1])
        array = pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), features.shape[1])
        if is_text:
            array = pa.ListArray.from_arrays(offsets, array)
        columns[name] = array, datasets.List(vector) if is_text else vector
        if scale is not None:
            array, one = pa.array(scale.numpy()), datasets.Value("float16")
            columns[scale_name] = (
                (pa.ListArray.from_arrays(offsets, array), datasets.List(one)) if is_text else (array, one)
            )
    columns["teacher"] = pa.array([description] * len(image)), datasets.Value("string")
    table, schema = shard.table, datasets.Features.from_arrow_schema(shard.table.schema)
    schema["image"] = datasets.Image()  # decoded again for a reader
    for name, (array, feature) in columns.items():
        table = table.append_column(name, array)
        schema[name] = feature
    if int8 and shard.split != "train":
        (folder / "exact").mkdir(exist_ok=True)
        exact = folder / "exact" / f"{shard.split}-{shard.number:05d}.npz"
        np.savez(f"{exact}.part.npz", image=image.half().numpy(), text=text.half().numpy())
        os.replace(f"{exact}.part.npz", exact)
    path = shard_file(folder, shard.split, shard.number)
    table = table.cast(schema.arrow_schema).replace_schema_metadata(schema.arrow_schema.metadata)
    pq.write_table(table, f"{path}.part", row_group_size=ROWS_IN_GROUP)
    os.replace(f"{path}.part", path)


def shard_file(folder: Path, split: str, number: int) -> Path:
    return folder / "data" / f"{split}-{number:05d}.parquet"


def quantize(embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows `[N, D]` and their float16 scales `[N]`: embeds are about int8 times scale."""
    scale = (embeds.abs().amax(dim=1) / 127).clamp(min=1e-6).half()
    return (embeds / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Preparation(torch.utils.data.Dataset):
    """What a loader's worker does with a batch of images or captions before the model."""

    def __init__(self, teachers: list[Teacher]):
        self.teachers = teachers

    def __getitems__(self, batch: tuple[str, list]) -> tuple[str, object]:
        kind, contents = batch
        if kind == "text":
            return kind, [teacher.prepare_texts(contents) for teacher in self.teachers]
        images = []
        for i, content in enumerate(contents):
            try:
                images.append(load_rgb({"bytes": content, "path": None}))
            except ValueError as error:
                return "error", (i, str(error))
        return kind, [teacher.prepare_images(images) for teacher in self.teachers]


def _as_it_is(batch):
    return batch


def _row_of_image(shard: Shard, batches_before: int, error: tuple[int, str]) -> str:
    place, message = error
    place += sum(len(contents) for _, contents in shard.batches[:batches_before])
    image_id = shard.table["image_id"][shard.image_rows.index(place)].as_py()
    return f"image_id {image_id!r}: {message}. Drop the row."


def _batches_by_length(captions: list[str], batch_size: int) -> Iterator[list[str]]:
    """Captions, longest first, in batches of about `batch_size` times 256 characters with their padding."""
    start = 0
    while start < len(captions):
        count = max(1, batch_size * 256 // max(len(captions[start]), 16))
        yield captions[start : start + count]
        start += count


def _undecoded(part: datasets.Dataset | datasets.IterableDataset, split: str):
    """The split with its images as bytes or paths, and without features of another teacher."""
    names = part.column_names
    missing = [name for name in ("image", "captions", "image_id") if name not in names]
    if missing:
        raise ValueError(
            f"The {split} split has no column {', '.join(missing)} (it has {', '.join(names)}): "
            "`python -m datasets_scripts.own_data` brings data into these columns."
        )
    part = part.remove_columns([name for name in (*TEACHER_COLUMNS, *TEACHER_SCALES, "teacher") if name in names])
    return part.cast_column("image", datasets.Image(decode=False))


def _chunks(part: datasets.Dataset | datasets.IterableDataset, size: int):
    """Number of each chunk of `size` rows, and what gives its rows. A stream is read through, whoever takes which."""
    if isinstance(part, datasets.Dataset):
        for number in range(math.ceil(len(part) / size)):
            span = range(number * size, min(len(part), (number + 1) * size))
            yield number, lambda span=span: part.select(span)
        return
    stream = iter(part)
    for number in itertools.count():
        examples = list(itertools.islice(stream, size))
        if not examples:
            return
        yield number, lambda examples=examples: datasets.Dataset.from_list(examples, features=part.features)


def _is_own(number: int) -> bool:
    state = PartialState()
    return number % state.num_processes == state.process_index


def _progress_bar(rows, folder: Path, size: int) -> tqdm:
    """Rows of this process that are left to do, with rows/s and the time left where the number of rows is known."""
    left: int | None = 0
    for split, part in rows.items():
        if not isinstance(part, datasets.Dataset):
            left = None
            break
        for number, start in enumerate(range(0, len(part), size)):
            if _is_own(number) and not shard_file(folder, split, number).is_file():
                left += min(size, len(part) - start)
    state = PartialState()
    label = f"features, process 1 of {state.num_processes}" if state.num_processes > 1 else "features"
    return tqdm(total=left, desc=label, unit=" rows", disable=None if state.is_main_process else True)
