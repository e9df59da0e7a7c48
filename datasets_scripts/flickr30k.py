"""Flickr30k under Karpathy's split (29,000/1,014/1,000 images) as a dataset for retrieval.

    python -m datasets_scripts.flickr30k --karpathy dataset_flickr30k.json --images flickr30k-images \\
        --output_dir flickr30k
    python -m datasets_scripts.flickr30k --hub_id AnyModal/flickr30k --output_dir flickr30k

The first reads Karpathy's file and the folder of the images, the second a copy on the Hub (columns image, alt_text,
filename, split). Nothing of Flickr30k ships with this project.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from rows.command_line import run_program

from .karpathy import Benchmark, run
from .source_rows import Columns


FLICKR30K = Benchmark(
    title="Flickr30k",
    counts={"train": (29_000, 145_000), "validation": (1_014, 5_070), "test": (1_000, 5_000)},
    license="other: images for research use only, see the Flickr30k terms",
    path_of=lambda entry: entry["filename"],
    # The number that Flickr gave the photo; Karpathy's imgid counts the entries of one file.
    image_id_of=lambda entry: PurePosixPath(entry["filename"]).stem,
    hub_id="AnyModal/flickr30k",
    hub_columns=Columns(image="image", captions=("alt_text",), id="filename"),
    image_id_of_hub=lambda filename: PurePosixPath(filename).stem,
)


def main(arguments: list[str] | None = None) -> None:
    run(FLICKR30K, "flickr30k", __doc__, arguments)


if __name__ == "__main__":
    run_program(main)
