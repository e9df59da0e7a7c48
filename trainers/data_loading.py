"""The rows that a run trains and evaluates on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets


@dataclass
class DataArguments:
    """Which rows, and whether a teacher's features are learned from them."""

    method: str = field(
        default="distillation",
        metadata={
            "choices": ["distillation", "contrastive"],
            "help": "Learn a teacher's stored features, or pairs alone (the baseline; also how a teacher is made).",
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "'icons', a Hub id, or a folder written by `DatasetDict.save_to_disk`."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Trained on."})
    validation_split: str = field(default="validation", metadata={"help": "Chooses the best checkpoint."})
    test_split: str = field(default="test", metadata={"help": "Evaluated once, at the end."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})


def load_data(args: DataArguments) -> datasets.DatasetDict:
    """The dataset's splits, named train, validation and test; the icons with their teacher's features.

    Raises:
        ValueError: where the dataset is not named or lacks a split.
    """
    if args.dataset_name is None:
        raise ValueError("dataset_name is missing: 'icons', a Hub id, or a folder written by `save_to_disk`.")
    if args.dataset_name == "icons":
        from datasets_scripts.icons import load_icons
        from datasets_scripts.icons_teacher import add_teacher_features, features_file

        rows = load_icons()
        if args.method == "distillation" or features_file().is_file():
            rows = add_teacher_features(rows)
    elif Path(args.dataset_name).is_dir():
        rows = datasets.load_from_disk(args.dataset_name)
    else:
        rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    wanted = {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    missing = [split for split in wanted.values() if split not in rows]
    if missing:
        raise ValueError(
            f"{args.dataset_name} has no split {', '.join(missing)} (it has {', '.join(rows)}): "
            "name its splits by train_split, validation_split and test_split."
        )
    return datasets.DatasetDict({split: rows[name] for split, name in wanted.items()})


def teacher_width(rows: datasets.DatasetDict) -> int | None:
    """Width D of the stored teacher features; None where there are none."""
    if "teacher_image_embeds" not in rows["train"].column_names or len(rows["train"]) == 0:
        return None
    return len(rows["train"].select_columns("teacher_image_embeds")[0]["teacher_image_embeds"])


def teacher_description(rows: datasets.DatasetDict) -> dict | None:
    """What the constant column `teacher` says of the teacher; None where the column is missing."""
    if "teacher" not in rows["train"].column_names:
        return None
    return json.loads(rows["train"].select_columns("teacher")[0]["teacher"])
