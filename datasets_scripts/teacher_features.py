"""A teacher's output features for every row of a dataset, file by file."""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from datasets_scripts.feature_shards import Encoding, Shard, plan, shard_file, write_shard
from rows.images import check_image_paths, load_rgb
from rows.teacher_columns import teacher_columns
from teachers import Teacher
from trainers.run.loader_workers import shielded


def encode_dataset(
    rows: datasets.DatasetDict | datasets.IterableDatasetDict,
    teachers: list[Teacher],
    description: str,
    encoding: Encoding,
    folder: Path,
    num_workers: int,
    skip_broken: bool = False,
    columns_only: bool = False,
) -> dict[str, int]:
    """Writes `folder/{split}-{number}.parquet` for every `shard_rows` rows that have no such file yet.

    Every process takes its share of the files. What is in a file does not depend on the number of processes or on what
    stood there before: a file is made of its own rows alone, and is whole or absent. It does depend, by rounding, on
    the number of threads: on a CPU torch adds in another order, and single features differ in float16's last digits.
    An image or caption that occurs several times in a file is encoded once.

    Args:
        rows: the splits; columns `image`, `captions`, `image_id` and any others, which are kept.
        teachers: their features are joined, see [`join`].
        description: JSON, the constant column `teacher`.
        folder: exists.
        num_workers: processes that decode images and tokenise captions.
        skip_broken: leave out rows whose captions, ids or image cannot be used, and note them, see [`all_left_out`].
        columns_only: write no images.

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
                    shard = plan(split, number, chunk(), encoding, skip_broken, columns_only)
                    if shard.batches:
                        pending.append(shard)
                        yield from (shard.contents(*batch) for batch in shard.batches)
                    else:
                        write_shard(shard, description, encoding.int8, folder)
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
        for kind, prepared, stored_images, unreadable in shielded(loader):
            shard = pending[0]
            shard.note_unreadable(unreadable, skip_broken)
            if prepared is not None:
                make = "image_features" if kind == "image" else "text_features"
                parts_of_row = [getattr(teacher, make)(inputs) for teacher, inputs in zip(teachers, prepared)]
                shard.features[kind].append(join(parts_of_row, encoding.weights))
            if kind == "image":
                shard.stored_images += stored_images
                bar.update(len(shard.batches[shard.done][1]))
            shard.done += 1
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


class Preparation(torch.utils.data.Dataset):
    """What a loader's worker does with a batch of images or captions before the model."""

    def __init__(self, teachers: list[Teacher], image_size: int | None):
        self.teachers = teachers
        self.image_size = image_size

    def __getitems__(self, batch: tuple[str, list]) -> tuple[str, list | None, list[bytes], dict[int, str]]:
        """Prepares a batch.

        Returns:
            Its kind; the teachers' inputs of what can be read, None where nothing can; images as they are to be stored
            where they are not stored as they came; the reason of each image that cannot be read, by its place.
        """
        kind, contents = batch
        if kind == "text":
            return kind, [teacher.prepare_texts(contents) for teacher in self.teachers], [], {}
        images, readable, unreadable = [], [], {}
        for i, content in enumerate(contents):
            try:
                images.append(load_rgb({"bytes": content or b"", "path": None}))
                readable.append(content)
            except ValueError as error:
                unreadable[i] = str(error)
        stored = []
        if self.image_size is not None:
            stored = [shrunk(content, image, self.image_size) for content, image in zip(readable, images)]
        prepared = [teacher.prepare_images(images) for teacher in self.teachers] if images else None
        return kind, prepared, stored, unreadable


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
