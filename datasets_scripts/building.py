"""What the programs that make image-text datasets share: rows, RGB files, writing beside and renaming, the card."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow.compute as pc
from datasets import DatasetDict, load_from_disk
from huggingface_hub import DatasetCard, DatasetCardData

from model_cards.tables import as_text
from rows.columns import partners
from rows.command_line import Command
from rows.files import counted, write_beside

from .arrow_files import Row, fold, name_of, read_images, store_images, stored_images, write_splits
from .duplicates import (
    in_several_splits,
    join_groups,
    leave_out_of_train,
    say_frequent,
    say_repeated,
    say_several_splits,
    say_shared_captions,
)
from .left_out import LeftOut
from .splits import assign_splits, given_splits, without_held_out_texts


def parse_arguments(parser: Command, arguments: list[str] | None) -> argparse.Namespace:
    """Adds `--output_dir` and `--push_to_hub`, parses, and refuses a folder that is there and not empty."""
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the dataset (save_to_disk).")
    parser.add_argument("--push_to_hub", metavar="REPO", help="Also push to this Hub dataset, e.g. name/data.")
    options = parser.parse_args(arguments)
    refuse_what_is_there(parser, options.output_dir)
    options.output_dir = options.output_dir.resolve()
    return options


def refuse_what_is_there(parser: Command, folder: Path) -> None:
    """Ends the program where the folder it is to write is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"--output_dir {folder} exists and is not empty: name a new folder")


def push(dataset: DatasetDict, card: DatasetCard, repo_id: str) -> None:
    """Pushes the dataset and its card to a Hub dataset."""
    dataset.push_to_hub(repo_id)
    # The push has written into the card which files are which split; those entries stay.
    card.data = DatasetCardData(**{**DatasetCard.load(repo_id).data.to_dict(), **card.data.to_dict()})
    card.push_to_hub(repo_id)


def build(
    parts: dict[str | None, list[Row]],
    output: Path,
    title: str,
    how_made: str,
    license: str,
    skip_broken: bool = False,
    repo_id: str | None = None,
    *,
    shares: tuple[float, float] | None = None,
    left_out: Iterable[str] = (),
    failed: Iterable[str] = (),
    max_skipped: float | None = None,
    duplicates: str = "leave_out",
    keep_uncaptioned: bool | None = None,
) -> DatasetDict:
    """Writes rows as a dataset folder (save_to_disk) of the row contract, with its card, and prints its counts.

    Captions are folded (see `fold`) and empty ones dropped; images become RGB files inside the dataset, each decoded
    once. Only a few images are in memory at a time.

    Args:
        parts: split -> rows, in the order in which they are written; None holds rows whose split is not known.
        output: the folder; written beside and renamed.
        title, how_made: for the card.
        license: an identifier of the Hub or plain words; kept in the dataset's info and on the card.
        skip_broken: leave out images that are missing or cannot be decoded, rows without a caption, and those of
            `left_out`. They are listed in `<output>.broken.txt` either way.
        repo_id: also push to this Hub dataset.
        shares: of validation and test, each in (0, 1), where `parts` lack them, see [`assign_splits`]; rows of the
            same picture then get one `group_id` and one split. None: `parts` are the splits of a published protocol,
            and are written as they are.
        left_out: rows that the reader could not use, a line each.
        failed: rows that the source marks as failed, a line each: left out, listed and counted, never an error.
        max_skipped: the largest share of rows that `skip_broken` leaves out, in [0, 1], not counting `failed`; None:
            any.
        duplicates: with `shares`, of pictures in several of the source's own splits: 'leave_out' of train, then of
            validation, or 'keep'.
        keep_uncaptioned: images without a caption stay; False: an error names the option; None: there is none.

    Raises:
        ValueError: an image_id occurs twice, rows cannot be used, a split is left empty.
    """
    out = LeftOut(output.with_name(f"{output.name}.broken.txt"), skip_broken, max_skipped, [*left_out], [*failed])
    parts = _usable_rows(parts, out, keep_uncaptioned)
    with write_beside(output) as beside:
        # Checked here, before hours of reading.
        out.check(len(_all(parts)))
        if shares is not None:
            given_splits(parts)
        images, stored = read_images(parts, out.images), beside / "images.arrow"
        if shares is None:
            write_splits(images, parts, beside, license)
        else:
            store_images(images, stored)
        parts = {split: [row for row in rows if row.pixels is not None] for split, rows in parts.items()}
        read = _all(parts)
        out.check(len(read))
        how_made += out.on_card()
        say_frequent(read)
        if shares is None:
            say_several_splits(in_several_splits(parts), None)
            say_repeated(parts, False)
        else:
            parts, note = _draw_splits(parts, shares, duplicates)
            parts = without_held_out_texts(parts)
            how_made += note
            write_splits(zip(read, stored_images(stored)), parts, beside, license)
            stored.unlink()
        say_shared_captions(_all(parts))
        dataset = load_from_disk(beside)
        if empty := [split for split, part in dataset.items() if part.num_rows == 0]:
            raise ValueError(f"no image is left for the split {', '.join(empty)}")
        card = dataset_card(dataset, title, how_made, license)
        (beside / "README.md").write_text(str(card), encoding="utf-8")
    out.say(len(read))
    print(f"{counts_table(dataset)}\nlicence: {license}\nwritten to {output}")
    dataset = load_from_disk(output)
    if repo_id:
        push(dataset, card, repo_id)
    return dataset


def counts_table(dataset: DatasetDict) -> str:
    """Markdown table of images and captions per split."""
    lines = ["| split | images | captions |", "|---|---|---|"]
    for split, part in dataset.items():
        captions = pc.sum(pc.list_value_length(part.data.column("captions"))).as_py()
        images = part.num_rows - part.data.column("image").null_count
        lines.append(f"| {split} | {images:,} | {captions or 0:,} |")
    return "\n".join(lines)


def license_fields(license: str) -> dict[str, str]:
    """A licence in a card's front matter: the Hub's identifier, or words of its own."""
    is_identifier = re.fullmatch(r"[a-z0-9.-]+", license)
    return {"license": license} if is_identifier else {"license": "other", "license_details": license}


def dataset_card(dataset: DatasetDict, title: str, how_made: str, license: str) -> DatasetCard:
    """The card of an image-text dataset: how it was made, its counts and its licence."""
    lonely_texts, lonely_images = False, False
    for part in dataset.values():
        has_image, counts = partners(part)
        lonely_texts, lonely_images = lonely_texts or not has_image.all(), lonely_images or not counts.all()
    data = DatasetCardData(
        **license_fields(license),
        pretty_name=title,
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["image-text-retrieval"],
    )
    return DatasetCard(
        f"""---
{data.to_yaml()}
---

# {as_text(title)}

{how_made}

{counts_table(dataset)}

- `image`: RGB; files that were not are converted{"; null for a text without an image" * lonely_texts}. `captions`: {
            "none or more strings" if lonely_images else "one string or more"
        }. `image_id`: the image's identity.

## Licence

Of the data: {as_text(license)}
"""
    )


def _draw_splits(
    parts: dict[str | None, list[Row]], shares: tuple[float, float], duplicates: str
) -> tuple[dict[str, list[Row]], str]:
    """Train, validation and test of rows that were read, no picture in two of them, and a paragraph for the card."""
    parts, note = given_splits(parts), ""
    several, left_out = in_several_splits(parts), None
    if several and duplicates == "leave_out":
        parts, left_out = leave_out_of_train(parts)
        note = f"\n\n{sum(left_out.values()):,} rows whose picture is in another split too are left out."
    say_several_splits(several, left_out)
    join_groups(_all(parts))
    say_repeated(parts, True)
    return assign_splits(parts, *shares), note


def _all(parts: dict[str | None, list[Row]]) -> list[Row]:
    return [row for rows in parts.values() for row in rows]


def _usable_rows(
    parts: dict[str | None, list[Row]], out: LeftOut, keep_uncaptioned: bool | None
) -> dict[str | None, list[Row]]:
    """The rows with their captions folded. Those without a caption, unless they are kept, are named in `out` instead.

    Raises:
        ValueError: an image_id occurs twice, or text is not Unicode.
    """
    split_of_id: dict[str, str | None] = {}
    usable: dict[str | None, list[Row]] = {split: [] for split in parts}
    dropped = uncaptioned = 0
    for split, rows in parts.items():
        for row in rows:
            of_split = "" if split is None else f" of {split}"
            if row.image_id in split_of_id:
                where = f"in {split_of_id[row.image_id]} and in {split}"
                raise ValueError(f"the image_id {row.image_id!r} occurs twice, {where}; make it unique")
            split_of_id[row.image_id] = split
            captions = list(filter(None, map(fold, row.captions)))
            try:
                "".join([row.image_id, row.group_id or "", *captions]).encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the image {row.image_id!r}{of_split} has text that is not Unicode: {error}"
                ) from None
            if not captions and not keep_uncaptioned:
                out.rows.append(f"{name_of(row, split)}: it has no caption")
                uncaptioned += 1
                continue
            dropped += len(row.captions) - len(captions)
            row.captions = captions
            usable[split].append(row)
    if dropped:
        print(f"{dropped:,} empty captions dropped")
    if uncaptioned and keep_uncaptioned is False:
        images = counted(uncaptioned, "image has no caption", "images have no caption")
        out.hint = f"{images}: keep them with --keep_uncaptioned, to learn them from the teacher alone. "
    return usable
