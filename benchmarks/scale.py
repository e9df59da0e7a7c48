"""Computes what runs cost, from Flickr30k on one GPU to 400 million pairs on 64: the tables of docs/about/scale.md.

python -m benchmarks.scale [--start_rows 1000000]

Models: ViT-B/16 at 224 and BERT-base under a CLIP ViT-L/14 teacher of width 768. Measured here is how many images a
core decodes and how many rows it checks; what is assumed stands in capitals below and is printed. With `--start_rows`
it also makes so many rows in a temporary folder (3 kB each) and times what a run does with them before its first step.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from model_cards import describe_captions
from rows.checks import check_images, check_repeats, check_rows, check_share
from rows.columns import caption_lists
from rows.images import load_rgb
from trainers.batches import RetrievalDataset
from trainers.equal_texts import find_shared_texts
from trainers.row_checks import check_together
from trainers.run.run_identity import rows_fingerprint


PEAK = 989e12  # FLOP/s of an H100 SXM in bf16, dense, as its maker states
UTILISATION = {"training": 0.35, "teacher": 0.45}  # assumed: share of PEAK that is reached
NETWORK = 50e9  # bytes/s each GPU sends and receives at once between machines (400 Gbit/s), assumed
IMAGE_BYTES = {"as photos come": 150e3, "stored at 256 pixels": 20e3}  # assumed, JPEG
TOKENS = 15  # in a caption of about 12 words, with the two special tokens
DIM = 768  # width of the teacher's and the student's features
QUEUE = 8192
PARAMETERS = 86e6 + 109e6 + 1.2e6  # vision tower, text tower, projections


@dataclass
class Run:
    """One line of the tables."""

    name: str
    images: float
    captions: int  # per image
    epochs: int
    gpus: int
    batch: int  # images per GPU

    @property
    def rows(self) -> int:
        """Features that are stored for one image and its captions."""
        return 1 + self.captions

    @property
    def seconds_per_image(self) -> float:
        """Seconds in which one GPU trains on an image and its captions; backward costs twice the forward."""
        flop = 3 * (transformer(197, 768, 12) + self.captions * transformer(TOKENS, 768, 12))
        return flop / (PEAK * UTILISATION["training"])

    @property
    def teacher_seconds_per_image(self) -> float:
        flop = transformer(257, 1024, 24) + self.captions * transformer(TOKENS, 768, 12)
        return flop / (PEAK * UTILISATION["teacher"])

    @property
    def step_seconds(self) -> float:
        return self.batch * self.seconds_per_image

    @property
    def gathered_bytes(self) -> float:
        """Bytes a GPU receives a step, float32: teacher rows for the queues, then students and their teacher rows."""
        others = self.batch * (self.gpus - 1)
        return 3 * others * self.rows * DIM * 4

    @property
    def gradient_bytes(self) -> float:
        """Bytes a GPU sends in a step for a ring all-reduce of float32 gradients."""
        return 2 * (self.gpus - 1) / self.gpus * PARAMETERS * 4


RUNS = [
    Run("Flickr30k", 29e3, 5, 20, 1, 128),
    Run("COCO", 113_287, 5, 15, 1, 128),
    Run("3 M pairs", 3e6, 1, 10, 8, 256),
    Run("30 M pairs", 30e6, 1, 5, 16, 256),
    Run("400 M pairs", 400e6, 1, 2, 64, 256),
]


def transformer(tokens: int, width: int, layers: int) -> float:
    """FLOP of one sequence's forward through a transformer whose feed-forward layers are four times as wide."""
    return layers * (tokens * 24 * width**2 + 4 * tokens**2 * width)


def images_per_core(size: tuple[int, int], seconds: float = 2.0) -> float:
    """Images per CPU second that one core decodes from JPEG, resizes to 224 x 224 and normalises.

    Args:
        size: width and height of the JPEG in pixels.
        seconds: CPU seconds to measure for.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    count, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        processor(images=[load_rgb({"bytes": buffer.getvalue(), "path": None})], return_tensors="pt")
        count += 1
    return count / (time.process_time() - started)


def rows_checked_per_core(rows: int = 5000, captions: int = 5, seconds: float = 2.0) -> float:
    """Rows per CPU second that `check_rows` checks before training, without the sample of images that is decoded."""
    rng = np.random.default_rng(0)

    def features(count: int) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=count * DIM).astype(np.float16)), DIM)

    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * captions)
    texts = pa.array([f"a caption of a photo, number {i}" for i in range(rows * captions)])
    columns = {
        "captions": pa.ListArray.from_arrays(offsets, texts),
        "image_id": pa.array([f"photo {i}" for i in range(rows)]),
        "teacher_image_embeds": features(rows),
        "teacher_text_embeds": pa.ListArray.from_arrays(offsets, features(rows * captions)),
    }
    table = pa.table(columns)
    count, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        check_rows(table, "train", DIM, 0)
        count += rows
    return count / (time.process_time() - started)


def made_rows(path: Path, rows: int, at_once: int = 10_000) -> datasets.Dataset:
    """Rows of the contract with one caption each and features of width `DIM`, mapped from a file that is made here."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    one_each = pa.array(np.arange(at_once + 1, dtype=np.int32))
    features = [pa.array(rng.normal(size=at_once * DIM).astype(np.float16)) for _ in range(2)]
    image, text = (pa.FixedSizeListArray.from_arrays(values, DIM) for values in features)
    columns = {
        "image": pa.array([{"bytes": buffer.getvalue(), "path": None}] * at_once),
        "teacher_image_embeds": image,
        "teacher_text_embeds": pa.ListArray.from_arrays(one_each, text),
    }
    writer = None
    with open(path, "wb") as file:
        for start in range(0, rows, at_once):
            numbers = range(start, start + at_once)
            captions = pa.array([f"a caption of ten words, of the photo with number {i}" for i in numbers])
            columns["captions"] = pa.ListArray.from_arrays(one_each, captions)
            columns["image_id"] = pa.array([f"photo {i}" for i in numbers])
            batch = pa.record_batch(columns).slice(0, min(at_once, rows - start))
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        writer.close()
    return datasets.Dataset.from_file(str(path)).cast_column("image", datasets.Image())


def start_table(rows: int) -> str:
    """Seconds that a run's start takes for what grows with the rows: measured, and counted for ten times as many."""
    seconds = {}

    def timed(name: str, work):
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    with tempfile.TemporaryDirectory(prefix="dsmd-") as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        dataset = timed("made", lambda: made_rows(Path(folder) / "rows.arrow", rows))
        hashes = timed("each row", lambda: check_share(dataset, "train", DIM))
        timed("repeats", lambda: check_repeats(dataset, "train", DIM, hashes))
        timed("images", lambda: check_images(dataset, "train"))
        check_together(dataset, "train", DIM)
        timed("stamp", lambda: check_together(dataset, "train", DIM))
        timed("equal texts", lambda: find_shared_texts(dataset, "train", ""))
        timed("captions", lambda: describe_captions(caption_lists(dataset)))
        timed("fingerprint", lambda: rows_fingerprint(dataset))
        order = timed("order", lambda: torch.randperm(rows).tolist())
        timed("batch", lambda: RetrievalDataset(dataset, with_teacher=True).__getitems__(order[:256]))
    lines = ["| rows | processes | first start | of it the check | again |", "|---" * 5 + "|"]
    for times, processes in ((1, 1), (1, 8), (10, 1), (10, 8)):
        check = times * (seconds["each row"] / processes + seconds["repeats"]) + seconds["images"] / processes
        rest = times * (seconds["equal texts"] / processes + seconds["captions"] + seconds["order"])
        rest += seconds["fingerprint"] + seconds["batch"]
        cells = [f"{times * rows:,}", str(processes), *(f"{x:.1f} s" for x in (check + rest, check))]
        lines.append("| " + " | ".join([*cells, f"{rest + seconds['stamp']:.1f} s"]) + " |")
    shown = ", ".join(f"{name} {of:.2f}" for name, of in seconds.items())
    lines += ["", f"Measured, in seconds, of {rows:,} rows on one process, read from memory: {shown}. Else counted."]
    return "\n".join(lines)


def size(number: float) -> str:
    """A number of bytes with its unit, to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def tables() -> str:
    """Three Markdown tables: bytes and hours of a run; what storage and CPU cores must deliver; what a step sends."""
    cores = {"500 x 375": images_per_core((500, 375)), "256 x 256": images_per_core((256, 256))}
    lines = ["| run | GPUs | images as photos | at 256 px | features float16 | int8 | teacher | training |"]
    lines += ["|---" * 8 + "|"]
    for run in RUNS:
        hours = [
            run.images * run.teacher_seconds_per_image / run.gpus / 3600,
            run.epochs * run.images * run.seconds_per_image / run.gpus / 3600,
        ]
        stored = [run.images * bytes_ for bytes_ in IMAGE_BYTES.values()]
        stored += [run.images * run.rows * 2 * DIM, run.images * run.rows * (DIM + 2)]
        cells = [*map(size, stored), f"{hours[0]:.2g} h", f"{hours[1]:.2g} h ({run.epochs} epochs)"]
        lines.append(f"| {run.name} | {run.gpus} | " + " | ".join(cells) + " |")
    lines += ["", "| run | images/s | features | photos | at 256 px | cores a GPU: photos | at 256 px |"]
    lines += ["|---" * 7 + "|"]
    for run in RUNS:
        rate = run.gpus / run.seconds_per_image
        read = [rate * run.rows * 2 * DIM] + [rate * bytes_ for bytes_ in IMAGE_BYTES.values()]
        needed = [f"{rate / run.gpus / of:.1f}" for of in cores.values()]
        cells = [f"{rate:,.0f}", *(f"{size(of)}/s" for of in read), *needed]
        lines.append(f"| {run.name} | " + " | ".join(cells) + " |")
    lines += ["", "| run | images a step | step | gathered by a GPU | gradients sent | both take | queues |"]
    lines += ["|---" * 7 + "|"]
    for run in RUNS:
        seconds = (run.gathered_bytes + run.gradient_bytes) / NETWORK
        cells = [f"{run.batch * run.gpus:,}", f"{1000 * run.step_seconds:.0f} ms", size(run.gathered_bytes)]
        cells += [size(run.gradient_bytes), f"{1000 * seconds:.0f} ms", size(2 * QUEUE * (DIM * 4 + 8))]
        lines.append(f"| {run.name} | " + " | ".join(cells) + " |")
    shown = ", ".join(f"{rate:.0f} of {of}" for of, rate in cores.items())
    checked = f"{rows_checked_per_core():,.0f} rows of 5 captions a second"
    lines += ["", f"Measured: a core decodes and resizes {shown} pixels a second, and checks {checked}."]
    lines += [f"Assumed: {100 * UTILISATION['training']:.0f} % of {PEAK / 1e12:.0f} TFLOP/s in training and "
              f"{100 * UTILISATION['teacher']:.0f} % for the teacher; {size(NETWORK)}/s a GPU; JPEGs of "
              f"{' and '.join(f'{size(of)} {how}' for how, of in IMAGE_BYTES.items())}."]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start_rows", type=int, default=0, help="Time the start of a run on so many rows.")
    start_rows = parser.parse_args().start_rows
    if start_rows < 0:
        parser.error(f"--start_rows {start_rows}: expected 0 or more rows.")
    print(tables())
    if start_rows:
        print("", start_table(start_rows), sep="\n")
