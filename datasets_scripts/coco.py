"""COCO under Karpathy's split (113,287/5,000/5,000 images) as a dataset for retrieval.

    python -m datasets_scripts.coco --karpathy dataset_coco.json --images coco --output_dir coco_karpathy
    python -m datasets_scripts.coco --hub_id undefined443/coco-karpathy-wds --output_dir coco_karpathy

The first reads Karpathy's file and a folder with train2014/ and val2014/. The second reads a copy on the Hub: its
columns are looked for by their usual names (see own_data.py), or are given by --image_column, --caption_column and
--id_column. Only the first is sure to keep the order of Karpathy's file, by which the five folds of COCO 1K are cut,
and COCO's own image ids. Nothing of COCO ships with this project.
"""

from __future__ import annotations

from rows.command_line import run_program

from .karpathy import Benchmark, run
from .source_rows import Columns


COCO = Benchmark(
    title="COCO",
    counts={"train": (113_287, 566_747), "validation": (5_000, 25_010), "test": (5_000, 25_010)},
    license="other: images belong to their Flickr authors; annotations CC BY 4.0",
    path_of=lambda entry: entry["filepath"] + "/" + entry["filename"],
    # File names differ between COCO 2014 and 2017, this number does not.
    image_id_of=lambda entry: str(int(entry["cocoid"])),
    hub_id="undefined443/coco-karpathy-wds",
    hub_columns=Columns(),
    image_id_of_hub=lambda image_id: image_id,
)


def main(arguments: list[str] | None = None) -> None:
    run(COCO, "coco", __doc__, arguments)


if __name__ == "__main__":
    run_program(main)
