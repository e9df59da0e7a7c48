"""Which split a word stands for: one table for folders, files, columns and splits of the Hub."""

from __future__ import annotations

import re
from pathlib import PurePath


# What published files call their splits; `restval` is Karpathy's second part of the training images.
SPLIT_NAMES = {
    "train": "train",
    "restval": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
SPLIT_OF = {**SPLIT_NAMES, "training": "train", "testing": "test"}


def split_of_word(word: str) -> str | None:
    """The split that a whole word names, whatever its case, digits and signs: `Train`, `val2017`, `test-1`."""
    return SPLIT_OF.get(re.sub(r"[\W\d_]+", "", word.lower()))


def split_of_name(name: str) -> str | None:
    """The split that a folder's or file's name says: as a whole, or by one of its words (`coco-train-0001`).

    `dev` counts only as a whole name (`dev_kit` is none), and a name with two splits (`train_val`) says neither.
    """
    if (split := split_of_word(name)) is not None:
        return split
    words = set(re.split(r"[^a-z]+", name.lower())) - {"dev"}
    found = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def split_of_path(place: PurePath, is_table: bool) -> tuple[str | None, str | None]:
    """Split and the name that decided it, of a path below the source: its nearest folder, then a table's own name.

    Args:
        place: relative to the source.
        is_table: the file holds rows (a table, a tar) and not one image.
    """
    names = [*reversed(place.parent.parts)]
    if is_table:
        names = [place.name.split(".")[0], *names]
    return next(((split, name) for name in names if (split := split_of_name(name))), (None, None))
