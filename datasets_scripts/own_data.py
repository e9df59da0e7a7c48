"""A dataset for retrieval from your own images and captions.

    python -m datasets_scripts.own_data --dataset_name SOURCE --output_dir DIR

SOURCE is one of

- a folder with images and `metadata.jsonl` (or .csv, .parquet), here or in sub-folders: `file_name` and `captions`
  (a list) or `caption` / `text`; images in train/, validation/, test/ keep that split;
- a csv, tsv, jsonl or parquet file, or a glob of several: paths relative to the file (parquet: or the images) and
  captions, one row an image or one row a caption;
- webdataset tars: a folder, a file or a glob; each sample an image with .txt or .json (`captions`, `caption`, `text`);
- a dataset: a folder of `save_to_disk`, a folder of parquet files in the Hub's layout, or a Hub id.

Rows of one image become one, captions in order, each once. Without a validation or test split, images go to them by
a hash of image_id: the same whatever the order of the rows.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from pathlib import Path

from datasets_scripts.source_rows import Columns, rows_by_split
from datasets_scripts.sources import HUB_ID, license_of_source, read_source
from model_cards.tables import as_code
from rows.command_line import Command

from .building import SPLITS, Row, build, fold, parse_arguments


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


def main(arguments: list[str] | None = None) -> None:
    parser = Command("datasets_scripts.own_data", __doc__)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=argparse.SUPPRESS)  # the old way
    parser.add_argument("--dataset_name", metavar="SOURCE", help="Folder, file, glob or Hub id, as described above.")
    parser.add_argument("--image_column", help="Column of images or paths (default: found by its usual names).")
    parser.add_argument(
        "--caption_column", help="Column of texts or lists of them (default: found by its usual names)."
    )
    parser.add_argument("--id_column", help="Column of what identifies an image (default: its path, or its content).")
    parser.add_argument("--group_column", help="Column that is equal for images which count as the same thing.")
    parser.add_argument(
        "--validation_share",
        type=float,
        default=0.1,
        help="Share of images to validate on (default: %(default)s).",
    )
    parser.add_argument(
        "--test_share", type=float, default=0.1, help="Share of the images to test on (default: %(default)s)."
    )
    parser.add_argument("--data_license", help="Licence of the data (default: what the source says, or 'unknown').")
    parser.add_argument("--skip_broken", action="store_true", help="Leave out missing and broken images.")
    options = parse_arguments(parser, arguments)
    if (options.source is None) == (options.dataset_name is None):
        parser.error("name the source once: --dataset_name SOURCE")
    if options.source is not None:
        print("SOURCE is called --dataset_name now.", file=sys.stderr)
    source = options.dataset_name or options.source
    shares = options.validation_share, options.test_share
    if min(shares) <= 0 or sum(shares) >= 1:
        parser.error(f"--validation_share and --test_share are {shares}, expected positive and a sum below 1")
    columns = Columns(options.image_column, options.caption_column, options.id_column, options.group_column)
    options.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.output_dir.name}-", dir=options.output_dir.parent) as cache:
        parts = assign_splits(rows_by_split(read_source(source, columns, Path(cache))), *shares)
        for rows in parts.values():
            for row in rows:
                row.captions = list(dict.fromkeys(map(fold, row.captions)))
        is_on_hub = re.fullmatch(HUB_ID, source) and not Path(source).exists()
        # Of a path, only the last part is published.
        how_made = f"Made from {as_code(source if is_on_hub else Path(source).resolve().name)}."
        title = options.output_dir.name
        license = options.data_license or license_of_source(source) or "unknown"
        build(parts, options.output_dir, title, how_made, license, options.skip_broken, options.push_to_hub)


if __name__ == "__main__":
    main()
