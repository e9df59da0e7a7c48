"""What the programs share: a row of the table, interleaved timings, one training step, and the machine's name."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from trainers import DSMDTrainer
from trainers.base_trainer import RetrievalTrainer
from trainers.timing import machine, seconds_of


@dataclass
class Row:
    """One claim of the table.

    Attributes:
        claim: what is measured.
        measured: median over the rounds.
        against: median of what it is compared with.
        ratio: median of the rounds' ratios.
        bar: what the ratio should be.
    """

    claim: str
    measured: str
    against: str
    ratio: str
    bar: str

    def __str__(self) -> str:
        return f"| {self.claim} | {self.measured} | {self.against} | {self.ratio} | {self.bar} |"


HEADER = "| claim | measured | against | ratio | bar |\n|---|---|---|---|---|"


def print_table(rows: Iterable[Row]) -> None:
    """Prints each row as soon as it is measured, and then the machine."""
    print(HEADER, flush=True)
    for row in rows:
        print(row, flush=True)
    print(f"\n{machine()}")


def measured(measure: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a program; called in the process that was spawned for it."""
    multiprocessing.set_start_method(None, force=True)  # fork loader workers again, as in train.py
    with contextlib.redirect_stdout(sys.stderr):  # so that stdout has the table alone
        return measure()


def interleaved(*sides: Callable[[], float], rounds: int, warm_up: int = 1) -> list[list[float]]:
    """Seconds of each side in each round; the sides take turns, so that a busy machine slows them alike.

    Args:
        sides: functions that run once and return the seconds that count.
        rounds: how many rounds are kept.
        warm_up: how many rounds before these are thrown away.

    Returns: for each side its `rounds` times.
    """
    times = [[side() for side in sides] for _ in range(warm_up + rounds)]
    return [list(column) for column in zip(*times[warm_up:])]


def ratio(first: list[float], second: list[float]) -> float:
    """The median, over the rounds, of first / second."""
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
    """A function that takes one step on a fixed batch and returns its seconds; without an optimiser it stops at the
    gradients."""

    def step() -> None:
        inputs = dict(batch)
        trainer.begin_step([inputs])
        trainer.compute_loss(trainer.model, inputs).backward()
        if optimizer is not None:
            optimizer.step()
        if isinstance(trainer, DSMDTrainer):
            trainer.end_step()
        trainer.model.zero_grad()

    trainer.model.train()
    return partial(seconds_of, step)


def fill_queues(trainer: RetrievalTrainer) -> None:
    """Fills the queues, as after many steps, with random teacher rows of groups that no batch has."""
    generator = torch.Generator().manual_seed(0)
    for queue in (trainer.image_queue, trainer.text_queue):
        features = torch.nn.functional.normalize(torch.randn(queue.size, queue.dim, generator=generator), dim=-1)
        queue.push(features, torch.arange(queue.size))
