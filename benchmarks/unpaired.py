"""Makes data with few pairs, or none, and a pool of images and texts that nobody has paired, from a paired dataset.

    python -m benchmarks.unpaired --dataset_name icons --pairs 400 --pool --output_dir DIR

Of the training split so many rows stay pairs, drawn by a hash of their groups: fewer pairs are some of more. With
`--pool` the captions of all others are torn from their images, and both are shuffled; without, these rows go. An image
of the pool knows no other image, nor which text is its own; of equal texts one stays. Validation and test stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np

from datasets_scripts.data_loading import DataArguments, load_data
from rows.columns import id_hash
from rows.command_line import Command, run_program
from rows.files import write_beside


def unpaired(rows: datasets.Dataset, pairs: int, pool: bool) -> datasets.Dataset:
    """The first `pairs` rows by a hash of their groups, and with `pool` the images and the texts of the others.

    Args:
        rows: of the contract, with a teacher's features.
    """
    groups = rows["group_id" if "group_id" in rows.column_names else "image_id"]
    order = np.argsort([id_hash(f"pair {group}") for group in groups], kind="stable")
    paired, others = rows.select(np.sort(order[:pairs])), rows.select(np.sort(order[pairs:]))
    if "group_id" not in paired.column_names:
        paired = paired.add_column("group_id", paired["image_id"], feature=datasets.Value("string"))
    features = paired.features
    if not pool:
        return paired
    undecoded = others.cast_column("image", datasets.Image(decode=False))

    def lonely_images():
        for row in undecoded:
            own = {"captions": [], "teacher_text_embeds": [], "group_id": row["image_id"]}
            yield {name: row[name] for name in features} | own

    def lonely_texts():
        seen = set()
        for row in others.remove_columns(["image", "teacher_image_embeds"]):
            for caption, embeds in zip(row["captions"], row["teacher_text_embeds"]):
                name = f"text/{id_hash(caption):x}"
                if caption not in seen:
                    seen.add(caption)
                    none = {"image": None, "teacher_image_embeds": None, "image_id": name, "group_id": name}
                    own = {"captions": [caption], "teacher_text_embeds": [embeds]}
                    yield {name: row.get(name) for name in features} | none | own

    undecoded_features = datasets.Features({**features, "image": datasets.Image(decode=False)})
    parts = [paired.cast_column("image", datasets.Image(decode=False))] if pairs else []
    for generate in (lonely_images, lonely_texts):
        parts.append(datasets.Dataset.from_list(list(generate()), features=undecoded_features))
    whole = datasets.concatenate_datasets(parts).cast_column("image", datasets.Image())
    return whole.shuffle(seed=0).flatten_indices()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Command("benchmarks.unpaired", __doc__)
    parser.add_argument("--dataset_name", required=True, help="A dataset with teacher features, such as icons.")
    parser.add_argument("--pairs", type=int, required=True, help="Rows that stay pairs, 0 or more.")
    parser.add_flag("--pool", help="Keep the other rows as images and texts apart.")
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
    rows["train"] = unpaired(rows["train"], options.pairs, options.pool)
    for split in ("validation", "test"):
        if "group_id" not in rows[split].column_names:
            own = rows[split]["image_id"]
            rows[split] = rows[split].add_column("group_id", own, feature=datasets.Value("string"))
    with write_beside(options.output_dir) as beside:
        rows.save_to_disk(beside)
    print(f"{options.output_dir}: {len(rows['train']):,} training rows, {options.pairs:,} of them pairs")


if __name__ == "__main__":
    run_program(main)
