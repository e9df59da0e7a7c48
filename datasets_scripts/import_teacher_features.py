"""Adds features made by DSMD's published scripts to a dataset, as the columns that train.py learns from.

    python -m datasets_scripts.import_teacher_features --dataset_name D --features train IMAGES.pt TEXTS.pt \\
        --features test IMAGES.pt TEXTS.pt --teacher_model_name_or_path NAME --output_dir DIR

Each file holds one tensor with a row for every caption of a split, in the order of the rows and of their captions; an
image's feature is repeated for each of its captions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from datasets_scripts.building import parse_arguments
from datasets_scripts.opening import open_dataset
from rows.checks import check_rows
from rows.command_line import Command, run_program
from rows.files import write_beside
from rows.teacher_columns import dataset_of, feature_columns, teacher_columns


def read_tensor(path: Path) -> torch.Tensor:
    """The one tensor `[rows, D]` in a file of `torch.save`, in float32.

    Raises:
        ValueError: it holds anything else; a pickle that would run code is not read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on broken bytes has no common type
        raise ValueError(
            f"{path} was not read: it is missing, damaged or a pickle of more than tensors, which can run any code. "
            "Expected one tensor saved by torch.save."
        ) from error
    if isinstance(content, (list, tuple)) and content and all(isinstance(part, torch.Tensor) for part in content):
        content = torch.cat([part if part.ndim == 2 else part[None] for part in content])
    if not isinstance(content, torch.Tensor) or content.ndim != 2 or not content.is_floating_point():
        found = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise ValueError(f"{path} holds {found}: expected one tensor of features, [captions, width].")
    return content.float()


def with_features(
    part: datasets.Dataset, image: torch.Tensor, text: torch.Tensor, split: str, teacher: dict
) -> datasets.Dataset:
    """A split's rows with `teacher_image_embeds`, `teacher_text_embeds` and `teacher`, in the place of any they had.

    Args:
        part: the split, its rows in the order that the features were made in.
        image, text: `[C, D]`, one row a caption.

    Raises:
        ValueError: the counts or widths differ, rows are NaN, infinite or zero, or an image's rows differ among
            themselves: the features then belong to rows in another order.
    """
    check_rows(part.with_format("arrow").select_columns(["image_id", "captions"])[:], split, None)
    counts = np.array([len(captions) for captions in part["captions"]])
    for name, features in (("image", image), ("text", text)):
        if len(features) != counts.sum():
            raise ValueError(
                f"{len(features)} {name} features for the {counts.sum()} captions of the {split} split: they are of "
                "other data, or made with another number of captions an image."
            )
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"Image features are {image.shape[1]} wide, text features {text.shape[1]}.")
    stops = np.cumsum(counts)
    starts = stops - counts
    ids = part["image_id"][:]
    noise = 1e-2 * image.abs().amax()
    for row, (start, stop) in enumerate(zip(starts, stops)):
        if (image[start:stop] - image[start]).abs().amax() > noise:
            raise ValueError(
                f"{split} split, row {row} (image_id {ids[row]!r}): the image features of its captions differ, so "
                "they are not in the order of these rows."
            )
    columns = feature_columns(image[torch.from_numpy(starts)], text, counts, ids)
    columns["teacher"] = pa.array([json.dumps(teacher)] * len(part)), datasets.Value("string")
    old = [*teacher_columns(part.column_names), *({"teacher"} & set(part.column_names))]
    return datasets.concatenate_datasets([part.remove_columns(old), dataset_of(columns)], axis=1)


def main(arguments: list[str] | None = None) -> None:
    parser = Command("datasets_scripts.import_teacher_features", __doc__)
    parser.add_argument(
        "--dataset_name", required=True, help="Folder or Hub id of the dataset, its rows in the features' order."
    )
    parser.add_argument(
        "--features",
        nargs=3,
        action="append",
        required=True,
        metavar=("SPLIT", "IMAGES", "TEXTS"),
        help="A split and the files of its image and text features; given again for each split.",
    )
    parser.add_argument(
        "--teacher_model_name_or_path",
        dest="teacher",
        required=True,
        help="Name of the teacher that made the features, for the card.",
    )
    options = parse_arguments(parser, arguments)
    try:
        rows = open_dataset(options.dataset_name)
        named = {split: (Path(image), Path(text)) for split, image, text in options.features}
        if len(named) != len(options.features) or set(named) != set(rows):
            given = ", ".join(split for split, _, _ in options.features)
            raise ValueError(f"--features names {given}; the dataset has {', '.join(rows)}. Give each once.")
        result = datasets.DatasetDict()
        for split, (image_path, text_path) in named.items():
            image, text = read_tensor(image_path), read_tensor(text_path)
            teacher = {
                "id": options.teacher,
                "revision": None,
                "dim": image.shape[1],
                "preprocessing": "not known",
            }
            result[split] = with_features(rows[split], image, text, split, teacher)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with write_beside(options.output_dir) as beside:
        result.save_to_disk(beside)
    if options.push_to_hub:
        result.push_to_hub(options.push_to_hub)
    print(f"{options.output_dir}: " + ", ".join(f"{len(part):,} {split} rows" for split, part in result.items()))


if __name__ == "__main__":
    run_program(main)
