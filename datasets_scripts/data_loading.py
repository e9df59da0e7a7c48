"""The rows that a run trains and evaluates on."""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from datasets_scripts.opening import open_dataset
from datasets_scripts.teacher_identity import check_same_teachers
from model_cards import describe_captions
from rows.columns import Splits, caption_lists
from rows.files import printable
from rows.images import check_image_paths, load_rgb
from rows.teacher_columns import TEACHER_COLUMNS, teacher_batches, teacher_description, teacher_width
from trainers.streaming import left_out_of
from trainers.teacher_pca import PCA_FILE, fit_pca, load_pca


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
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Teacher: makes the features where the dataset has none; kept in the cache for later runs."},
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
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
        if self.streaming and self.teacher_model_name_or_path is not None:
            raise ValueError(
                "streaming and teacher_model_name_or_path do not go together: the features are kept with the rows. "
                "Run `python -m datasets_scripts.add_teacher_features --streaming` first, and stream what it writes."
            )


def load_data(
    args: DataArguments,
    trust_remote_code: bool = False,
    before_teacher: Callable[[datasets.Dataset], None] | None = None,
) -> Splits:
    """The dataset's splits, named train, validation and test, with the teacher's features where there are any.

    Args:
        before_teacher: called with the training split before a teacher is loaded to make features.

    Raises:
        ValueError: where the dataset is not named or lacks a split, or has another teacher's features than asked for.
    """
    if args.dataset_name is None:
        raise ValueError("dataset_name is missing: 'icons', a Hub id, or a folder.")
    state = PartialState()
    with state.main_process_first():  # what one process has prepared, the others find
        rows = open_dataset(args.dataset_name, args.dataset_config_name, args.streaming, whole_samples=True)
    wanted = {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    missing = [split for split in wanted.values() if split not in rows]
    if missing:
        raise ValueError(
            f"{args.dataset_name} has no split {', '.join(missing)} (it has {', '.join(rows)}): "
            "name its splits by train_split, validation_split and test_split."
        )
    rows = type(rows)({split: rows[name] for split, name in wanted.items()})
    if args.test_fold_size and not args.streaming and len(rows["test"]) % args.test_fold_size:
        raise ValueError(
            f"test_fold_size={args.test_fold_size} does not divide the {len(rows['test'])} test images: leave it out."
        )
    if args.streaming:
        if state.is_main_process:
            print("a stream is not checked for pictures that are in several splits or there under several names")
        return datasets.IterableDatasetDict(
            {split: part if split == "train" else _stored(part, split) for split, part in rows.items()}
        )
    if args.teacher_model_name_or_path is not None:
        return _with_teacher(rows, args, trust_remote_code, before_teacher)
    if args.dataset_name == "icons":
        from datasets_scripts.icons_teacher import add_icons_features, features_file

        if args.method == "distillation" or features_file().is_file():
            with state.main_process_first():
                rows = add_icons_features(rows)
    return rows


def _stored(stream: datasets.IterableDataset, split: str) -> datasets.Dataset:
    """A streamed split on disk until the process ends: evaluation needs its rows in order, several times.

    Rows that training would leave out are left out, and counted.
    """
    folder = tempfile.TemporaryDirectory(prefix="dsmd-")
    atexit.register(folder.cleanup)
    stream = stream.cast_column("image", datasets.Image(decode=False))
    left_out = []

    def usable_rows() -> Iterator[dict]:
        for table in stream.with_format("arrow").iter(100):
            faults = left_out_of(table)
            check_image_paths(table.filter(table["image"].is_valid())["image"], None)
            for i, row in enumerate(table.to_pylist()):
                try:
                    if i not in faults:
                        load_rgb(row["image"])
                        yield row
                        continue
                    reason = faults[i]
                except ValueError as error:
                    reason = error
                left_out.append(f"{printable(str(row['image_id']))}: {reason}")

    rows = datasets.Dataset.from_generator(
        usable_rows, features=stream.features, cache_dir=folder.name, fingerprint=os.path.basename(folder.name)
    )
    if left_out and PartialState().is_main_process:
        print(f"{len(left_out):,} rows of the {split} split are left out, the first: {left_out[0]}")
    return rows.cast_column("image", datasets.Image())


def _with_teacher(
    rows: datasets.DatasetDict,
    args: DataArguments,
    trust_remote_code: bool,
    before_teacher: Callable[[datasets.Dataset], None] | None,
) -> datasets.DatasetDict:
    """The rows with the features of `teacher_model_name_or_path`: their own, kept from an earlier run, or made now."""
    teacher_id, revision = args.teacher_model_name_or_path, args.teacher_revision
    present = [split for split, part in rows.items() if set(TEACHER_COLUMNS) <= set(part.column_names)]
    if len(present) == len(rows):
        try:
            check_same_teachers(teacher_description(rows) or {}, [(teacher_id, revision)], args.dataset_name)
        except ValueError as error:
            raise ValueError(
                f"{error}: leave teacher_model_name_or_path out, or make others with "
                "datasets_scripts.add_teacher_features."
            ) from None
        return rows
    from datasets_scripts.feature_job import cached_teacher_features
    from datasets_scripts.teacher_dataset import join_columns

    folder = cached_teacher_features(
        rows,
        [(teacher_id, revision)],
        [1.0],
        source=args.dataset_name,
        trust_remote_code=trust_remote_code,
        skip_broken=args.skip_broken,
        max_skipped=args.max_skipped,
        before_teacher=None if before_teacher is None else partial(before_teacher, rows["train"]),
    )
    if PartialState().is_main_process:
        print(f"teacher features: {folder}")
    with PartialState().main_process_first():
        return join_columns(rows, folder)


def teacher_projection(
    rows: Splits, args: DataArguments, projection_dim: int, saved: str | None
) -> torch.Tensor | None:
    """`[D, projection_dim]`, which brings the teacher's features to the student's width; None where they have it.

    The projection that the student was trained under, else the one that came with the dataset, else one fitted on the
    training split's features; see [`fit_pca`].

    Args:
        saved: folder or Hub id of the student or checkpoint that the run starts from.

    Raises:
        ValueError: the student would be wider than its teacher; or a stream came without a projection.
    """
    width = teacher_width(rows)
    if width is None or projection_dim == width:
        return None
    if projection_dim > width:
        way_out = f"train with --projection_dim {width} or less"
        if saved is not None:
            way_out = "evaluate it by --method contrastive, which takes features of any width, or make wider ones"
        raise ValueError(
            f"projection_dim={projection_dim} is more than the {width} of the teacher's features: {way_out}."
        )
    components = None if saved is None else _stored_pca(saved, "model")
    if components is None and args.dataset_name != "icons":
        components = _stored_pca(args.dataset_name, "dataset")
    if components is None and args.streaming:
        raise ValueError(
            f"projection_dim={projection_dim} is less than the teacher's {width}, and the dataset brings no "
            f"{PCA_FILE} to project with: add its features with datasets_scripts.add_teacher_features."
        )
    if components is None:
        components = fit_pca(teacher_batches(rows["train"]))
    if components.shape[0] != width or components.shape[1] < projection_dim:
        raise ValueError(f"{PCA_FILE} is {list(components.shape)}, expected [{width}, {projection_dim} or more].")
    return components[:, :projection_dim].contiguous()


def _stored_pca(name: str, repo_type: str) -> torch.Tensor | None:
    if Path(name).is_dir():
        return load_pca(name)
    try:
        return load_pca(os.path.dirname(hf_hub_download(name, PCA_FILE, repo_type=repo_type)))
    except EntryNotFoundError:
        return None


def training_captions(part: datasets.Dataset | datasets.IterableDataset) -> Iterator[str]:
    """All captions of a training split; of a stream those of its first 20,000 rows; read as they are used."""
    streamed = isinstance(part, datasets.IterableDataset)
    for captions in caption_lists(part.take(STREAM_HEAD) if streamed else part):
        yield from captions


def data_facts(rows: Splits, args: DataArguments) -> dict[str, dict]:
    """How many images, captions and words each split has, by its own name; not of a streamed one."""
    names = {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    return {
        names[split]: describe_captions(caption_lists(part))
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
