"""Adds a teacher's output features to an image-text dataset: what a student is distilled from, made once.

accelerate launch datasets_scripts/add_teacher_features.py --dataset D --teacher ID [--teacher ID2 ...] --output DIR

It can be stopped at any moment: the same command goes on from the last whole file, with the same result. The output is
a folder as the Hub has it (`data/*.parquet`, a card), for `train.py --dataset_name DIR`, `datasets.load_dataset(DIR)`,
streamed or not.
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
    default_dtype,
    default_workers,
    identity_of,
    make_teacher_features,
    teacher_fingerprint,
)
from datasets_scripts.opening import license_of, open_dataset
from datasets_scripts.teacher_features import Encoding
from teachers import load_teacher
from trainers.run.distributed import use_the_cores


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="'icons', a folder (save_to_disk or parquet) or a Hub id")
    parser.add_argument("--dataset_config_name", help="configuration of a Hub dataset")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream, never storing it")
    parser.add_argument("--teacher", action="append", required=True, help="folder or Hub id; may be given again")
    parser.add_argument("--teacher_revision", action="append", help="one for each --teacher, in their order")
    parser.add_argument("--weights", type=float, nargs="+", help="of several teachers; equal by default")
    parser.add_argument("--output", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--push_to_hub", metavar="REPO", help="also push to this Hub dataset, e.g. name/coco-clip")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto",
                        help="of the teacher's arithmetic; auto: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="store int8 with a scale a row: half of float16")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    parser.add_argument("--shard_rows", type=int, default=1024, help="rows in a file")
    parser.add_argument("--image_size", type=int, metavar="PIXELS",
                        help="store images at the student's size: faster to read, smaller on disk")  # fmt: skip
    parser.add_argument("--num_workers", type=int, help="processes that decode, for each process; default: its cores")
    parser.add_argument("--license", help="of the data; default: what the dataset says")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the teachers' repositories run code")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "shard_rows", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected 1 or more")
    for name in ("teacher_revision", "weights"):
        values = getattr(options, name)
        if values is not None and len(values) != len(options.teacher):
            parser.error(f"--{name}: {len(values)} values for {len(options.teacher)} teachers")
    if options.weights is not None and min(options.weights) <= 0:
        parser.error(f"--weights {options.weights}: expected numbers above 0")
    if options.output.exists():  # before a teacher is loaded
        if not options.overwrite and not options.push_to_hub:
            parser.error(f"--output {options.output} exists: name another, or replace it with --overwrite")
        if not list(options.output.glob("data/*.parquet")) or not (options.output / "README.md").is_file():
            parser.error(f"--output {options.output} exists and was not made by this program: name another")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # Left to itself accelerate joins no processes on a CPU, and gives up on a process that waits for ten minutes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    use_the_cores(state.device, state.num_processes)
    if options.push_to_hub and state.is_main_process:
        HfApi().create_repo(options.push_to_hub, repo_type="dataset", exist_ok=True)  # now, not after hours
    if options.overwrite or not options.output.exists():
        try:
            make(options, state)
        except ValueError as error:
            sys.exit(f"error: {error}")
        except OSError as error:
            if not options.output.with_name(f"{options.output.name}.partial").exists():
                sys.exit(f"error: {error}")
            raise OSError(
                f"{error}\nNothing that was written is lost: mend this, and the same command goes on from "
                f"{options.output}.partial."
            ) from error
    elif state.is_main_process:
        _check_teacher(options)
    if options.push_to_hub and state.is_main_process:
        HfApi().upload_folder(
            folder_path=options.output,
            repo_id=options.push_to_hub,
            repo_type="dataset",
            delete_patterns=["data/*.parquet"],  # of an earlier push, with another number of files
        )


def _check_teacher(options: argparse.Namespace) -> None:
    """An output that was there already is pushed as it is: only where it is of the teachers that are named."""
    first = next(options.output.glob("data/*.parquet"))
    made_by = json.loads(pq.ParquetFile(first).read_row_group(0, columns=["teacher"])["teacher"][0].as_py())["id"]
    asked = " + ".join(Path(name).name if Path(name).is_dir() else name for name in options.teacher)
    if made_by != asked:
        sys.exit(f"error: {options.output} has features of {made_by}, not of {asked}: it is not pushed. Name another "
                 "--output, or make it again with --overwrite.")  # fmt: skip


def make(options: argparse.Namespace, state: PartialState) -> None:
    dtype = default_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    revisions = options.teacher_revision or [None] * len(options.teacher)
    weights = options.weights or [1.0] * len(options.teacher)
    with state.main_process_first():
        rows = open_dataset(options.dataset, options.dataset_config_name, options.streaming)
    teachers = [
        load_teacher(
            name, revision=revision, dtype=dtype, device=state.device, trust_remote_code=options.trust_remote_code
        )
        for name, revision in zip(options.teacher, revisions)
    ]
    make_teacher_features(
        rows,
        teachers,
        identity_of(rows, options.dataset, [teacher_fingerprint(*which) for which in zip(options.teacher, revisions)]),
        options.output,
        Encoding(
            weights=[weight / sum(weights) for weight in weights],
            int8=options.int8,
            batch_size=options.batch_size,
            shard_rows=options.shard_rows,
            image_size=options.image_size,
        ),
        source=Path(options.dataset).name if Path(options.dataset).exists() else options.dataset,
        num_workers=default_workers() if options.num_workers is None else options.num_workers,
        overwrite=options.overwrite,
        license=options.license or license_of(rows, options.dataset),
    )


if __name__ == "__main__":
    main()
