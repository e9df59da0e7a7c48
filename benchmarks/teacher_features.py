"""What making teacher features costs beside the teacher's bare forward: rows/s, as a ratio taken in one run.

python -m benchmarks.teacher_features [--rows 16] [--rounds 2]

The teacher is a CLIP ViT-B/16 with random weights, the rows JPEG photos of 500 x 375 pixels with five captions of some
12 words. The bare forward gets the same batches as tensors, decoded and tokenised before the clock starts. On a GPU,
take thousands of rows.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from datasets_scripts.teacher_features import Encoding, Preparation, encode_dataset, plan
from teachers import Teacher, load_teacher


WORDS = [f"word{i}" for i in range(1000)]


def make_teacher(device: torch.device, dtype: torch.dtype) -> Teacher:
    """CLIP ViT-B/16, random, through a folder as any teacher."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "<|endoftext|>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|endoftext|>", model_max_length=77
    )
    config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 2, "pad_token_id": 0})
    with tempfile.TemporaryDirectory() as folder:
        CLIPModel(config).save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessor(), fast).save_pretrained(folder)
        return load_teacher(folder, dtype=dtype, device=device)


def make_rows(count: int) -> datasets.DatasetDict:
    rng = np.random.default_rng(0)
    rows = {"image": [], "captions": [], "image_id": []}
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["captions"].append([" ".join(rng.choice(WORDS, rng.integers(9, 16))) for _ in range(5)])
        rows["image_id"].append(str(i))
    part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    return datasets.DatasetDict({"train": part})


def bare(teacher: Teacher, rows: datasets.DatasetDict, encoding: Encoding) -> float:
    """Seconds of the forwards alone."""
    device = teacher.device
    part = rows["train"].cast_column("image", datasets.Image(decode=False))
    preparation, shard = Preparation([teacher]), plan("train", 0, part, encoding)
    prepared = [preparation.__getitems__(shard.contents(*batch)) for batch in shard.batches]
    # The copy to the device is no part of the forward.
    prepared = [(kind, ({name: value.to(device) for name, value in inputs.items()},)) for kind, (inputs,) in prepared]
    started = time.perf_counter()
    for kind, (inputs,) in prepared:
        (teacher.image_features if kind == "image" else teacher.text_features)(inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def whole(teacher: Teacher, rows: datasets.DatasetDict, encoding: Encoding, num_workers: int) -> float:
    """Seconds from the stored rows to the finished file."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        encode_dataset(rows, [teacher], "{}", encoding, Path(folder), num_workers)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_workers", type=int, default=2)
    options = parser.parse_args()
    device = PartialState().device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher, rows, encoding = make_teacher(device, dtype), make_rows(options.rows), Encoding(batch_size=32)
    bare(teacher, datasets.DatasetDict({"train": rows["train"].select(range(8))}), encoding)  # warm up
    times = [
        (bare(teacher, rows, encoding), whole(teacher, rows, encoding, options.num_workers))
        for _ in range(options.rounds)
    ]
    alone, together = (options.rows / statistics.median(column) for column in zip(*times))
    ratio = statistics.median(first / second for first, second in times)
    print(f"{device}, {dtype}, {options.rows} rows of an image and five captions, median of {options.rounds} rounds")
    print(f"bare forward {alone:.1f} rows/s, add_teacher_features {together:.1f} rows/s: {100 * ratio:.0f} %")


if __name__ == "__main__":
    main()
