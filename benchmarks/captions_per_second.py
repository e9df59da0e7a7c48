"""Captions/s in training with each image encoded once for its five captions, beside the published way.

python -m benchmarks.captions_per_second

Steps of the paper's student (ViT-B/16 at 224 and BERT-base, random weights and pixels, captions of some 12 words) with
four losses in all pairs, queues of 8,192 x 768, and the optimiser. The published way encodes an image again for each
of its captions, and pads captions to 30 tokens. The ratio of the two ways' FLOPs is the most that can be gained.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainers import DSMDTrainer
from trainers.losses import PAIRS

from .common import Row, collate, fill_queues, first_examples, interleaved, print_table, ratio, training_step
from .gpu.common import make_trainer


PUBLISHED_LENGTH = 30


def published_batch(trainer, examples: list[dict]) -> dict:
    """A batch of one (image, caption) pair per row, captions padded or cut to `PUBLISHED_LENGTH` tokens."""
    pairs = [
        {**example, "captions": [caption], "teacher_text": example["teacher_text"][i : i + 1]}
        for example in examples
        for i, caption in enumerate(example["captions"])
    ]
    batch = collate(trainer, pairs)
    padding = PUBLISHED_LENGTH - batch["input_ids"].shape[1]
    pad_id = trainer.processing_class.tokenizer.pad_token_id
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, padding), value=pad_id)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, padding))
    batch["text_buckets"] = [(len(pairs), PUBLISHED_LENGTH)]
    return batch


def padding_share(batch: dict) -> float:
    """The share of padding, 0 to 1, among the tokens that go through the text tower."""
    tokens = sum(rows * length for rows, length in batch["text_buckets"])
    return 1 - batch["attention_mask"].sum().item() / tokens


def flops(step: Callable[[], float]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def four_pair_trainer(folder: str, images: int, tiny: bool) -> DSMDTrainer:
    """A trainer of the paper's student in float32, with all losses and pairs, full queues, and `images` per batch."""
    settings = {"bf16": False, "contrastive_pairs": list(PAIRS), "per_device_train_batch_size": images}
    settings["queue_size"] = count = 64 if tiny else 8192
    trainer = make_trainer(folder, count, tiny, **settings)
    fill_queues(trainer)
    return trainer


def measure(images: int = 6, rounds: int = 2, tiny: bool = False) -> list[Row]:
    """The table's row.

    Args:
        images: images of a step, each with five captions.
        rounds: how often each side is timed.
        tiny: towers of width 32 and short queues, to try it.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = four_pair_trainer(folder, images, tiny)
        examples = first_examples(trainer, images)
        batches = [collate(trainer, examples), published_batch(trainer, examples)]
        optimizer = trainer.create_optimizer()
        ours, published = (training_step(trainer, batch, optimizer) for batch in batches)
        ours()  # the first step also sets the balancer
        ceiling = flops(published) / flops(ours)  # these steps also warm up
        captions = len(batches[0]["input_ids"])
        times = interleaved(ours, published, rounds=rounds, warm_up=0)
    here, there = (f"{captions / statistics.median(column):.2f} captions/s" for column in times)
    padding = " and ".join(f"{100 * padding_share(batch):.0f} %" for batch in batches)
    return [
        Row(
            f"training, ViT-B/16 and BERT-base, {images} images with {captions} captions; padding {padding}",
            here,
            f"an image for each caption, padded to {PUBLISHED_LENGTH}: {there}",
            f"{ratio(times[1], times[0]):.2f} x (FLOPs: {ceiling:.2f} x)",
            "at least 3.6 x",
        )
    ]


if __name__ == "__main__":
    print_table(measure())
