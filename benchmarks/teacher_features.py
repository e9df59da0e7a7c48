"""How close making teacher features comes to the speed of the teacher's bare forward, in rows/s.

python -m benchmarks.teacher_features [--model ViT-L/14] [--rows 64] [--rounds 2]

The teacher is a CLIP with random weights; the rows are JPEGs of 500 x 375 pixels with five captions of some 12 words.
The bare forward gets the same batches as tensors, decoded and tokenised before the clock starts. On a GPU, take
thousands of rows, and batches of 256.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from datasets_scripts.feature_shards import Encoding, plan
from datasets_scripts.teacher_features import Preparation, encode_dataset
from teachers import Teacher, load_teacher
from trainers.timing import seconds_of

from .common import Row


WORDS = [f"word{i}" for i in range(1000)]

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {  # CLIPConfig's own defaults are ViT-B's
    "ViT-B/16": {"vision_config": {"patch_size": 16}, "text_config": {}},
    "ViT-L/14": {"vision_config": {**LARGE, "patch_size": 14}, "text_config": LARGE_TEXT, "projection_dim": 768},
    "tiny": {"vision_config": TINY, "text_config": TINY, "projection_dim": 32},
}


def make_config(model: str) -> CLIPConfig:
    text = {**SIZES[model]["text_config"], "eos_token_id": 2, "pad_token_id": 0}
    return CLIPConfig(**{**SIZES[model], "text_config": text})


def make_teacher(model: str, device: torch.device, dtype: torch.dtype) -> Teacher:
    """A CLIP with random weights, of a size named in `SIZES`, saved to a folder and loaded like any teacher."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "<|endoftext|>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|endoftext|>", model_max_length=77
    )
    with tempfile.TemporaryDirectory() as folder:
        CLIPModel(make_config(model)).save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessorPil(), fast).save_pretrained(folder)
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


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def bare(teacher: Teacher, rows: datasets.DatasetDict, encoding: Encoding) -> float:
    """Seconds of the teacher's forwards alone."""
    device = teacher.device
    part = rows["train"].cast_column("image", datasets.Image(decode=False))
    preparation, shard = Preparation([teacher], None), plan("train", 0, part, encoding)
    prepared = [preparation.__getitems__(shard.contents(*batch))[:2] for batch in shard.batches]
    # Copied to the device before the clock starts.
    prepared = [(kind, ({name: value.to(device) for name, value in inputs.items()},)) for kind, (inputs,) in prepared]

    def forwards() -> None:
        for kind, (inputs,) in prepared:
            (teacher.image_features if kind == "image" else teacher.text_features)(inputs)

    return seconds_of(forwards)


def whole(teacher: Teacher, rows: datasets.DatasetDict, encoding: Encoding, num_workers: int) -> float:
    """Seconds from stored rows to the finished files of features."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds_of(lambda: encode_dataset(rows, [teacher], "{}", encoding, Path(folder), num_workers))


def rates(model: str, rows: int, rounds: int, batch_size: int, num_workers: int) -> tuple[float, float, float]:
    """Rows/s of the bare forward, rows/s of making features, and the second as a share of the first (median)."""
    device = PartialState().device
    teacher = make_teacher(model, device, dtype_of(device))
    data, encoding = make_rows(rows), Encoding(batch_size=batch_size)
    few = datasets.DatasetDict({"train": data["train"].select(range(min(rows, batch_size)))})
    bare(teacher, few, encoding)  # to warm up
    times = [(bare(teacher, data, encoding), whole(teacher, data, encoding, num_workers)) for _ in range(rounds)]
    alone, together = (rows / statistics.median(column) for column in zip(*times))
    return alone, together, statistics.median(first / second for first, second in times)


def figures(model: str, rows: int, rounds: int, batch_size: int, num_workers: int) -> Iterator[tuple[str, str]]:
    """Pairs of (what was measured, the figure)."""
    alone, together, share = rates(model, rows, rounds, batch_size, num_workers)
    dtype = dtype_of(PartialState().device)
    what = f"CLIP {model}, {dtype}, {rows} rows of an image and five captions, batches of {batch_size}"
    yield f"bare forward, {what}", f"{alone:,.1f} rows/s"
    yield f"add_teacher_features, {num_workers} workers", f"{together:,.1f} rows/s, {100 * share:.0f} % of it"


def measure(
    model: str = "ViT-B/16", rows: int = 64, rounds: int = 2, batch_size: int = 32, num_workers: int = 2
) -> list[Row]:
    """This program's row in the table of `python -m benchmarks`."""
    alone, together, share = rates(model, rows, rounds, batch_size, num_workers)
    bare = f"its bare forward: {alone:.1f} rows/s"
    return [Row(f"teacher features, CLIP {model}", f"{together:.1f} rows/s", bare, f"{share:.2f} x", "at least 0.9 x")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="ViT-B/16")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    options = parser.parse_args()
    for what, figure in figures(**vars(options)):
        print(f"{what}: {figure}")


if __name__ == "__main__":
    main()
