"""What the programs share: a row of the table, interleaved runs, one training step, the machine."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from trainers import DSMDTrainer
from trainers.base_trainer import RetrievalTrainer


@dataclass
class Row:
    """One claim of the table: medians of both sides, and the median of the rounds' ratios beside its bar."""

    claim: str
    measured: str
    against: str
    ratio: str
    bar: str

    def __str__(self) -> str:
        return f"| {self.claim} | {self.measured} | {self.against} | {self.ratio} | {self.bar} |"


HEADER = "| claim | measured | against | ratio | bar |\n|---|---|---|---|---|"


def print_table(rows: Iterable[Row]) -> None:
    """Each row is printed when it is there."""
    print(HEADER, flush=True)
    for row in rows:
        print(row, flush=True)
    print(f"\n{machine()}")


def measured(measure: Callable[[], list[Row]]) -> list[Row]:
    """A program's rows, in the process that was spawned for it."""
    multiprocessing.set_start_method(None, force=True)  # loader workers are forked again, as in train.py
    with contextlib.redirect_stdout(sys.stderr):  # the table's lines stay together
        return measure()


def machine() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores of {name}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def interleaved(*sides: Callable[[], float], rounds: int, warm_up: int = 1) -> list[list[float]]:
    """Seconds of each side in each round; the sides take turns, so that a busy machine slows them alike.

    Args:
        sides: each runs once and returns the seconds that count.
        rounds: that are kept.
        warm_up: rounds before them that are not.
    """
    times = [[side() for side in sides] for _ in range(warm_up + rounds)]
    return [list(column) for column in zip(*times[warm_up:])]


def ratio(first: list[float], second: list[float]) -> float:
    """The median over the rounds of first / second."""
    return statistics.median(a / b for a, b in zip(first, second))


def first_examples(trainer: RetrievalTrainer, images: int) -> list[dict]:
    return trainer.train_dataset.__getitems__(list(range(images)))


def collate(trainer: RetrievalTrainer, examples: list[dict]) -> dict:
    """A batch as `begin_step` gets it."""
    batch = trainer.data_collator(examples)
    batch.pop("unreadable")
    return batch


def training_step(
    trainer: RetrievalTrainer, batch: dict, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], float]:
    """A function that takes one step on a fixed batch and returns its seconds; without an optimiser, its gradient."""

    def step() -> float:
        started = time.perf_counter()
        inputs = dict(batch)
        trainer.begin_step([inputs])
        trainer.compute_loss(trainer.model, inputs).backward()
        if optimizer is not None:
            optimizer.step()
        if isinstance(trainer, DSMDTrainer):
            trainer.end_step()
        trainer.model.zero_grad()
        return time.perf_counter() - started

    trainer.model.train()
    return step


def fill_queues(trainer: RetrievalTrainer) -> None:
    """As after many steps: random teacher rows of groups that no batch has."""
    generator = torch.Generator().manual_seed(0)
    for queue in (trainer.image_queue, trainer.text_queue):
        features = torch.nn.functional.normalize(torch.randn(queue.size, queue.dim, generator=generator), dim=-1)
        queue.push(features, torch.arange(queue.size))
