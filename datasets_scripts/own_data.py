"""A dataset for retrieval from your own images and captions.

    python -m datasets_scripts.own_data --dataset_name SOURCE --output_dir DIR

SOURCE is one of

- a folder with images and, found in this order: `metadata.jsonl` (or .csv, .json, .parquet) here or in sub-folders;
  webdataset tars; a .txt or .json beside each image; a table such as captions.csv; a folder for each class (with
  --caption_template);
- a csv, tsv, txt, json, jsonl or parquet file, or a glob of several: paths and captions, one row an image or one row a
  caption; COCO's captions_*.json, Flickr's results.csv and .token files, with --images;
- webdataset tars: a file or a glob; each sample an image with .txt (a caption a line) or .json;
- a dataset: a folder of `save_to_disk`, a folder of parquet files in the Hub's layout, or a Hub id.

`--texts FILE` adds texts without images, `--keep_uncaptioned` keeps images without captions:
docs/guides/no_pairs.md.

Rows of one image become one, captions in order, each once. Without a validation or test split, images go to them by
a hash of image_id: the same whatever the order of the rows.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from datasets_scripts.source_rows import Columns, rows_by_split
from datasets_scripts.sources import HUB_ID, Source, license_of_source
from model_cards.tables import as_code
from rows.command_line import Command, run_program

from .building import build, fold, parse_arguments
from .left_out import share
from .text_rows import text_rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("datasets_scripts.own_data", __doc__)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=argparse.SUPPRESS)  # the old way
    parser.add_argument("--dataset_name", metavar="SOURCE", help="Folder, file, glob or Hub id, as described above.")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="Folder of the images that a table names (default: the table's)."
    )
    parser.add_argument("--image_column", help="Column of images or paths (default: found by its usual names).")
    parser.add_argument(
        "--caption_column",
        action="append",
        help="Column of captions: texts, lists of them, or a field of objects (sentences.raw). May be given again "
        "(default: found by its usual names).",
    )
    parser.add_argument(
        "--id_column",
        help="Column that identifies an image (default: found by its usual names, else path or content).",
    )
    parser.add_argument(
        "--group_column",
        help="Column that is equal for images which count as the same thing: right answers to each other's captions "
        "(default: group_id).",
    )
    parser.add_argument(
        "--split_group_column",
        help="Column that is equal for images which must be in one split and remain different things, such as the "
        "frames of a film.",
    )
    parser.add_argument(
        "--caption_template",
        metavar="TEXT",
        help="Sentence that makes a caption of a class's name, such as 'a photo of a {}'.",
    )
    parser.add_argument(
        "--encoding", help="Encoding of csv, txt and json files, such as latin-1 (default: UTF-8 or UTF-16)."
    )
    parser.add_argument(
        "--delimiter", help="Character between the cells of a csv file (default: found in its first line)."
    )
    parser.add_flag("--ignore_splits", help="Take no notice of folders, files and columns that name a split.")
    parser.add_argument("--dataset_config_name", help="Configuration of a Hub dataset.")
    parser.add_argument("--revision", help="Branch, tag or commit of a Hub dataset.")
    parser.add_argument("--split", help="Take only this split of a Hub dataset.")
    parser.add_argument("--rows", type=int, help="Take only this many rows of each split of a dataset, for a trial.")
    parser.add_argument(
        "--validation_share", type=float, default=0.1, help="Share of images to validate on (default: %(default)s)."
    )
    parser.add_argument(
        "--test_share", type=float, default=0.1, help="Share of images to test on (default: %(default)s)."
    )
    parser.add_argument("--data_license", help="Licence of the data (default: what the source says, or 'unknown').")
    parser.add_argument(
        "--skip_broken", action="store_true", help="Leave out missing and broken images, which are errors otherwise."
    )
    parser.add_argument(
        "--duplicates",
        choices=["leave_out", "keep"],
        default="leave_out",
        help="Pictures in several of the source's own splits: leave_out keeps them in test, else in validation "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--max_skipped",
        type=share,
        metavar="SHARE",
        help="Stop where --skip_broken would leave out more than this share of rows, such as 0.01 (default: never).",
    )
    parser.add_argument(
        "--texts",
        metavar="SOURCE",
        help="Texts without images, such as a log of queries: a .txt file (a text a line), a table, or a dataset.",
    )
    parser.add_argument("--text_column", help="Column of --texts (default: found by the usual names of captions).")
    parser.add_flag("--keep_uncaptioned", help="Keep images without a caption, to be learned from the teacher alone.")
    options = parse_arguments(parser, arguments)
    if (options.source is None) == (options.dataset_name is None):
        parser.error("name the source once: --dataset_name SOURCE")
    if options.source is not None:
        print("SOURCE is called --dataset_name now.", file=sys.stderr)
        options.dataset_name = options.source
    shares = options.validation_share, options.test_share
    if min(shares) <= 0 or sum(shares) >= 1:
        parser.error(f"--validation_share and --test_share are {shares}, expected positive and a sum below 1")
    if options.images is not None and not options.images.is_dir():
        parser.error(f"--images {options.images} is no folder")
    if options.caption_template is not None and options.caption_template.count("{}") != 1:
        parser.error(f"--caption_template {options.caption_template!r}: expected one {{}} where the name goes")
    if options.delimiter is not None and len(options.delimiter) != 1:
        parser.error(f"--delimiter {options.delimiter!r}: expected one character")
    if options.rows is not None and options.rows < 1:
        parser.error(f"--rows {options.rows}: expected 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Reads the source and writes the dataset.

    Raises:
        FileNotFoundError, ValueError: the source cannot be read, or what is read makes no dataset.
    """
    options = parse(arguments)
    name, output = options.dataset_name, options.output_dir
    captions = None if options.caption_column is None else tuple(options.caption_column)
    named = (options.id_column, options.group_column, options.split_group_column)
    columns = Columns(options.image_column, captions, *named)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as cache:
        source = Source(
            name,
            columns,
            Path(cache),
            images=options.images,
            encoding=options.encoding,
            delimiter=options.delimiter,
            template=options.caption_template,
            ignore_splits=options.ignore_splits,
            config_name=options.dataset_config_name,
            revision=options.revision,
            split=options.split,
            rows=options.rows,
            keep_uncaptioned=options.keep_uncaptioned,
        )
        found = rows_by_split(source.tables())
        for rows in found.parts.values():
            for row in rows:
                row.captions = list(dict.fromkeys(map(fold, row.captions)))
        if options.texts is not None:
            known = {caption for rows in found.parts.values() for row in rows for caption in row.captions}
            how = (options.text_column, options.encoding, options.delimiter)
            split = None if set(found.parts) == {None} else "train"
            found.parts[split] = found.parts.get(split, []) + text_rows(options.texts, *how, Path(cache), known)
        is_on_hub = re.fullmatch(HUB_ID, name) and not Path(name).exists()
        # Of a path, only the last part is published.
        how_made = f"Made from {as_code(name if is_on_hub else Path(name).resolve().name)}."
        license = options.data_license or license_of_source(name) or "unknown"
        build(
            found.parts,
            output,
            output.name,
            how_made,
            license,
            options.skip_broken,
            options.push_to_hub,
            shares=(options.validation_share, options.test_share),
            left_out=found.left_out,
            failed=source.failed,
            max_skipped=options.max_skipped,
            duplicates=options.duplicates,
            keep_uncaptioned=options.keep_uncaptioned,
        )


if __name__ == "__main__":
    run_program(main)
