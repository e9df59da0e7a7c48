"""What opening and reading a dataset with teacher features costs, in seconds and in memory.

python -m benchmarks.open_features [--gigabytes 5]

Writes rows (tiny images, five captions, features of width 768 in float16) to a temporary folder. A fresh process opens
them as train.py does, and two loader workers read up to 25,600 of them in random order. Memory that grows with the
features would mean that they are held, and not read from mapped files.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import VisionTextDualEncoderProcessor, ViTImageProcessorPil

from benchmarks.process_memory import own_bytes, tree
from datasets_scripts.opening import open_dataset
from rows.teacher_columns import dataset_of, feature_columns
from trainers.batches import RetrievalCollator, RetrievalDataset
from trainers.student import train_tokenizer


DIM, CAPTIONS, BLOCK = 768, 5, 1000
BATCHES = 400
ROW_BYTES = 2 * DIM * (1 + CAPTIONS)


def write_features(folder: Path, gigabytes: float) -> None:
    """Writes a dataset with random features: one block of rows, repeated up to so many gigabytes of features."""
    image, text = torch.randn(BLOCK, DIM), torch.randn(BLOCK * CAPTIONS, DIM)
    ids = [str(i) for i in range(BLOCK)]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    columns = {
        "image": (pa.array([{"bytes": buffer.getvalue(), "path": None}] * BLOCK), datasets.Image()),
        "captions": (pa.array([["a red square"] * CAPTIONS] * BLOCK), datasets.List(datasets.Value("string"))),
        "image_id": (pa.array(ids), datasets.Value("string")),
        **feature_columns(image, text, np.full(BLOCK, CAPTIONS), ids),
    }
    blocks = max(1, round(gigabytes * 1e9 / ROW_BYTES / BLOCK))
    datasets.DatasetDict({"train": datasets.concatenate_datasets([dataset_of(columns)] * blocks)}).save_to_disk(folder)


def read(folder: Path) -> dict[str, float]:
    """What opening the dataset takes, and reading rows in random order with two loader workers."""
    before = own_bytes()
    started = time.perf_counter()
    rows = open_dataset(str(folder))["train"]
    data = RetrievalDataset(rows, with_teacher=True)
    figures = {"open_seconds": time.perf_counter() - started, "opening_bytes": own_bytes() - before}
    side = {"height": 8, "width": 8}
    processor = VisionTextDualEncoderProcessor(ViTImageProcessorPil(size=side), train_tokenizer(["a red square"], 300))
    loader = DataLoader(data, 64, shuffle=True, num_workers=2, collate_fn=RetrievalCollator(processor, 16))
    batches = min(len(loader), BATCHES)
    held = []  # memory of main process and workers after a tenth, when all is set up, and near the end
    figures |= {"rows": len(rows), "features_bytes": len(rows) * ROW_BYTES, "read_bytes": 0}
    for number, batch in enumerate(itertools.islice(loader, batches)):
        if number in (batches // 10, batches - 5):  # the workers end before the last batches are used
            held.append([own_bytes(process.pid) for process in tree(os.getpid())])
        if len(held) == 1:
            figures["read_bytes"] += batch["teacher_image"].nbytes + batch["teacher_text"].nbytes
    grown = [later - earlier for earlier, later in zip(*held, strict=True)]
    return {**figures, "main_bytes": grown[0], "worker_bytes": max(grown[1:])}


def measure(gigabytes: float) -> dict[str, float]:
    """The figures of [`read`], measured in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="dsmd-") as folder:
        write_features(Path(folder) / "rows", gigabytes)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # as in train.py
        }
        command = [sys.executable, "-m", "benchmarks.open_features", "--read", f"{folder}/rows"]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the features; default: 5")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # in a process that this one starts
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read)))
        return
    figures = measure(options.gigabytes)
    gigabytes = figures["read_bytes"] / 1e9
    print(
        f"{figures['rows']:,} rows, {figures['features_bytes'] / 1e9:.2f} GB of features: opened in "
        f"{figures['open_seconds']:.2f} s, with {figures['opening_bytes'] / 1e6:.0f} MB of memory. While two loader "
        f"workers read {gigabytes:.2f} GB of them, the main process grew by {figures['main_bytes'] / 1e6:.1f} MB, a "
        f"worker by {figures['worker_bytes'] / 1e6:.1f} MB."
    )


if __name__ == "__main__":
    main()
