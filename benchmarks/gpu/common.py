"""What the GPU programs share: the paper's student on random data, its trainer, a clock and a table."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import time
from collections.abc import Iterable

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import BertConfig, VisionTextDualEncoderProcessor, ViTConfig, ViTImageProcessorPil, set_seed

from modeling_dsmd import DSMDModel
from trainers import DSMDTrainer, DSMDTrainingArguments
from trainers.student import train_tokenizer


SIDE = 256  # of the stored images
CAPTIONS = 5  # of an image
TINY_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small towers, few rows: to try it on a CPU")
    return parser


def make_rows(count: int, dim: int) -> datasets.Dataset:
    """Rows of the contract: JPEG of 256 x 256 pixels (64 different ones), captions of some 12 words, random features.

    Args:
        count: of rows.
        dim: width of the teacher's features.
    """
    rng = np.random.default_rng(0)
    images = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        grainy = smooth + rng.normal(0, 6, smooth.shape)  # a smooth picture decodes faster than a photo
        buffer = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    # Of letters alone: a number is a token of its own.
    words = np.array([f"word{i}".translate(str.maketrans("0123456789", "abcdefghij")) for i in range(1000)])
    # As in COCO: most of 9 to 15 words, few of 25 and more.
    lengths = np.exp(rng.normal(np.log(11.7), 0.25, (count, CAPTIONS))).round().astype(int).clip(min=5)
    features = rng.normal(size=(count * (1 + CAPTIONS), dim)).astype(np.float16)
    vectors = pa.FixedSizeListArray.from_arrays(features.ravel(), dim)
    offsets = pa.array(np.arange(0, count * CAPTIONS + 1, CAPTIONS, dtype=np.int32))
    vector = datasets.List(datasets.Value("float16"), length=dim)
    columns = {
        "image": [images[i % len(images)] for i in range(count)],
        "captions": [[" ".join(rng.choice(words, length)) for length in row] for row in lengths],
        "image_id": [str(i) for i in range(count)],
        "teacher_image_embeds": vectors[:count],
        "teacher_text_embeds": pa.ListArray.from_arrays(offsets, vectors[count:]),
    }
    kinds = {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
        "teacher_image_embeds": vector,
        "teacher_text_embeds": datasets.List(vector),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def make_trainer(folder: str, count: int, tiny: bool, **settings) -> DSMDTrainer:
    """A trainer of the paper's student (ViT-B/16 at 224, BERT-base, random weights) on random rows, in bf16.

    Args:
        folder: the run's.
        count: rows, from 8,192 on as many as fill the queues.
        tiny: towers of width 32 and images of 32 pixels instead.
        **settings: of the run.
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
    """Marks on the device's own time line, so that none of them waits for the device; on the wall on a CPU."""

    def __init__(self):
        self.marks: list = []

    def mark(self) -> None:
        if torch.cuda.is_available():
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next; forgets them."""
        marks, self.marks = self.marks, []
        pairs = list(zip(marks[:-1], marks[1:]))
        if not torch.cuda.is_available():
            return [later - earlier for earlier, later in pairs]
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) / 1000 for earlier, later in pairs]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def print_table(figures: Iterable[tuple[str, str]]) -> None:
    """A Markdown table of (measure, figure), each row printed when it is there: what comes later may fail."""
    cores = len(os.sched_getaffinity(0))
    print(f"{datetime.date.today()}, {device_name()}, {cores} CPU cores, torch {torch.__version__}, bf16 autocast\n")
    if not torch.cuda.is_available():
        print("No GPU here: peak memory, FLOP utilisation and synchronisations are left out.\n")
    print("| measure | figure |\n|---|---|", flush=True)
    for measure, figure in figures:
        print(f"| {measure} | {figure} |", flush=True)
