"""Captions/s in training the paper's student on one GPU, eager and compiled, and the time of each part of a step.

python -m benchmarks.gpu.training

A step is the trainer's: forward under bf16 autocast, four losses in all pairs, backward, clipping, fused AdamW,
balancer, queues of 8,192 x 768. The batch size doubles until the memory is exhausted; batches are on the device before
the clock starts.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from trainers import DSMDTrainer
from trainers.losses import PAIRS

from .common import CAPTIONS, Clock, device_name, make_trainer, parser, print_table


DENSE_BF16_PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # FLOP/s, of the data sheets
BATCHES = 3  # different batches, so that the lengths of captions vary as in training
PARTS = ("teacher rows and queues", "forward", "losses", "backward and optimiser", "balancer")
OUTSIDE = ("teacher rows and queues", "losses", "balancer")


@dataclass
class Speed:
    """The speed at one batch size.

    Attributes:
        images: images per batch.
        seconds: seconds per step.
        memory: most bytes of device memory held; 0 on a CPU.
        graphs: graphs that were compiled while the clock ran.
    """

    images: int
    seconds: float
    memory: int
    graphs: int


def make_batches(trainer: DSMDTrainer, images: int) -> list[dict]:
    """`BATCHES` batches of so many images each, as the trainer gets them from its loader, on the device."""
    batches = []
    for start in range(0, BATCHES * images, images):
        examples = trainer.train_dataset.__getitems__(list(range(start, start + images)))
        batch = trainer.data_collator(examples)
        batch.pop("unreadable")
        batches.append(send_to_device(batch, trainer.args.device))
    return batches


def prepare(trainer: DSMDTrainer) -> nn.Module:
    """The model as Trainer wraps it for training: under autocast, compiled where the settings say so."""
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    return model


def optimise(trainer: DSMDTrainer, model: nn.Module) -> None:
    trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    model.zero_grad()


def step(trainer: DSMDTrainer, model: nn.Module, batch: dict) -> None:
    """One optimiser step as Trainer takes it."""
    batch = dict(batch)
    trainer.begin_step([batch])
    trainer.training_step(model, batch)
    optimise(trainer, model)
    trainer.end_step()


def warmed_up(trainer: DSMDTrainer, model: nn.Module, images: int) -> list[dict]:
    """Batches of so many images, after two steps on each."""
    batches = make_batches(trainer, images)
    for batch in 2 * batches:
        step(trainer, model, batch)
    return batches


def measure(trainer: DSMDTrainer, model: nn.Module, images: int, steps: int) -> Speed:
    """Speed over `steps` steps of batches of so many images.

    Raises: torch.cuda.OutOfMemoryError.
    """
    torch._dynamo.reset()  # so that no graph of another batch size is used
    batches = warmed_up(trainer, model, images)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    graphs = counters["stats"]["unique_graphs"]
    clock = Clock()
    clock.mark()
    for i in range(steps):
        step(trainer, model, batches[i % BATCHES])
    clock.mark()
    (seconds,) = clock.seconds()
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Speed(images, seconds / steps, memory, counters["stats"]["unique_graphs"] - graphs)


def double(trainer: DSMDTrainer, model: nn.Module, start: int, steps: int) -> list[Speed]:
    """Speeds with start, 2 start, 4 start, ... images per batch, until memory or data do not suffice."""
    speeds, images = [], start
    while BATCHES * images <= len(trainer.train_dataset):
        try:
            speeds.append(measure(trainer, model, images, steps))
        except torch.cuda.OutOfMemoryError:
            break
        images *= 2
    # Free what the failed step left behind.
    model.zero_grad()
    trainer.step_so_far = None
    gc.collect()
    torch.cuda.empty_cache()
    if not speeds:
        raise ValueError(f"--start {start}: {BATCHES} batches of so many images exceed the memory or the data.")
    return speeds


def parts(trainer: DSMDTrainer, model: nn.Module, batches: list[dict], steps: int) -> dict[str, float]:
    """Seconds per step of each of `PARTS`; to tell them apart, the autograd graph is cut at the embeddings."""
    clock, sums = Clock(), dict.fromkeys(PARTS, 0.0)
    for i in range(steps):
        batch = dict(batches[i % len(batches)])
        clock.mark()
        trainer.begin_step([batch])
        clock.mark()
        with trainer.compute_loss_context_manager():
            embeds = trainer.embed(model, batch)
            clock.mark()
            leaves = tuple(rows.detach().requires_grad_() for rows in embeds)
            with mock.patch.object(trainer, "embed", lambda model, batch, leaves=leaves: leaves):
                loss = trainer.compute_loss(model, batch)
        loss.backward()
        clock.mark()
        torch.autograd.backward(embeds, [leaf.grad for leaf in leaves])
        optimise(trainer, model)
        clock.mark()
        trainer.end_step()
        clock.mark()
        for name, seconds in zip(PARTS, clock.seconds()):
            sums[name] += seconds / steps
    return sums


def student_flops(trainer: DSMDTrainer, model: nn.Module, batch: dict) -> int:
    """FLOPs of the student's forward and backward on a batch, padding included; the model must be eager."""
    with FlopCounterMode(display=False) as counter:
        with trainer.compute_loss_context_manager():
            embeds = trainer.embed(model, batch)
        torch.autograd.backward(embeds, [torch.ones_like(rows) for rows in embeds])
    model.zero_grad()
    return counter.get_total_flops()


def synchronisations(run: Callable[[], None]) -> list[str]:
    """File and line of each time that the host waits for the GPU while `run` runs."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    return [f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}" for warning in waits]


def mode_figures(mode: str, tiny: bool, start: int, steps: int) -> Generator[tuple[str, str], None, int]:
    """Yields the table's rows of one mode.

    Args:
        mode: "eager" or "compiled".
        tiny: small towers and few rows.
        start: images of the smallest batch.
        steps: steps timed for each batch size.

    Returns: the number of images of the fastest batch.
    """
    settings = {"contrastive_pairs": list(PAIRS), "torch_compile": mode == "compiled"}
    if tiny and mode == "compiled":
        settings["torch_compile_backend"] = "eager"  # the same graphs, without minutes of a C++ compiler
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, 48 if tiny else 8192, tiny, **settings)
        model = prepare(trainer)
        speeds = double(trainer, model, start, steps)
        for speed in speeds:
            yield f"{mode}, {speed.images} images a step", f"{CAPTIONS * speed.images / speed.seconds:,.0f} captions/s"
        best = min(speeds, key=lambda speed: speed.seconds / speed.images)
        yield f"{mode}, best batch", f"{best.images} images, {CAPTIONS * best.images} captions"
        yield f"{mode}, captions/s", f"{CAPTIONS * best.images / best.seconds:,.0f}"
        yield f"{mode}, images/s", f"{best.images / best.seconds:,.0f}"
        if mode == "compiled":
            yield "compiled, graphs compiled while the clock ran", str(best.graphs)

        batches = warmed_up(trainer, model, best.images)
        seconds = parts(trainer, model, batches, steps)
        for name in PARTS:
            yield f"{mode}, {name}", f"{1000 * seconds[name]:.2f} ms"
        share = sum(seconds[name] for name in OUTSIDE) / sum(seconds.values())
        yield f"{mode}, share of the step outside the student", f"{100 * share:.1f} %"
        flops_per_image = student_flops(trainer, trainer.model, batches[0]) / best.images  # the model itself is eager
        yield f"{mode}, forward and backward", f"{flops_per_image / 1e9:,.3g} GFLOP an image with its captions"
        if torch.cuda.is_available():
            yield f"{mode}, peak memory", f"{best.memory / 2**30:.1f} GiB"
            peak = DENSE_BF16_PEAK.get(device_name())
            if peak is not None:
                share = flops_per_image * best.images / best.seconds / peak
                yield f"{mode}, model FLOP utilisation", f"{100 * share:.1f} % of {peak / 1e12:.0f} TFLOP/s"
            waits = synchronisations(lambda: step(trainer, model, batches[0]))
            yield f"{mode}, host synchronisations in a step", f"{len(waits)} {' '.join(sorted(set(waits)))}".strip()
        return best.images


def free_memory() -> None:
    gc.collect()  # trainer and callbacks refer to each other, and hold device memory
    torch.cuda.empty_cache()


def figures(tiny: bool, start: int, steps: int) -> Iterator[tuple[str, str]]:
    """Rows of the table; the compiled model's smallest batch is the eager one's fastest."""
    for mode in ("eager", "compiled"):
        start = yield from mode_figures(mode, tiny, start, steps)
        free_memory()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--start", type=int, help="images of the smallest batch (default: 32)")
    options.add_argument("--steps", type=int, help="steps timed for each batch size (default: 20)")
    options = options.parse_args()
    start, steps = (8, 2) if options.tiny else (32, 20)
    print_table(figures(options.tiny, options.start or start, options.steps or steps))


if __name__ == "__main__":
    main()
