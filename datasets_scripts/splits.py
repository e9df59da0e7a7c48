"""Which rows are for training, validation and test: as the source says, else by a hash of what they show."""

from __future__ import annotations

import hashlib
from collections import Counter

from .arrow_files import Row
from .glyphs import components


SPLITS = ("train", "validation", "test")


def given_splits(parts: dict[str | None, list[Row]]) -> dict[str, list[Row]]:
    """The splits that a source has, train among them; a source with a single split, whatever its name, is all train.

    Args:
        parts: split -> rows; None holds those whose split is not known.

    Raises:
        ValueError: there are no rows, some have a split and some not, or none are for training.
    """
    parts = {split: rows for split, rows in parts.items() if rows or split is not None}
    if not any(parts.values()):
        raise ValueError("there are no rows; expected some in one of the splits")
    if len(parts) == 1:
        return {"train": next(iter(parts.values()))}
    if None in parts:
        raise ValueError(f"the image {parts[None][0].image_id!r} has no split, others have; put it into one")
    if "train" not in parts:
        raise ValueError(f"the source has the splits {', '.join(parts)} and none for training")
    return parts


def assign_splits(
    parts: dict[str | None, list[Row]], validation_share: float, test_share: float
) -> dict[str, list[Row]]:
    """Train, validation and test; what the source lacks is drawn from what it has, by a hash of the images' ids.

    Validation, or both, is drawn from the training images. Only a test split that is lacking beside train and
    validation (COCO's train2017 and val2017) is drawn from validation: what the source holds out is divided, and its
    training images stay whole.

    Images of one group, and those of one `split_group`, stay together. A hash is a number in [0, 1), and a split an
    interval of these: new images move no old ones. Only a split that would be empty takes the image or group whose
    number is nearest to its interval.

    Args:
        parts: as for [`given_splits`].
        validation_share, test_share: in (0, 1), of the images that are distributed; of those of a given validation,
            `test_share / (validation_share + test_share)` go to test.

    Raises:
        ValueError: as [`given_splits`], or there are fewer images or groups than splits to fill.
    """
    parts = given_splits(parts)
    shares = {"test": test_share, "validation": validation_share}
    shares = {split: share for split, share in shares.items() if split not in parts}
    result: dict[str, list[Row]] = {split: parts.get(split, []) for split in SPLITS}
    if shares:
        giver = "train"
        if "validation" in parts and len(set(_kept_together(parts["validation"]))) > 1:
            giver, shares = "validation", {"test": test_share / (validation_share + test_share)}
        keys = _kept_together(parts[giver])
        numbers = {key: _number(key) for key in keys}
        split_of = {key: _split_at(number, shares, giver) for key, number in numbers.items()}
        _fill_empty_splits(split_of, numbers, shares, giver)
        for split in (*shares, giver):
            result[split] = [row for row, key in zip(parts[giver], keys) if split_of[key] == split]
        of_giver = _counted(parts[giver]) + " of validation" * (giver == "validation")
        print(f"{' and '.join(shares)} taken from {of_giver} by a hash of their ids")
    counts = ", ".join(f"{split}: {_counted(rows)}" for split, rows in result.items())
    print(counts)
    if not all(result.values()):
        raise ValueError(f"a split is empty ({counts}); expected images in each")
    return result


def _counted(rows: list[Row]) -> str:
    """How many images, or, where texts without images are among them, rows."""
    return f"{len(rows):,} {'rows' if any(row.read is None for row in rows) else 'images'}"


def without_held_out_texts(parts: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The splits without the texts without an image that a later split has too; prints how many these are.

    Args:
        parts: train, validation and test.
    """
    later: set[str] = set()
    kept, dropped = {}, 0
    for split in reversed(SPLITS):
        rows = parts[split]
        kept[split] = [row for row in rows if row.read is not None or row.captions[0] not in later]
        dropped += len(rows) - len(kept[split])
        later.update(caption for row in rows for caption in row.captions)
    if dropped:
        print(f"{dropped:,} texts without an image are captions of validation or test too: they are left out")
    return {split: kept[split] for split in parts}


def _kept_together(rows: list[Row]) -> list[str]:
    """A name for each row, the same for rows that must be in one split."""
    groups = [row.group_id or row.image_id for row in rows]
    if all(row.split_group is None for row in rows):
        return groups
    # Named by the split group, so that another image in it does not move it.
    names = [
        group if row.split_group is None else f"split group {row.split_group}" for row, group in zip(rows, groups)
    ]
    return components([(("group", group), ("name", name)) for group, name in zip(groups, names)], names)


def _number(key: str) -> float:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _split_at(number: float, shares: dict[str, float], giver: str) -> str:
    for split, share in shares.items():
        if number < share:
            return split
        number -= share
    return giver


def _fill_empty_splits(
    split_of: dict[str, str], numbers: dict[str, float], shares: dict[str, float], giver: str
) -> None:
    """Changes `split_of` so that each split has a group: those of `shares`, and the one that gives to them."""
    wanted = (*shares, giver)
    if len(numbers) < len(wanted):
        raise ValueError(
            f"a split is empty: there are {len(numbers)} images, those of one group or picture counted once, for "
            f"{', '.join(wanted)}; expected {len(wanted)} at least"
        )
    start = 0.0
    for split in wanted:
        end = start + shares.get(split, 1)
        counts = Counter(split_of.values())
        if not counts[split]:

            def distance(key: str, start=start, end=end) -> tuple[float, str]:
                return max(start - numbers[key], numbers[key] - end, 0.0), key

            # No other split is emptied by it: with as many groups as splits, one of them has two.
            nearest = min((key for key in numbers if counts[split_of[key]] > 1), key=distance)
            print(
                f"{split} would be empty: it takes what is nearest to it by hash, {nearest!r} of {split_of[nearest]}"
            )
            split_of[nearest] = split
        start = end
