"""A real training, `trainer.train()` with its loader and all that it does in a step, timed over ragged batches."""

from __future__ import annotations

import contextlib
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate.utils import send_to_device
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from trainers import DSMDTrainer

from .common import device_name
from .training import DENSE_BF16_PEAK, student_flops


WARM_UP, WATCHED = 10, 5  # steps before the clock runs, and steps after it whose waits for the device are listed
FLOP_BATCHES = 3


@dataclass
class Timed:
    """What the steps under the clock were.

    Attributes:
        steps, images, captions: how many.
        seconds: they took, the waiting for batches in them.
        waited: seconds of these in which the loader was waited for.
        graphs: graphs that `torch.compile` had made when the clock began, and that it made while it ran.
        memory: most bytes held: of the device's memory, or on a CPU of the process's.
        host_waits: file and line of each time that the host waited for the GPU in `WATCHED` steps.
    """

    steps: int = 0
    images: int = 0
    captions: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    graphs: tuple[int, int] = (0, 0)
    memory: int = 0
    host_waits: list[str] = field(default_factory=list)


class Watch(TrainerCallback):
    """Times a training from the end of one step to the end of a later one.

    Args:
        trainer: its loader and its steps are watched.
        warm_up: steps before the clock runs.
        steps: steps while it runs; `WATCHED` more follow.
    """

    def __init__(self, trainer: DSMDTrainer, warm_up: int, steps: int):
        self.trainer = trainer
        self.first, self.last = warm_up, warm_up + steps
        self.timed = Timed()
        self.caught: list = []
        self.watching = contextlib.ExitStack()
        self.fetch = trainer.get_batch_samples
        trainer.get_batch_samples = self.timed_fetch

    def timed_fetch(self, batches: Iterator, *args):
        """As the trainer's own, which takes a step's batches; only the loader's share of it is counted."""

        def waited_for() -> Iterator:
            while True:
                started = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                if self.first <= self.trainer.state.global_step < self.last:
                    self.timed.waited += time.perf_counter() - started
                yield batch

        return self.fetch(waited_for(), *args)

    def on_step_end(self, args, state, control, **kwargs):
        timed, step = self.timed, state.global_step
        if step == self.first:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            timed.graphs = (counters["stats"]["unique_graphs"], 0)
            self.started = time.perf_counter()
        elif self.first < step <= self.last:
            timed.steps += 1
            timed.images += self.trainer.num_images
            timed.captions += self.trainer.num_captions
        if step == self.last:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            timed.seconds = time.perf_counter() - self.started
            timed.graphs = (timed.graphs[0], counters["stats"]["unique_graphs"] - timed.graphs[0])
            timed.memory = most_memory()
            if torch.cuda.is_available():
                self.caught = self.watching.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self.watching.callback(torch.cuda.set_sync_debug_mode, "default")
        if step == self.last + WATCHED:
            self.watching.close()
            waits = [warning for warning in self.caught if "called a synchronizing" in str(warning.message)]
            timed.host_waits = [f"{'/'.join(of.filename.split('/')[-2:])}:{of.lineno}" for of in waits]

    def on_train_end(self, args, state, control, **kwargs):
        self.watching.close()


def most_memory() -> int:
    """Most bytes that were held: of the device's memory, on a CPU of the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_training(trainer: DSMDTrainer, warm_up: int, steps: int) -> Timed:
    """Trains `warm_up + steps + WATCHED` steps, for which `max_steps` must be set, and times the middle ones."""
    watch = Watch(trainer, warm_up, steps)
    trainer.add_callback(watch)
    trainer.train()
    trainer.remove_callback(watch)
    trainer.get_batch_samples = watch.fetch
    if not watch.timed.seconds:
        raise ValueError(f"max_steps={trainer.args.max_steps} is less than {warm_up + steps + WATCHED}")
    return watch.timed


def flops_of_an_image(trainer: DSMDTrainer) -> float:
    """FLOPs of the student's forward and backward for an image with its captions, of which a tenth at most is padding,
    as a mean over some batches; a CPU's buckets are taken, so that padding does not count as work."""
    own, trainer.data_collator.most_buckets = trainer.data_collator.most_buckets, 32
    images, flops = trainer.args.train_batch_size, 0
    for start in range(0, FLOP_BATCHES * images, images):
        rows = [row % len(trainer.train_dataset) for row in range(start, start + images)]
        batch = trainer.data_collator(trainer.train_dataset.__getitems__(rows))
        flops += student_flops(trainer, trainer.model, send_to_device(batch, trainer.args.device))
    trainer.data_collator.most_buckets = own
    trainer.nonfinite.rows.clear()
    return flops / (FLOP_BATCHES * images)


def figures(name: str, trainer: DSMDTrainer, warm_up: int, steps: int) -> Iterator[tuple[str, str]]:
    """Rows of the table.

    Args:
        name: what is trained.
        trainer: its `max_steps` is `warm_up + steps + WATCHED`.
        warm_up, steps: see [`time_training`].
    """
    args = trainer.args
    timed = time_training(trainer, warm_up, steps)
    images = timed.images / timed.seconds
    what = f"{args.train_batch_size} images a step, {args.dataloader_num_workers} loader workers"
    yield f"{name}, captions/s in `trainer.train()`", f"{timed.captions / timed.seconds:,.0f} ({what})"
    yield f"{name}, images/s", f"{images:,.0f}"
    yield f"{name}, a step", f"{1000 * timed.seconds / timed.steps:.1f} ms, mean of {timed.steps}"
    yield f"{name}, of it the loader was waited for", f"{100 * timed.waited / timed.seconds:.1f} %"
    flops = flops_of_an_image(trainer)
    peak = DENSE_BF16_PEAK.get(device_name())
    share = "" if peak is None else f", {100 * flops * images / peak:.1f} % of {peak / 1e12:.0f} TFLOP/s (MFU)"
    yield f"{name}, student's FLOP/s", f"{flops * images / 1e12:.3g} TFLOP/s{share}"
    if torch.cuda.is_available():
        places = ", ".join(sorted(set(timed.host_waits)))
        yield f"{name}, host waits a step", f"{len(timed.host_waits) / WATCHED:.1f} {places}".strip()
    if args.torch_compile:
        limit = torch._dynamo.config.recompile_limit
        of_all = f"{sum(timed.graphs)}, {timed.graphs[1]} of them while the clock ran (torch's limit: {limit})"
        yield f"{name}, compiled graphs", of_all
    whose = "of the device" if torch.cuda.is_available() else "of the process"
    yield f"{name}, peak memory {whose}", f"{timed.memory / 2**30:.2f} GiB"
