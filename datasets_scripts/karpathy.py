"""Datasets from Karpathy's split files, with the counts that everybody compares on; see flickr30k.py and coco.py."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets

from model_cards.tables import as_code
from rows.command_line import Command
from rows.files import file_in, read_file

from .building import Row, build, parse_arguments
from .source_rows import Columns, rows_by_split
from .sources import Source
from .split_words import SPLIT_NAMES
from .splits import SPLITS


# Counts of training images that come of a well-known mistake.
KNOWN_MISTAKES = {
    82_783: "82,783 training images: restval was forgotten; train on train + restval",
    29_783: "29,783 training images are the Flickr30k Entities split, whose test list is another one",
}


@dataclass(frozen=True)
class Benchmark:
    """What a data set under Karpathy's split is.

    Args:
        title: its name.
        counts: split -> (images, captions), restval in train.
        license: what is known of it.
        path_of: the image's file below the image folder, from the file's entry.
        image_id_of: the image's identity, from the file's entry.
        hub_id: a copy on the Hub.
        hub_columns: its columns, as far as they are known.
        image_id_of_hub: the image's identity, from the value in the copy's id column.
    """

    title: str
    counts: dict[str, tuple[int, int]]
    license: str
    path_of: Callable[[dict], str]
    image_id_of: Callable[[dict], str]
    hub_id: str
    hub_columns: Columns
    image_id_of_hub: Callable[[str], str]


def read_karpathy(path: Path, images: Path, benchmark: Benchmark) -> dict[str, list[Row]]:
    """Rows of a Karpathy JSON in its order (COCO's five folds are cut by it); train holds restval.

    Args:
        path: `dataset_flickr30k.json` or `dataset_coco.json`.
        images: the folder with the images.
        benchmark: which of the two.

    Raises:
        ValueError: the file is not of the format, naming the entry; a file name leaves the folder.
    """
    if not images.is_dir():
        raise ValueError(f"the image folder {images} is not a folder")
    try:
        entries = list(json.loads(path.read_text(encoding="utf-8"))["images"])
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a Karpathy split file, expected {{'images': [...]}}: {error!r}") from None
    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    seen = set()
    for i, entry in enumerate(entries):
        try:
            if entry["imgid"] in seen:
                raise ValueError("this imgid occurs twice")
            seen.add(entry["imgid"])
            if entry["split"] not in SPLIT_NAMES:
                raise ValueError(f"unknown split {entry['split']!r}, expected one of {', '.join(SPLIT_NAMES)}")
            captions = [sentence["raw"] for sentence in entry["sentences"]]
            if not all(isinstance(caption, str) for caption in captions):
                raise ValueError(f"sentences are not all text: {reprlib.repr(captions)}")
            file = file_in(images, benchmark.path_of(entry))
            row = Row(benchmark.image_id_of(entry), captions, partial(read_file, file))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else error
            name = entry.get("filename") if isinstance(entry, dict) else entry
            raise ValueError(f"{path.name}: images[{i}] ({name!r}): {what}") from None
        parts[SPLIT_NAMES[entry["split"]]].append(row)
    return parts


def read_hub(hub_id: str, revision: str | None, columns: Columns, benchmark: Benchmark) -> dict[str, list[Row]]:
    """Rows of a copy on the Hub, in its order."""
    source = Source(hub_id, columns, cache=Path(datasets.config.HF_DATASETS_CACHE))
    parts = rows_by_split(source.tables_of_datasets(datasets.load_dataset(hub_id, revision=revision))).parts
    for rows in parts.values():
        for row in rows:
            row.image_id = benchmark.image_id_of_hub(row.image_id)
    return parts


def check_counts(parts: dict[str, list[Row]], benchmark: Benchmark, allow_others: bool) -> None:
    """Prints images and captions per split.

    Raises:
        ValueError: they are not the benchmark's and others are not allowed.
    """
    differences = []
    for split, (images, captions) in benchmark.counts.items():
        rows = parts.get(split, [])
        found = f"{split}: {len(rows):,} images and {sum(len(row.captions) for row in rows):,} captions"
        expected = f"{split}: {images:,} images and {captions:,} captions"
        print(f"{benchmark.title} {found}")
        if found != expected:
            differences.append(f"{found}, expected {expected.removeprefix(f'{split}: ')}")
    if not differences:
        return
    differences += filter(None, [KNOWN_MISTAKES.get(len(parts.get("train", [])))])
    message = f"these are not {benchmark.title}'s counts:\n  " + "\n  ".join(differences)
    if not allow_others:
        raise ValueError(f"{message}\nAnother split or a partial copy is meant? Then add --allow_other_counts.")
    print(message)


def run(benchmark: Benchmark, module: str, doc: str, arguments: list[str] | None) -> None:
    """The program of flickr30k.py and coco.py."""
    parser = Command(f"datasets_scripts.{module}", doc)
    parser.add_argument("--karpathy", type=Path, metavar="JSON", help="Karpathy's split file; needs --images.")
    parser.add_argument("--images", type=Path, metavar="DIR", help="Folder of the images.")
    parser.add_argument(
        "--hub_id", help=f"Instead of --karpathy and --images: a copy on the Hub, e.g. {benchmark.hub_id}."
    )
    parser.add_argument("--revision", help="Branch (such as refs/convert/parquet), tag or commit of the Hub's copy.")
    for name, default, what in (
        ("image_column", benchmark.hub_columns.image, "images"),
        ("caption_column", (benchmark.hub_columns.captions or (None,))[0], "captions"),
        ("id_column", benchmark.hub_columns.id, "the images' ids"),
    ):
        shown = default or "found by its usual names"
        parser.add_argument(
            f"--{name}", default=default, help=f"Column of {what} in the Hub's copy (default: {shown})."
        )
    parser.add_argument(
        "--data_license", default=benchmark.license, help="Licence of the data (default: %(default)s)."
    )
    parser.add_flag("--skip_broken", help="Leave out missing and broken images, which are errors otherwise.")
    parser.add_flag("--allow_other_counts", help="Accept other counts than the published ones, for a partial copy.")
    options = parse_arguments(parser, arguments)
    if bool(options.hub_id) == bool(options.karpathy or options.images):
        parser.error("expected either --karpathy and --images, or --hub_id")
    if options.hub_id:
        captions = None if options.caption_column is None else (options.caption_column,)
        columns = Columns(options.image_column, captions, options.id_column)
        parts = read_hub(options.hub_id, options.revision, columns, benchmark)
        how_made = f"{benchmark.title} under Karpathy's split, from the Hub's {as_code(options.hub_id)}, in its order."
    elif options.karpathy and options.images:
        parts = read_karpathy(options.karpathy, options.images, benchmark)
        how_made = f"{benchmark.title} under Karpathy's split, in the order of {as_code(options.karpathy.name)}."
    else:
        parser.error("--karpathy and --images need each other")
    check_counts(parts, benchmark, options.allow_other_counts)
    if lost := parts.get(None):
        first = lost[0].image_id
        raise ValueError(f"{len(lost):,} images are of no split (the first: {first!r}); expected each in one")
    parts = {split: parts[split] for split in SPLITS if parts.get(split)}
    title = benchmark.title
    build(parts, options.output_dir, title, how_made, options.data_license, options.skip_broken, options.push_to_hub)
