"""Reading the columns that do not come from the teacher: captions, and ids as int64."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch


Splits = datasets.DatasetDict | datasets.IterableDatasetDict


def id_hash(text: str) -> int:
    """int64 of the string's blake2b-64: the same in every process and on every machine, unlike `hash()`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def text_id(text: str) -> int:
    """A caption's id, 0 to 2**63 - 1: equal for equal texts, as they are written, on every machine."""
    return id_hash(text) & (2**63 - 1)


def text_ids(dataset: datasets.Dataset) -> torch.Tensor:
    """The [`text_id`] of each caption, row by row, `[M]` int64."""
    ids = [text_id(caption) for captions in dataset["captions"] for caption in captions]
    return torch.tensor(ids, dtype=torch.int64)


def partners(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have an image, `[R]` bool, and how many captions each has, `[R]`; no image is read."""
    has_image = dataset.data.column("image").is_valid().to_numpy()
    counts = caption_counts(dataset.data.column("captions"))
    if dataset._indices is not None:  # of a selection: to take the images themselves would copy them
        rows = dataset._indices.column(0).to_numpy()
        has_image, counts = has_image[rows], counts[rows]
    return has_image, counts


def pairs_alone(
    dataset: datasets.Dataset, image_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> tuple[datasets.Dataset, torch.Tensor, torch.Tensor]:
    """The rows of a split that have both an image and captions, and their embeddings.

    Args:
        image_embeds, text_embeds: of all images `[N, D]` and captions `[M, D]` that the split has, row by row.
    """
    has_image, counts = partners(dataset)
    is_pair = has_image & (counts > 0)
    if is_pair.all():
        return dataset, image_embeds, text_embeds
    of_images, of_captions = torch.from_numpy(is_pair[has_image]), torch.from_numpy(np.repeat(is_pair, counts))
    embeds = image_embeds[of_images.to(image_embeds.device)], text_embeds[of_captions.to(text_embeds.device)]
    return dataset.select(np.flatnonzero(is_pair)), *embeds


def caption_counts(captions: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """How many captions each row of a column of lists has, `[R]` int64; none where the list is null."""
    return pc.fill_null(pc.list_value_length(captions), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def pairs_of(dataset: datasets.Dataset) -> np.ndarray:
    """The rows that have both an image and a caption, ascending, `[P]` int64."""
    has_image, counts = partners(dataset)
    return np.flatnonzero(has_image & (counts > 0))


def rows_and_captions(dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The group of each row `[N]`, as a hash, and for each caption its row `[M]`, both int64."""
    column = "group_id" if "group_id" in dataset.column_names else "image_id"
    groups = torch.tensor([id_hash(group) for group in dataset[column]])
    counts = torch.tensor([len(captions) for captions in dataset["captions"]])
    return groups, torch.repeat_interleave(torch.arange(len(groups)), counts)


def first_row(rows: Splits, columns: list[str]) -> dict | None:
    """The given columns of the first split's first row; None if there is no row, or if a column is missing."""
    part = next(iter(rows.values()))
    if not set(columns) <= set(part.column_names):
        return None
    return next(iter(part.select_columns(columns)), None)


def caption_lists(part: datasets.Dataset | datasets.IterableDataset) -> Iterator[list[str]]:
    """The captions of each row, read a thousand rows at a time."""
    for table in part.select_columns(["captions"]).with_format("arrow").iter(1000):
        yield from table["captions"].to_pylist()
