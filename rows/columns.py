"""Reading the columns that do not come from the teacher: captions, and ids as int64."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import datasets
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
    return torch.tensor([text_id(caption) for captions in dataset["captions"] for caption in captions])


def rows_and_captions(dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The group of each image `[N]`, as a hash, and for each caption the row of its image `[M]`, both int64."""
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
