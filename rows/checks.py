"""The check that a dataset follows the row contract, made before training starts."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from .columns import id_hash, partners
from .images import load_rgb
from .teacher_columns import TEACHER_COLUMNS, TEACHER_SCALES, teacher_features


IMAGES_DECODED = 1000
ROWS_AT_ONCE = 5000


def check_dataset(dataset: datasets.Dataset, split: str, teacher_dim: int | None) -> None:
    """Raises an error where rows break the contract.

    Columns, captions, ids and teacher features (their widths, numbers, and that they are finite) are checked in all
    rows. Images are decoded only in a seeded sample of 1,000 rows; training skips, counts and lists the unreadable
    ones that it meets later.

    Args:
        dataset: map-style rows.
        split: name of the split, for the error message.
        teacher_dim: width D that teacher features must have; None if the rows need no teacher features.

    Raises:
        ValueError: at the first fault, naming the row, what was expected and what to do.
    """
    check_columns(dataset, split, teacher_dim)
    check_repeats(dataset, split, teacher_dim, check_share(dataset, split, teacher_dim))
    check_images(dataset, split)


def check_columns(dataset: datasets.Dataset, split: str, teacher_dim: int | None) -> None:
    """The part of [`check_dataset`] that reads no row."""
    needed = _needed(teacher_dim)
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The {split} split has no column {', '.join(missing)} (it has {', '.join(dataset.column_names)}). "
            "Rename the columns you have (`dataset.rename_column`)"
            + ("; teacher features must be added before distilling." if set(missing) & set(TEACHER_COLUMNS) else ".")
        )
    if len(dataset) == 0:
        raise ValueError(f"The {split} split is empty.")


def check_share(
    dataset: datasets.Dataset, split: str, teacher_dim: int | None, rank: int = 0, ranks: int = 1
) -> np.ndarray:
    """The part of [`check_dataset`] that looks at each row for itself, on the `rank`-th of `ranks` shares.

    Shares are runs of whole tables of `ROWS_AT_ONCE` rows, in order, so that the first share with a fault has the
    fault that is found first where all rows are one share.

    Returns:
        The hashes of the share's image_ids, int64 `[n]`: 8 bytes a row; a dict of strings takes over 100.
    """
    rows = _checked_columns(dataset, teacher_dim).remove_columns("image")
    has_image, _ = partners(dataset)
    starts = range(0, len(dataset), ROWS_AT_ONCE)
    starts = starts[len(starts) * rank // ranks : len(starts) * (rank + 1) // ranks]
    hashes = [np.empty(0, np.int64)]
    for start in tqdm(starts, desc=f"check {split}", leave=False, disable=None):
        table = rows[start : start + ROWS_AT_ONCE]
        check_rows(table, split, teacher_dim, start, has_image[start : start + ROWS_AT_ONCE])
        ids = table["image_id"].to_pylist()
        hashes.append(np.fromiter(map(id_hash, ids), np.int64, len(ids)))
    return np.concatenate(hashes)


def check_repeats(dataset: datasets.Dataset, split: str, teacher_dim: int | None, hashes: np.ndarray) -> None:
    """The part of [`check_dataset`] that compares rows of one image_id.

    Args:
        hashes: `[N]`, of the image_ids of all rows, see [`check_share`].
    """
    rows = _checked_columns(dataset, teacher_dim)
    first_row: dict[int, int] = {}
    for i in _rows_alike(hashes):
        first = first_row.setdefault(hashes[i], i)
        if first != i and rows[first].to_pylist() != rows[i].to_pylist():
            raise ValueError(
                f"Row {i} of the {split} split (image_id {rows[i]['image_id'][0].as_py()!r}): row {first} has this "
                "image_id and other content. Give each row an image_id of its own."
            )


def check_images(dataset: datasets.Dataset, split: str, rank: int = 0, ranks: int = 1) -> None:
    """The part of [`check_dataset`] that decodes images, on the `rank`-th of `ranks` shares of its sample."""
    rows = _checked_columns(dataset, None).select_columns(["image", "image_id"])
    has_image, _ = partners(dataset)
    with_image = range(len(dataset)) if has_image.all() else np.flatnonzero(has_image).tolist()
    sample = sorted(random.Random(0).sample(with_image, min(IMAGES_DECODED, len(with_image))))
    share = sample[len(sample) * rank // ranks : len(sample) * (rank + 1) // ranks]
    for i in tqdm(share, desc=f"decode {split}", leave=False, disable=None):
        row = rows[i]
        try:
            load_rgb(row["image"][0].as_py())
        except ValueError as error:
            raise ValueError(
                f"Row {i} of the {split} split (image_id {row['image_id'][0].as_py()!r}): {error}. Drop it."
            ) from error


def _needed(teacher_dim: int | None) -> tuple[str, ...]:
    return ("image", "captions", "image_id", *(TEACHER_COLUMNS if teacher_dim is not None else ()))


def _checked_columns(dataset: datasets.Dataset, teacher_dim: int | None) -> datasets.Dataset:
    """The columns that are checked, as arrow, images undecoded."""
    optional = ("group_id", *(TEACHER_SCALES if teacher_dim is not None else ()))
    names = [*_needed(teacher_dim), *(name for name in optional if name in dataset.column_names)]
    return dataset.select_columns(names).cast_column("image", datasets.Image(decode=False)).with_format("arrow")


def _rows_alike(hashes: np.ndarray) -> list[int]:
    """Indices, ascending, of the rows whose hash occurs more than once."""
    in_order = np.sort(hashes)
    repeated = in_order[1:][in_order[1:] == in_order[:-1]]
    return np.flatnonzero(np.isin(hashes, repeated)).tolist()


def check_rows(
    table: pa.Table,
    split: str,
    teacher_dim: int | None,
    start: int | None = None,
    has_image: np.ndarray | None = None,
) -> None:
    """Refuses rows whose captions, image_id or teacher features break the contract.

    Args:
        table: the rows without their column `image`, which is not checked here.
        split, teacher_dim: as in [`check_dataset`].
        start: index in the split of the table's first row, for the error message; None for rows of a stream, which
            have no index.
        has_image: `[N]` bool, which rows have an image; None: all.

    Raises:
        ValueError: at the first fault, naming the image_id.
    """
    ids = table["image_id"].to_pylist()

    def fail(row: int, message: str):
        where = "A row" if start is None else f"Row {start + row}"
        raise ValueError(f"{where} of the {split} split (image_id {ids[row]!r}): {message}")

    for row, message in row_faults(table, has_image).items():
        fail(row, message)
    if teacher_dim is not None:
        _check_teacher(table, teacher_dim, has_image, fail)


def row_faults(table: pa.Table, has_image: np.ndarray | None = None) -> dict[int, str]:
    """Rows whose captions, image_id or group_id break the contract: place in the table, in order, and what is wrong.

    Args:
        table: as for [`check_rows`].
        has_image: `[N]` bool, which rows have an image; None: all.
    """
    groups = table["group_id"].to_pylist() if "group_id" in table.column_names else None
    faults, has_lost_image = {}, np.zeros(len(table), bool)
    if has_image is not None and "teacher_image_embeds" in table.column_names:
        has_lost_image = table["teacher_image_embeds"].is_valid().to_numpy() & ~has_image
    for i, (image_id, texts) in enumerate(zip(table["image_id"].to_pylist(), table["captions"].to_pylist())):
        if not isinstance(image_id, str) or not image_id:
            faults[i] = "image_id must be a string that is not empty."
        elif not isinstance(texts, list):
            faults[i] = f"it has captions {reprlib.repr(texts)}: expected a list of strings. Drop the row."
        elif not texts and has_image is not None and not has_image[i]:
            faults[i] = "it has neither an image nor a caption: expected one of them. Drop the row."
        elif has_lost_image[i]:
            faults[i] = "it has teacher_image_embeds and no image: expected both, or null for both. Drop the row."
        elif any(_is_blank(text) for text in texts):
            faults[i] = f"it has an empty caption in {reprlib.repr(texts)}: drop or fill it."
        elif groups is not None and (not isinstance(groups[i], str) or not groups[i]):
            faults[i] = f"group_id is {groups[i]!r}: expected a string that is not empty, such as its image_id."
    return faults


def without_empty_captions(table: pa.Table) -> tuple[pa.Table, int]:
    """The rows without their empty captions, and how many these were; a row of empty ones alone keeps them."""
    captions = table["captions"].to_pylist()
    kept = [[text for text in texts or [] if not _is_blank(text)] or texts for texts in captions]
    dropped = sum(len(before) - len(after) for before, after in zip(captions, kept) if before)
    if dropped:
        place = table.column_names.index("captions")
        table = table.set_column(place, table.field(place), pa.array(kept, table.field(place).type))
    return table, dropped


def _is_blank(text: object) -> bool:
    return not isinstance(text, str) or not text.strip()


def _check_teacher(table: pa.Table, teacher_dim: int, has_image: np.ndarray | None, fail: Callable) -> None:
    captions = table["captions"].to_pylist()
    has_image = np.ones(len(captions), bool) if has_image is None else has_image
    image_widths = _list_lengths(table["teacher_image_embeds"])
    text_counts = _list_lengths(table["teacher_text_embeds"])
    text_widths = _list_lengths(table["teacher_text_embeds"].combine_chunks().flatten())
    expected_counts = np.array([len(row) for row in captions])

    for row in np.flatnonzero(has_image & (image_widths != teacher_dim))[:1]:
        fail(row, f"teacher_image_embeds has width {image_widths[row]}, expected {teacher_dim} (projection_dim).")
    for row in np.flatnonzero(text_counts != expected_counts)[:1]:
        fail(row, f"{text_counts[row]} teacher_text_embeds for {expected_counts[row]} captions, expected one each.")
    if "teacher_text_scale" in table.column_names:
        for row in np.flatnonzero(_list_lengths(table["teacher_text_scale"]) != expected_counts)[:1]:
            fail(row, f"teacher_text_scale must have one value for each of its {expected_counts[row]} captions.")
    row_of_caption = np.repeat(np.arange(len(captions)), expected_counts)
    for caption in np.flatnonzero(text_widths != teacher_dim)[:1]:
        fail(
            row_of_caption[caption],
            f"teacher_text_embeds has width {text_widths[caption]}, expected {teacher_dim} (projection_dim).",
        )
    for column, row_of in (
        ("teacher_image_embeds", np.flatnonzero(has_image)),
        ("teacher_text_embeds", row_of_caption),
    ):
        norms = np.linalg.norm(teacher_features(table, column).astype(np.float32), axis=1)
        for i in np.flatnonzero(~np.isfinite(norms) | (norms == 0))[:1]:
            fail(row_of[i], f"{column} is NaN, infinite or zero: compute the teacher's features again.")


def _list_lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()
