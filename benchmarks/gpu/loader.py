"""Images/s that the training loader delivers on this machine's CPU cores, beside those that a step consumes.

python -m benchmarks.gpu.loader

Stored images of 256 x 256 pixels are decoded, shifted, zoomed and resized to the student's size, their captions
tokenised. The batches are copied to the device; nothing trains meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator

import torch

from trainers import DSMDTrainer
from trainers.run.distributed import usable_cores

from .common import make_trainer, parser, print_table
from .training import measure, prepare


def loader_rate(trainer: DSMDTrainer, num_workers: int) -> float:
    """Images/s of one pass, without the first batches, which the workers may make before they are asked for."""
    trainer.args.dataloader_num_workers = num_workers
    ahead = 1 + 2 * num_workers
    images = 0
    for i, batch in enumerate(trainer.get_train_dataloader()):
        if i >= ahead:
            images += len(batch["image_groups"])
        elif i == ahead - 1:
            started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the last batch has arrived
    if not images:
        raise ValueError(f"{num_workers} workers make all the batches before the clock starts: take more rows.")
    return images / (time.perf_counter() - started)


def figures(tiny: bool, images: int, workers: list[int]) -> Iterator[tuple[str, str]]:
    """Rows of the table: the eager step with `images` per batch, then the loader with each number of workers."""
    settings = {"per_device_train_batch_size": images, "random_shift": 0.05, "random_zoom": 0.1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, 128 if tiny else 16384, tiny, **settings)
        step_rate = images / measure(trainer, prepare(trainer), images, steps=2 if tiny else 20).seconds
        yield f"step, {images} images", f"{step_rate:,.0f} images/s"
        for num_workers in workers:
            rate = loader_rate(trainer, num_workers)
            text = f"{rate:,.0f} images/s, {rate / step_rate:.2f} x the step"
            yield f"loader, {num_workers} workers, {images} images", text


def default_workers() -> list[int]:
    """Half of this machine's cores, and all of them."""
    cores = usable_cores()
    return sorted({max(1, cores // 2), cores})


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, help="images per batch (default: 128)")
    options.add_argument("--workers", type=int, nargs="+", default=default_workers())
    options = options.parse_args()
    print_table(figures(options.tiny, options.images or (8 if options.tiny else 128), options.workers))


if __name__ == "__main__":
    main()
