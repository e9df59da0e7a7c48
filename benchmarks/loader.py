"""Whether the data loader keeps up with the quickstart's training step.

python -m benchmarks.loader [--dataloader_num_workers 1 ...]

Takes steps of the quickstart from its own loader, with the recipe's settings and any options of `train.py` that are
given. Measured are the share of the time in which the step waits for a batch to be decoded, augmented and tokenised,
and the time of an epoch beside that of an epoch without loader workers.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time

import torch

from train import prepare
from trainers.base_trainer import RetrievalTrainer

from .common import Row, print_table, ratio, training_step


RECIPE = ["--config", "recipes/icons.yaml", "--report_to", "none"]


def one_pass(trainer: RetrievalTrainer, optimizer: torch.optim.Optimizer, steps: int) -> tuple[float, float]:
    """Seconds of `steps` steps after the first, and how many of these seconds the steps waited for their batches."""
    loader = trainer.get_train_dataloader()
    if len(loader) <= steps:
        raise ValueError(f"an epoch has {len(loader)} batches, expected more than {steps}: take smaller batches")
    batches = iter(loader)
    next(batches)  # not timed: the workers start
    waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        batch.pop("unreadable")
        training_step(trainer, batch, optimizer)()
    seconds = time.perf_counter() - started
    del batches, loader
    trainer.accelerator.free_memory()  # or it keeps the loader, whose workers would slow the next pass
    return seconds, waited


def measure(settings: list[str] | None = None, steps: int = 20, rounds: int = 3) -> list[Row]:
    """Two rows of the table.

    Args:
        settings: command line of `train.py`; the recipe's by default.
        steps: how many steps a pass times.
        rounds: how many passes of each kind are kept.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in train.py
    with tempfile.TemporaryDirectory() as folder:
        trainer, *_ = prepare([*(settings or RECIPE), "--output_dir", folder])
        optimizer = trainer.create_optimizer()
        args = trainer.args
        names = ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers")
        recipe = {name: getattr(args, name) for name in names}
        within = dict(zip(names, (0, None, False)))

        def run(values: dict) -> tuple[float, float]:
            for name, value in values.items():
                setattr(args, name, value)
            return one_pass(trainer, optimizer, steps)

        passes = [(run(recipe), run(within)) for _ in range(1 + rounds)][1:]
    ahead, in_step = ([times[side][0] for times in passes] for side in (0, 1))
    waits = [times[0][1] for times in passes]
    share, alone = statistics.median(waits) / steps, statistics.median(ahead) / steps
    workers = f"{recipe['dataloader_num_workers']} loader workers"
    epoch = len(trainer.get_train_dataloader())
    return [
        Row(
            f"the quickstart's step waits for a batch, {workers}",
            f"{1000 * share:.1f} ms",
            f"the step with its wait: {1000 * alone:.0f} ms",
            f"{100 * ratio(waits, ahead):.1f} %",
            "under 5 %",
        ),
        Row(
            f"an epoch of the quickstart, {workers}",
            f"{epoch * alone:.1f} s",
            f"0 workers: {epoch * statistics.median(in_step) / steps:.1f} s",
            f"{ratio(ahead, in_step):.2f} x",
            "-",
        ),
    ]


if __name__ == "__main__":
    print_table(measure([*RECIPE, *sys.argv[1:]]))
