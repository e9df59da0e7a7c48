"""How many images/s a run's loader must give, and how many one of its workers gives, measured before training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device

from .base_trainer import RetrievalTrainer
from .batches import RetrievalDataset
from .pixel_bytes import with_pixel_numbers
from .timing import seconds_of


FORWARDS = 3  # a step costs: a forward, and a backward of two


@dataclass(frozen=True)
class LoaderSpeed:
    """What is asked of the loader.

    Attributes:
        asked: images/s that a process trains on, where it never waits.
        by_worker: images/s that one worker decodes, augments and tokenises the captions of.
    """

    asked: float
    by_worker: float

    @property
    def workers(self) -> int:
        """How many workers a process needs."""
        return max(1, math.ceil(self.asked / self.by_worker))


@torch.no_grad()
def measure(trainer: RetrievalTrainer) -> LoaderSpeed | None:
    """Measures on a few rows of the training split, at even distances; weights and random numbers stay as they are.

    Returns:
        None for a stream, whose rows would be taken from it, where a frozen tower leaves no image to load, and where
        there is no image among these rows or none that can be read: training leaves such images out.
    """
    rows, model, args = trainer.train_dataset, trainer.model, trainer.args
    if not isinstance(rows, RetrievalDataset) or (
        args.freeze == "vision" and not (args.random_shift + args.random_zoom)
    ):
        return None
    few = min(32 if args.device.type == "cuda" else 4, len(rows))
    chosen = [(2 * i + 1) * len(rows) // (2 * few) for i in range(few)]
    made = []

    def make() -> None:
        made.append(trainer.data_collator(rows.__getitems__(chosen)))

    try:
        seconds = min(seconds_of(make) for _ in range(2))  # the first one opens files
    except ValueError:
        return None
    batch = with_pixel_numbers(send_to_device(made[-1], args.device), trainer.pixel_table)
    images = len(batch["image_groups"])
    if not images:
        return None
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in batch}
    was_training = model.training
    model.eval()
    with trainer.compute_loss_context_manager():
        forward = min(seconds_of(lambda: model(**inputs)) for _ in range(2))
    model.train(was_training)
    return LoaderSpeed(asked=images / (FORWARDS * forward), by_worker=images / seconds)


def describe(speed: LoaderSpeed, workers: int, processes: int) -> str:
    """A sentence on what a run asks of its loader, and what to set where it has too few workers.

    Args:
        speed: of one process.
        workers: of each process, as they are set.
        processes: of the run.
    """
    rank = "" if processes == 1 else " in each process"
    text = (
        f"Loader: about {speed.asked:,.0f} images/s are asked for{rank} (a step as long as {FORWARDS} forwards); "
        f"a worker makes {speed.by_worker:,.0f}."
    )
    if workers and workers < speed.workers:
        text += f" {workers} of them will be waited for: --dataloader_num_workers {speed.workers} would keep up."
    return text
