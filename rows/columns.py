"""The columns of a row besides the teacher's: captions, and ids as numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import datasets
import torch


# Characters that are read of a caption: tokenizers take seconds for a million, and minutes to be trained on them.
LONGEST_CAPTION = 8192
Splits = datasets.DatasetDict | datasets.IterableDatasetDict


def id_hash(text: str) -> int:
    """int64 of the string's blake2b-64: the same in every process and on every machine, unlike `hash()`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def rows_and_captions(dataset: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups `[N]` of the images, and the row `[M]` of each caption's image."""
    column = "group_id" if "group_id" in dataset.column_names else "image_id"
    groups = torch.tensor([id_hash(group) for group in dataset[column]])
    counts = torch.tensor([len(captions) for captions in dataset["captions"]])
    return groups, torch.repeat_interleave(torch.arange(len(groups)), counts)


def first_row(rows: Splits, columns: list[str]) -> dict | None:
    """Some columns of the first training row; None where there is none, or a column is missing."""
    part = rows["train"]
    if not set(columns) <= set(part.column_names):
        return None
    return next(iter(part.select_columns(columns)), None)


def caption_lists(part: datasets.Dataset | datasets.IterableDataset) -> Iterator[list[str]]:
    """The captions of each row, read a thousand rows at a time."""
    for table in part.select_columns(["captions"]).with_format("arrow").iter(1000):
        yield from table["captions"].to_pylist()
