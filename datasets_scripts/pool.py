"""A pool: another dataset's images and texts, which join the training rows. They need no partners."""

from __future__ import annotations

import functools
import hashlib

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState

from datasets_scripts.opening import open_dataset
from datasets_scripts.teacher_identity import without_names
from rows.columns import partners, text_id
from rows.files import counted
from rows.images import load_rgb
from rows.teacher_columns import TEACHER_COLUMNS, TEACHER_SCALES, teacher_description, teacher_tensors, teacher_width
from trainers.run import distributed


OF_ROWS = ("image", "captions", "image_id", "group_id", *TEACHER_COLUMNS, *TEACHER_SCALES, "teacher")
ALIKE = 0.999  # cosine of the teacher's features from which on two images are compared pixel by pixel
ROWS_AT_ONCE = 5000


def with_pool(rows: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    """The splits, of which `train` has the rows of all splits of another dataset too.

    An image of the pool that is in validation or test, and a text that is a caption there, are left out and counted.
    An image whose file is in train too has the group of that row. Where the features are not made yet, see
    [`without_alike`] too. To be called on every process.

    Args:
        rows: the run's splits; where its training rows have a teacher's features, the pool must have this teacher's.
        name: the pool's: a folder or Hub id.

    Raises:
        ValueError: the pool has features of another teacher, or none, or nothing is left of it.
    """
    train = rows["train"]
    state = PartialState()
    with state.main_process_first():  # what one process has prepared, the others find
        opened = open_dataset(name, None, False)
    pool = datasets.concatenate_datasets([_of_the_contract(part, name) for part in opened.values()])
    has_features = set(TEACHER_COLUMNS) <= set(train.column_names)
    if has_features:
        _check_teacher(train, pool, name)
    held_out = [part for split, part in rows.items() if split != "train"]
    pool, images, texts = without_held_out(pool, held_out)
    if not len(pool):
        raise ValueError(f"--pool {name}: all of its rows are in validation or test too, so none is left of it.")
    ids = {column: [f"pool/{own}" for own in pool["image_id" if column not in pool.column_names else column][:]]
           for column in ("image_id", "group_id")}  # fmt: skip
    pool = pool.remove_columns([column for column in ids if column in pool.column_names])
    if "group_id" not in train.column_names:
        train = train.add_column("group_id", train["image_id"][:], feature=datasets.Value("string"))
    again = distributed.decided_by_first_rank(lambda: _groups_of_train(pool, train))
    ids["group_id"] = [again.get(row, own) for row, own in enumerate(ids["group_id"])]
    for column, values in ids.items():
        pool = pool.add_column(column, values, feature=datasets.Value("string"))
    names = [column for column in OF_ROWS if column in train.column_names]
    train = train.select_columns(names)
    stored = [
        column
        for column in names
        if column.startswith("teacher_") and train.features[column] != pool.features.get(column)
    ]
    if stored:
        raise ValueError(
            f"--pool {name}: {stored[0]} is {pool.features.get(stored[0])}, and that of the training rows "
            f"{train.features[stored[0]]}: make both with the same settings of add_teacher_features."
        )
    with state.main_process_first():
        joined = datasets.concatenate_datasets([train, pool.select_columns(names).cast(train.features)])
    joined.info.license = rows["train"].info.license
    if state.is_main_process:
        has_image, counts = partners(pool)
        print(
            f"the pool {name} adds {int(has_image.sum()):,} images and {int(counts.sum()):,} texts; {images:,} images "
            f"and {texts:,} texts of it are in validation or test too and left out"
        )
        if again:
            print(f"{counted(len(again), 'image', 'images')} of it are in train too, and of the same group there")
    return datasets.DatasetDict({**rows, "train": joined})


def without_alike(rows: datasets.DatasetDict, added: set[str], name: str) -> datasets.DatasetDict:
    """The splits; of a pool's rows in `train` those with a picture of validation or test are left out and counted.

    For features that a run makes of the pool too: without them [`with_pool`] knows an image by its file alone. To be
    called on every process.

    Args:
        rows: the run's splits, with the teacher's features.
        added: the image_ids of the pool's rows in `train`.
        name: the pool's, for the message.
    """
    train, held_out = rows["train"], [part for split, part in rows.items() if split != "train"]
    of_pool = [row for row, image_id in enumerate(train["image_id"]) if image_id in added]
    alike = distributed.decided_by_first_rank(lambda: _alike(train.select(of_pool), held_out))
    if not alike:
        return rows
    out = {of_pool[row] for row in alike}
    if PartialState().is_main_process:
        print(
            f"{len(out):,} more images of the pool {name} are in validation or test too, as other files, and left out"
        )
    return datasets.DatasetDict({**rows, "train": train.select([row for row in range(len(train)) if row not in out])})


def say_lonely(part: datasets.Dataset | datasets.IterableDataset) -> None:
    """Prints how many training rows have no partner, if any has none; of a stream nobody knows."""
    if not isinstance(part, datasets.Dataset) or not PartialState().is_main_process:
        return
    has_image, counts = partners(part)
    images, texts = int((has_image & (counts == 0)).sum()), int(counts[~has_image].sum())
    if images or texts:
        print(
            f"{images:,} training images have no caption and {texts:,} texts no image: they are learned from the "
            "teacher alone"
        )


def _of_the_contract(part: datasets.Dataset, name: str) -> datasets.Dataset:
    missing = [column for column in ("image", "captions", "image_id") if column not in part.column_names]
    if missing:
        raise ValueError(
            f"--pool {name} has no column {', '.join(missing)} (it has {', '.join(part.column_names)}): "
            "`python -m datasets_scripts.own_data` brings data into these columns."
        )
    return part.select_columns([column for column in part.column_names if column in OF_ROWS])


def _check_teacher(train: datasets.Dataset, pool: datasets.Dataset, name: str) -> None:
    of_train = teacher_description({"train": train}) or {}
    make = f"python -m datasets_scripts.add_teacher_features --dataset_name {name} --teacher_model_name_or_path "
    make += str(of_train.get("id", "TEACHER"))
    if not set(TEACHER_COLUMNS) <= set(pool.column_names):
        raise ValueError(
            f"--pool {name} has no teacher features, and the training rows have those of "
            f"{of_train.get('id', 'an unnamed teacher')}: make them by `{make} --output_dir DIR`, and name DIR."
        )
    of_pool = teacher_description({"train": pool}) or {}
    facts = [(of.get("id"), without_names(of)) for of in (of_train, of_pool)]
    if facts[0] != facts[1] or teacher_width({"train": train}) != teacher_width({"train": pool}):
        raise ValueError(
            f"--pool {name} has features of {of_pool.get('id', 'an unnamed teacher')}, and the training rows those of "
            f"{of_train.get('id', 'an unnamed teacher')}: make the pool's anew by `{make} --output_dir DIR`."
        )


def without_held_out(pool: datasets.Dataset, held_out: list[datasets.Dataset]) -> tuple[datasets.Dataset, int, int]:
    """The rows of a pool without those whose image or text is held out.

    Images are equal where their files are, or where the teacher's features are nearly equal and all their pixels are.
    A row with an image goes as a whole; a text counts only without one, since a caption may stand for many images.
    To be called on every process: the first reads all images, and tells the others.

    Returns:
        The rows that are left, and how many images and texts are not.
    """
    out, images, texts = distributed.decided_by_first_rank(lambda: _held_out(pool, held_out))
    return pool.select(np.setdiff1d(np.arange(len(pool)), out)), images, texts


def _held_out(pool: datasets.Dataset, held_out: list[datasets.Dataset]) -> tuple[list[int], int, int]:
    """The rows of a pool that are held out, and how many images and texts these are."""
    files, texts = set(), set()
    for part in held_out:
        files |= {digest for digest in _file_digests(part) if digest is not None}
        texts |= {text_id(text) for own in part["captions"] for text in own}
    has_image, _ = partners(pool)
    is_out = np.array([digest in files for digest in _file_digests(pool)], bool)
    is_out[_alike(pool, held_out)] = True
    images = int(is_out.sum())
    captions, dropped = pool["captions"][:], 0
    for row in np.flatnonzero(~has_image):
        equal = sum(text_id(text) in texts for text in captions[row])
        dropped += equal
        is_out[row] |= equal > 0
    return np.flatnonzero(is_out).tolist(), images, dropped


def _groups_of_train(pool: datasets.Dataset, train: datasets.Dataset) -> dict[int, str]:
    """Rows of the pool whose image's file is that of a training row, which is then no negative of it: row -> group."""
    known = dict(zip(_file_digests(train), train["group_id"][:]))
    known.pop(None, None)
    return {row: known[digest] for row, digest in enumerate(_file_digests(pool)) if digest in known}


def _file_digests(part: datasets.Dataset) -> list[bytes | None]:
    """A hash of each row's image file; None for a row without one."""
    rows = part.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)).with_format("arrow")
    digests = []
    for table in rows.iter(1000):
        for cell in table["image"]:
            content = cell["bytes"].as_buffer() if cell.is_valid and cell["bytes"].is_valid else None
            digests.append(None if content is None else hashlib.blake2b(content, digest_size=16).digest())
    return digests


def _alike(pool: datasets.Dataset, held_out: list[datasets.Dataset]) -> list[int]:
    """Rows of the pool with the picture of a row that is held out, found by the teacher's features."""
    parts = [part for part in held_out if "teacher_image_embeds" in part.column_names]
    if "teacher_image_embeds" not in pool.column_names:
        return []
    known = [_image_features(part) for part in parts]
    pixels_of = functools.cache(lambda part, row: _pixels(pool if part is None else parts[part], row))
    found = set()
    for start in range(0, len(pool), ROWS_AT_ONCE):
        some, places = _image_features(pool.select(range(start, min(start + ROWS_AT_ONCE, len(pool)))))
        for part, (features, rows) in enumerate(known):
            if some.shape[1] != features.shape[1]:
                continue
            for i, j in (some @ features.T > ALIKE).nonzero().tolist():
                row = start + places[i]
                if row not in found and pixels_of(None, row) == pixels_of(part, rows[j]) is not None:
                    found.add(row)
    return sorted(found)


def _image_features(part: datasets.Dataset) -> tuple[torch.Tensor, list[int]]:
    """Normalised features of the images `[N, D]`, and the row of each."""
    names = [name for name in (*TEACHER_COLUMNS, *TEACHER_SCALES) if name in part.column_names]
    table: pa.Table = part.select_columns(names).with_format("arrow")[:]
    image, _ = teacher_tensors(table)
    return torch.nn.functional.normalize(image, dim=1), np.flatnonzero(partners(part)[0]).tolist()


def _pixels(part: datasets.Dataset, row: int) -> bytes | None:
    """A hash of the size and the RGB pixels of a row's image; None where it cannot be read."""
    cell = part.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))[row]["image"]
    try:
        image = load_rgb(cell)
    except ValueError:
        return None
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()
