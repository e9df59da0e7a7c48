"""Training with cached teacher features beside training with the teacher online, and when the cache has paid off.

python -m benchmarks.cached_teacher

The paper's student under a CLIP ViT-L/14, both with random weights, from stored rows: a step includes decoding,
tokenising and the optimiser. Online, the teacher embeds every image and caption again in every epoch; the cache costs
one pass of `add_teacher_features`. It has paid off after (seconds a row to make it) / (seconds a row that the teacher
online adds to an epoch) epochs; every further epoch is gain.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial

import datasets
import torch

from datasets_scripts.feature_shards import Encoding
from trainers.timing import seconds_of

from .common import Row, collate, fill_queues, first_examples, interleaved, print_table, training_step
from .gpu.common import make_rows, make_trainer
from .teacher_features import make_teacher, whole


def measure(images: int = 4, rounds: int = 2, tiny: bool = False) -> list[Row]:
    """Two rows of the table.

    Args:
        images: images of a step, each with five captions.
        rounds: how often each side is timed.
        tiny: small towers and short queues, to try it.
    """
    name = "tiny" if tiny else "ViT-L/14"
    teacher = make_teacher(name, torch.device("cpu"), torch.float32)
    count = 64 if tiny else 8192
    with tempfile.TemporaryDirectory() as folder:
        settings = {"bf16": False, "per_device_train_batch_size": images, "queue_size": count}
        trainer = make_trainer(folder, count, tiny, **settings)
        fill_queues(trainer)
        optimizer = trainer.create_optimizer()
        rows = datasets.DatasetDict({"train": make_rows(images, trainer.model.config.projection_dim)})

        def cached() -> None:
            training_step(trainer, collate(trainer, first_examples(trainer, images)), optimizer)()

        def online() -> None:
            examples = first_examples(trainer, images)
            image = teacher.image_features(teacher.prepare_images([example["image"] for example in examples]))
            captions = [caption for example in examples for caption in example["captions"]]
            text = teacher.text_features(teacher.prepare_texts(captions))
            texts = text.split([len(example["captions"]) for example in examples])
            for example, row, of_captions in zip(examples, image, texts):
                example |= {"teacher_image": row.numpy(), "teacher_text": of_captions.numpy()}
            training_step(trainer, collate(trainer, examples), optimizer)()

        sides = partial(seconds_of, cached), partial(seconds_of, online), partial(whole, teacher, rows, Encoding(), 0)
        with_cache, with_teacher, to_make = interleaved(*sides, rounds=rounds)
        captions = sum(len(example["captions"]) for example in first_examples(trainer, images))
    faster = statistics.median(slow / fast for slow, fast in zip(with_teacher, with_cache))
    epochs = statistics.median(once / (slow - fast) for once, slow, fast in zip(to_make, with_teacher, with_cache))
    adds = statistics.median(slow - fast for slow, fast in zip(with_teacher, with_cache))
    here, there = (f"{captions / statistics.median(column):.2f} captions/s" for column in (with_cache, with_teacher))
    return [
        Row("training with cached features", here, f"CLIP {name} online: {there}", f"{faster:.2f} x", "-"),
        Row(
            "making the cache",
            f"{statistics.median(to_make) / images:.2f} s a row",
            f"an epoch's teacher online: {adds / images:.2f} s a row",
            f"paid after {epochs:.2f} epochs",
            "at most 1.2 epochs",
        ),
    ]


if __name__ == "__main__":
    print_table(measure())
