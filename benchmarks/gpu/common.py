"""What the GPU programs share: the paper's student on random data, its trainer, a clock and a table."""

from __future__ import annotations

import argparse
import datetime
import io
import subprocess
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image
from transformers import BertConfig, VisionTextDualEncoderProcessor, ViTConfig, ViTImageProcessorPil, set_seed

from modeling_dsmd import DSMDModel
from rows.teacher_columns import dataset_of, feature_columns
from trainers import DSMDTrainer, DSMDTrainingArguments
from trainers.run.distributed import usable_cores
from trainers.student import build_student, train_tokenizer
from trainers.student_arguments import StudentArguments


RECIPE = Path(__file__).parents[2] / "recipes" / "icons.yaml"
SIDE = 256  # of the stored images
CAPTIONS = 5  # of an image
TINY_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small towers and few rows, to try the program on a CPU")
    return parser


def make_rows(count: int, dim: int, side: int = SIDE, per_image: int = CAPTIONS) -> datasets.Dataset:
    """Rows that follow the row contract: square JPEGs, captions of some 12 words, random features.

    Args:
        count: number of rows; they share 64 different images.
        dim: width D of the teacher's features.
        side: of an image, in pixels.
        per_image: captions of an image.
    """
    rng = np.random.default_rng(0)
    images = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        grainy = smooth + rng.normal(0, 6, smooth.shape)  # smooth pictures decode faster than photos
        buffer = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    # Made of letters alone, since the tokenizer would split off digits.
    words = np.array([f"word{i}".translate(str.maketrans("0123456789", "abcdefghij")) for i in range(1000)])
    # As in COCO: most of 9 to 15 words, few of 25 and more.
    lengths = np.exp(rng.normal(np.log(11.7), 0.25, (count, per_image))).round().astype(int).clip(min=5)
    features = rng.normal(size=(count * (1 + per_image), dim)).astype(np.float16)
    image, text = torch.from_numpy(features).split([count, count * per_image])
    captions = [[" ".join(rng.choice(words, length)) for length in row] for row in lengths]
    ids = [str(i) for i in range(count)]
    columns = {
        "image": (pa.array([images[i % len(images)] for i in range(count)]), datasets.Image()),
        "captions": (pa.array(captions), datasets.List(datasets.Value("string"))),
        "image_id": (pa.array(ids), datasets.Value("string")),
        **feature_columns(image, text, np.full(count, per_image), ids),
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


def make_quickstart_trainer(folder: str, count: int, **settings) -> DSMDTrainer:
    """A trainer of the quickstart's student by its recipe, on random rows of images of 64 pixels with one caption.

    Args:
        folder: the run's output folder.
        count: number of rows.
        **settings: fields of `DSMDTrainingArguments`, in place of the recipe's.
    """
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    of_student = {field.name for field in fields(StudentArguments)}
    of_training = {field.name for field in fields(DSMDTrainingArguments)} - {"output_dir", "num_train_epochs"}
    rows = make_rows(count, 256, side=64, per_image=1)
    set_seed(0)
    student = StudentArguments(**{name: value for name, value in recipe.items() if name in of_student})
    model, processor = build_student(student, (text for texts in rows["captions"] for text in texts), 256, None)
    own = {name: float(value) if name == "learning_rate" else value for name, value in recipe.items()}
    no_evaluation = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    own = {name: value for name, value in own.items() if name in of_training} | no_evaluation
    machine = {"bf16": True, "use_cpu": not torch.cuda.is_available(), "report_to": "none"}
    args = DSMDTrainingArguments(output_dir=folder, **{**own, **machine, **settings})
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


def commit() -> str:
    """The commit that these programs are of, and whether files differ from it; "unknown" outside of a repository."""
    root = Path(__file__).parents[2]
    try:
        run = {"cwd": root, "capture_output": True, "text": True, "check": True}
        name = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with changes" if changed else name


def machine() -> str:
    """Date, device, cores, torch and commit, in a line."""
    cores = f"{usable_cores()} CPU cores"
    return f"{datetime.date.today()}, {device_name()}, {cores}, torch {torch.__version__}, commit {commit()}"


def print_rows(figures: Iterable[tuple[str, str]]) -> None:
    """Prints (measure, figure) pairs as rows of a table, one by one, so that a failure does not lose earlier rows."""
    for measure, figure in figures:
        print(f"| {measure} | {figure} |", flush=True)


def print_table(figures: Iterable[tuple[str, str]]) -> None:
    """Prints a Markdown table of (measure, figure) and what it was measured on."""
    print(f"{machine()}, bf16 autocast\n")
    if not torch.cuda.is_available():
        print("No GPU here: peak memory, FLOP utilisation and synchronisations are left out.\n")
    print("| measure | figure |\n|---|---|", flush=True)
    print_rows(figures)
