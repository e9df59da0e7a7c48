"""Makes data with few of a dataset's pairs, or none, and with a pool of images and texts that nobody has paired.

    python -m benchmarks.few_pairs --dataset_name icons --pairs 400 --output_dir runs/icons_400
    python -m benchmarks.few_pairs --dataset_name icons --pairs 400 --pool --output_dir runs/icons_400_pool

Of train so many images stay with their captions, of validation 200, and the whole test split: those whose ids have the
smallest hashes, so the same on every machine, and fewer are some of more. With `--pool` the captions of all other
training images are torn from them, and both are shuffled; without, these rows go. An image of the pool knows no other
image, nor which text is its own; of equal texts one stays. A teacher's features stay with what they are of.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import datasets

from datasets_scripts.data_loading import DataArguments, load_data
from rows.columns import id_hash
from rows.command_line import Command, run_program
from rows.files import write_beside


def by_hash(rows: datasets.Dataset) -> list[int]:
    """The rows' numbers in the order of the hashes of their `image_id`."""
    ids = rows["image_id"][:]
    return sorted(range(len(ids)), key=lambda i: hashlib.blake2b(ids[i].encode(), digest_size=8).digest())


def few_of(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """The rows whose `image_id` has one of the smallest hashes, in the order of these.

    Raises:
        ValueError: there are fewer than `count`.
    """
    if count > len(rows):
        raise ValueError(f"{count:,} images are asked for, and there are {len(rows):,}")
    return rows.select(by_hash(rows)[:count])


def with_pool(rows: datasets.Dataset, pairs: int) -> datasets.Dataset:
    """The rows of [`few_of`], and the images and the texts of all others, each a row without a partner, in any order.

    Args:
        rows: of the contract, with a teacher's features.
        pairs: rows that stay pairs, 0 or more.
    """
    rows = grouped(rows)
    paired, others = few_of(rows, pairs), rows.select(by_hash(rows)[pairs:])
    features = datasets.Features({**rows.features, "image": datasets.Image(decode=False)})
    undecoded = others.cast_column("image", datasets.Image(decode=False))

    def lonely_images() -> Iterator[dict]:
        for row in undecoded:
            own = {"captions": [], "teacher_text_embeds": [], "group_id": row["image_id"]}
            yield {name: row[name] for name in features} | own

    def lonely_texts() -> Iterator[dict]:
        seen = set()
        for row in others.remove_columns(["image", "teacher_image_embeds"]):
            for caption, embeds in zip(row["captions"], row["teacher_text_embeds"]):
                name = f"text/{id_hash(caption):x}"
                if caption not in seen:
                    seen.add(caption)
                    none = {"image": None, "teacher_image_embeds": None, "image_id": name, "group_id": name}
                    own = {"captions": [caption], "teacher_text_embeds": [embeds]}
                    yield {name: row.get(name) for name in features} | none | own

    parts = [paired.cast_column("image", datasets.Image(decode=False))] if pairs else []
    parts += [
        datasets.Dataset.from_list(list(lonely()), features=features) for lonely in (lonely_images, lonely_texts)
    ]
    whole = datasets.concatenate_datasets(parts).cast_column("image", datasets.Image())
    return whole.shuffle(seed=0).flatten_indices()


def grouped(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with a `group_id`, which is their `image_id` where they had none."""
    if "group_id" in rows.column_names:
        return rows
    return rows.add_column("group_id", rows["image_id"][:], feature=datasets.Value("string"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("benchmarks.few_pairs", __doc__)
    parser.add_argument("--dataset_name", required=True, help="'icons', or a dataset with teacher features.")
    parser.add_argument("--pairs", type=int, default=400, help="Training images that keep their captions.")
    parser.add_flag("--pool", help="Keep the other training rows as images and texts apart.")
    parser.add_argument("--validation", type=int, default=200, help="Validation images to keep.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder (save_to_disk).")
    options = parser.parse_args(arguments)
    if options.pairs < 0 or (options.pairs == 0 and not options.pool):
        parser.error(f"--pairs {options.pairs}: expected 1 or more, or 0 with --pool")
    if options.output_dir.exists():
        parser.error(f"--output_dir {options.output_dir} exists: name a new folder")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = load_data(DataArguments(dataset_name=options.dataset_name))
    train = (with_pool if options.pool else few_of)(rows["train"], options.pairs)
    validation = few_of(rows["validation"], options.validation)
    few = datasets.DatasetDict(train=train, validation=validation, test=rows["test"])
    if options.pool:
        few = datasets.DatasetDict({split: grouped(part) for split, part in few.items()})
    with write_beside(options.output_dir) as beside:
        few.save_to_disk(beside)
    captions = {split: sum(map(len, part["captions"][:])) for split, part in few.items()}
    counts = ", ".join(f"{split}: {len(part):,} rows, {captions[split]:,} captions" for split, part in few.items())
    print(f"{counts}; of train {options.pairs:,} are pairs")


if __name__ == "__main__":
    run_program(main)
