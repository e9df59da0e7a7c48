"""What the programs that make image-text datasets share: rows, RGB files, writing beside and renaming, the card."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
from datasets import DatasetDict, DatasetInfo, Features, Image, List, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image as PILImage
from tqdm.auto import tqdm

from model_cards.tables import as_text
from rows.command_line import Command
from rows.files import printable, write_beside
from rows.images import open_image, to_rgb


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
SPLITS = ("train", "validation", "test")
IMAGES_AT_ONCE = 32
BROKEN_SHOWN = 20


@dataclass
class Row:
    """A row to be written. Its image stays where it is until `read` is called."""

    image_id: str
    captions: list[str]
    read: Callable[[], bytes]
    group_id: str | None = None


def fold(caption: str) -> str:
    """The caption without blanks around it, its lines joined by a space."""
    return " ".join(filter(None, map(str.strip, caption.splitlines())))


def rgb_bytes(data: bytes) -> bytes:
    """An image file as an RGB file: the same bytes where it is an upright RGB JPEG or PNG, else written anew.

    A JPEG stays one (quality 95), all else becomes PNG. Orientation from EXIF is applied, transparent parts become
    white, 16-bit grey is scaled to 8 bits. Decodes the whole image.

    Raises:
        Exception: of many types, where the file is broken or a decompression bomb.
    """
    image = open_image(io.BytesIO(data))
    file_format = image.format
    upright = image.getexif().get(PILImage.ExifTags.Base.Orientation, 1) == 1
    if file_format in ("JPEG", "PNG") and image.mode == "RGB" and upright and not image.has_transparency_data:
        return data
    buffer = io.BytesIO()
    rgb = to_rgb(image)
    if file_format in ("JPEG", "MPO"):
        rgb.save(buffer, format="JPEG", quality=95)
    else:
        rgb.save(buffer, format="PNG")
    return buffer.getvalue()


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
        broken = _write_rows(parts, beside, license)
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


def _write_rows(parts: dict[str, list[Row]], folder: Path, license: str) -> list[str]:
    """Writes what `DatasetDict.save_to_disk` would, image by image. Returns what could not be read, with reasons."""
    features = Features({"image": Image(), "captions": List(Value("string")), "image_id": Value("string")})
    if any(row.group_id is not None for rows in parts.values() for row in rows):
        features["group_id"] = Value("string")
    broken = []
    for split, rows in parts.items():
        (folder / split).mkdir()
        name = "data-00000-of-00001.arrow"
        content = hashlib.blake2b(digest_size=8)
        with ArrowWriter(features=features, path=str(folder / split / name), writer_batch_size=16) as writer:
            for row, image, reason in _read_images(rows, split):
                if reason is not None:
                    broken.append(f"{split} {printable(row.image_id)}: {reason}")
                    continue
                # A path beside the bytes would win over them where a file of that name lies in the working folder.
                example = {"image": {"bytes": image, "path": None}}
                example |= {column: getattr(row, column) for column in features if column != "image"}
                writer.write(example)
                content.update(image)
                content.update(json.dumps([row.captions, row.image_id, row.group_id]).encode())
            writer.finalize()
        DatasetInfo(features=features, license=license).write_to_directory(str(folder / split))
        state = {
            "_data_files": [{"filename": name}],
            "_fingerprint": content.hexdigest(),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        (folder / split / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}), encoding="utf-8")
    return broken


def _read_images(rows: list[Row], split: str) -> Iterator[tuple[Row, bytes | None, str | None]]:
    """Rows in order, each with its RGB file or the reason why there is none."""
    with ThreadPoolExecutor() as pool, tqdm(total=len(rows), desc=split, unit=" images", disable=None) as bar:
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            some = rows[start : start + IMAGES_AT_ONCE]
            for row, (image, reason) in zip(some, pool.map(_read_image, some)):
                yield row, image, reason
                bar.update()


def _read_image(row: Row) -> tuple[bytes | None, str | None]:
    try:
        return rgb_bytes(row.read()), None
    except Exception as error:  # what Pillow's decoders raise on broken bytes has no common type
        reason = re.sub(r" <_io.BytesIO object at \w+>", "", str(error))
        return None, fold(f"{type(error).__name__}: {reason}")


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
