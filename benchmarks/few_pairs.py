"""A dataset with few of its training pairs: what the study of few pairs trains on.

python -m benchmarks.few_pairs --dataset_name icons --output_dir runs/icons_400

Keeps the teacher's features, and the whole test split. Of train 400 images and of validation 200 are kept, those whose
ids have the smallest hashes: the same on every machine, and each of the smaller number is in the larger.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import datasets

from datasets_scripts.data_loading import DataArguments, load_data
from rows.files import write_beside


def few_of(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """The rows whose `image_id` has one of the smallest hashes, in the order of these.

    Raises:
        ValueError: there are fewer than `count`.
    """
    if count > len(rows):
        raise ValueError(f"{count:,} images are asked for, and there are {len(rows):,}")
    ids = rows["image_id"][:]
    order = sorted(range(len(ids)), key=lambda i: hashlib.blake2b(ids[i].encode(), digest_size=8).digest())
    return rows.select(order[:count])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="'icons', or a dataset with teacher features")
    parser.add_argument("--pairs", type=int, default=400, help="training images to keep; default: 400")
    parser.add_argument("--validation", type=int, default=200, help="validation images to keep; default: 200")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists: name a new folder")
    rows = load_data(DataArguments(dataset_name=args.dataset_name))
    try:
        kept = {"train": args.pairs, "validation": args.validation}
        few = datasets.DatasetDict({split: few_of(rows[split], count) for split, count in kept.items()})
    except ValueError as error:
        parser.error(str(error))
    few["test"] = rows["test"]
    with write_beside(args.output_dir) as beside:
        few.save_to_disk(beside)
    captions = {split: sum(map(len, part["captions"][:])) for split, part in few.items()}
    print(", ".join(f"{split}: {len(part):,} images, {captions[split]:,} captions" for split, part in few.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
