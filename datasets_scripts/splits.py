"""Which rows are for training, validation and test: as the source says, else by a hash of what they show."""

from __future__ import annotations

import hashlib

from .arrow_files import Row


SPLITS = ("train", "validation", "test")


def assign_splits(
    parts: dict[str | None, list[Row]], validation_share: float, test_share: float
) -> dict[str, list[Row]]:
    """Train, validation and test; what the source lacks is taken from its training images by a hash of their id.

    A source of one split only, whatever its name, counts as not split. Images of one group stay together.

    Args:
        parts: as `rows_by_split` gives them.
        validation_share, test_share: in (0, 1), of the images that are distributed.

    Raises:
        ValueError: some images have a split and some not, or a split is empty.
    """
    if not parts:
        raise ValueError("the source has no rows")
    if len(parts) == 1:
        parts = {"train": next(iter(parts.values()))}
    if None in parts:
        raise ValueError(f"the image {parts[None][0].image_id!r} has no split, others have; put it into one")
    if "train" not in parts:
        raise ValueError(f"the source has the splits {', '.join(parts)} and none for training")
    shares = {"test": test_share, "validation": validation_share}
    shares = {split: share for split, share in shares.items() if split not in parts}
    result: dict[str, list[Row]] = {split: parts.get(split, []) for split in SPLITS}
    result["train"] = []
    for row in parts["train"]:
        key = (row.group_id or row.image_id).encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
        split = "train"
        for name, share in shares.items():
            if number < share:
                split = name
                break
            number -= share
        result[split].append(row)
    if shares:
        print(f"{' and '.join(shares)} taken from {len(parts['train']):,} images by a hash of their ids")
    counts = ", ".join(f"{split}: {len(rows):,} images" for split, rows in result.items())
    print(counts)
    if not all(result.values()):
        raise ValueError(f"a split is empty ({counts}); larger --validation_share and --test_share may help")
    return result
