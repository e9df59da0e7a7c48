"""Brings features that another program made to the rows of a dataset, and writes what add_teacher_features writes.

    python -m datasets_scripts.import_teacher_features --dataset_name D --image_features IMAGES.npy \\
        --text_features TEXTS.parquet --teacher_model_name_or_path NAME --output_dir DIR

Files of features are .npy, .safetensors or .parquet, and say which image_id or caption each row belongs to; see
docs/guides/teachers.md. An image has one row.

    python -m datasets_scripts.import_teacher_features --dataset_name D --features train IMAGES.pt TEXTS.pt \\
        --features test IMAGES.pt TEXTS.pt --teacher_model_name_or_path NAME --output_dir DIR

takes what DSMD's published scripts write: a tensor of a split with a row for every caption, in the order of the rows
and of their captions; an image's row stands once for each of its captions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
from datasets.table import embed_table_storage
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from datasets_scripts.building import refuse_what_is_there
from datasets_scripts.feature_files import Features, check_features, read_features, read_tensor
from datasets_scripts.feature_shards import Shard, write_shard
from datasets_scripts.opening import license_of, open_dataset
from datasets_scripts.teacher_dataset import assemble, figures_table
from rows.checks import check_rows
from rows.columns import pairs_of
from rows.command_line import Command, run_program
from rows.files import shown_name, write_beside
from rows.teacher_columns import teacher_columns


SHARD_ROWS = 1024  # rows of a file
Places = tuple[np.ndarray, np.ndarray]  # of a split: the rows of its images `[N]` and of its captions `[C]`


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        figures = import_features(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.push_to_hub:
        HfApi().create_repo(options.push_to_hub, repo_type="dataset", exist_ok=True)
        HfApi().upload_folder(
            folder_path=options.output_dir,
            repo_id=options.push_to_hub,
            repo_type="dataset",
            delete_patterns=["data/*.parquet"],  # of an earlier push, with another number of files
        )
    print(f"\n{figures_table(figures)}\n" if figures else "")
    print(f"The dataset is in {options.output_dir}: train.py --dataset_name {options.output_dir}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("datasets_scripts.import_teacher_features", __doc__)
    parser.add_argument("--dataset_name", required=True, help="Folder or Hub id of the rows.")
    parser.add_argument(
        "--image_features", type=Path, nargs="+", metavar="FILE", help="Features of the images of all splits."
    )
    parser.add_argument(
        "--text_features",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="Features of the captions of all splits, by caption, or by image_id in the order of its captions.",
    )
    parser.add_argument(
        "--features",
        nargs=3,
        action="append",
        metavar=("SPLIT", "IMAGES", "TEXTS"),
        help="A split and its two files of DSMD's published scripts; once for each split, in the order of its rows.",
    )
    parser.add_argument(
        "--teacher_model_name_or_path", dest="teacher", required=True, help="What made the features, for the card."
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="New folder, written as add_teacher_features writes it."
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="Also push to this Hub dataset, e.g. name/features.")
    options = parser.parse_args(arguments)
    refuse_what_is_there(parser, options.output_dir)
    keyed = options.image_features, options.text_features
    if not (all(keyed) and not options.features or options.features and not any(keyed)):
        parser.error("give --image_features and --text_features, or --features for each split")
    options.output_dir = options.output_dir.resolve()
    return options


def import_features(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Writes the dataset; returns the teacher's figures by split.

    Raises:
        ValueError: rows or features that cannot be used, see [`keyed_features`] and [`published_features`].
    """
    source, name = options.dataset_name, options.teacher
    rows = open_dataset(source)
    for split, part in rows.items():
        missing = [column for column in ("image", "captions", "image_id") if column not in part.column_names]
        if missing or not len(part):
            lacks = f"has no column {', '.join(missing)}" if missing else "is empty: leave it out"
            raise ValueError(f"The {split} split of {source} {lacks}.")
        check_rows(part.with_format("arrow").select_columns(["image_id", "captions"])[:], split, None)
        if lonely := len(part) - len(pairs_of(part)):
            raise ValueError(
                f"{lonely:,} rows of the {split} split of {source} have no captions, or no image: this program takes "
                "rows that have both; add_teacher_features encodes what there is."
            )
    if options.features:
        image, text, places = published_features(rows, options.features)
    else:
        image, text, places = keyed_features(rows, options.image_features, options.text_features)
    if image.width != text.width:
        raise ValueError(f"Image features are {image.width} wide, text features {text.width}.")
    teacher = {
        "id": shown_name(name),
        "revision": None,
        "dim": image.width,
        "preprocessing": "not known",
        "stored_as": "float16",
    }
    with write_beside(options.output_dir) as beside:
        partial = beside / "partial"
        partial.mkdir()
        files = {
            split: write_split(part, split, image, text, places[split], teacher, partial)
            for split, part in rows.items()
        }
        figures = assemble(partial, files, teacher, shown_name(source), license_of(rows, source), int8=False)
        for path in list((partial / "dataset").iterdir()):
            path.rename(beside / path.name)
        shutil.rmtree(partial)
    return figures


def keyed_features(
    rows: datasets.DatasetDict, image_files: list[Path], text_files: list[Path]
) -> tuple[Features, Features, dict[str, Places]]:
    """Features of images and of captions, and where those of each split stand among them.

    Raises:
        ValueError: an id is missing, unknown or named twice, or an image has another number of features than captions.
    """
    image, _, image_ids = read_features(image_files, ["image_id"])
    text, text_key, text_ids = read_features(text_files, ["caption", "image_id"])
    image_place = _places("--image_features", "image_id", image_ids)
    text_rows: dict[str, list[int]] = {}
    if text_key == "caption":
        text_rows = {caption: [place] for caption, place in _places("--text_features", "caption", text_ids).items()}
    else:
        for place, image_id in enumerate(text_ids):
            text_rows.setdefault(image_id, []).append(place)
    places, known_images, known_texts = {}, set(), set()
    for split, part in rows.items():
        ids, captions = part["image_id"][:], part["captions"][:]
        _refuse_missing("--image_features", "image_id", ids, image_place, split)
        known_images.update(ids)
        named_texts = ids if text_key == "image_id" else [text for texts in captions for text in texts]
        _refuse_missing("--text_features", text_key, named_texts, text_rows, split)
        known_texts.update(named_texts)
        if text_key == "image_id":
            for image_id, texts in zip(ids, captions):
                if len(text_rows[image_id]) != len(texts):
                    raise ValueError(
                        f"--text_features have {len(text_rows[image_id])} rows of image_id {image_id!r} for its "
                        f"{len(texts)} captions in the {split} split: expected one each, in their order."
                    )
        own_texts = [place for text in named_texts for place in text_rows[text]]
        places[split] = np.array([image_place[image_id] for image_id in ids]), np.array(own_texts)
    _refuse_unknown("--image_features", "image_id", image_place.keys() - known_images)
    _refuse_unknown("--text_features", text_key, text_rows.keys() - known_texts)
    return image, text, places


def _places(option: str, key: str, ids: list[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, value in enumerate(ids):
        if places.setdefault(value, place) != place:
            raise ValueError(f"{option} name the {key} {value!r} twice: keep one row of it.")
    return places


def _refuse_missing(option: str, key: str, wanted: Iterable[str], found: dict, split: str) -> None:
    missing = list(dict.fromkeys(value for value in wanted if value not in found))
    if missing:
        raise ValueError(
            f"{option} have no row of {key} {missing[0]!r}{_and_more(missing)} of the {split} split: each needs one."
        )


def _refuse_unknown(option: str, key: str, unknown: set[str]) -> None:
    if unknown:
        raise ValueError(
            f"{option} name the {key} {min(unknown)!r}{_and_more(unknown)}, which no row of the dataset has: write "
            f"{key}s as the dataset has them, and leave out what is not in it."
        )


def _and_more(values: list | set) -> str:
    return f" and {len(values) - 1:,} more" if len(values) > 1 else ""


def published_features(
    rows: datasets.DatasetDict, named: list[tuple[str, str, str]]
) -> tuple[Features, Features, dict[str, Places]]:
    """The same of files of DSMD's published scripts, which name no ids.

    Args:
        named: a split and its two files, once for each split.

    Raises:
        ValueError: a split is missing or named twice, the counts or widths differ, or an image's rows differ among
            themselves: the features then belong to rows in another order.
    """
    if len({split for split, _, _ in named}) != len(named) or {split for split, _, _ in named} != set(rows):
        given = ", ".join(split for split, _, _ in named)
        raise ValueError(f"--features names {given}; the dataset has {', '.join(rows)}. Give each once.")
    images, texts, places, start = [], [], {}, 0
    for split, image_file, text_file in named:
        image, text = read_tensor(Path(image_file)), read_tensor(Path(text_file))
        if image.shape[1] != text.shape[1]:
            raise ValueError(f"Image features are {image.shape[1]} wide, text features {text.shape[1]}.")
        firsts = _rows_of_images(rows[split], split, (image_file, image), (text_file, text))
        places[split] = start + firsts, start + np.arange(len(text))
        for found, part in ((images, image), (texts, text)):
            if found and found[0].shape[1] != part.shape[1]:
                raise ValueError(
                    f"Features of the {split} split are {part.shape[1]} wide, others {found[0].shape[1]}."
                )
            found.append(part)
        start += len(text)
    return Features(images), Features(texts), places


def _rows_of_images(
    part: datasets.Dataset, split: str, image_file: tuple[str, np.ndarray], text_file: tuple[str, np.ndarray]
) -> np.ndarray:
    """The first row `[N]` of each image among its captions'. A file is its path and what it holds."""
    counts, ids = np.array([len(captions) for captions in part["captions"]]), part["image_id"][:]
    for name, (path, features) in (("image", image_file), ("text", text_file)):
        if len(features) != counts.sum():
            raise ValueError(
                f"{len(features)} {name} features for the {counts.sum()} captions of the {split} split: they are of "
                "other data, or of captions cut to another number an image."
            )
        check_features(Path(path), "image_id", np.repeat(ids, counts).tolist(), features)
    image = image_file[1]
    stops = np.cumsum(counts)
    starts = stops - counts
    noise = 1e-2 * np.abs(image).max()
    for row, (start, stop) in enumerate(zip(starts, stops)):
        if np.abs(image[start:stop] - image[start]).max() > noise:
            raise ValueError(
                f"{split} split, row {row} (image_id {ids[row]!r}): the image features of its captions differ, so "
                "they are not in the order of these rows."
            )
    return starts


def write_split(
    part: datasets.Dataset,
    split: str,
    image: Features,
    text: Features,
    places: Places,
    teacher: dict,
    folder: Path,
) -> int:
    """Writes a split's rows with `teacher_image_embeds`, `teacher_text_embeds` and `teacher`, in the place of any they
    had, as `folder/{split}-{number}.parquet`; returns the number of files."""
    stops = np.cumsum([len(captions) for captions in part["captions"]])
    dropped = {*teacher_columns(part.column_names), "teacher"}
    part = part.select_columns([name for name in part.column_names if name not in dropped])
    part = part.cast_column("image", datasets.Image(decode=False)).with_format("arrow")
    image_rows, text_rows = places
    starts = range(0, len(part), SHARD_ROWS)
    for number, start in enumerate(tqdm(starts, desc=f"features of {split}", leave=False, disable=None)):
        stop = min(len(part), start + SHARD_ROWS)
        try:
            table = embed_table_storage(part[start:stop])
        except OSError as error:
            raise ValueError(f"An image file of the {split} split cannot be read: {error}") from error
        first = stops[start - 1] if start else 0
        own_image, own_text = image_rows[start:stop], text_rows[first : stops[stop - 1]]
        shard = Shard(
            split, number, table,
            distinct_images=list(range(len(own_image))), image_of_row=list(range(len(own_image))),
            distinct_captions=[], text_of_caption=list(range(len(own_text))), batches=[],
            left_out={"images": [], "rows": []},
            features={"image": [image.take(own_image)], "text": [text.take(own_text)]},
        )  # fmt: skip
        write_shard(shard, json.dumps(teacher), False, folder)
    return len(starts)


if __name__ == "__main__":
    run_program(main)
