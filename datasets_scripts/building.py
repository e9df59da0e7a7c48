"""What the programs that make image-text datasets share: rows, RGB files, writing beside and renaming, the card."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pyarrow.compute as pc
from datasets import DatasetDict, load_from_disk
from huggingface_hub import DatasetCard, DatasetCardData

from model_cards.tables import as_text
from rows.command_line import Command
from rows.files import write_beside

from .arrow_files import Row, fold, write_rows
from .splits import SPLITS as SPLITS


# A split's usual names, and Karpathy's second part of the training images -> the split.
SPLIT_OF = {
    "train": "train",
    "restval": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
BROKEN_SHOWN = 20


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
    # The push has written which files are which split; those entries stay.
    card.data = DatasetCardData(**{**DatasetCard.load(repo_id).data.to_dict(), **card.data.to_dict()})
    card.push_to_hub(repo_id)


def build(
    parts: dict[str, list[Row]],
    output: Path,
    title: str,
    how_made: str,
    license: str,
    skip_broken: bool = False,
    repo_id: str | None = None,
) -> DatasetDict:
    """Writes rows as a dataset folder (save_to_disk) of the row contract, with its card, and prints its counts.

    Captions are folded (see `fold`) and empty ones dropped; images become RGB files inside the dataset, each decoded
    once. Only a few images are in memory at a time.

    Args:
        parts: split -> rows, in the order in which they are written.
        output: the folder; written beside and renamed.
        title, how_made: for the card.
        license: an identifier of the Hub or plain words; kept in the dataset's info and on the card.
        skip_broken: leave out images that are missing or cannot be decoded. They are listed in
            `<output>.broken.txt` either way.
        repo_id: also push to this Hub dataset.

    Raises:
        ValueError: an image_id occurs twice, an image has no caption, images are broken, a split is left empty.
    """
    _check_rows(parts)
    with write_beside(output) as beside:
        broken = write_rows(parts, beside, license)
        _report_broken(broken, output.with_name(f"{output.name}.broken.txt"), skip_broken)
        dataset = load_from_disk(beside)
        if empty := [split for split, part in dataset.items() if part.num_rows == 0]:
            raise ValueError(f"no image is left for the split {', '.join(empty)}")
        if broken:
            how_made += f"\n\n{len(broken):,} images were missing or broken and are left out."
        card = dataset_card(dataset, title, how_made, license)
        (beside / "README.md").write_text(str(card), encoding="utf-8")
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
        lines.append(f"| {split} | {part.num_rows:,} | {captions or 0:,} |")
    return "\n".join(lines)


def license_fields(license: str) -> dict[str, str]:
    """A licence in a card's front matter: the Hub's identifier, or words of its own."""
    is_identifier = re.fullmatch(r"[a-z0-9.-]+", license)
    return {"license": license} if is_identifier else {"license": "other", "license_details": license}


def dataset_card(dataset: DatasetDict, title: str, how_made: str, license: str) -> DatasetCard:
    """The card of an image-text dataset: how it was made, its counts and its licence."""
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

- `image`: RGB; files that were not are converted. `captions`: one string or more. `image_id`: the image's identity.

## Licence

Of the data: {as_text(license)}
"""
    )


def _check_rows(parts: dict[str, list[Row]]) -> None:
    """Folds the captions, and refuses what would be found out after hours of writing otherwise."""
    if not any(parts.values()):
        raise ValueError("there are no rows; expected some in one of the splits")
    split_of_id: dict[str, str] = {}
    dropped = 0
    for split, rows in parts.items():
        for row in rows:
            if row.image_id in split_of_id:
                where = f"in {split_of_id[row.image_id]} and in {split}"
                raise ValueError(f"the image_id {row.image_id!r} occurs twice, {where}; make it unique")
            split_of_id[row.image_id] = split
            captions = list(filter(None, map(fold, row.captions)))
            if not captions:
                raise ValueError(f"the image {row.image_id!r} of {split} has no caption; add one or drop the image")
            try:
                "".join([row.image_id, row.group_id or "", *captions]).encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the image {row.image_id!r} of {split} has text that is not Unicode: {error}"
                ) from None
            dropped += len(row.captions) - len(captions)
            row.captions = captions
    if dropped:
        print(f"{dropped:,} empty captions dropped")


def _report_broken(broken: list[str], report: Path, skip_broken: bool) -> None:
    if not broken:
        report.unlink(missing_ok=True)  # of an earlier run
        return
    report.write_text("\n".join(broken) + "\n", encoding="utf-8")
    shown = "\n  ".join(broken[:BROKEN_SHOWN])
    message = f"{len(broken):,} images are missing or broken, all listed in {report}; the first:\n  {shown}"
    if not skip_broken:
        raise ValueError(f"{message}\nMend them, or leave them out with --skip_broken.")
    print(f"left out: {message}")
