"""What the GPU programs share: the paper's student on random data, its trainer, a clock and a table."""

from __future__ import annotations

import argparse
import datetime
import io
import time
from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import BertConfig, VisionTextDualEncoderProcessor, ViTConfig, ViTImageProcessorPil, set_seed

from modeling_dsmd import DSMDModel
from rows.teacher_columns import dataset_of, feature_columns
from trainers import DSMDTrainer, DSMDTrainingArguments
from trainers.run.distributed import usable_cores
from trainers.student import train_tokenizer


SIDE = 256  # of the stored images
CAPTIONS = 5  # of an image
TINY_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small towers and few rows, to try the program on a CPU")
    return parser


def make_rows(count: int, dim: int) -> datasets.Dataset:
    """Rows that follow the row contract: JPEGs of 256 x 256 pixels, captions of some 12 words, random features.

    Args:
        count: number of rows; they share 64 different images.
        dim: width D of the teacher's features.
    """
    rng = np.random.default_rng(0)
    images = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        grainy = smooth + rng.normal(0, 6, smooth.shape)  # smooth pictures decode faster than photos
        buffer = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    # Made of letters alone, since the tokenizer would split off digits.
    words = np.array([f"word{i}".translate(str.maketrans("0123456789", "abcdefghij")) for i in range(1000)])
    # As in COCO: most of 9 to 15 words, few of 25 and more.
    lengths = np.exp(rng.normal(np.log(11.7), 0.25, (count, CAPTIONS))).round().astype(int).clip(min=5)
    features = rng.normal(size=(count * (1 + CAPTIONS), dim)).astype(np.float16)
    image, text = torch.from_numpy(features).split([count, count * CAPTIONS])
    captions = [[" ".join(rng.choice(words, length)) for length in row] for row in lengths]
    ids = [str(i) for i in range(count)]
    columns = {
        "image": (pa.array([images[i % len(images)] for i in range(count)]), datasets.Image()),
        "captions": (pa.array(captions), datasets.List(datasets.Value("string"))),
        "image_id": (pa.array(ids), datasets.Value("string")),
        **feature_columns(image, text, np.full(count, CAPTIONS), ids),
    }
    return dataset_of(columns)


def make_trainer(folder: str, count: int, tiny: bool, **settings) -> DSMDTrainer:
    """A trainer of the paper's student (ViT-B/16 at 224, BERT-base, random weights) on random rows, in bf16.

    Args:
        folder: the run's output folder.
        count: number of rows; a queue of the default size needs 8,192.
        tiny: towers of width 32 and images of 32 pixels instead.
        **settings: fields of `DSMDTrainingArguments`.
    """
    vision = ViTConfig(image_size=32, **TINY_TOWER) if tiny else ViTConfig()
    text = BertConfig(**TINY_TOWER) if tiny else BertConfig()
    rows = make_rows(count, text.hidden_size)
    set_seed(0)
    model = DSMDModel.from_vision_text_configs(
        vision, text, projection_dim=text.hidden_size, vision_pooling="cls", text_pooling="cls"
    )
    tokenizer = train_tokenizer((caption for captions in rows["captions"][:1000] for caption in captions), 4000)
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = VisionTextDualEncoderProcessor(ViTImageProcessorPil(size=size), tokenizer)
    settings = {"bf16": True, "use_cpu": not torch.cuda.is_available(), "report_to": "none", **settings}
    args = DSMDTrainingArguments(output_dir=folder, **settings)
    return DSMDTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)


class Clock:
    """Times what runs between marks: by CUDA events, so that no mark waits for the device, or by wall clock."""

    def __init__(self):
        self.marks: list = []

    def mark(self) -> None:
        if torch.cuda.is_available():
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between each mark and the next; the marks are then forgotten."""
        marks, self.marks = self.marks, []
        pairs = list(zip(marks[:-1], marks[1:]))
        if not torch.cuda.is_available():
            return [later - earlier for earlier, later in pairs]
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) / 1000 for earlier, later in pairs]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def print_table(figures: Iterable[tuple[str, str]]) -> None:
    """Prints a Markdown table of (measure, figure), row by row, so that a failure does not lose earlier rows."""
    cores = usable_cores()
    print(f"{datetime.date.today()}, {device_name()}, {cores} CPU cores, torch {torch.__version__}, bf16 autocast\n")
    if not torch.cuda.is_available():
        print("No GPU here: peak memory, FLOP utilisation and synchronisations are left out.\n")
    print("| measure | figure |\n|---|---|", flush=True)
    for measure, figure in figures:
        print(f"| {measure} | {figure} |", flush=True)
