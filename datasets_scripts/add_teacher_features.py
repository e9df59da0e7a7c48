"""Adds a teacher's output features to an image-text dataset: what a student is distilled from, made once.

    accelerate launch -m datasets_scripts.add_teacher_features --dataset_name D --teacher_model_name_or_path ID \\
        --output_dir DIR

It can be stopped at any moment: the same command goes on from the last whole file, with the same result; with another
number of threads features may differ by rounding. The output is a folder as the Hub has it (`data/*.parquet`, a card),
for `train.py --dataset_name DIR`, `datasets.load_dataset(DIR)`, streamed or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from huggingface_hub import HfApi

from datasets_scripts.feature_job import (
    check_replaceable,
    default_dtype,
    default_workers,
    identity_of,
    make_teacher_features,
)
from datasets_scripts.feature_shards import Encoding
from datasets_scripts.left_out import share
from datasets_scripts.opening import license_of, open_dataset
from datasets_scripts.teacher_identity import check_same_teachers, earlier_fingerprint, teacher_fingerprint
from rows.command_line import Command
from rows.files import shown_name
from teachers import load_teacher
from trainers.run.distributed import run_launched, use_the_cores


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("datasets_scripts.add_teacher_features", __doc__)
    parser.add_argument(
        "--dataset_name", required=True, help="'icons', a Hub id, or a folder (save_to_disk or parquet)."
    )
    parser.add_argument("--dataset_config_name", help="Configuration of a Hub dataset.")
    parser.add_flag("--streaming", help="Read the dataset as a stream, never storing it.")
    parser.add_argument(
        "--teacher_model_name_or_path",
        action="extend",
        nargs="+",
        dest="teachers",
        metavar="TEACHER",
        required=True,
        help="Folder or Hub id of the teacher. The features of several, or of one option given again, are joined.",
    )
    parser.add_argument(
        "--teacher_revision",
        action="extend",
        nargs="+",
        help="Branch, tag or commit of each teacher, in their order.",
    )
    parser.add_argument(
        "--teacher_weights",
        type=float,
        nargs="+",
        help="Weights of several teachers, in their order (default: all equal).",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the dataset.")
    parser.add_flag("--overwrite_output_dir", help="Replace the output folder.")
    parser.add_argument("--push_to_hub", metavar="REPO", help="Also push to this Hub dataset, e.g. name/coco-clip.")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="Type of the teacher's arithmetic (default: auto, which is bfloat16 on a GPU and float32 on a CPU).",
    )
    parser.add_flag("--int8", help="Store features as int8 with one scale for each row: half the size of float16.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in a batch (default: %(default)s).")
    parser.add_argument("--shard_rows", type=int, default=1024, help="Rows in a parquet file (default: %(default)s).")
    parser.add_argument(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help="Store images with no side above this, the student's size: faster to read, smaller on disk.",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        help="Workers of each process that decode images (default: its share of the cores, 8 at most).",
    )
    parser.add_argument("--data_license", help="Licence of the data (default: what the dataset says).")
    parser.add_flag("--skip_broken", help="Leave out rows whose image or captions cannot be used, and list them.")
    parser.add_argument(
        "--max_skipped",
        type=share,
        metavar="SHARE",
        help="Share of rows that --skip_broken leaves out at most, such as 0.01 (default: any).",
    )
    parser.add_flag("--trust_remote_code", help="Let the teachers' repositories run code of their own.")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "shard_rows", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected 1 or more")
    for name in ("teacher_revision", "teacher_weights"):
        values = getattr(options, name)
        if values is not None and len(values) != len(options.teachers):
            parser.error(f"--{name}: {len(values)} values for {len(options.teachers)} teachers")
    if options.teacher_weights is not None and min(options.teacher_weights) <= 0:
        parser.error(f"--teacher_weights {options.teacher_weights}: expected numbers above 0")
    if options.output_dir.exists():  # before a teacher is loaded
        if not options.overwrite_output_dir and not options.push_to_hub:
            parser.error(
                f"--output_dir {options.output_dir} exists: name another, or replace it with --overwrite_output_dir"
            )
        try:
            check_replaceable(options.output_dir)
        except ValueError as error:
            parser.error(f"--output_dir {error}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # Left to itself accelerate joins no processes on a CPU, and gives up on a process that waits for ten minutes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    use_the_cores(state.device, state.num_processes)
    if options.push_to_hub and state.is_main_process:
        HfApi().create_repo(options.push_to_hub, repo_type="dataset", exist_ok=True)  # now, not after hours
    if options.overwrite_output_dir or not options.output_dir.exists():
        try:
            make(options, state)
        except (ImportError, ValueError) as error:  # what a teacher needs may not be installed
            sys.exit(f"error: {error}")
        except OSError as error:
            if not options.output_dir.with_name(f"{options.output_dir.name}.partial").exists():
                sys.exit(f"error: {error}")
            raise OSError(
                f"{error}\nNothing that was written is lost: mend this, and the same command goes on from "
                f"{options.output_dir}.partial."
            ) from error
    elif state.is_main_process:
        _check_teacher(options)
    if options.push_to_hub and state.is_main_process:
        HfApi().upload_folder(
            folder_path=options.output_dir,
            repo_id=options.push_to_hub,
            repo_type="dataset",
            delete_patterns=["data/*.parquet"],  # of an earlier push, with another number of files
        )


def _check_teacher(options: argparse.Namespace) -> None:
    """Refuses to push an output that was there already where it is not of the teachers that are named."""
    first = next(options.output_dir.glob("data/*.parquet"))
    made_by = json.loads(pq.ParquetFile(first).read_row_group(0, columns=["teacher"])["teacher"][0].as_py())
    try:
        check_same_teachers(made_by, _named_teachers(options), str(options.output_dir))
    except ValueError as error:
        sys.exit(
            f"error: {error}: it is not pushed. Name another --output_dir, or make it again with "
            "--overwrite_output_dir."
        )


def _named_teachers(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Id and revision of each teacher."""
    return list(zip(options.teachers, options.teacher_revision or [None] * len(options.teachers)))


def make(options: argparse.Namespace, state: PartialState) -> None:
    dtype = default_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    named = _named_teachers(options)
    weights = options.teacher_weights or [1.0] * len(options.teachers)
    with state.main_process_first():
        rows = open_dataset(options.dataset_name, options.dataset_config_name, options.streaming)
    teachers = [
        load_teacher(
            name, revision=revision, dtype=dtype, device=state.device, trust_remote_code=options.trust_remote_code
        )
        for name, revision in named
    ]
    make_teacher_features(
        rows,
        teachers,
        identity_of(
            rows,
            options.dataset_name,
            [teacher_fingerprint(*which) for which in named],
        ),
        options.output_dir,
        Encoding(
            weights=[weight / sum(weights) for weight in weights],
            int8=options.int8,
            batch_size=options.batch_size,
            shard_rows=options.shard_rows,
            image_size=options.image_size,
        ),
        source=shown_name(options.dataset_name),
        num_workers=default_workers() if options.num_workers is None else options.num_workers,
        overwrite=options.overwrite_output_dir,
        license=options.data_license or license_of(rows, options.dataset_name),
        skip_broken=options.skip_broken,
        max_skipped=options.max_skipped,
        earlier=lambda: [earlier_fingerprint(*which) for which in named],
    )
    if state.is_main_process:
        print(f"The dataset is in {options.output_dir}: train.py --dataset_name {options.output_dir}")


if __name__ == "__main__":
    run_launched(main)
