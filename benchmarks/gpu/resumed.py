"""A run that is stopped and resumed, beside the unbroken one: how far apart they are, and what saving costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback

from .common import make_trainer


class FirstStep(TrainerCallback):
    """Notes when the first step of a training has ended, and the seconds of the longest save."""

    def __init__(self):
        self.at: float | None = None
        self.saving = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.at = self.at or time.perf_counter()
        self.ended = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.saving = max(self.saving, time.perf_counter() - self.ended)


def largest_difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    """Over all weights of two models of one kind."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


def figures(tiny: bool, images: int, steps: int) -> Iterator[tuple[str, str]]:
    """Rows of the table: the paper's student is trained for `steps` steps, and again from the checkpoint half-way.

    Args:
        tiny: small towers.
        images: of a batch.
        steps: an even number.
    """
    settings = {
        "per_device_train_batch_size": images, "max_steps": steps, "save_strategy": "steps", "save_steps": steps // 2,
        "dataloader_num_workers": 1, "random_shift": 0.05, "random_zoom": 0.1, "logging_steps": steps,
        "disable_tqdm": True,
    }  # fmt: skip
    count = max(images * steps, 64)
    with tempfile.TemporaryDirectory() as folder:
        unbroken = make_trainer(folder, count, tiny, **settings)
        watch = FirstStep()
        unbroken.add_callback(watch)
        unbroken.train()
        checkpoint = Path(folder) / f"checkpoint-{steps // 2}"
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        resumed = make_trainer(folder, count, tiny, **settings)
        first = FirstStep()
        resumed.add_callback(first)
        started = time.perf_counter()
        resumed.train(resume_from_checkpoint=str(checkpoint))
        name = f"resumed after {steps // 2} of {steps} steps of {images} images"
        difference = largest_difference(unbroken.model, resumed.model)
        yield f"{name}, largest difference of a weight", "0 (bit for bit)" if not difference else f"{difference:.2g}"
        yield f"{name}, until its first step has ended", f"{first.at - started:.1f} s"
        yield "a checkpoint, written", f"{watch.saving:.1f} s, {size / 2**20:,.0f} MiB"
