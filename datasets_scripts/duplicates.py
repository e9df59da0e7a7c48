"""One picture under several names, and one caption of several pictures: found, said, and kept in one split.

Pictures are equal where all their RGB pixels are; pictures that are nearly equal are not looked for.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from rows.files import counted, printable

from .arrow_files import Row
from .glyphs import components
from .splits import SPLITS


MANY_ROWS = 100  # of one picture: it may say "no image available"
SHOWN = 20  # such pictures, at most


def join_groups(rows: list[Row]) -> None:
    """Gives rows of the same picture one `group_id`; groups that share a picture become one.

    A group is named by the smallest of the names that it joins, so the order of the rows does not matter. Where no
    picture has two rows and no row had a `group_id`, none gets one; else all have one.

    Args:
        rows: with their `pixels`.
    """
    # Where a row has no group_id, its image_id stands for it.
    names = [row.group_id or row.image_id for row in rows]
    groups = components([(name, row.pixels) for name, row in zip(names, rows)], names)
    if len(set(groups)) < len(rows) or any(row.group_id is not None for row in rows):
        for row, group in zip(rows, groups):
            row.group_id = group


def leave_out_of_train(parts: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Leaves out of train the pictures that are in validation or test too, and of validation those that are in test.

    Args:
        parts: split -> rows with their `pixels`.

    Returns:
        The parts, and split -> number of rows that were left out of it.

    Raises:
        ValueError: nothing is left of a split.
    """
    later: set[bytes] = set()
    kept, left_out = {}, {}
    for split in sorted(parts, key=SPLITS.index, reverse=True):
        kept[split] = [row for row in parts[split] if row.pixels not in later]
        left_out[split] = len(parts[split]) - len(kept[split])
        if not kept[split] and parts[split]:
            raise ValueError(
                f"all {len(parts[split]):,} pictures of {split} are in other splits too, so none is left of it; mend "
                "the splits, or keep these pictures with --duplicates keep"
            )
        later.update(row.pixels for row in parts[split])
    return {split: kept[split] for split in parts}, {split: left_out[split] for split in parts if left_out[split]}


def in_several_splits(parts: dict[str, list[Row]]) -> int:
    """Number of pictures that are in more than one split."""
    counts = Counter(picture for rows in parts.values() for picture in {row.pixels for row in rows})
    return sum(count > 1 for count in counts.values())


def say_repeated(parts: dict[str | None, list[Row]], share_a_group: bool) -> None:
    """Prints how many pictures have several rows of one split.

    Args:
        parts: split -> rows with their `pixels`.
        share_a_group: whether such rows get one `group_id` and one split.
    """
    counts = [Counter(row.pixels for row in rows) for rows in parts.values()]
    repeated = {picture for of_split in counts for picture, number in of_split.items() if number > 1}
    if repeated:
        effect = ": they share a group_id and a split" if share_a_group else ""
        print(f"{counted(len(repeated), 'picture is', 'pictures are')} there under several names{effect}")


def say_frequent(rows: list[Row]) -> None:
    """Names pictures with so many rows that they may say "no image available"."""
    counts = Counter(row.pixels for row in rows)
    first = {row.pixels: row.image_id for row in reversed(rows)}
    for picture, count in counts.most_common(SHOWN):
        if count > MANY_ROWS:
            print(
                f"one picture has {count:,} rows, {printable(first[picture])} the first of them: "
                "leave them out if it says that there is no image"
            )


def say_several_splits(count: int, left_out: dict[str, int] | None) -> None:
    """Prints how many pictures are in several splits.

    Args:
        count: as [`in_several_splits`] gives it.
        left_out: split -> rows that were left out of it; None: they stay.
    """
    if not count:
        return
    pictures = counted(count, "picture is", "pictures are")
    if left_out is None:
        print(f"{pictures} in several splits and stay there: a model is tested on what it has seen")
        return
    rows = " and ".join(f"{number:,} rows of {split}" for split, number in left_out.items())
    print(f"{pictures} in several splits: {rows} are left out (--duplicates keep would keep them)")


def say_shared_captions(rows: list[Row]) -> None:
    """Prints the share of captions that stand for several images, if any does."""
    groups = defaultdict(set)
    for row in rows:
        for caption in row.captions:
            groups[caption].add(row.group_id or row.image_id)
    total = sum(len(row.captions) for row in rows)
    shared = sum(len(groups[caption]) > 1 for row in rows for caption in row.captions)
    if shared:
        most = max(groups, key=lambda caption: len(groups[caption]))
        example = printable(most if len(most) < 60 else f"{most[:57]}...")
        print(
            f"{100 * shared / total:.3g} % of the captions stand for several images ({example!r} for "
            f"{len(groups[most]):,}): none of these images is a negative for it, and each is a right answer unless "
            "train.py is told --recall_by_index; captions that say more would tell them apart"
        )
