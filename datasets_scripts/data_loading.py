"""The rows that a run trains and evaluates on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState

from datasets_scripts.pool import say_lonely, with_pool, without_alike
from datasets_scripts.run_splits import open_splits, with_test_split
from datasets_scripts.teacher_identity import check_same_teachers, shown_name, without_names
from model_cards import describe_captions
from rows.columns import Splits, caption_lists, partners
from rows.teacher_columns import (
    TEACHER_COLUMNS,
    teacher_columns,
    teacher_description,
    teacher_width,
)


STREAM_HEAD = 20_000  # rows of a stream whose captions train a tokenizer


@dataclass
class DataArguments:
    """Which rows, and whether a teacher's features are learned from them."""

    method: str = field(
        default="distillation",
        metadata={
            "choices": ["distillation", "contrastive"],
            "help": "Learn a teacher's stored features (distillation), or from the pairs alone (contrastive): for a "
            "baseline, or to make a teacher.",
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "'icons', a Hub id, or a folder: of `save_to_disk`, or of parquet files as on the Hub."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    validation_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Another dataset to validate on, and to test on where dataset_name has no test split."},
    )
    pool: str | None = field(
        default=None,
        metadata={
            "help": "Another dataset whose images and texts are trained on too, partners or not: a folder or "
            "a Hub id, with the same teacher's features where dataset_name has any."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Name of the split that is trained on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Name of the split that chooses the best checkpoint."}
    )
    test_split: str = field(default="test", metadata={"help": "Name of the split that is evaluated once, at the end."})
    test_fold_size: int | None = field(
        default=None,
        metadata={"help": "Also report the mean over consecutive folds of this many test images (COCO 1K: 1000)."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream the training split, never storing it; needs max_steps."}
    )
    teacher_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": "Teacher: makes the features where the dataset has none; kept in the cache for later runs. "
            "Several are joined. Named on the command line, features that are there must be of it.",
        },
    )
    teacher_revision: list[str] | None = field(
        default=None,
        metadata={"action": "extend", "help": "Branch, tag or commit of each teacher on the Hub, in their order."},
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several teachers (default: all equal)."}
    )
    skip_broken: bool = field(
        default=False,
        metadata={"help": "Where a teacher's features are made: leave out rows that cannot be used, and list them."},
    )
    max_skipped: float | None = field(
        default=None,
        metadata={"help": "Share of rows that skip_broken leaves out at most, such as 0.01 (default: any)."},
    )
    data_license: str | None = field(
        default=None, metadata={"help": "Licence of the data, shown on the card (default: what the dataset says)."}
    )
    baseline_results: Path | None = field(
        default=None,
        metadata={"help": "all_results.json of a --method contrastive run, shown beside this student in the tables."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})

    def __post_init__(self):
        if self.test_fold_size is not None and self.test_fold_size < 1:
            raise ValueError(f"test_fold_size={self.test_fold_size}: expected 1 or more images, or none.")
        if self.max_skipped is not None and not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped={self.max_skipped}: expected a share from 0 to 1, such as 0.01.")
        for name in ("teacher_revision", "teacher_weights"):
            values, teachers = getattr(self, name), self.teacher_model_name_or_path or []
            if values is not None and len(values) != len(teachers):
                raise ValueError(f"{name}: {len(values)} values for {len(teachers)} teachers.")
        if self.teacher_weights is not None and min(self.teacher_weights) <= 0:
            raise ValueError(f"teacher_weights={self.teacher_weights}: expected numbers above 0.")

    @property
    def teachers(self) -> list[tuple[str, str | None]]:
        """Id and revision of each teacher."""
        names = self.teacher_model_name_or_path or []
        return list(zip(names, self.teacher_revision or [None] * len(names)))

    @property
    def split_names(self) -> dict[str, str]:
        """What the dataset calls its splits: train, validation, test -> name."""
        return {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}


def load_data(
    args: DataArguments,
    trust_remote_code: bool = False,
    before_teacher: Callable[[datasets.DatasetDict], int | None] | None = None,
    trains: bool = True,
    teacher_is_demanded: bool = False,
) -> Splits:
    """The dataset's splits, named train, validation and test, with the teacher's features where there are any.

    A dataset that has features is used as it is: the teacher of the arguments makes them where there are none.

    Args:
        before_teacher: called with the splits before a teacher is loaded to make features; returns the width
            that the student was told to have, or None.
        trains: the run is a training; an evaluation does with the splits that there are.
        teacher_is_demanded: refuse features of another teacher than that of the arguments.

    Raises:
        ValueError: where the dataset is not named or lacks a split, has another teacher's features than demanded, or
            has none and none can be made.
    """
    if args.dataset_name is None:
        raise ValueError("dataset_name is missing: 'icons', a Hub id, or a folder.")
    state = PartialState()
    of_run = (args.split_names, args.validation_dataset_name, trains)
    with state.main_process_first():  # what one process has prepared, the others find
        rows = open_splits(args.dataset_name, args.dataset_config_name, args.streaming, *of_run)
    if args.streaming and state.is_main_process:
        print("a stream is not checked for pictures that are in several splits or there under several names")
    # What a distillation learns from; an evaluation compares with the teacher where it can.
    judged = ["train"] if trains else [split for split in rows if split != "train"]
    has_features = all(set(TEACHER_COLUMNS) <= set(rows[split].column_names) for split in judged)
    if args.pool is not None:
        _check_pool(args, trains)
    added: set[str] = set()  # image_ids of the pool's rows that the teacher runs over too
    if args.pool is not None and not has_features and args.dataset_name != "icons":
        own = len(rows["train"])
        rows = with_pool(rows, args.pool)
        added = set(rows["train"]["image_id"][own:])
    if has_features:
        rows = _with_own_features(rows, args, teacher_is_demanded)
    elif args.teachers and not args.streaming:
        rows = _with_teacher(rows, args, trust_remote_code, before_teacher if trains else None)
        if added:
            rows = without_alike(rows, added, args.pool)
    elif args.dataset_name == "icons" and not args.streaming:
        from datasets_scripts.icons_teacher import add_icons_features, features_file

        if args.method == "distillation" or features_file().is_file():
            with state.main_process_first():
                rows = add_icons_features(rows)
    elif trains and args.method == "distillation":
        raise ValueError(_no_features(args))
    if args.pool is not None and (has_features or args.dataset_name == "icons"):
        rows = with_pool(rows, args.pool)
    if "train" in rows:
        rows = with_test_split(rows, args.dataset_name)
        say_lonely(rows["train"])
    if args.test_fold_size and len(rows.get("test", ())) % args.test_fold_size:
        raise ValueError(
            f"test_fold_size={args.test_fold_size} does not divide the {len(rows['test'])} test images: leave it out."
        )
    return rows


def _check_pool(args: DataArguments, trains: bool) -> None:
    """Refuses a pool where none can be used.

    Raises:
        ValueError: which setting does not go with it.
    """
    if not trains:
        raise ValueError(f"--pool {args.pool} is for training: leave it out of an evaluation.")
    if args.streaming:
        raise ValueError(f"--pool {args.pool} cannot join a stream: leave out --streaming, or stream one dataset.")
    if args.method == "contrastive":
        raise ValueError(f"--pool {args.pool}: without a teacher, what has no partner teaches nothing; leave it out.")


def _no_features(args: DataArguments) -> str:
    make = f"python -m datasets_scripts.add_teacher_features --dataset_name {args.dataset_name}"
    teacher = " ".join(f"--teacher_model_name_or_path {name}" for name, _ in args.teachers or [("TEACHER", None)])
    if args.streaming:
        return (
            f"{args.dataset_name} has no teacher features, which a stream needs beforehand: run `{make} --streaming "
            f"{teacher} --output_dir DIR`, and stream DIR."
        )
    return (
        f"{args.dataset_name} has no teacher features: name a teacher that makes them by "
        "--teacher_model_name_or_path, or train without one by --method contrastive."
    )


def _with_own_features(rows: Splits, args: DataArguments, teacher_is_demanded: bool) -> Splits:
    """The rows as they are; says whose features they have. Those of other splits that are another teacher's go.

    Raises:
        ValueError: another teacher is demanded.
    """
    description = teacher_description(rows) or {}
    if teacher_is_demanded and args.teachers:
        way_out = (
            "leave --teacher_model_name_or_path out, or make others with datasets_scripts.add_teacher_features and "
            "another --output_dir."
        )
        try:
            check_same_teachers(description, args.teachers, args.dataset_name)
        except ValueError as error:
            raise ValueError(f"{error}: {way_out}") from None
        weights, stored = _shares(args.teacher_weights), description.get("weights")
        if weights is not None and stored is not None and not np.allclose(weights, stored):
            raise ValueError(f"{args.dataset_name} joins its teachers by {stored}, not by {weights}: {way_out}")
    whose = description.get("id", "an unnamed teacher")
    said = [f"{args.dataset_name} has teacher features, of {whose}"]
    asked = " + ".join(shown_name(name) for name, _ in args.teachers)
    if not teacher_is_demanded and asked not in ("", whose):
        said.append(f"the recipe's {asked} is not used")
    for split in ("validation", "test") if args.validation_dataset_name is not None else ():
        part = rows.get(split)
        if part is None or not set(TEACHER_COLUMNS) <= set(part.column_names):
            continue
        of_part = teacher_description({split: part}) or {}
        facts = [(of.get("id"), without_names(of)) for of in (description, of_part)]
        if facts[0] != facts[1] or teacher_width({split: part}) != teacher_width(rows):
            said.append(f"those of the {split} split are of {of_part.get('id', 'an unnamed teacher')} and not used")
            columns = (*teacher_columns(part.column_names), "teacher")
            rows[split] = part.select_columns([name for name in part.column_names if name not in columns])
    if PartialState().is_main_process:
        print("; ".join(said))
    return rows


def _shares(weights: list[float] | None) -> list[float] | None:
    return None if weights is None else [weight / sum(weights) for weight in weights]


def _with_teacher(
    rows: datasets.DatasetDict,
    args: DataArguments,
    trust_remote_code: bool,
    before_teacher: Callable[[datasets.DatasetDict], int | None] | None,
) -> datasets.DatasetDict:
    """The rows with features of the arguments' teachers: kept from an earlier run, or made now."""
    from datasets_scripts.feature_job import cached_teacher_features
    from datasets_scripts.teacher_dataset import join_columns

    count = len(args.teachers)
    folder = cached_teacher_features(
        rows,
        args.teachers,
        _shares(args.teacher_weights) or [1 / count] * count,
        source=args.dataset_name,
        trust_remote_code=trust_remote_code,
        skip_broken=args.skip_broken,
        max_skipped=args.max_skipped,
        before_teacher=None if before_teacher is None else partial(before_teacher, rows),
    )
    if PartialState().is_main_process:
        print(f"teacher features: {folder}")
    with PartialState().main_process_first():
        return join_columns(rows, folder)


def settings_that_count(args: DataArguments) -> dict[str, object]:
    """The settings that a run's result follows from, by name; those of an earlier release as that release had them."""
    settings = asdict(args)
    for name in ("overwrite_output_dir", "skip_broken", "max_skipped"):  # what is left out shows in the rows
        settings.pop(name)
    for name in ("teacher_model_name_or_path", "teacher_revision"):
        if len(settings[name] or ()) == 1:
            settings[name] = settings[name][0]
    younger = ("validation_dataset_name", "teacher_weights", "pool")
    return {name: value for name, value in settings.items() if name not in younger or value is not None}


def training_captions(part: datasets.Dataset | datasets.IterableDataset) -> Iterator[str]:
    """All captions of a training split; of a stream those of its first 20,000 rows; read as they are used."""
    streamed = isinstance(part, datasets.IterableDataset)
    for captions in caption_lists(part.take(STREAM_HEAD) if streamed else part):
        yield from captions


def data_facts(rows: Splits, args: DataArguments) -> dict[str, dict]:
    """How many images, captions and words each split has, by its own name; not of a streamed one."""
    return {
        args.split_names[split]: describe_captions(caption_lists(part), partners(part)[0])
        for split, part in rows.items()
        if isinstance(part, datasets.Dataset) and len(part)
    }


def read_baseline(path: Path | None, test_images: int) -> dict[str, float] | None:
    """The figures of a contrastive run, where one is named.

    Raises:
        ValueError: the file is not such a run's, or was not of as many test images.
    """
    if path is None:
        return None
    try:
        figures = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--baseline_results {path} cannot be read: {error}") from error
    if not isinstance(figures, dict) or "test_rsum" not in figures:
        raise ValueError(f"--baseline_results {path} has no test_rsum: name the all_results.json of a run.")
    if figures["test_images"] != test_images:
        raise ValueError(
            f"--baseline_results {path} is of {figures['test_images']} test images, and this run has {test_images}: "
            "the two cannot stand in one table."
        )
    return figures
